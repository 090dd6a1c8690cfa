"""Cold pages without a cache: what is dense attention over keys and values that went through bits."""

import pytest
import torch
from families import make_model
from texts import profiling_prompts as prompts

from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.attention import stored
from redknot_hf.attention.stored import attend_stored, through_bits
from redknot_hf.attention.watching import restricted, watching
from redknot_hf.profiling import profile_heads


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_every_query_sees_the_pages_cold_that_its_chunk_finds_so(storage, monkeypatch):
    """Whichever are asked for."""
    monkeypatch.setattr(stored, "CHUNK", 100)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 600, 16, generator=generator) for heads in (4, 2, 2))
    options = {"scale": 0.25, "softcap": None, "s_aux": None}
    found = attend_stored(torch.nn.Module(), query, key, value, storage, options)
    cold = through_bits(key, value, stored.BITS[storage])
    for token in (0, 99, 200, 300, 399, 599):
        last = 64 * (1 + max((token // 100 * 100 - 128) // 64 - 1, 0))
        keys, values = (x.clone()[:, :, : token + 1] for x in (key, value))
        keys[:, :, 64:last], values[:, :, 64:last] = (x[:, :, 64 : min(last, token + 1)] for x in cold)
        scores = (query[0, :, token].unflatten(0, (2, 2)) @ keys[0].mT * 0.25).softmax(-1) @ values[0]
        torch.testing.assert_close(found[0, token], scores.flatten(0, 1), rtol=1e-4, atol=1e-5)
    for rows in ((0, 3, 3, 40), (5, 99, 100, *range(300, 560, 2), 599)):
        some = attend_stored(torch.nn.Module(), query[:, :, list(rows)], key, value, storage, options, rows)
        torch.testing.assert_close(some, found[:, list(rows)], rtol=1e-4, atol=1e-5)


def test_masks_that_are_kept_outlive_inference_mode():
    """A backward pass on a GPU keeps them."""
    stored._parts.cache_clear()
    with torch.inference_mode():
        (part,) = stored._parts(range(200), 256, 2, torch.float32, torch.device("cpu"))
    assert not part.bias.is_inference()


def test_bits_cost_what_they_are(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 2, 200, 16, generator=generator) for _ in range(2))
    errors = {bits: (through_bits(key, value, bits)[0] - key).abs().max() for bits in (4, 8)}
    assert 0 < errors[8] < 0.02 < errors[4] < 0.4
    assert (through_bits(key, value, 4)[0][:, :, 192:] == key[:, :, 192:]).all(), "no full page"
    assert through_bits(key[:, :, :63], value[:, :, :63], 4)[0].shape[2] == 63


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_heads_of_all_kinds_in_one_layer(family):
    """A head's output is that of a layer whose heads are all like it, whatever stands beside it."""
    model, (prompt, _) = make_model(family), prompts(400)
    kinds = [HeadSpec(8, 1), HeadSpec(storage="int4"), HeadSpec(storage="int8"), HeadSpec()]
    seen = {}

    def watcher(call):
        if call.layer == 1:
            seen["mixed"] = call.attend(tuple(kinds[: call.heads]))
            seen["alone"] = [call.attend((kind,) * call.heads) for kind in kinds[: call.heads]]
        return call.attend((HeadSpec(),) * call.heads)

    with torch.no_grad(), watching(model, watcher):
        model(prompt.ids[None], use_cache=False)
    group = seen["mixed"].shape[2] // len(seen["alone"])
    for head, alone in enumerate(seen["alone"]):
        mine = slice(head * group, (head + 1) * group)
        torch.testing.assert_close(seen["mixed"][:, :, mine], alone[:, :, mine], rtol=1e-4, atol=1e-5)


def test_a_profile_of_windows_and_storages():
    model = make_model("llama")
    inputs = prompts(400, 4)
    profile = profile_heads(model, inputs, windows=(8, 100), storages=("int8", "int4"), budget=0.5)
    assert [(spec.window, spec.storage) for spec in profile.choices] == [
        (8, "model"), (100, "model"), (None, "int4"), (None, "int8"),
    ]  # fmt: skip
    means = dict(zip(profile.choices, profile.errors.mean(0), strict=True))
    assert means[HeadSpec(8, 4)] > means[HeadSpec(100, 4)]
    assert means[HeadSpec(storage="int4")] > means[HeadSpec(storage="int8")]
    assert (profile.errors[:, 2] >= profile.errors[:, 3]).all()
    assert profile.errors[:, 3].min() > 0
    plan = profile.plan()
    assert plan.nbytes(400, 16, 4) <= 0.5 * 16 * 400 * 32 * 4
    assert {spec.storage for layer in plan for spec in layer} >= {"int4"}
    whole, mine = (logits(model, p, inputs[0]) for p in (HeadPlan.uniform(model.config, HeadSpec()), plan))
    assert not torch.allclose(whole, mine)


def logits(model, plan, prompt):
    with torch.no_grad(), watching(model, restricted(plan)):
        return model(prompt.ids[None], use_cache=False).logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storages": ("int2",)}, "choose different ones of"),
        ({"storages": ("int4", "int4")}, "choose different ones of"),
        ({"storages": ("int4",), "method": "mass"}, "mass looks at windows alone"),
        ({"storages": ("int4",), "method": "loss", "global_ratio": 0.5}, "give a budget, or no storages"),
    ],
)
def test_what_no_storage_serves_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        profile_heads(make_model("llama"), prompts(), windows=(4,), **options)
