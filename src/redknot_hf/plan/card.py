"""The card of a plan: what it keeps, what confirms it, and how to use it, as the Hub shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .picture import picture

if TYPE_CHECKING:
    from .plan import HeadPlan

_TAGS = ("kv-cache", "long-context", "head-plan")


def card(plan: Any, repository: str = "org/plans") -> str:
    """Markdown with the Hub's metadata.

    Args:
        plan: A HeadPlan.
        repository: Where its reader would load it from.
    """
    return "\n".join([*_metadata(plan.provenance.get("model")), *_body(plan, repository)]) + "\n"


def cover(repository: str) -> str:
    """The card of a repository of plans."""
    lines = (
        "# Head plans",
        "",
        "What each KV head of a model keeps of a long context, for the cache of redknot-hf. Each folder is a model's:",
        "its plan, and a card that says what the plan costs.",
        "",
        *_use(repository, None),
    )
    return "\n".join([*_metadata(None), *lines]) + "\n"


def _metadata(model: Any) -> Iterator[str]:
    yield from ("---", "library_name: redknot-hf", "tags:", *(f"- {tag}" for tag in _TAGS))
    if model and "/" in str(model):  # an id on the Hub, and no folder
        yield f"base_model: {model}"
    yield from ("---", "")


def _body(plan: HeadPlan, repository: str) -> Iterator[str]:
    model = plan.provenance.get("model") or "a model"
    yield from (f"# A head plan of {model}", "")
    yield from (_verdict(plan.provenance), "")
    yield from ("```", picture(plan), "```", "")
    yield from _use(repository, str(model))
    yield from ("", "## What confirms it", "", *_evidence(plan.provenance), "")
    yield from ("## How it was made", "", "| | |", "|---|---|")
    for name, entry in plan.provenance.items():
        if name not in ("held_out", "overlap"):
            yield f"| {name} | {_words(entry)} |"


def _verdict(provenance: Mapping[str, Any]) -> str:
    rows = _rows(provenance)
    if not rows:
        return "Nothing confirms this plan on prompts that were held out: check it with `redknot gate`."
    holds = [row["length"] for row in rows if row.get("holds")]
    fails = [row["length"] for row in rows if not row.get("holds")]
    said = [f"holds at {_listed(holds)} tokens"] if holds else []
    said += [f"does not hold at {_listed(fails)} tokens"] if fails else []
    return f"On prompts that were held out it {' and '.join(said)}."


def _evidence(provenance: Mapping[str, Any]) -> Iterator[str]:
    if not _rows(provenance):
        yield "Nothing yet: `redknot gate MODEL --plan plan.json`."
        return
    yield "KL in nats a token, to the model with its dense cache; answers that are right, with the plan and densely."
    yield from ("", "| tokens | prompts of | KL | right, % | dense, % | |", "|---|---|---|---|---|---|")
    for row in _rows(provenance):
        verdict = "**holds**" if row.get("holds") else "**does not hold**"
        yield _line(row["length"], f"all, {row.get('prompts', '')}", row, verdict)
        for kind in row.get("kinds") or ():
            left_out = "" if kind.get("judged") else "left out: the model itself cannot"
            yield _line("", kind["kind"], kind, left_out)


def _line(length: Any, what: str, row: Mapping[str, Any], said: str) -> str:
    right, dense = 100 * row["accuracy"], 100 * row["dense_accuracy"]
    return f"| {length} | {what} | {row['kl']:.4f} | {right:.1f} | {dense:.1f} | {said} |"


def _rows(provenance: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = provenance.get("held_out")
    rows = found if isinstance(found, list) else []
    known = {"length", "kl", "accuracy", "dense_accuracy"}
    return [row for row in rows if isinstance(row, Mapping) and known <= row.keys()]


def _use(repository: str, model: str | None) -> Iterator[str]:
    yield from ("## Use", "", "```python", "import redknot_hf", "from redknot_hf import HeadPlan, RedKnotCache")
    yield from ("from transformers import AutoModelForCausalLM", "")
    name = f'"{model}"' if model else "name"
    yield f'model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto", attn_implementation="redknot")'
    yield f'plan = HeadPlan.from_pretrained("{repository}", model)'
    yield from ("model.generate(**inputs, past_key_values=RedKnotCache(model.config, plan))", "```")


def _listed(lengths: list[Any]) -> str:
    return " and ".join(map(str, lengths))


def _words(entry: Any) -> str:
    if isinstance(entry, Mapping):
        return ", ".join(f"{name} {_words(value)}" for name, value in entry.items())
    if isinstance(entry, list | tuple):
        return ", ".join(map(_words, entry))
    return str(entry).replace("|", "\\|")
