"""What a config says of each layer's keys and values."""

import pytest
from families import FAMILIES, make_model

from redknot_hf.plan.per_layer import kv_dims, kv_heads


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_dims_are_those_of_the_projections(family):
    model = make_model(family)
    heads, dims = kv_heads(model.config), kv_dims(model.config)
    assert len(heads) == len(dims) == model.config.num_hidden_layers
    for layer, number, (key, value) in zip(model.model.layers, heads, dims, strict=True):
        attention = layer.self_attn
        if getattr(attention, "k_proj", None) is not None:  # a layer that shares keys has none
            assert attention.k_proj.out_features == number * key
        if getattr(attention, "v_proj", None) is not None:
            assert attention.v_proj.out_features == number * value
