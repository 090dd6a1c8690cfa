import json

import pytest
from families import make_model
from pages import typed

from evals.benchmarks import reuse_real
from evals.benchmarks.commands import reuse_real as command
from evals.real import __main__ as evals_real
from evals.real import contexts, reuse_summary

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
    rows, out, picture = (tiny / name for name in ("rows.jsonl", "out.jsonl", "out.png"))
    size = ["--contexts", "1", "--documents", "3", "--tokens", "400", "--dtype", "float32", "--device", "cpu"]
    chosen = [part for method in METHODS for part in ("--method", method)]
    words = typed("python -m evals bench reuse_real", {"X": rows})[5:]
    for first in ("0", "7"):
        command.app([*words, *size, "--first", first, *chosen, "--model", str(tiny)], standalone_mode=False)
    words = typed("python -m evals.real summarize-reuse", {"X": rows, "R": out, "F": picture})[3:]
    evals_real.app(words, standalone_mode=False)
    assert picture.stat().st_size > 10_000
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(r["kind"], r["method"]) for r in records} == {
        (kind, method) for kind in contexts.KINDS for method in (reuse_summary.DENSE, *METHODS)
    }
    assert all(r["contexts"] == 2 for r in records)
    by_name = {r["method"]: r for r in records if r["kind"] == "copy"}
    assert {kind: next(r["questions"] for r in records if r["kind"] == kind) for kind in contexts.KINDS} == {
        "number": 12, "word": 12, "friend": 6, "copy": 6, "text": 2, "summary": 6,
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


def test_only_contexts_that_all_methods_were_asked_about_count():
    """And a difference is of pairs: contexts in which both fail alike say nothing."""
    about = {"documents": 2, "tokens": 9, "stand_in": 0, "dtype": "", "model": "", "date": "", "hardware": {}}

    def row(context, method, right, kl=0.0):
        return {"context": context, "method": method, "kind": "word", "recomputed": 0.1 * context, "questions": 4,
                "right": right, "kl": 4 * kl, "top1": 4.0, **about}  # fmt: skip

    rows = [row(c, "dense", 4.0 * (c % 2)) for c in range(12)]
    rows += [row(c, "naive", 4.0 * (c % 2) - (c == 3), 0.5) for c in range(11)]
    dense, naive = reuse_summary.records(rows)
    assert dense["contexts"] == naive["contexts"] == 11
    assert dense["right_minus_dense"][0] == 0 > dense["right_minus_dense"][1]
    assert naive["right_minus_dense"][0] == pytest.approx(-1 / 44, abs=1e-6)
    assert naive["right_minus_dense"][2] <= 0
    assert naive["kl"] == [0.5, 0.5, 0.5]
    assert naive["recomputed"] == pytest.approx(0.5)
    assert naive["date"] == ""
    rows[-1]["date"] = "later"
    assert [one["date"] for one in reuse_summary.records(rows)] == ["", ["", "later"]]
