"""Reading and answering apart: one process reads prompts, another goes on from what it has read.

The wire is the segment store. Who reads stores all of a prompt but its last token as a segment without a prefix; who
answers opens it as the beginning of the prompt, exactly, and reads the last token. Both have the same model and plan,
and stores with a tier in common (`remote=`, or a folder). What got lost on the way is read by the one who answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from redknot_hf.cache.span import Span
from redknot_hf.reuse.ids import Ids, as_ids
from redknot_hf.reuse.store import SegmentStore
from redknot_hf.reuse.transfer import as_span

from .engine import Engine
from .request import Request, Sampling


def read_ahead(store: SegmentStore, prompts: Sequence[Ids]) -> list[str]:
    """Reads prompts into a store, in batches; what another process has read already is not read again.

    Args:
        store: Of the model and the plan of whoever answers, with a tier in common.
        prompts: Ids of each.

    Returns:
        The address of each prompt's segment, by which a router knows who holds it.

    Raises:
        ValueError: A prompt has fewer than two tokens: there is nothing to read ahead of the last one.
    """
    return [ref.address for ref in store.add_all([_ahead(prompt) for prompt in prompts])]


def answer(
    engine: Engine, store: SegmentStore, prompt: Ids, sampling: Sampling | None = None, **options: Any
) -> Request:
    """Hands a prompt in whose beginning was read elsewhere; the tokens are those of an engine that reads it itself.

    Args:
        engine: Of the model and plan of the store.
        store: Where the beginning is; read anew there, and counted, if it is not.
        prompt: All ids.
        sampling, options: As `Engine.submit` takes them, but for `source`.

    Raises:
        ValueError: The store is another model's or plan's, the prompt has fewer than two tokens, or the request can
            never be served.
    """
    source = beginning(engine, store, prompt)
    return engine.submit(list(as_ids(prompt)), sampling, source=source, **options)


def beginning(engine: Engine, store: SegmentStore, prompt: Ids) -> Callable[[], Span]:
    """What makes the beginning of a prompt that was read elsewhere, for `Engine.submit(source=)`.

    Args:
        engine, store, prompt: As `answer` has them.

    Raises:
        ValueError: The store is another model's or plan's, or the prompt has fewer than two tokens.
    """
    if store.model is not engine.model or store.plan != engine.plan:
        raise ValueError("the store is of another model or plan than the engine: make SegmentStore(engine.model, "
                         "engine.plan, remote=...)")  # fmt: skip
    if store.keep != "plan":
        raise ValueError(f"the store keeps {store.keep!r}, more than an engine's pages take: pass keep='plan'")
    ref = store.ref(_ahead(prompt))
    return lambda: as_span(store.get(ref))


def _ahead(prompt: Ids) -> tuple[int, ...]:
    ids = as_ids(prompt)
    if len(ids) < 2:
        raise ValueError(f"a prompt of {len(ids)} tokens: its last one is read by who answers, so give two at least")
    return ids[:-1]
