"""Items of the real model's frontier, the plans that are compared on them, and what their figures amount to."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import make_model
from pages import typed
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from evals.real import contenders as compared
from evals.real import frontier, peers
from evals.real.__main__ import app
from evals.real.contenders import contenders, dealt, part, share
from evals.real.frontier import asked
from evals.real.items import TASKS, Item, items
from evals.real.summary import summarize, table
from evals.real.texts import docstrings
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import HeadProfile, fisher, profile_heads, python_texts


@pytest.fixture(scope="module")
def some(byte_tokenizer):
    return list(items(byte_tokenizer, python_texts()[0][:60_000], 9000, 2))


def test_items_are_as_long_as_asked_and_ask_what_they_say(some, byte_tokenizer):
    for item in some:
        assert len(item.ids) == 9000
        assert {task: len(answers) for task, answers in item.answers.items()} == {
            "numbers": 10, "words": 14, "codes": 10, "copied": 88, "text": 256,
        }  # fmt: skip
        whole = byte_tokenizer.decode(item.ids)
        for task, before in (("numbers", ":"), ("words", '"'), ("codes", " =")):
            for answer in item.answers[task]:
                said = byte_tokenizer.decode([item.ids[place] for place in answer])
                asked_for = byte_tokenizer.decode(item.ids[answer[0] - 80 : answer[0]]).splitlines()[-1]
                assert asked_for.endswith(before)
                assert whole.count(f"\n{asked_for}{said}") == 2, "where it is said, and where it is asked for"
        copied = [place for (place,) in item.answers["copied"]]
        passage = byte_tokenizer.decode([item.ids[place] for place in copied])
        assert passage in byte_tokenizer.decode(item.ids[: copied[0]])
    assert some[0].ids != some[1].ids


def test_the_same_arguments_ask_the_same(some, byte_tokenizer):
    again = list(items(byte_tokenizer, python_texts()[0][:60_000], 9000, 1))
    assert again[0] == some[0]
    with pytest.raises(ValueError, match="length is 900: an item of this tokenizer needs"):
        next(items(byte_tokenizer, python_texts()[0][:60_000], 900, 1))
    with pytest.raises(ValueError, match="the text has 100 tokens"):
        next(items(byte_tokenizer, "x" * 100, 9000, 1))


def test_calibration_and_evaluation_share_no_text():
    said, calibrated = docstrings(), python_texts()[0]
    assert len(said) > 800_000
    lines = {line.strip() for line in said.splitlines() if len(line) > 60}
    assert len(lines & {line.strip() for line in calibrated.splitlines()}) <= 0.001 * len(lines)


@pytest.fixture(scope="module")
def measured():
    model = make_model("llama")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(1, 97, (4, 300), generator=generator)
    options = {"windows": (8, 64), "storages": ("int8", "int4")}
    return model, profile_heads(model, inputs, **options)


def test_contenders_keep_what_they_say(measured):
    model, drift = measured
    profiles = {"drift": drift, "windows only": part(drift, windows=True, storages=False)}
    found = list(contenders(model.config, 300, profiles))
    assert {one.method for one in found} == {
        "drift", "windows only", "streaming", "random 0", "random 1", "random 2", "int4 everywhere", "int8 everywhere",
    }  # fmt: skip
    for one in found:
        if one.method in profiles:
            assert one.kept <= one.budget
        assert one.kept == pytest.approx(share(drift, one.plan, 300))
    assert not any(
        spec.storage != "model" for one in found if one.method == "windows only" for x in one.plan for spec in x
    )
    plan = drift.plan(budget=0.4)
    assert sorted(map(str, sum(dealt(plan, 1), ()))) == sorted(map(str, sum(plan, ())))
    assert dealt(plan, 1) != plan


def test_all_global_is_dense_and_figures_are_paired(measured, tmp_path):
    model, drift = measured
    generator = torch.Generator().manual_seed(1)
    plans = [
        compared.Contender("drift", 0.3, 0.3, drift.plan(budget=0.3)),
        compared.Contender("all", 0.3, 1.0, HeadPlan.uniform(model.config, HeadSpec())),
    ]
    lines = [json.dumps({"length": 300, "texts": "", "hardware": {"device": "none"}})]
    for index in range(6):
        item = Item(torch.randint(1, 97, (300,), generator=generator).tolist())
        item.answers = {task: [[100 + 20 * i, 101 + 20 * i], [110 + 20 * i]] for i, task in enumerate(TASKS)}
        lines += [json.dumps(row) for row in asked(model, index, item, plans)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n")
    found = {line["method"]: line for line in summarize(tmp_path / "items.jsonl", against="all")}
    assert [name for name, line in found.items() if "beyond" in line] == ["drift"]
    assert {line["items"] for line in found.values()} == {6}
    for task in TASKS:
        assert found["all"]["tasks"][task]["kl"][0] == pytest.approx(0, abs=1e-5)
        assert found["all"]["tasks"][task]["top1"] == 100
        assert found["all"]["tasks"][task]["apart"] == [0, 0, 0]
        value, low, high = found["drift"]["tasks"][task]["kl"]
        assert 0 < low < value < high
        assert found["drift"]["beyond"][task]["kl"] == pytest.approx([value, low, high], abs=1e-5), "of dense itself"
        assert found["drift"]["tasks"][task]["answers"] == 12
    assert "| 0.30 | drift |" in table(list(found.values()))
    files = {"X/items.jsonl": "items.jsonl", "R": "out.jsonl", "F": "figure.png"}
    files = {said: tmp_path / name for said, name in files.items()}
    result = CliRunner().invoke(app, typed("python -m evals.real summarize X/items.jsonl", files)[3:])
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def small(byte_tokenizer, tmp_path, monkeypatch):
    """A folder as `fetch` leaves it, of a model with random weights, and little to measure on it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    (folder / "origin.json").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(frontier, "_ROUNDS", 1)
    monkeypatch.setattr(fisher, "_DRAWN", 1)
    monkeypatch.setattr(frontier, "calibration_kinds", lambda texts: ("text", "copy"))
    monkeypatch.setattr(compared, "BUDGETS", (0.5,))
    monkeypatch.setattr(compared, "_COMPARED", (0.5,))
    one = Item(list(range(1, 200)), {task: [[9]] for task in TASKS}, context=100)
    monkeypatch.setattr(frontier, "items", lambda *arguments: iter([one, one]))


