"""What a model asks of attention besides queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def attention_options(query: Tensor, scaling: float | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns scale, softcap and logits of the sink, as the kernels take them.

    Args:
        query: Any; the scale is by its last dimension unless the model says one.
        scaling: The model's.
        asked: What else came with the call, by transformers' names.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return {"scale": scale, "softcap": asked.get("softcap"), "s_aux": asked.get("s_aux")}
