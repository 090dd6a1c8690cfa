import json

import pytest
from families import make_model

from evals.benchmarks import reuse_real
from evals.real import contexts

METHODS = [
    "naive", "boundary all", "stand-in", "stand-in, question 15 %", "stand-in, two ranked best",
    "stand-in, ranked best, question 12 %",
]  # fmt: skip


@pytest.fixture
def tiny(tmp_path, byte_tokenizer):
    """A folder as `evals.real fetch` leaves it, of a model with random weights."""
    make_model("llama", vocab_size=700, num_hidden_layers=2, max_position_embeddings=8192).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "origin.json").write_text("{}")
    return tmp_path


def test_all_methods_answer_the_same_questions(tiny, monkeypatch):
    monkeypatch.setattr(reuse_real, "STAND_IN", 64)
    out = tiny / "out.jsonl"
    size = ["--contexts", "1", "--documents", "3", "--tokens", "400", "--dtype", "float32", "--device", "cpu"]
    chosen = [part for method in METHODS for part in ("--method", method)]
    reuse_real.app([*size, *chosen, "--model", str(tiny), "--out", str(out)], standalone_mode=False)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(r["kind"], r["method"]) for r in records} == {
        (kind, method) for kind in reuse_real.KINDS for method in (reuse_real.DENSE, *METHODS)
    }
    by_name = {r["method"]: r for r in records if r["kind"] == "copy"}
    assert {kind: next(r["questions"] for r in records if r["kind"] == kind) for kind in reuse_real.KINDS} == {
        "number": 6, "word": 6, "friend": 3, "copy": 3, "text": 1, "summary": 3,
    }  # fmt: skip
    assert by_name["dense"]["kl"][0] == 0 <= by_name["boundary all"]["kl"][0] < 1e-5 < by_name["naive"]["kl"][0]
    assert by_name["naive"]["recomputed"] == by_name["stand-in"]["recomputed"] == 0
    assert 0.05 < by_name["stand-in, question 15 %"]["recomputed"] <= 0.15
    assert 0.6 < by_name["stand-in, two ranked best"]["recomputed"] < 0.7
    assert all(r["top1"][0] == 1 for r in records if r["method"] == "dense")


def test_facts_stand_in_the_documents_that_questions_name(byte_tokenizer):
    maker = contexts.Maker(byte_tokenizer)
    documents, questions = maker.context(3, 3, 600, contexts.KINDS)
    assert maker.context(3, 3, 600, contexts.KINDS) == (documents, questions)
    assert maker.context(4, 3, 600, contexts.KINDS) != (documents, questions)
    texts = [byte_tokenizer.decode(document) for document in documents]
    for asked in questions:
        said = byte_tokenizer.decode([*asked.prompt, *asked.answer])
        if asked.kind in ("number", "word"):
            assert said in texts[asked.document]
        if asked.kind == "copy":
            assert byte_tokenizer.decode(asked.answer) in texts[asked.document]
