import pytest
import torch
from families import make_model
from texts import profiling_prompts as prompts

from redknot_hf import HeadPlan
from redknot_hf.profiling import profile_heads


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def test_a_profile_says_where_it_comes_from(model, tmp_path):
    seen = []
    profile = profile_heads(model, prompts(), windows=(8, 4), budget=0.5, report=lambda *step: seen.append(step))
    assert seen == [("drift", 1, 2), ("drift", 2, 2)]
    assert profile.windows == (4, 8)
    assert profile.length == 40
    assert profile.head_dims == ((16, 16),) * 4
    assert profile.itemsize == 4
    assert profile.provenance["calibration"]["scored"] == 78
    plan = profile.plan()
    assert plan.nbytes(40, 16, 4) <= 0.5 * 40 * 16 * 2 * 16 * 4
    assert {"model", "revision", "calibration", "method", "budget", "drift"} <= plan.provenance.keys()
    plan.save(tmp_path / "plan.json")
    assert HeadPlan.load(tmp_path / "plan.json", model.config).provenance == plan.provenance


def test_the_same_prompts_give_the_same_profile(model):
    first, second = (profile_heads(model, prompts(), windows=(4,)) for _ in range(2))
    assert (first.errors == second.errors).all()
    assert first.provenance["calibration"] == second.provenance["calibration"]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (lambda: prompts(), {"windows": (40,)}, "40 tokens, and a window of 40"),
        (lambda: prompts(), {"windows": (4, 4)}, "different numbers"),
        (lambda: prompts(), {"windows": ()}, "different numbers"),
        (lambda: prompts(), {"windows": (4,), "method": "magic"}, "choose one of"),
        (lambda: prompts(), {"windows": (4,), "budget": 0.05}, "impossible"),
        (lambda: prompts(), {"windows": (4,), "budget": 1.5}, "share from 0 to 1"),
        (lambda: prompts(), {"windows": (4,), "budget": 0.5, "global_ratio": 0.5}, "exactly one"),
        (lambda: prompts(count=1), {"windows": (4,)}, "1 prompt"),
        (list, {"windows": (4,)}, "no prompts"),
        (lambda: torch.rand(2, 40), {"windows": (4,)}, "token ids"),
    ],
)
def test_wrong_input_is_told(model, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        profile_heads(model, inputs(), **options)


def test_a_model_with_other_attention_is_told():
    model = make_model("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        profile_heads(model, prompts(), windows=(4,))


def test_a_model_that_computes_nan_is_told():
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        profile_heads(model, prompts(), windows=(4,))


def test_prompts_may_be_plain_rows_of_ids(model):
    ids = torch.stack([prompt.ids for prompt in prompts()])
    first = profile_heads(model, ids, windows=(4,))
    assert (first.errors == profile_heads(model, prompts(), windows=(4,)).errors).all()
    assert (first.errors == profile_heads(model, ids.tolist(), windows=(4,)).errors).all()
