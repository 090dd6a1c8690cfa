"""What a transformers config says of the keys and values of each layer; layers may differ in heads and in dims."""

from typing import Any

# Model types whose sliding layers have so many times the KV heads that the config says.
_IN_SLIDING_LAYERS = {"mimo_v2_flash": 2}


def kv_heads(config: Any) -> tuple[int, ...]:
    """Return the KV heads of each layer of the (text) model with this config.

    Raises:
        ValueError: It is not the config of a decoder.
    """
    config = text_config(config)
    layers = getattr(config, "num_hidden_layers", None)
    if getattr(config, "is_heterogeneous", False):
        heads = [_heads(layer) for layer in config.per_layer_config]
    else:
        heads = _heads(config)
        if isinstance(heads, int) and isinstance(layers, int):
            heads = [heads * _times(config, i) for i in range(layers)]
    if isinstance(heads, (list, tuple)) and len(heads) == layers:
        return tuple(heads)
    found = f"num_hidden_layers={layers!r} and {heads!r} KV heads"
    raise ValueError(f"{type(config).__name__} has {found}: give the config of a decoder, model.config")


def kv_dims(config: Any) -> tuple[tuple[int, int], ...]:
    """Return the elements of a key and of a value in each layer of the (text) model with this config."""
    config = text_config(config)
    if getattr(config, "is_heterogeneous", False):
        return tuple(_dims(layer) for layer in config.per_layer_config)
    return (_dims(config),) * config.num_hidden_layers


def kv_sources(config: Any) -> tuple[int, ...]:
    """Return for each layer that whose keys it attends to: itself, or an earlier one that shares its own."""
    config = text_config(config)
    layers = config.num_hidden_layers
    first = layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    kinds = getattr(config, "layer_types", None) or [None] * layers
    return tuple(
        i if i < first else max((j for j in range(first) if kinds[j] == kinds[i]), default=i) for i in range(layers)
    )


def text_config(config: Any) -> Any:
    """Return the config of the text model, given that of the whole model or the model itself.

    Raises:
        ValueError: It is neither.
    """
    config = getattr(config, "config", config)
    if hasattr(config, "get_text_config"):
        return config.get_text_config(decoder=True)
    if hasattr(config, "__dict__"):  # whatever else names its layers and heads
        return config
    raise ValueError(f"{config!r:.80} is no config: give model.config")


def _heads(config: Any) -> Any:
    return getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)


def _times(config: Any, layer: int) -> int:
    times = _IN_SLIDING_LAYERS.get(getattr(config, "model_type", ""), 1)
    return times if times > 1 and config.layer_types[layer] == "sliding_attention" else 1


def _dims(config: Any) -> tuple[int, int]:
    key = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return key, getattr(config, "v_head_dim", None) or key
