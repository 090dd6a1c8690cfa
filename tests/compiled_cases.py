"""Captured decoding: `generate` compiles the steps of a reserved cache once, and gives the same tokens.

`make test` runs this file on its own, without the checks of shapes that other tests run under: those are wrappers that
no compiler looks through. So the way of a token is counted here too, which wrappers would lengthen.
"""

import sys
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, make_model
from served import kept_after_its_end
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

import redknot_hf
from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument
from redknot_hf.cache.cache import row_layers
from redknot_hf.serving import Engine, Sampling
from redknot_hf.serving.capturing import CapturedStep

pytest.importorskip("triton")
# What depends on how a version of transformers calls a cache; the others are about the compiler and our own steps.
core = pytest.mark.core

LAYERS = {"llama": {}, "gemma2": {"layer_types": ["full_attention", "sliding_attention"]}}
LAYERS["gpt_oss"] = LAYERS["gemma2"]
LAYERS["gemma3n"] = {  # the second layer attends the first one's keys
    "layer_types": ["full_attention"] * 2,
    "num_kv_shared_layers": 1,
    "activation_sparsity_pattern": [0.0] * 2,
}
LAYERS["gemma4"] = {"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 1, "global_head_dim": 16}
HEADS = (HeadSpec(), HeadSpec(window=7, sink=2), HeadSpec(window=20, sink=3), HeadSpec(window=7, sink=2))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def tiny(family: str = "llama", layers: int = 2) -> tuple[PreTrainedModel, HeadPlan]:
    return make_model(family, num_hidden_layers=layers, **LAYERS[family]), HeadPlan((HEADS,) * layers)


def reserved(model: PreTrainedModel, plan: HeadPlan, slots: int = 64) -> RedKnotCache:
    return RedKnotCache(model.config, plan, page_size=16, impl="triton", max_cache_len=slots)


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 0, 0
    return ids, mask


def compiled(backend: str = "eager") -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


# On older versions one whose layers are alike, and one whose second layer attends the first one's keys.
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[core] if name in ("llama", "gemma3n") else []) for name in LAYERS]
)
def test_generate_compiles_once_and_gives_the_same_tokens(family):
    model, plan = tiny(family)
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids, past_key_values=RedKnotCache(model.config, plan, page_size=16), **options)
    cache = reserved(model, plan)
    for turn in ("new", "reset", "another"):
        cache = reserved(model, plan) if turn == "another" else cache
        assert torch.equal(model.generate(ids, past_key_values=cache, compile_config=compiled(), **options), expected)
        assert "26 tokens x 2 sequences" in str(cache)
        lengths = [layer.storage.rows.lengths.tolist() for _, layer in row_layers(cache)]
        assert lengths == [[26, 21]] * (1 if "num_kv_shared_layers" in LAYERS[family] else 2)
        cache.reset()
    assert counters["stats"]["unique_graphs"] == 1


def test_aot_autograd_leaves_the_pages_where_they_are():
    model, plan = tiny()
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, past_key_values=RedKnotCache(model.config, plan, page_size=16), **options)
    cache = reserved(model, plan)
    model.generate(ids, past_key_values=cache, max_new_tokens=1, attention_mask=mask)
    places = [layer.storage.pool.pages.keys.data_ptr() for layer in cache.layers]
    cache.reset()
    ours = model.generate(ids, past_key_values=cache, compile_config=compiled("aot_eager"), **options)
    assert torch.equal(ours, expected)
    assert [layer.storage.pool.pages.keys.data_ptr() for layer in cache.layers] == places


def test_an_eager_turn_follows_compiled_ones():
    model, plan = tiny()
    ids = prompts()[0][:, 5:]
    options = {"max_new_tokens": 3, "do_sample": False}
    cache, plain = reserved(model, plan), RedKnotCache(model.config, plan, page_size=16)
    answers = []
    for held, how in ((cache, {"compile_config": compiled()}), (plain, {})):
        out = model.generate(ids, past_key_values=held, **options, **how)
        answers.append(model.generate(torch.cat([out, ids[:, :9]], 1), past_key_values=held, **options, **how))
        held.crop(-5)
    assert torch.equal(*answers)
    with torch.no_grad():
        logits = [model(ids[:, :3], **cache_argument(model, held)).logits for held in (cache, plain)]
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)


def test_compiled_steps_go_on_after_a_cache_was_compressed():
    model, plan = tiny()
    ids, options = prompts()[0][:, 5:], {"max_new_tokens": 3, "do_sample": False}
    whole = HeadPlan.uniform(model.config, HeadSpec())
    cache, plain = reserved(model, whole), RedKnotCache(model.config, whole, page_size=16)
    answers = []
    for held, how in ((cache, {"compile_config": compiled()}), (plain, {})):
        out = model.generate(ids, past_key_values=held, **options, **how)
        held.compress(plan)
        answers.append(model.generate(torch.cat([out, ids[:, :9]], 1), past_key_values=held, **options, **how))
    assert torch.equal(*answers)


@core
def test_beams_of_a_reserved_cache():
    model, plan = tiny()
    ids, _ = prompts()
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = model.generate(ids[:1], past_key_values=RedKnotCache(model.config, plan, page_size=16), **options)
    cache = reserved(model, plan)
    assert torch.equal(model.generate(ids[:1], past_key_values=cache, compile_config=compiled(), **options), expected)


