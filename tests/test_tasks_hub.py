"""Data sets of the Hub, read from small copies in their own format; nothing here touches the network."""

from itertools import groupby
from pathlib import Path

import pytest

from evals import metrics, tasks
from evals.tasks.hub import read
from evals.tasks.length import prompt_tokens
from evals.tasks.rendered import _apart

FOLDER = Path(__file__).parent / "fixtures" / "hub"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    datasets.disable_progress_bars()


def load(name: str):
    family, _, task = name.partition("/")
    folder = {"longbench_e": "longbench", "ruler_hub": "ruler"}.get(family, task if family == "multihop" else family)
    return tasks.load(name, str(FOLDER / folder))


def examples(tokenizer, name: str, length: int, count: int, seed: int = 0):
    found = list(load(name).examples(tokenizer, length, count, seed))
    assert len({example.id for example in found}) == count
    assert all(prompt_tokens(tokenizer, example) <= length for example in found)
    assert found == list(load(name).examples(tokenizer, length, count, seed))
    return found


def test_a_folder_is_told_by_the_sizes_of_its_files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").write_text("abc")
    name = tasks.load("babilong/qa1", str(tmp_path)).name
    assert name.startswith(f"babilong/qa1 of {tmp_path.name} ")
    (tmp_path / "data" / "x.jsonl").write_text("abcd")
    assert tasks.load("babilong/qa1", str(tmp_path)).name != name
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        tasks.load("babilong/qa1", str(tmp_path / "none")).name  # noqa: B018 - it is made when asked for


def test_without_a_source_the_hub_is_asked(byte_tokenizer):
    for name in ("ruler_hub/vt", "longbench/hotpotqa", "babilong/qa1", "multihop/musique"):
        with pytest.raises(ConnectionError, match="go online, or give a folder with its files as the source"):
            next(tasks.load(name).examples(byte_tokenizer, 5000, 1, seed=0))


def test_rows_of_one_task():
    rows = read("simonjegou/ruler", "4096", "test", str(FOLDER / "ruler"), task="niah_single_1")
    assert len(rows) == 3
    assert {rows[i]["task"] for i in range(3)} == {"niah_single_1"}


@pytest.mark.parametrize(("length", "config"), [(4096, "4096"), (8191, "4096"), (9000, "8192")])
def test_ruler_of_the_longest_that_fits(byte_tokenizer, length, config):
    for example in examples(byte_tokenizer, "ruler_hub/niah_single_1", length, 3):
        (answer,) = example.answers
        assert answer.startswith(config)
        assert f"Remember {answer}. " in example.context
        assert example.question.endswith(" hold?\n")
        assert (example.answer_prefix, example.max_new_tokens) == ("The numbers are", 128)
    (example,) = examples(byte_tokenizer, "ruler_hub/niah_multivalue", length, 1)
    assert metrics.load("string_match_all").score(f"They are {example.answers[1]}.", example.answers) == 0.5


def test_ruler_says_what_it_lacks(byte_tokenizer):
    with pytest.raises(ValueError, match=r"prompts of \(4096, 8192, 16384\) tokens, length is 4095"):
        next(load("ruler_hub/qa_1").examples(byte_tokenizer, 4095, 1, seed=0))
    with pytest.raises(ValueError, match=r"has 3 questions \(of 3\) that fit 4096 tokens, count is 4"):
        next(load("ruler_hub/niah_single_1").examples(byte_tokenizer, 4096, 4, seed=0))


def test_longbench_loses_its_middle(byte_tokenizer):
    whole = examples(byte_tokenizer, "longbench/hotpotqa", 9000, 4)
    for example, cut in zip(whole, examples(byte_tokenizer, "longbench/hotpotqa", 300, 4), strict=True):
        assert cut.question == example.question
        assert prompt_tokens(byte_tokenizer, cut) >= 280 < prompt_tokens(byte_tokenizer, example)
        assert cut.context.startswith("Answer the question based on the given passages.\n\nPassage 1:")
        assert cut.context.endswith(f"It is {example.answers[0]} deep.\n\n")
        assert cut.context not in example.context
        assert [part.split("\n")[0] for part in example.documents[1:]] == ["Passage 1:", "Passage 2:", "Passage 3:"]
        assert "".join(example.documents) == example.context
        assert "".join(cut.documents) in (cut.context, "")
    assert {example.answers for example in whole} == {(f"{i} feet", str(i)) for i in range(4)}
    assert all(example.question.endswith("?\n") for example in whole)
    with pytest.raises(ValueError, match="no room for the context"):
        next(load("longbench/hotpotqa").examples(byte_tokenizer, 20, 1, seed=0))


def test_longbench_e_reports_lengths(byte_tokenizer):
    found = examples(byte_tokenizer, "longbench_e/hotpotqa", 2000, 4)
    assert sorted(example.kind for example in found) == ["0-4k", "4-8k", "4-8k", "8k+"]
    assert {example.kind for example in examples(byte_tokenizer, "longbench/hotpotqa", 2000, 4)} == {""}


