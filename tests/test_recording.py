import pytest
import torch
from families import make_model
from oracle import random_plan, under_plan
from redknot_kernels import UNBOUNDED
from transformers import DynamicCache

from redknot_hf import cache_argument
from redknot_hf.reuse.recording import record

PREFIX = [5, 6, 7]


@pytest.fixture(scope="module")
def model():
    return make_model("gemma3", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def plan(model):
    return random_plan(model.config, seed=3)


@pytest.mark.parametrize("keep", ["plan", "full"])
@pytest.mark.parametrize("prefix", [[], PREFIX])
def test_a_segment_holds_what_its_heads_keep(model, plan, keep, prefix):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 97, (n,), generator=generator).tolist() for n in (600, 97, 2)]
    segments = record(model, plan, ids, prefix, keep=keep, addresses=["a", "b", "c"], page_size=32)
    for text, segment in zip(ids, segments, strict=True):
        assert segment.ids == tuple(text)
        assert segment.prefix == tuple(prefix)
        cache = DynamicCache(config=model.config)
        cache.layers = [type(cache.layers[2])() for _ in cache.layers]  # also what lies beyond sliding windows
        with under_plan(model, plan), torch.no_grad():
            model(torch.tensor([prefix + text]), **cache_argument(model, cache))
        for i, layer in enumerate(cache.layers):
            kept = segment.layers[i]
            assert (keep == "full") == all(w >= UNBOUNDED for w in kept.window) or all(
                spec.is_global for spec in plan[i]
            )
            heads, tokens = (torch.from_numpy(x) for x in kept.packed(len(text)))
            for held, computed in ((segment.keys(i), layer.keys), (segment.values(i), layer.values)):
                torch.testing.assert_close(held, computed[0, heads, len(prefix) + tokens], atol=1e-4, rtol=1e-4)
