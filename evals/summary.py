"""What records amount to: a row for each task, length and method, with intervals, and a verdict in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.identity import digest
from evals.intervals import Estimate, difference, estimate, mean
from evals.records import Records, Run

MARGIN = 1.0  # points of score that a method may differ from dense and still be called as good
Answer = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One method on one task and length.

    Attributes:
        run: What produced the answers; of several seeds, the first.
        kind: Part of the task; empty for all of it.
        answers, contexts: How many.
        unaudited: Answers that are not what the cache that was measured gives.
        score: Mean score, in points of 100.
        score_difference: Of the same examples, to dense, in points; `None` without dense records.
        same_answer, top1, top10: Shares of answers and of tokens that are those of dense, in points.
        kl: Mean KL(dense || method) of a token, in nats.
        kl_p99: Its 99th percentile.
        perplexity_difference: Of the dense answers, to dense.
        diverges_at: Median over the answers that diverge of the first token that does.
        ttft_s: Median seconds from an unread context to the first token.
        token_s: Median seconds of each later token of each answer.
        tokens_per_s: Of all answers decoded together.
        resident_bytes, peak_bytes: Medians, of keys and values once the context is read, and of the most memory taken
            on the way; `None` where less was seen than is held.
        dense_share: Of the bytes that the dense cache holds.
    """

    run: Run
    kind: str
    answers: int
    contexts: int
    unaudited: int
    score: Estimate
    score_difference: Estimate | None
    same_answer: Estimate
    top1: Estimate
    top10: Estimate
    kl: Estimate
    kl_p99: float
    perplexity_difference: Estimate
    diverges_at: float | None
    ttft_s: float
    token_s: float | None
    tokens_per_s: float | None
    resident_bytes: float
    peak_bytes: float | None
    dense_share: float | None

    @property
    def name(self) -> str:
        """The method's name."""
        return self.run.name

    @property
    def verdict(self) -> str:
        """What the figures mean, in words."""
        if self.unaudited:
            return f"void: {self.unaudited} of {self.answers} answers did not come from the cache that was measured"
        if self.name == "dense":
            return "the reference"
        apart = self.score_difference
        if apart is None:
            return "no dense answers to compare with"
        if apart.low is None or apart.high is None:
            return f"{apart.value:+.1f} points from dense, and too few contexts for an interval"
        if apart.low >= -MARGIN and apart.high <= MARGIN:
            return f"within {MARGIN:g} point of dense, 95 % sure"
        if apart.high < 0:
            return f"worse than dense by {-apart.value:.1f} points, 95 % sure of at least {-apart.high:.1f}"
        if apart.low > 0:
            return f"better than dense by {apart.value:.1f} points, 95 % sure of at least {apart.low:.1f}"
        return f"not shown to be within {MARGIN:g} point of dense: {apart.low:+.1f} to {apart.high:+.1f} are possible"

    def to_json(self) -> dict[str, Any]:
        """Return it as a line of a result file: estimates as value, low, high."""
        line = self.run.to_json()
        for name, value in vars(self).items():
            if name != "run":
                value = value.to_json() if isinstance(value, Estimate) else value
                line[name] = float(f"{value:.6g}") if isinstance(value, float) else value
        return line | {"verdict": self.verdict}


def summarize(records: Records, kinds: bool = False) -> list[Row]:
    """Return a row for each task, length, model and method; with `kinds`, for each kind of example too.

    Answers of several seeds are taken together.
    """
    by_series: dict[str, list[Run]] = {}
    for run in records.runs.values():
        by_series.setdefault(digest([*_setting(run), run.method, run.versions]), []).append(run)
    rows = []
    for runs in by_series.values():
        answers = {
            (run.seed, id): answer for run in runs for (key, id), answer in records.answers.items() if key == run.key
        }
        if not answers:
            continue
        dense = _dense(records, runs[0])
        parts = [""]
        if kinds:
            parts += sorted({answer["kind"] for answer in answers.values() if answer["kind"]})
        for kind in parts:
            chosen = {at: answer for at, answer in answers.items() if not kind or answer["kind"] == kind}
            rows.append(_row(runs[0], kind, chosen, dense))
    return sorted(rows, key=lambda row: (row.run.task, row.run.length, row.kind))