def test_room_is_asked_for_before_a_compiled_step():
    model, plan = tiny()
    ids, _ = prompts()
    cache = reserved(model, plan, 27)
    with pytest.raises(ValueError, match="27 slots are used and 1 more exceed max_cache_len=27"):
        model.generate(ids, past_key_values=cache, max_new_tokens=9, compile_config=compiled())
    assert cache.get_seq_length() == 27


def test_a_compiled_forward_of_ones_own_needs_no_mask():
    model, plan = tiny()
    ids, _ = prompts()
    cache, plain = reserved(model, plan), RedKnotCache(model.config, plan, page_size=16)
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        for held in (cache, plain):
            model(ids, **cache_argument(model, held))
        for i in range(3):
            ours = step(ids[:, i : i + 1], **cache_argument(model, cache)).logits
            torch.testing.assert_close(
                ours, model(ids[:, i : i + 1], **cache_argument(model, plain)).logits, atol=2e-5, rtol=1e-4
            )
    assert cache.get_seq_length() == 27


def test_a_growing_cache_breaks_the_graph_and_says_what_capturing_needs():
    model, plan = tiny()
    ids, _ = prompts()
    cache, plain = (RedKnotCache(model.config, plan, page_size=16) for _ in range(2))
    whole, parts = (torch.compile(model.forward, backend="eager", fullgraph=whole) for whole in (True, False))
    with torch.no_grad():
        for held in (cache, plain):
            model(ids, **cache_argument(model, held))
        with pytest.raises(torch._dynamo.exc.Unsupported, match="RedKnotCache with max_cache_len and impl='triton'"):
            whole(ids[:, :1], **cache_argument(model, cache))
        for step in (ids[:, :1], ids[:, :20]):
            ours = parts(step, **cache_argument(model, cache)).logits
            torch.testing.assert_close(ours, model(step, **cache_argument(model, plain)).logits, atol=2e-5, rtol=1e-4)


@core
def test_generate_reads_a_prompt_in_chunks_outside_of_the_graph():
    model, plan = tiny(layers=1)  # each layer breaks the graph of a chunk, and what is between is compiled
    ids, _ = prompts()
    options = {"max_new_tokens": 3, "do_sample": False, "prefill_chunk_size": 20}
    expected = model.generate(ids, past_key_values=RedKnotCache(model.config, plan, page_size=16), **options)
    compiling = compiled()
    compiling.fullgraph = False
    cache = reserved(model, plan)
    assert torch.equal(model.generate(ids, past_key_values=cache, compile_config=compiling, **options), expected)


def test_padding_in_a_compiled_step_is_skipped_and_told():
    model, plan = tiny()
    ids, _ = prompts()
    cache, plain = reserved(model, plan), RedKnotCache(model.config, plan, page_size=16)
    flags = torch.tensor([True, False])[:, None, None, None]
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
        model(ids, **cache_argument(model, plain))
        positions = torch.full((2, 1), 24)
        step(ids[:, :1], **cache_argument(model, cache), attention_mask=flags, position_ids=positions)
        ours = step(
            ids[:, 1:2], **cache_argument(model, cache), attention_mask=flags | True, position_ids=positions
        ).logits
        theirs = model(ids[:, 1:2], **cache_argument(model, plain), position_ids=positions).logits
    torch.testing.assert_close(ours[1], theirs[1], atol=2e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match=r"compiled step had padding.*cache\.reset\(\)"):
        cache.get_seq_length()


def test_steps_of_an_engine_compile_once_for_all_seats(monkeypatch):
    model, plan = tiny("gemma3n")  # its second layer attends the first one's keys
    plan = plan.stored("int8")
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **options: torch_compile(run, backend="eager", **options))
    ids, cache = prompts()[0][:1, :14], RedKnotCache(model.config, plan, page_size=16)
    expected = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)[0, 14:].tolist()
    sizes = {"max_batch": 3, "max_len": 32, "page_size": 16, "memory": 1 << 20, "parked": 0}
    engine = Engine(model, plan, impl="triton", compiled=True, **sizes)
    engine.reader.seats.captures = True  # as on a device with graphs; here its replays are steps
    assert engine.generate(ids.tolist(), Sampling(max_new_tokens=4))[0].ids == expected
    assert engine.reader.seats.replays == 3
    assert {size: type(step) for size, step in engine.reader.seats.graphs.items()} == {3: CapturedStep}
    assert counters["stats"]["unique_graphs"] == 1
    assert not kept_after_its_end(engine)


def test_a_decoded_token_enters_few_files_of_a_layer():
    """The host takes this way once for every layer and token; files are counted as they are entered, kernels aside."""
    home, entered = Path(redknot_hf.__file__).parent, []
    model, plan = tiny()
    cache = RedKnotCache(model.config, plan)
    ids, layer = torch.arange(3, 63)[None], model.model.layers[1].self_attn
    forward = layer.forward

    def watch(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(home):
            entered.append(path.relative_to(home).as_posix())

    def watched(*args, **kwargs):
        sys.setprofile(watch)
        try:
            return forward(*args, **kwargs)
        finally:
            sys.setprofile(None)

    with torch.no_grad():
        for tokens in (60, 1, 1):
            model(ids[:, :tokens], use_cache=True, **cache_argument(model, cache))
        layer.forward = watched
        model(ids[:, :1], use_cache=True, **cache_argument(model, cache))
    stays = [path for path, before in zip(entered, [None, *entered], strict=False) if path != before]
    assert stays[0] == "cache/cache.py"
    assert {"cache/storage.py", "attention/attention.py"} <= {*stays}
    assert len(stays) <= 10, stays