def real(words, *more):
    """Runs a line of the page on the small model."""
    return CliRunner().invoke(app, [*words[3:], "--model", "model", "--length", "1200", "--device", "cpu", *more])


def test_a_frontier_runs_from_profiles_to_lines(small, monkeypatch):
    done = real(typed("python -m evals.real frontier --out X"), "--count", "1", "--loss", "0.5")
    assert done.exit_code == 0, done.output
    head, *rows = (json.loads(line) for line in Path("X/items.jsonl").read_text().splitlines())
    assert head["length"] == 1200
    methods = {
        "dense", "drift", "fisher", "windows only", "storages only", "mass", "loss 0.5", "streaming",
        "int4 everywhere", "int8 everywhere",
    }  # fmt: skip
    assert {row["method"] for row in rows} == methods
    assert Path("X/drift.json").exists()
    assert done.stdout.splitlines()[-1].startswith("9 plans")
    more = real(typed("python -m evals.real frontier --out Y --profiles X", {"40": 1}), "--count", "1")
    assert more.exit_code == 0, more.output
    assert not Path("Y/drift.json").exists()
    found = summarize(Path("X/items.jsonl"), Path("Y/items.jsonl"))
    assert {line["method"] for line in found} == methods
    assert {line["items"] for line in found} == {2}


def test_other_libraries_are_asked_too_or_named_before_anything_is_measured(small, monkeypatch):
    beside = typed("python -m evals.real frontier --out X --peers")
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert str(real(beside).exception).startswith("error: --peers needs kvpress, optimum-quanto, hqq: evals/real/")
    assert not [*Path("X").iterdir()]
    hidden = (torch.zeros(0, dtype=torch.long),) * 3
    press = SimpleNamespace(post_init_from_model=lambda model: None)
    press.compress = lambda module, *given: setattr(module, "masked_key_indices", hidden)
    monkeypatch.setattr(frontier, "peers", lambda: [peers.Press("SnapKV", 0.5)])
    monkeypatch.setattr(peers, "_press", lambda scorer, ratio: press)
    monkeypatch.setattr(frontier, "names", lambda job: ["drift"])
    done = real(beside, "--count", "1")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("X/items.jsonl").read_text().splitlines()[1:]]
    assert {"drift", "kvpress AdaKV SnapKV"} < {row["method"] for row in rows}


def test_profiles_are_made_alone(small):
    made = real(typed("python -m evals.real profile fisher loss 0.1", {"loss 0.1": "loss 0.5"}))
    assert made.exit_code == 0, made.output
    assert sorted(path.name for path in Path("P").iterdir()) == ["fisher.json", "loss_0.5.json", "profiles.jsonl"]
    assert real(["python", "-m", "evals.real", "profile", "drift 2", "--out", "P"]).exit_code == 0
    profile = HeadProfile.load(Path("P/drift_2.json"))
    assert [profile.provenance["calibration"]["prompts"], profile.provenance["held_out"][0]["prompts"]] == [4, 2]
    took = [json.loads(line) for line in Path("P/profiles.jsonl").read_text().splitlines()]
    assert [(row["profile"], row["prompts"], row["held_out"]) for row in took] == [
        ("fisher", 2, 2), ("loss 0.5", 2, 2), ("drift 2", 4, 2),
    ]  # fmt: skip
    assert all(row["cpu_seconds"] > 0 and row["seconds"] > 0 for row in took)
    unknown = real(["python", "-m", "evals.real", "profile", "drift", "loss", "--out", "P"])
    assert str(unknown.exception).startswith("error: profile 'loss': name drift, fisher")


def test_items_of_an_older_run_are_refused_in_a_line(tmp_path):
    old = tmp_path / "items.jsonl"
    old.write_text(json.dumps({"length": 300, "hardware": {}}) + "\n")
    result = CliRunner().invoke(app, ["summarize", str(old), "--out", str(tmp_path / "out.jsonl")])
    assert str(result.exception) == (
        f"error: {old}: its first line does not say texts, as that of an older `frontier`: run it anew"
    )


def test_a_model_that_is_not_there_names_the_command(tmp_path):
    result = CliRunner().invoke(app, ["frontier", "--out", str(tmp_path), "--model", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "python -m evals.real fetch" in str(result.exception) + result.output