def test_longbench_classes_and_counts(byte_tokenizer):
    for example in examples(byte_tokenizer, "longbench/trec", 2000, 3):
        assert example.choices == ("Individual", "Other location", "Date")
        assert example.stop == "\n"
        assert metrics.load("classification").score("Individual", example.answers, example.choices) == 1
    found = examples(byte_tokenizer, "longbench/passage_count", 2000, 2)
    assert {example.answers for example in found} == {("2",), ("3",)}
    assert {example.stop for example in found} == {None}


def test_longbench_v2_asks_for_a_letter(byte_tokenizer):
    found = examples(byte_tokenizer, "longbench_v2", 3000, 4)
    assert {example.answers for example in found} == {("A",), ("B",), ("C",), ("D",)}
    assert {example.kind for example in found} == {"short", "long"}
    judge = metrics.load(load("longbench_v2").metric)
    assert sum(judge.score("The correct answer is (C)", example.answers) for example in found) == 1


def test_infinitebench_reads_a_book_once(byte_tokenizer):
    found = examples(byte_tokenizer, "infinitebench/longbook_choice_eng", 600, 6)
    books = [context for context, _ in groupby(example.context for example in found)]
    assert len(books) == 2  # cut alike for all its questions
    assert max(prompt_tokens(byte_tokenizer, example) for example in found) > 590
    assert all(example.question.endswith("D. Dan\n") for example in found)
    assert {answer for example in found for answer in example.answers} == {*"ABCD"}
    first = next(load("infinitebench/passkey").examples(byte_tokenizer, 600, 1, seed=0))
    assert (first.question, first.answer_prefix) == ("What is the pass key?", "")
    assert _apart("Who?", " Ann") == "Who?"
    assert _apart("Who?\n", "Ann") == "Who?\n"
    assert _apart("Who?", "Ann") == "Who?\n"
    judge = metrics.load(load("infinitebench/math_find").metric)
    for example in examples(byte_tokenizer, "infinitebench/math_find", 600, 3):
        assert judge.score(f" {example.answers[0]}.", example.answers) == 1


@pytest.mark.parametrize(("length", "least"), [(300, 0), (1400, 400), (2400, 800)])
def test_babilong_of_the_longest_that_fits(byte_tokenizer, length, least):
    judge = metrics.load("only_label")
    for example in examples(byte_tokenizer, "babilong/qa1", length, 5):
        assert prompt_tokens(byte_tokenizer, example) > least
        (answer,) = example.answers
        assert f"Mary moved to the {answer}. " in f"{example.context} ".replace("\n", " ")
        assert judge.score(f" The most recent location of Mary is {answer}.", example.answers, example.choices) == 1
        assert judge.score(" It is the bathroom or the hallway.", example.answers, example.choices) == 0
    found = examples(byte_tokenizer, "babilong/qa8", length, 5)
    assert {example.answers for example in found} == {("apple,milk",), ("nothing",)}
    scores = [judge.score("milk and apple", example.answers, example.choices) for example in found]
    assert scores == [float(example.answers == ("apple,milk",)) for example in found]


def test_babilong_says_what_it_lacks(byte_tokenizer):
    with pytest.raises(ValueError, match="needs at least 250 tokens, length is 200"):
        next(load("babilong/qa1").examples(byte_tokenizer, 200, 1, seed=0))
    with pytest.raises(ValueError, match=r"has 5 questions \(of 5\) that fit 1400 tokens, count is 6"):
        list(load("babilong/qa1").examples(byte_tokenizer, 1400, 6, seed=0))


@pytest.mark.parametrize("name", ["multihop/hotpotqa", "multihop/2wikimqa", "multihop/musique"])
@pytest.mark.parametrize("length", [260, 500, 1200])
def test_multihop_documents_are_segments(byte_tokenizer, name, length):
    found = examples(byte_tokenizer, name, length, 8)
    for example in found:
        opening, *documents = example.documents
        assert "".join(example.documents) == example.context
        assert opening.endswith("The following are given documents.\n\n")
        assert len({document.split("\n")[0] for document in documents}) == len(documents)
        lake = example.question.split("Lake ")[1].split("?")[0]
        assert f"Document: Lake {lake}\nLake {lake} lies on Hill {lake}. It is deep.\n\n" in documents
        assert f"Document: Hill {lake}\nHill {lake} was named by {example.answers[0]}. It is high.\n\n" in documents
        assert example.answers[0] == f"Ann {lake}"
    counts = [len(example.documents) - 1 for example in found]
    assert (max(counts) < 4) if length == 260 else (min(counts) > 4 if length == 1200 else max(counts) >= 4)
    kinds = {"multihop/musique": {"2 hops", "3 hops"}}.get(name, {"bridge", "comparison"})
    assert {example.kind for example in found} == kinds


def test_multihop_begins_with_the_own_passages(byte_tokenizer):
    (example,) = examples(byte_tokenizer, "multihop/musique", 5000, 1)
    assert len(example.documents) == 1 + 8 * 4  # the split for validation, and no passage twice
    for example in examples(byte_tokenizer, "multihop/musique", 700, 4):
        lake = example.question.split("Lake ")[1].split("?")[0]
        own = {f"Document: {what} {lake}" for what in ("Lake", "Hill", "Road", "Mill")}
        titles = {document.split("\n")[0] for document in example.documents[1:]}
        assert own <= titles or titles <= own
    answers = {len(example.answers) for example in examples(byte_tokenizer, "multihop/musique", 700, 8)}
    assert answers == {1, 2}
