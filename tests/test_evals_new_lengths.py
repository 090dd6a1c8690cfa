import json

from transformers import LlamaConfig

from evals.benchmarks import new_lengths
from evals.benchmarks.commands import new_lengths as command


def test_new_lengths_are_timed_beside_known_ones(tmp_path, capsys):
    out = tmp_path / "lengths.jsonl"
    size = ["--shape", "toy", "--device", "cpu", "--length", "64", "--length", "96", "--longest", "3"]
    command.app([*size, "--out", str(out)], standalone_mode=False)
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert [(row["method"], row["length"]) for row in found["prompts"]] == [
        (method, length) for length in (64, 96) for method in new_lengths.METHODS
    ]
    assert all(row["new_s"] > 0 and row["s"] > 0 for row in found["prompts"])
    assert [row["method"] for row in found["questions"]] == list(new_lengths.METHODS)


def test_uneven_layers_have_every_number_of_global_heads():
    plan = new_lengths.uneven(LlamaConfig(num_hidden_layers=9, num_key_value_heads=8, num_attention_heads=8))
    assert {sum(head.is_global for head in layer) for layer in plan} == set(range(9))
