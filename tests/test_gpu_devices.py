"""A model whose layers are on several devices: generate, the engine and reuse give what one device does."""

import accelerate
import pytest
import torch
from families import VOCABULARY, make_model
from served import SIZES, all_free, planned_here_and_there

from redknot_hf import RedKnotCache, SegmentStore, assemble, captured_decoding, prompt
from redknot_hf.cache.cache import row_layers
from redknot_hf.serving import Engine, Sampling

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs an accelerator")]

# Where the second half of the layers is; the host is a device as any other here, and weights are not brought from it.
SECOND = ["cpu", pytest.param(1, marks=pytest.mark.skipif(GPUS < 2, reason="needs two accelerators"))]
FAMILIES = ["llama", "gpt_oss", "gemma3n", "gemma4"]  # the last two: layers of the second half share keys of the first


def texts(*lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for n in lengths]


def plan_of(model):
    """Heads with windows, heads that keep everything in the model's dtype and others in int8."""
    plan, _, _ = planned_here_and_there(model)
    return plan.stored("int8", heads=[(1, 0)])


def spread(model, second):
    """The same model, its first layers on the first accelerator; as `device_map` does it."""
    layers = len(model.model.layers)
    places = {f"model.{name}": second for name, _ in model.model.named_children() if name != "layers"}
    places |= {"lm_head": second}
    places |= {f"model.layers.{i}": 0 if i < layers // 2 else second for i in range(layers)}
    # What layers write to for each other is not moved: it would be a copy.
    return accelerate.dispatch_model(model, places, main_device=second, skip_keys=model._skip_keys_device_placement)


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_two_devices_give_the_tokens_of_one(family, second):
    model = make_model(family, tie_word_embeddings=False)
    plan, asked, parts = plan_of(model), texts(40, 150, 90, 21), texts(60, 45, seed=1)

    def found(model):
        device = model.get_input_embeddings().weight.device
        tokens = []
        for ids in asked:
            cache = RedKnotCache(model.config, plan, page_size=16)
            out = model.generate(
                torch.tensor([ids], device=device), past_key_values=cache, max_new_tokens=12, do_sample=False
            )
            tokens.append(out[0, len(ids) :].tolist())
        places = {layer.storage.device for _, layer in row_layers(cache) if layer.is_initialized}
        engine = Engine(model, plan, **SIZES | {"memory": 1 << 23})
        served = [request.ids for request in engine.generate(asked, Sampling(12))]
        assert {*engine.memory.places()} == places
        assert served == tokens
        assert all_free(engine)
        store = SegmentStore(model, plan, identity="a model of a test")
        context = assemble(model, store.add_all(parts)[::-1])
        out = model.generate(**prompt(context, asked[0], device=device), max_new_tokens=8, do_sample=False)
        return tokens, out[0, -8:].tolist(), places

    *expected, one = found(model)
    *tokens, two = found(spread(model, second))
    assert len(one) == 1
    assert len(two) == (1 if family in ("gemma3n", "gemma4") else 2), "shared keys are of the first layers"
    assert tokens == expected


@pytest.mark.parametrize("second", SECOND)
def test_sequences_of_two_devices_go_to_the_host_and_back(second):
    model = make_model("llama", tie_word_embeddings=False)
    plan, asked = plan_of(model), texts(150, 90)
    engine = Engine(spread(model, second), plan, **SIZES | {"max_batch": 1, "parked": 0})
    expected = [request.ids for request in engine.generate(asked, Sampling(30))]
    low = engine.submit(asked[0], Sampling(30))
    for _ in range(20):
        engine.step()
    high = engine.submit(asked[1], Sampling(30), priority=1)
    assert engine.drain()
    assert [low.result(), high.result()] == expected
    assert engine.scheduler.preemptions["swap"] == 1


@pytest.mark.skipif(GPUS < 2, reason="needs two accelerators")
@pytest.mark.parametrize("how", ["engine", "captured_decoding"])
def test_a_model_that_is_not_on_the_current_device(how):
    asked, found = texts(150, 90, 40), []
    for device in range(2):
        model = make_model("llama").cuda(device)
        plan = plan_of(model)
        if how == "engine":
            with Engine(model, plan, **SIZES | {"memory": 1 << 23}) as engine:
                found.append([request.ids for request in engine.generate(asked, Sampling(30))])
                assert engine.reader.seats.replays
            continue
        cache, ids = RedKnotCache(model.config, plan, page_size=16, max_cache_len=256), torch.tensor(asked[:1])
        out = model.generate(ids.cuda(device), past_key_values=cache, custom_generate=captured_decoding,
                             max_new_tokens=30, do_sample=False)  # fmt: skip
        found.append(out.tolist())
    assert found[0] == found[1]
