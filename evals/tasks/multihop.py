"""Questions that take several documents: HotpotQA, 2WikiMultihopQA and MuSiQue, each document a segment."""

from collections.abc import Callable
from functools import partial

from evals.tasks.documents import Inquiry, Passage
from evals.tasks.hub import Row, read
from evals.tasks.inquiries import Inquiries


def hotpot_inquiry(row: Row) -> Inquiry:
    """Return the question of a row of HotpotQA (Yang et al. 2018), or of 2WikiMultihopQA in the same columns."""
    wanted = set(row["supporting_facts"]["title"])
    passages = [
        (title in wanted, Passage(title, "".join(_spaced(sentences)).strip()))
        for title, sentences in zip(row["context"]["title"], row["context"]["sentences"], strict=True)
    ]
    return _inquiry(row["id"], row["question"], (row["answer"],), passages, row["type"])


def musique_inquiry(row: Row) -> Inquiry:
    """Return the question of a row of MuSiQue (Trivedi et al. 2022)."""
    passages = [
        (bool(paragraph["is_supporting"]), Passage(paragraph["title"], paragraph["paragraph_text"].strip()))
        for paragraph in row["paragraphs"]
    ]
    hops = row["id"].split("hop")[0]
    return _inquiry(row["id"], row["question"], (row["answer"], *row["answer_aliases"]), passages, f"{hops} hops")


def _spaced(sentences: list[str]) -> list[str]:
    """Return sentences of which each but the first begins with a space, as only some copies have them."""
    return [sentence if sentence.startswith(" ") else f" {sentence}" for sentence in sentences]


def _inquiry(
    name: str, question: str, answers: tuple[str, ...], passages: list[tuple[bool, Passage]], kind: str
) -> Inquiry:
    return Inquiry(
        id=name,
        question=question,
        answers=answers,
        needed=tuple(passage for needed, passage in passages if needed),
        others=tuple(passage for needed, passage in passages if not needed),
        kind=kind,
    )


# By name: the data set's id on the Hub, its configuration, and what reads a row.
DATA_SETS: dict[str, tuple[str, str | None, Callable[[Row], Inquiry]]] = {
    "multihop/hotpotqa": ("hotpotqa/hotpot_qa", "distractor", hotpot_inquiry),
    "multihop/2wikimqa": ("framolfese/2WikiMultihopQA", None, hotpot_inquiry),
    "multihop/musique": ("dgslibisey/MuSiQue", None, musique_inquiry),
}
NAMES = tuple(DATA_SETS)


def load(name: str, source: str | None) -> Inquiries:
    """Return the task of this name; a source is a folder with the data set's files."""
    return Inquiries(name, "squad_f1", partial(_read, name, source))


def _read(name: str, source: str | None) -> list[Inquiry]:
    data_set, config, inquiry = DATA_SETS[name]
    rows = read(data_set, config, "validation", source)
    return [inquiry(rows[place]) for place in range(len(rows))]
