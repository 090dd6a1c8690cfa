"""`redknot serve` under torchrun: processes that share the model, of which the first listens and the others follow."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from .terminal import fail

if TYPE_CHECKING:
    from redknot_hf.plan.plan import HeadPlan
    from redknot_hf.serving import Engine


def number() -> int:
    """Which rank this process is."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many share the model; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def check(store: str | None, device: str | None, balance: bool) -> None:
    """Checks options that mean something else where ranks share a model.

    Raises:
        ValueError: One is off; says what to do.
    """
    if count() == 1:
        if balance:
            raise ValueError("--balance levels the ranks of a shared model: start it with torchrun --no-python "
                             "--nproc-per-node N redknot serve ...")  # fmt: skip
        return
    if store is not None:
        raise ValueError(
            f"--store {store}: ranks of one model do not store segments, as one may lose what another has; leave it "
            "out, or serve a whole model a GPU"
        )
    if device is not None:
        raise ValueError(f"--device {device}: under torchrun every rank takes the GPU of its number; leave it out")


def balanced(model: Any, plan: HeadPlan, length: int | None) -> HeadPlan:
    """Puts a model's heads into the order in which ranks hold about as many bytes, and the plan too.

    Args:
        model: Shared; its weights are mutated.
        plan: In the model's own order.
        length: Tokens of a sequence for which it is so; the model's limit by default.
    """
    from redknot_hf.parallel import reorder_heads
    from redknot_hf.plan.per_layer import text_config

    limit = getattr(text_config(model), "max_position_embeddings", 32768)
    placement = plan.balanced(count(), length or limit, model.config)
    reorder_heads(model, placement)
    return placement.plan


def follow(engine: Engine) -> None:
    """Does what rank 0 does until it ends, also when all ranks are told to end: rank 0 lets answers be finished."""
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, signal.SIG_IGN)
    try:
        engine.follow()
    except RuntimeError as e:
        fail(e)


def leave() -> None:
    """Ends what ranks have exchanged tensors through, when nothing uses it any more."""
    if count() > 1:
        from torch import distributed

        distributed.destroy_process_group()
