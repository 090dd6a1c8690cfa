"""`impl="triton"` through `generate`: the tokens of the plain kernels (in the interpreter where no GPU is)."""

import pytest
import torch
from families import VOCABULARY, make_model

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

pytest.importorskip("triton")


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_tokens_are_those_of_the_plain_kernels(family):
    model = make_model(family, num_hidden_layers=1, layer_types=None if family == "llama" else ["full_attention"])
    heads = [HeadSpec(), HeadSpec(window=7, sink=2), HeadSpec(window=20, sink=3), HeadSpec(window=7, sink=2)]
    plan = HeadPlan((tuple(heads),))
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :9], mask[1, :9] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": 25}
    results = []
    for impl in ("torch", "triton"):
        cache = RedKnotCache(model.config, plan, page_size=16, impl=impl)
        results.append(model.generate(ids, past_key_values=cache, **options))
    assert torch.equal(*results)


def test_the_default_needs_no_triton():
    model = make_model("llama", num_hidden_layers=1)
    cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()))
    model(torch.ones(1, 3, dtype=torch.long), **cache_argument(model, cache))
    assert cache.layers[0].storage.kernels.decode.__module__ == "redknot_kernels.plain.decode"
