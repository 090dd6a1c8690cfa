"""Every layer of transformers' cache that holds keys has its counterpart; the others stay what they are."""

import pytest
from families import FAMILIES, make_model

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.cache.counterparts import check_model, layers_of
from redknot_hf.cache.layer import RedKnotLayer


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_hold_keys_are_ours(family):
    config = make_model(family).config.get_text_config()
    check_model(config)
    layers = layers_of(config, HeadPlan.uniform(config, HeadSpec()), 16, None, "torch", 20)
    others = {type(layer).__name__ for layer in layers if not isinstance(layer, RedKnotLayer)}
    assert others <= {"DummyLayer", "LinearAttentionLayer"}
    ours = [layer for layer in layers if isinstance(layer, RedKnotLayer)]
    assert ours
    assert {(layer.page_size, layer.hot, layer.impl) for layer in ours} == {(16, 20, "torch")}
