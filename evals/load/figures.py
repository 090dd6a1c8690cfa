"""What answers say together: percentiles of delays, and tokens a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from .sending import Answer

PERCENTILES = (50, 90, 95, 99)
# Of the columns of a table: what a row of results calls it, and what a person does.
DELAYS = {"first_s": "first token", "between_s": "between tokens", "whole_s": "whole answer"}


def summed_up(answers: Sequence[Answer]) -> dict[str, Any]:
    """One row of results.

    `first_s` is from when a request was due to the first token; `between_s` is, answer by answer, the mean time
    between the tokens behind it; `gaps_s` are the times between the parts that came, of all answers.

    Raises:
        ValueError: No request was answered; says why not.
    """
    fine = [x for x in answers if not x.error]
    if not fine:
        why = answers[0].error if answers else "there were none"
        raise ValueError(f"none of {len(answers)} requests was answered: {why}")
    seconds = max(x.asked.at + x.ended for x in fine) - min(x.asked.at for x in fine)
    tokens, prompts = sum(x.tokens for x in fine), sum(x.prompt or len(x.asked.prompt) for x in fine)
    cached = sum(x.cached for x in fine)
    spoke = [x for x in fine if x.parts]
    long = [x for x in spoke if x.tokens > 1]
    gaps = [after - before for x in spoke for before, after in zip(x.parts, x.parts[1:], strict=False)]
    return {
        "requests": len(answers), "failed": len(answers) - len(fine), "s": seconds,
        "requests_per_s": len(fine) / seconds, "tokens": tokens, "tokens_per_s": tokens / seconds,
        "prompt_tokens": prompts, "prompt_tokens_per_s": prompts / seconds, "cached_tokens": cached,
        "first_s": percentiles([x.parts[0] for x in spoke]),
        "between_s": percentiles([(x.parts[-1] - x.parts[0]) / (x.tokens - 1) for x in long]),
        "gaps_s": percentiles(gaps),
        "whole_s": percentiles([x.ended for x in fine]),
        "sent_late_s": percentiles([x.sent for x in fine]),
        "errors": sorted({x.error for x in answers if x.error})[:5],
    }  # fmt: skip


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and largest of some values; `None` of none."""
    if not values:
        return None
    found = np.percentile(values, PERCENTILES).tolist()
    named = {f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(np.mean(values)), **named, "max": float(max(values))}


def table_of(row: dict[str, Any]) -> Table:
    """A row of results, for a terminal."""
    fine, cached = row["requests"] - row["failed"], f"{row['cached_tokens']:,} of {row['prompt_tokens']:,}"
    table = Table(
        title=f"{fine} of {row['requests']} answered in {row['s']:.1f} s: {row['tokens_per_s']:,.1f} tokens/s, "
        f"{row['requests_per_s']:.2f} requests/s, {cached} tokens of prompts cached"
    )
    table.add_column("ms")
    names = ["mean", *(f"p{p}" for p in PERCENTILES), "max"]
    for name in names:
        table.add_column(name, justify="right")
    for key, told in DELAYS.items():
        found = row[key]
        table.add_row(told, *("-" if found is None else f"{1e3 * found[name]:,.1f}" for name in names))
    return table
