"""How a plan prints: who it is, a glyph for each head, what it saves, and what confirms it."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

from .evidence import evidence

if TYPE_CHECKING:
    from .plan import HeadPlan

# Global heads are blocks, the lighter the fewer bits they hold. A local head's glyph grows with its window.
_GLOBAL_GLYPHS = {"model": "█", "int8": "▓", "int4": "▒"}
_LOCAL_GLYPHS = "·▁▂▃▄▅▆"
_MAX_ROWS = 20
_MAX_WIDTH = 100
# What the share of bytes is told for; it matters for scales of cold pages alone.
_HEAD_DIM, _ITEMSIZE = 128, 2


def picture(plan: HeadPlan) -> str:
    """The whole of it, in lines."""
    return "\n".join([_header(plan), *_glyphs(plan), _saving(plan), *evidence(plan.provenance)])


def shape(counts: tuple[int, ...]) -> str:
    """Layers and KV heads in words."""
    heads = str(counts[0]) if len(set(counts)) == 1 else str(list(counts))
    return f"{len(counts)} layers x {heads} KV heads"


def _header(plan: HeadPlan) -> str:
    kinds = Counter(spec for spec in chain.from_iterable(plan) if not spec.is_global).most_common()
    text = "; ".join(f"window {spec.window}, sink {spec.sink}" for spec, _ in kinds[:3])
    more = f"; {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""
    local = f"{plan.num_heads - plan.num_global} local" + (f" ({text}{more})" if kinds else "")
    stored = Counter(spec.storage for spec in chain.from_iterable(plan) if spec.storage != "model")
    of_them = ", ".join(f"{stored[name]} in {name}" for name in _GLOBAL_GLYPHS if stored[name])
    kept = f"{plan.num_global} global" + (f" ({of_them})" if of_them else "")
    return f"HeadPlan: {shape(tuple(map(len, plan.heads)))}, {kept}, {local}"


def _glyphs(plan: HeadPlan) -> list[str]:
    """Return a row of glyphs for each layer, in columns, and the legend."""
    windows = sorted({spec.window for spec in chain.from_iterable(plan) if spec.window is not None})
    stored = [
        s for s in _GLOBAL_GLYPHS if s == "model" or any(s == spec.storage for spec in chain.from_iterable(plan))
    ]
    glyphs: dict[tuple[int | None, str], str] = {(None, storage): _GLOBAL_GLYPHS[storage] for storage in stored}
    for i, window in enumerate(windows):
        glyphs[window, "model"] = _LOCAL_GLYPHS[i * len(_LOCAL_GLYPHS) // len(windows)]
    digits, width = len(str(len(plan) - 1)), max(map(len, plan.heads))
    rows_of = ("".join(glyphs[spec.window, spec.storage] for spec in layer) for layer in plan)
    cells = [f"  {i:>{digits}}  {row:<{width}}" for i, row in enumerate(rows_of)]
    columns = min(-(-len(cells) // _MAX_ROWS), max(1, _MAX_WIDTH // len(cells[0])))
    rows = -(-len(cells) // columns)
    legend = "".join(f"  {_GLOBAL_GLYPHS[s]} {'global' if s == 'model' else s}" for s in stored)
    legend += "   window:" if windows else ""
    for glyph in _LOCAL_GLYPHS:
        if shared := [window for window in windows if glyphs[window, "model"] == glyph]:
            legend += f"  {glyph} {shared[0]}" + (f" to {shared[-1]}" if len(shared) > 1 else "")
    return [*("  ".join(cells[row::rows]).rstrip() for row in range(rows)), legend]


def _saving(plan: HeadPlan) -> str:
    parts, stored = [], any(spec.storage != "model" for spec in chain.from_iterable(plan))
    for thousands in (8, 32, 128):
        length = thousands * 1024
        share = plan.nbytes(length, _HEAD_DIM, _ITEMSIZE) / (plan.num_heads * length * 2 * _HEAD_DIM * _ITEMSIZE)
        percent = f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.1f}"
        parts.append(f"{thousands}K {percent} % ({1 / share:.1f}x less)")
    return "KV kept" + (f" (head_dim {_HEAD_DIM}, bfloat16)" if stored else "") + ": " + ", ".join(parts)
