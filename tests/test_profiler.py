import pytest
import torch
from families import make_model
from texts import profiling_prompts as prompts

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import Prompt, profile_heads, profiler


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def test_a_profile_says_where_it_comes_from(model, tmp_path):
    seen = []
    profile = profile_heads(model, prompts(), windows=(8, 4), budget=0.5, report=lambda *step: seen.append(step))
    assert seen == [("drift", 1, 2), ("drift", 2, 2)]
    assert profile.windows == (4, 8)
    assert profile.length == 40
    assert profile.head_dims == ((16, 16),) * 2
    assert profile.itemsize == 4
    assert profile.provenance["calibration"]["scored"] == 78
    plan = profile.plan()
    assert plan.nbytes(40, 16, 4) <= 0.5 * 40 * 8 * 2 * 16 * 4
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


def test_gradients_that_do_not_fit_name_what_does(model, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr(profiler, "measured", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"'fisher' .* memory on prompts of 40 tokens: .* by drift"):
        profile_heads(model, prompts(), windows=(4,), method="fisher")
    with pytest.raises(torch.OutOfMemoryError, match="9 GiB"):
        profile_heads(model, prompts(), windows=(4,))


@pytest.mark.parametrize("method", ["drift", "fisher", "loss", "gates"])
def test_within_inference_mode_the_profile_is_the_same(method):
    """Its prompts are made there too."""
    model = make_model("llama", num_hidden_layers=1)
    options = {"windows": (4,), "method": method, "budget": 0.5, "steps": 2}
    outside = profile_heads(model, prompts(), **options)
    with torch.inference_mode():
        inside = profile_heads(model, prompts(), **options)
        assert torch.is_inference_mode_enabled()
    assert (inside.errors == outside.errors).all()
    assert inside.picks().tolist() == outside.picks().tolist()


def test_weights_that_can_have_no_gradients_are_told():
    with torch.inference_mode():
        model = make_model("llama", num_hidden_layers=1)
    profile_heads(model, prompts(), windows=(4,))
    with pytest.raises(ValueError, match=r"method='fisher' needs gradients, and .* torch.inference_mode\(\) has none"):
        profile_heads(model, prompts(), windows=(4,), method="fisher")


def test_a_model_with_other_attention_is_told():
    model = make_model("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        profile_heads(model, prompts(), windows=(4,))


def test_a_model_that_computes_nan_is_told():
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        profile_heads(model, prompts(), windows=(4,))


def test_prompts_may_be_plain_rows_of_ids(model):
    ids = torch.stack([prompt.ids for prompt in prompts()])
    first = profile_heads(model, ids, windows=(4,))
    assert (first.errors == profile_heads(model, prompts(), windows=(4,)).errors).all()
    assert (first.errors == profile_heads(model, ids.tolist(), windows=(4,)).errors).all()


def test_out_of_time_fewer_prompts_are_measured_and_the_profile_says_how_many(model):
    profile = profile_heads(model, prompts(count=6), windows=(4,), budget=0.5, seconds=0)
    assert profile.provenance["calibration"]["prompts"] == 2
    whole = profile_heads(model, prompts(count=6), windows=(4,), budget=0.5, seconds=1000)
    assert whole.provenance["calibration"]["prompts"] == 5
    assert profile.provenance["held_out"][0]["prompts"] == whole.provenance["held_out"][0]["prompts"] == 1


def test_without_a_bound_the_smallest_budget_that_holds_is_the_target(model):
    text = prompts(count=8)
    profile = profile_heads(model, text, windows=(4, 12), max_kl=0.2)
    (row,) = profile.provenance["held_out"]
    assert row["holds"]
    assert row["kl"] <= 0.2
    tighter = profile_heads(model, text, windows=(4, 12), max_kl=0.02)
    assert profile.target["budget"] < tighter.target["budget"] <= 1
    single = [Prompt(prompt.ids, kind=str(i)) for i, prompt in enumerate(prompts(count=5))]
    for few, told in ((prompts(), r"2 inputs \(kinds: 1\) leave none: give 4"), (single, r"\(kinds: 5\) .*: give 6")):
        with pytest.raises(ValueError, match=f"max_kl is looked for on prompts held out, and .*{told} or more"):
            profile_heads(model, few, windows=(4,), max_kl=0.1)
    with pytest.raises(ValueError, match="max_kl=0: give nats"):
        profile_heads(model, prompts(count=4), windows=(4,), max_kl=0)


def test_where_no_kind_can_be_done_no_budget_holds(model):
    asked = [Prompt(prompt.ids, kind="riddle") for prompt in prompts(count=6)]
    with pytest.raises(ValueError, match="the model itself can do none of the kinds"):
        profile_heads(model, asked, windows=(4, 12), max_kl=0.2)


def test_a_folder_is_named_without_its_path(model, tmp_path):
    model.config.name_or_path = str(tmp_path)
    try:
        profile = profile_heads(model, prompts(), windows=(4,))
    finally:
        model.config.name_or_path = ""
    assert profile.provenance["model"] == tmp_path.name


def test_windows_fit_the_prompts_by_default(model):
    assert profile_heads(model, prompts()).windows == (10,)
    assert profile_heads(model, prompts(200)).windows == (50, 64)


@pytest.mark.parametrize("method", ["drift", "mass", "loss", "gates"])
@pytest.mark.parametrize("family", ["gemma4", "gemma4_ragged", "mimo_v2_flash"])
def test_layers_may_differ_in_heads_and_dims(family, method):
    model = make_model(family)
    found = profile_heads(model, prompts(), windows=(4,), method=method, budget=0.6, steps=2, seconds=5)
    heads = tuple(map(len, found.plan()))
    assert heads == tuple(map(len, HeadPlan.uniform(model.config, HeadSpec())))
    assert len(found.errors) == sum(heads) - 8 * (family == "gemma4")  # two of its layers attend others' keys
    assert 0 < found.plan().num_global < sum(heads)
