"""What a plan says of its own worth: where it was measured, and what it cost on prompts that were held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Below it other prompts may well choose otherwise: on a real model plans whose halves agreed on 76 % gained by more
# prompts, by which they agreed on 87 % (docs/plans.md).
_SETTLED = 0.8


def evidence(provenance: Mapping[str, Any]) -> list[str]:
    """Lines for people; none for a plan whose provenance says nothing of it."""
    found = provenance.get("held_out")
    if not isinstance(found, list):
        return []
    rows = [row for row in found if isinstance(row, Mapping) and {"length", "kl", "accuracy"} <= row.keys()]
    if not rows:
        return ["held out: nothing, so nothing confirms this plan; check it: redknot gate MODEL --plan FILE"]
    lines = [line for row in rows for line in confirmed(row)]
    overlap = provenance.get("overlap")
    if isinstance(overlap, (int, float)):
        more = "" if overlap >= _SETTLED else ": more prompts would settle more (redknot profile --prompts)"
        lines.append(f"both halves of the prompts agree on {overlap:.0%} of the global heads{more}")
    return lines


def confirmed(row: Mapping[str, Any]) -> list[str]:
    """A length's figures, and under it those of every kind of prompts."""
    verdict = "holds" if row.get("holds") else "the plan does not hold at this length"
    head = f"held out, {row['length']} tokens: KL {row['kl']:.4f}{_between(row.get('kl_interval'), '.4f')}"
    lines = [f"{head}, right {_right(row)}{_between(row.get('accuracy_interval'), '+.1%')}: {verdict}"]
    for kind in row.get("kinds") or ():
        said = f"KL {kind['kl']:.4f}, right {_right(kind)}"
        if not kind["judged"]:
            said = f"left out of the verdict: the model itself is right on {kind['dense_accuracy']:.1%}"
        lines.append(f"  {kind['kind']:<8} {said}")
    return lines


def _right(row: Mapping[str, Any]) -> str:
    return f"{row['accuracy']:.1%} (dense {row['dense_accuracy']:.1%})"


def _between(interval: Sequence[float] | None, form: str) -> str:
    return f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else ""
