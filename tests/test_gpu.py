"""The equalities on an accelerator: `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch
from families import VOCABULARY, make_model
from oracle import masked_logits, random_plan
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache

from evals.tiny.corpus import Corpus
from evals.tiny.lexicon import Lexicon
from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument, captured_decoding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")]

TINY = Path(__file__).parents[1] / "evals" / "tiny"
IMPLS = ["torch", "triton"]
FAMILIES = ["llama", "mistral_sliding", "gemma2", "gemma3", "gemma3n", "gpt_oss", "phi3"]


def prompts():
    """Two rows of 200 ids, the second one padded."""
    ids = torch.randint(3, VOCABULARY, (2, 200), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :61], mask[1, :61] = 0, 0
    return ids.cuda(), mask.cuda()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_global_equals_dynamic_cache_token_for_token(family, impl):
    model = make_model(family).cuda()
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()), page_size=16, impl=impl)
    ours = model.generate(ids, past_key_values=cache, **options)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(ids, past_key_values=DynamicCache(config=model.config), **options))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_plan_equals_the_explicit_mask_at_every_step(family, impl):
    model = make_model(family).cuda()
    ids, mask = prompts()
    plan = random_plan(model.config, seed=len(family))
    expected = masked_logits(model, plan, ids, mask)
    cache = RedKnotCache(model.config, plan, page_size=16, impl=impl)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for start, stop in [(0, 100), (100, 152), (152, 160), *((i, i + 1) for i in range(160, 200))]:
            step = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
            logits = model(ids[:, start:stop], **cache_argument(model, cache), **step).logits
            real = mask[:, start:stop].bool()
            torch.testing.assert_close(logits[real], expected[:, start:stop][real], atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_beams_and_prompt_lookup(impl):
    model = make_model("llama").cuda()
    ids = prompts()[0][:1]
    for options in ({"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 8}):
        options |= {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()), page_size=16, impl=impl)
        ours = model.generate(ids, past_key_values=cache, **options)
        model.set_attn_implementation("eager")
        dense = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
        model.set_attn_implementation("redknot")
        assert torch.equal(ours, dense)


@pytest.mark.parametrize("how", ["eager", "generate", "captured_decoding"])
def test_greedy_tokens_are_the_twins_on_the_bundled_model(how):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="redknot").cuda()
    plan = HeadPlan.load(TINY / "plan.json", model.config)
    ids = torch.tensor([Corpus(Lexicon(), 0).collection(2048, 5).context]).cuda()
    options = {"max_new_tokens": 256, "do_sample": False}
    expected = model.generate(ids, past_key_values=RedKnotCache(model.config, plan, impl="torch"), **options)
    extra = {"disable_compile": True} if how == "eager" else {}
    extra |= {"custom_generate": captured_decoding} if how == "captured_decoding" else {}
    cache = RedKnotCache(model.config, plan, max_cache_len=2400)
    for _ in range(2):  # the second time nothing is compiled anew
        assert torch.equal(model.generate(ids, past_key_values=cache, **options, **extra), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
        cache.reset()


def test_generate_compiles_once_and_captures_one_graph(monkeypatch):
    begin, captured = torch.cuda.CUDAGraph.capture_begin, []
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "capture_begin", lambda self, *a, **k: captured.append(self) or begin(self, *a, **k)
    )
    torch._dynamo.reset()
    counters.clear()
    model = make_model("llama").cuda()
    ids, mask = prompts()
    plan = random_plan(model.config, seed=3)
    options = {"attention_mask": mask, "do_sample": False}
    cache = RedKnotCache(model.config, plan, max_cache_len=256)
    for new in (20, 40, 7):
        model.generate(ids, past_key_values=cache, max_new_tokens=new, **options)
        cache.reset()
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(captured) == 2  # PyTorch's first is empty: it keeps their memory


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3n", "gpt_oss"])
def test_captured_batches_with_padding(family):
    model = make_model(family).cuda()
    ids, mask = prompts()
    plan = random_plan(model.config, seed=3)
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    expected = model.generate(ids, past_key_values=RedKnotCache(model.config, plan, impl="torch"), **options)
    for extra in ({}, {"custom_generate": captured_decoding}):
        cache = RedKnotCache(model.config, plan, max_cache_len=256)
        assert torch.equal(model.generate(ids, past_key_values=cache, **options, **extra), expected)


def requested():
    """Bytes asked of the device's allocator and not given back; it may set aside up to 1 MiB more for a tensor."""
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize("impl", IMPLS)
def test_the_allocator_reports_what_the_cache_says(impl):
    model = make_model("llama").cuda().half()
    plan = HeadPlan.with_global(model.config, [(0, 0), (1, 1)], local=HeadSpec(window=64, sink=4))
    ids = torch.randint(3, VOCABULARY, (4, 8192), device="cuda")
    with torch.no_grad():
        model(ids[:, :256], **cache_argument(model, RedKnotCache(model.config, plan, impl=impl)), logits_to_keep=1)
        before = requested()
        cache = RedKnotCache(model.config, plan, impl=impl)
        model(ids, **cache_argument(model, cache), logits_to_keep=1)
    small = (
        sum(storage.mirror.table.nbytes for storage in cache._storages()) + 4096
    )  # tables, and what kernels look up
    assert cache.nbytes <= requested() - before <= cache.nbytes + small
    cache.offload()
    assert requested() - before <= small
    cache.prefetch()
    with torch.no_grad():
        model(ids[:, :1], **cache_argument(model, cache))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two accelerators")