def _setting(run: Run) -> list[Any]:
    return [run.task, run.length, run.model]


def _dense(records: Records, run: Run) -> dict[tuple[int, str], Answer]:
    """The dense answers of the same examples, by seed and id; the newest versions win."""
    same = {
        key: one.seed for key, one in records.runs.items() if one.name == "dense" and _setting(one) == _setting(run)
    }
    return {(same[key], id): answer for (key, id), answer in records.answers.items() if key in same}


def _row(run: Run, kind: str, answers: dict[tuple[int, str], Answer], dense: dict[tuple[int, str], Answer]) -> Row:
    found = list(answers.values())
    contexts = [answer["context"] for answer in found]
    near = [answer["fidelity"] for answer in found]
    tokens = [one["tokens"] for one in near]
    costs = [answer["cost"] for answer in found]
    paired = [at for at in answers if at in dense]
    apart = None
    if paired:
        ours, theirs = ([side[at]["score"] for at in paired] for side in (answers, dense))
        apart = difference([answers[at]["context"] for at in paired], ours, theirs).scaled(100)
    token_s = _median(cost["token_s"] for cost in costs)
    diverging = [one["first_divergence"] for one in near if one["first_divergence"] is not None]
    resident, held = (_median(a["cost"]["resident_bytes"] for a in side) for side in (found, dense.values()))
    assert resident is not None
    return Row(
        run=run,
        kind=kind,
        answers=len(found),
        contexts=len(set(contexts)),
        unaudited=sum(not answer["audited"] for answer in found),
        score=mean(contexts, [answer["score"] for answer in found]).scaled(100),
        score_difference=apart,
        same_answer=mean(contexts, [one["same_answer"] for one in near]).scaled(100),
        top1=estimate(contexts, ([one["top1"] for one in near], tokens), _ratio).scaled(100),
        top10=estimate(
            contexts, ([one["top10"] * n for one, n in zip(near, tokens, strict=True)], tokens), _ratio
        ).scaled(100),
        kl=_over_zero(estimate(contexts, ([math.fsum(one["kl"]) for one in near], tokens), _ratio)),
        kl_p99=max(0.0, float(np.percentile([kl for one in near for kl in one["kl"]], 99))),
        perplexity_difference=estimate(
            contexts, ([one["nll"] for one in near], [one["dense_nll"] for one in near], tokens), _perplexities
        ),
        diverges_at=_median(diverging),
        ttft_s=statistics.median(cost["prepare_s"] + cost["question_s"] for cost in costs),
        token_s=token_s,
        tokens_per_s=None if token_s is None else statistics.median(cost["batch"] for cost in costs) / token_s,
        resident_bytes=resident,
        peak_bytes=_believable(_median(cost["peak_bytes"] for cost in costs), resident),
        dense_share=None if held is None else resident / held,
    )


def _over_zero(found: Estimate) -> Estimate:
    """A KL that rounding has made negative is none."""
    low, high = (None if end is None else max(0.0, end) for end in (found.low, found.high))
    return Estimate(max(0.0, found.value), low, high)


def _believable(peak: float | None, resident: float) -> float | None:
    """A peak below what is held afterwards was not seen: a process takes memory that it has had before."""
    return None if peak is None or peak < resident else peak


def _ratio(total: Any, n: Any) -> Any:
    return total / n


def _perplexities(nll: Any, dense_nll: Any, tokens: Any) -> Any:
    return np.exp(nll / tokens) - np.exp(dense_nll / tokens)


def _median(values: Iterable[float | None] | Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
