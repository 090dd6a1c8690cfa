"""How a plan prints: who it is, a glyph for each head, what it saves, and what confirms it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

from .evidence import evidence

if TYPE_CHECKING:
    from .plan import HeadPlan
    from .spec import HeadSpec

# Global heads are blocks, the lighter the fewer bits they hold. A local head's glyph grows with its window.
_GLOBAL_GLYPHS = {"model": "█", "int8": "▓", "int4": "▒"}
_LOCAL_GLYPHS = "·▁▂▃▄▅▆"
_MAX_LAYERS = 96  # side by side, in a terminal of usual width
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
    """Return the map of heads, layers to the right and heads down as in figures, and the legend."""
    windows = sorted({spec.window for spec in chain.from_iterable(plan) if spec.window is not None})
    stored = [
        s for s in _GLOBAL_GLYPHS if s == "model" or any(s == spec.storage for spec in chain.from_iterable(plan))
    ]
    glyphs: dict[tuple[int | None, str], str] = {(None, storage): _GLOBAL_GLYPHS[storage] for storage in stored}
    for i, window in enumerate(windows):
        glyphs[window, "model"] = _LOCAL_GLYPHS[i * len(_LOCAL_GLYPHS) // len(windows)]
    bands = -(-len(plan) // _MAX_LAYERS)
    layers = -(-len(plan) // bands)  # of a band
    rows = [
        line
        for first in range(0, len(plan), layers)
        for line in _band(plan.heads[first : first + layers], first, glyphs)
    ]
    legend = "".join(f"  {_GLOBAL_GLYPHS[s]} {'global' if s == 'model' else s}" for s in stored)
    legend += "   window:" if windows else ""
    for glyph in _LOCAL_GLYPHS:
        if shared := [window for window in windows if glyphs[window, "model"] == glyph]:
            legend += f"  {glyph} {shared[0]}" + (f" to {shared[-1]}" if len(shared) > 1 else "")
    return [*rows, legend]


def _band(
    plan: tuple[tuple[HeadSpec, ...], ...], first: int, glyphs: dict[tuple[int | None, str], str]
) -> Iterator[str]:
    """Layers side by side: their numbers, every fifth, and a line for each KV head."""
    most = max(map(len, plan))
    digits = len(str(most - 1))
    ruler = "".join(f"{i:<5}" for i in range(-(-first // 5) * 5, first + len(plan), 5))
    yield f"  {'layer':>{digits + 5}} {' ' * (-first % 5)}{ruler}".rstrip()
    for head in range(most):
        cells = "".join(
            glyphs[layer[head].window, layer[head].storage] if head < len(layer) else " " for layer in plan
        )
        yield f"  {'' if head else 'head':<4} {head:>{digits}} {cells}".rstrip()


def _saving(plan: HeadPlan) -> str:
    parts, stored = [], any(spec.storage != "model" for spec in chain.from_iterable(plan))
    for thousands in (8, 32, 128):
        length = thousands * 1024
        share = plan.nbytes(length, _HEAD_DIM, _ITEMSIZE) / (plan.num_heads * length * 2 * _HEAD_DIM * _ITEMSIZE)
        percent = f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.1f}"
        parts.append(f"{thousands}K {percent} % ({1 / share:.1f}x less)")
    return "KV kept" + (f" (if head_dim is {_HEAD_DIM}, in bfloat16)" if stored else "") + ": " + ", ".join(parts)