@pytest.mark.parametrize("reserved", [None, 256])
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gpt_oss"])
def test_a_model_over_two_devices_decodes_the_tokens_of_one(family, reserved, tmp_path):
    model = make_model(family)
    model.save_pretrained(tmp_path)
    ids, mask = prompts()
    plan = random_plan(model.config, seed=5)
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "disable_compile": True}
    expected = model.cuda().generate(ids, past_key_values=RedKnotCache(model.config, plan, impl="torch"), **options)
    layers = len(model.model.layers)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{i}": int(i >= layers // 2) for i in range(layers)}
    split = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, attn_implementation="redknot")
    cache = RedKnotCache(split.config, plan, page_size=16, impl="triton", max_cache_len=reserved)
    assert torch.equal(split.generate(ids, past_key_values=cache, **options), expected)
    pools = [layer.storage.pool.pages.device.index for layer in cache.layers if layer.is_initialized]
    assert set(pools) == {0, 1}


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_stored_heads_decode_as_their_twins(storage):
    model = make_model("llama").cuda()
    plan = HeadPlan.uniform(model.config, HeadSpec()).stored(storage)
    ids = torch.randint(3, VOCABULARY, (2, 600), device="cuda")
    asked = {"do_sample": False, "max_new_tokens": 40, "attention_mask": torch.ones_like(ids)}
    twin = model.generate(ids, past_key_values=RedKnotCache(model.config, plan, impl="torch"), **asked)
    assert torch.equal(model.generate(ids, past_key_values=RedKnotCache(model.config, plan), **asked), twin)
    reserved = RedKnotCache(model.config, plan, max_cache_len=700)
    captured = model.generate(ids, past_key_values=reserved, custom_generate=captured_decoding, **asked)
    assert torch.equal(captured, twin)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_the_allocator_reports_what_stored_heads_hold(storage):
    model = make_model("llama").cuda().half()
    plans = [p := HeadPlan.uniform(model.config, HeadSpec()), p.stored(storage)]
    ids, found = torch.randint(3, VOCABULARY, (4, 8192), device="cuda"), []
    for plan in plans:
        with torch.no_grad():
            model(ids[:, :256], **cache_argument(model, RedKnotCache(model.config, plan)), logits_to_keep=1)
            before = requested()
            cache = RedKnotCache(model.config, plan)
            for part in ids.split(2048, 1):  # cold pages leave as they fill
                model(part, **cache_argument(model, cache), logits_to_keep=1)
        found.append(requested() - before)
        assert cache.nbytes <= found[-1]
        del cache
    assert found[1] < {"int8": 0.8, "int4": 0.6}[storage] * found[0]  # of heads of 16 dims, whose scales weigh much


@pytest.mark.parametrize("reserved", [None, 8448])
@pytest.mark.parametrize("narrower", ["windows", "int8", "int4"])
def test_compressing_gives_the_allocator_its_bytes_back(narrower, reserved):
    model = make_model("llama", max_position_embeddings=16384).cuda().half()
    whole = HeadPlan.uniform(model.config, HeadSpec())
    local = HeadPlan.with_global(model.config, [(0, 0)], local=HeadSpec(window=64, sink=4))
    plan = local if narrower == "windows" else whole.stored(narrower)
    ids = torch.randint(3, VOCABULARY, (4, 8192), device="cuda")
    with torch.no_grad():
        model(ids[:, :256], **cache_argument(model, RedKnotCache(model.config, plan)), logits_to_keep=1)
        before = requested()
        cache = RedKnotCache(model.config, whole, max_cache_len=reserved)
        for part in ids.split(2048, 1):
            model(part, **cache_argument(model, cache), logits_to_keep=1)
        held, full = cache.nbytes, requested() - before
        cache.compress(plan)
        left = requested() - before
    small = (
        sum(s.mirror.table.nbytes + s.cold._table.nbytes + s.cold._counts.nbytes for s in cache._storages()) + 65536
    )
    assert cache.nbytes <= left <= cache.nbytes + small
    assert full - left >= held - cache.nbytes - small
    assert cache.nbytes < {"windows": 0.2, "int8": 0.8, "int4": 0.6}[narrower] * held  # of 16 dims: scales weigh


@pytest.mark.parametrize("narrower", ["windows", "int8", "int4"])
def test_tokens_after_compressing_are_the_twins(narrower):
    model = make_model("llama").cuda()
    whole = HeadPlan.uniform(model.config, HeadSpec())
    plan = random_plan(model.config, seed=3) if narrower == "windows" else whole.stored(narrower)
    ids = torch.randint(3, VOCABULARY, (2, 400), device="cuda")
    answers = []
    for impl, reserved in (("torch", None), ("triton", None), ("triton", 470)):
        cache = RedKnotCache(model.config, whole, impl=impl, max_cache_len=reserved)
        extra = {"custom_generate": captured_decoding} if reserved else {}
        for new in (20, 20):
            asked = {"do_sample": False, "max_new_tokens": new, **extra}
            text = answers[-1] if cache.get_seq_length() else ids
            out = model.generate(text, past_key_values=cache, attention_mask=torch.ones_like(text), **asked)
            answers.append(out)
            if cache.plan == whole:
                cache.compress(plan)
    assert all(torch.equal(first, second) for first, second in zip(answers, answers[2:], strict=False))
