"""What a report says first: a sentence with the verdict, and three rows for whoever reads no more."""

from __future__ import annotations

from collections.abc import Sequence

from evals.summary import MARGIN, Row

SLIGHT = 5.0  # points of score: a loss below it is slight


def headline(rows: Sequence[Row]) -> str:
    """Say how the method that the report is about fares, at the longest texts of the first task."""
    row = subject(rows)
    if row is None:
        return "Only the dense cache has answered: there is nothing yet to compare with it."
    share = "" if row.dense_share is None else f", and holds {row.dense_share:.0%} of its keys and values"
    where = f"{row.run.task} at {row.run.length} tokens"
    return f"On {where}, {row.name} {_fares(row)}{share}."


def digest(rows: Sequence[Row]) -> dict[str, list[list[str]] | list[str]]:
    """The same as a table of three rows: answers, memory, time; nothing without a method to compare."""
    row = subject(rows)
    if row is None:
        return {"head": [], "body": []}
    shown = [one for one in _alike(rows, row) if one.name == "dense"] + [row]
    mib, seconds = ([get(one) for one in shown] for get in (lambda r: r.resident_bytes / 2**20, lambda r: r.ttft_s))
    later = ["-" if one.token_s is None else f"{1e3 * one.token_s:.1f} ms" for one in shown]
    return {
        "head": ["", *(one.name for one in shown)],
        "body": [
            ["right answers (score of 100)", *(f"{one.score.value:.1f}" for one in shown)],
            ["memory of the context", *(f"{held:.1f} MiB" for held in mib)],
            ["first token, each later one", *(f"{s:.2f} s, {ms}" for s, ms in zip(seconds, later, strict=True))],
        ],
    }


def subject(rows: Sequence[Row]) -> Row | None:
    """The row that the report is about: redknot's if there is one, else the first that is not dense."""
    whole = [row for row in rows if not row.kind]
    others = [row for row in whole if row.name != "dense"]
    if not others:
        return None
    name = next((row.name for row in others if row.name == "redknot"), others[0].name)
    same = [row for row in others if row.name == name and row.run.task == others[0].run.task]
    return max(same or others[:1], key=lambda row: row.run.length)


def mood(row: Row) -> str:
    """How a verdict is coloured: by the size of the loss, and by whether it is sure.

    `none`, `slight` or `large`, and `unsure` with it; `plain` for the reference; `large` for what is void.
    """
    apart = row.score_difference
    if row.name == "dense" or (apart is None and not row.unaudited):
        return "plain"
    if row.unaudited or apart is None:
        return "large"
    lost = -apart.value
    size = "none" if lost <= MARGIN else "slight" if lost < SLIGHT else "large"
    settled = row.verdict.startswith(("within", "better", "worse"))
    return size if settled else f"{size} unsure"


def _fares(row: Row) -> str:
    apart = row.score_difference
    if row.unaudited:
        return "is void: answers did not come from the cache that was measured"
    if apart is None:
        return "was not held against dense answers"
    if apart.low is None or apart.high is None:
        return f"is {apart.value:+.1f} points from dense, on {row.contexts} contexts, too few to be sure"
    if apart.low >= -MARGIN and apart.high <= MARGIN:
        return "answers as dense does"
    if apart.high < 0 or apart.low > 0:
        return f"{'loses' if apart.high < 0 else 'gains'} {abs(apart.value):.1f} points against dense"
    return f"is {apart.value:+.1f} points from dense; {apart.low:+.1f} to {apart.high:+.1f} are possible"


def _alike(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows of the same task and length."""
    place = (row.run.task, row.run.length)
    return [one for one in rows if not one.kind and (one.run.task, one.run.length) == place]
