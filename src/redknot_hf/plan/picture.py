"""How a plan prints: who it is, a glyph for each head, and what it saves."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import HeadPlan

# Global heads are full blocks. A local head's glyph grows with its window.
_GLOBAL_GLYPH = "█"
_LOCAL_GLYPHS = "·▁▂▃▄▅▆"
_MAX_ROWS = 20
_MAX_WIDTH = 100


def picture(plan: HeadPlan) -> str:
    """The whole of it, in lines."""
    return "\n".join([_header(plan), *_glyphs(plan), _saving(plan)])


def shape(counts: tuple[int, ...]) -> str:
    """Layers and KV heads in words."""
    heads = str(counts[0]) if len(set(counts)) == 1 else str(list(counts))
    return f"{len(counts)} layers x {heads} KV heads"


def _header(plan: HeadPlan) -> str:
    kinds = Counter(spec for spec in chain.from_iterable(plan) if not spec.is_global).most_common()
    text = "; ".join(f"window {spec.window}, sink {spec.sink}" for spec, _ in kinds[:3])
    more = f"; {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""
    local = f"{plan.num_heads - plan.num_global} local" + (f" ({text}{more})" if kinds else "")
    return f"HeadPlan: {shape(tuple(map(len, plan.heads)))}, {plan.num_global} global, {local}"


def _glyphs(plan: HeadPlan) -> list[str]:
    """Return a row of glyphs for each layer, in columns, and the legend."""
    windows = sorted({spec.window for spec in chain.from_iterable(plan) if spec.window is not None})
    glyphs: dict[int | None, str] = {None: _GLOBAL_GLYPH}
    glyphs |= {window: _LOCAL_GLYPHS[i * len(_LOCAL_GLYPHS) // len(windows)] for i, window in enumerate(windows)}
    digits, width = len(str(len(plan) - 1)), max(map(len, plan.heads))
    rows_of = ("".join(glyphs[spec.window] for spec in layer) for layer in plan)
    cells = [f"  {i:>{digits}}  {row:<{width}}" for i, row in enumerate(rows_of)]
    columns = min(-(-len(cells) // _MAX_ROWS), max(1, _MAX_WIDTH // len(cells[0])))
    rows = -(-len(cells) // columns)
    legend = f"  {_GLOBAL_GLYPH} global" + ("   window:" if windows else "")
    for glyph in _LOCAL_GLYPHS:
        if shared := [window for window in windows if glyphs[window] == glyph]:
            legend += f"  {glyph} {shared[0]}" + (f" to {shared[-1]}" if len(shared) > 1 else "")
    return [*("  ".join(cells[row::rows]).rstrip() for row in range(rows)), legend]


def _saving(plan: HeadPlan) -> str:
    parts = []
    for thousands in (8, 32, 128):
        length = thousands * 1024
        share = plan._kept(length) / (plan.num_heads * length)
        percent = f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.1f}"
        parts.append(f"{thousands}K {percent} % ({1 / share:.1f}x less)")
    return "KV kept: " + ", ".join(parts)
