import pytest
import torch
from families import make_model
from oracle import random_plan

from redknot_hf import HeadPlan, HeadSpec, SegmentStore, assemble
from redknot_hf.reuse.gate import gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3", "phi3"])
def test_models_with_rotary_positions_pass(family, dtype):
    model = make_model(family, dtype=dtype, max_position_embeddings=1024)
    verdict = gate(model, random_plan(model.config))
    assert verdict.passed, verdict.reason
    most = 1e-4 if dtype == torch.float32 else 0.1
    assert 0 <= verdict.logits_error < most
    assert 0 < verdict.keys_error < most


def learned_positions(model):
    """Adds to every token what depends on its place: a way in that is not RoPE."""
    table = torch.randn(4096, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def add(module, args, kwargs):
        places = kwargs["position_ids"]
        kwargs["hidden_states" if "hidden_states" in kwargs else "x"] = args[0] + table[places]
        return (args[0] + table[places], *args[1:]), {
            k: v for k, v in kwargs.items() if k not in ("hidden_states", "x")
        }

    model.model.layers[1].register_forward_pre_hook(add, with_kwargs=True)


def test_a_model_that_knows_its_place_by_other_means_is_refused():
    model = make_model("llama", max_position_embeddings=1024)
    learned_positions(model)
    plan = HeadPlan.uniform(model.config, HeadSpec())
    verdict = gate(model, plan)
    assert not verdict.passed
    assert "llama" in verdict.reason

    store = SegmentStore(model, plan)
    refs = store.add_all([[1, 2, 3], [4, 5, 6, 7]])
    with pytest.raises(ValueError, match=r"segments are not reused.*boundary='all'"):
        assemble(model, refs, boundary=1)
    assert assemble(model, refs, boundary="all").recomputed_tokens == 7
    assert store.verdict() is store.verdict()


def test_a_refusal_can_be_overruled_where_nothing_moves():
    model = make_model("llama", max_position_embeddings=1024)
    learned_positions(model)
    store = SegmentStore(model, HeadPlan.uniform(model.config, HeadSpec()))
    first = store.add([1, 2, 3])
    assert assemble(model, [first], force=True).reused_tokens == 3
    if store.verdict().relocation is None:
        with pytest.raises(ValueError, match="cannot be moved"):
            assemble(model, [first, first], force=True, boundary=1)
