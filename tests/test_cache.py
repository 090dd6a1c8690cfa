"""The cache as a user holds it: what it keeps, frees, shares, takes back and says."""

import copy
import gc
import pickle

import pytest
import torch
from families import make_model
from layers import PAGE, feed, planned
from oracle import masked_logits
from texts import some_ids

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument


def page_bytes(cache):
    pool = cache.layers[0].storage.pool
    return pool.pages.keys[0].nbytes + pool.pages.values[0].nbytes


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 33, 100, 257])
@pytest.mark.parametrize("batch", [1, 3])
def test_resident_bytes_are_those_of_the_plan_and_at_most_two_pages_a_row(batch, length):
    model, cache, _ = planned(batch, length)
    plan = cache.plan
    kept = batch * plan.nbytes(length, model.config.head_dim, torch.float32)
    assert kept <= cache.nbytes <= kept + 2 * page_bytes(cache) * plan.num_heads * batch
    storages = [x.untyped_storage() for layer in cache.layers for x in layer.storage.pool.pages]
    assert cache.nbytes == sum(storage.nbytes() for storage in storages)
    assert cache.dense_nbytes == batch * length * plan.num_heads * 2 * model.config.head_dim * 4


def live_floats():
    """Address and bytes of every floating-point storage that is alive."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.is_floating_point()]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def test_a_forward_pass_leaves_the_pages_and_nothing_else():
    model, cache, _ = planned()
    before = live_floats()
    feed(model, cache, some_ids(1, 90))
    feed(model, cache, some_ids(1, 1))
    after = live_floats()
    extra = sum(nbytes for address, nbytes in after.items() if address not in before)
    assert cache.nbytes <= extra < cache.nbytes + 4096, "the pages, and masks of a step that layers share"


@pytest.mark.parametrize(
    "spec", [HeadSpec(window=32, sink=4), HeadSpec(window=17, sink=0), HeadSpec(window=1, sink=2)]
)
def test_a_local_row_stops_growing(spec):
    model = make_model("llama")
    cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, spec), page_size=PAGE)
    feed(model, cache, some_ids(1, spec.window + spec.sink + 2 * PAGE))
    before = cache.nbytes
    for _ in range(4 * spec.window):
        feed(model, cache, some_ids(1, 1))
    assert cache.nbytes == before
    row = cache.layers[0].storage.rows.table[0, 0]
    assert (row >= 0).sum() * PAGE < spec.window + spec.sink + 2 * PAGE


@pytest.mark.parametrize("removed", [1, 7, PAGE])
@pytest.mark.parametrize("length", [20, 45, 90])
def test_crop_takes_tokens_back(length, removed):
    model, cache, ids = planned(2, length)
    cache.crop(torch.tensor(-removed))
    assert cache.get_seq_length() == length - removed
    other = some_ids(2, 30, seed=5)
    logits = feed(model, cache, other)
    whole = torch.cat([ids[:, : length - removed], other], 1)
    torch.testing.assert_close(logits, masked_logits(model, cache.plan, whole)[:, -30:], atol=2e-4, rtol=1e-4)


def test_crop_frees_pages_and_can_empty_the_cache():
    model = make_model("llama")
    cache = RedKnotCache(model.config, HeadPlan.uniform(model.config, HeadSpec()), page_size=PAGE)
    ids = some_ids(1, 200)
    expected = feed(model, cache, ids)
    full = cache.nbytes
    cache.crop(-150)
    assert cache.nbytes < full / 2
    cache.crop(-50)
    assert cache.get_seq_length() == 0
    assert torch.equal(feed(model, cache, ids), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_recording_lets_crop_reach_far_behind_the_window(when):
    model, cache, _ = planned(1)
    plan = cache.plan
    ids = some_ids(1, 400)
    if when == "before":
        cache.activate_past_recording()
        feed(model, cache, ids[:, :150])
    else:
        feed(model, cache, ids[:, :150])
        cache.activate_past_recording()
    for start in range(150, 400, 25):
        feed(model, cache, ids[:, start : start + 25])
    cache.crop(-250)
    other = some_ids(1, 20, seed=3)
    expected = masked_logits(model, plan, torch.cat([ids[:, :150], other], 1))[:, -20:]
    torch.testing.assert_close(feed(model, cache, other), expected, atol=2e-4, rtol=1e-4)


def test_widening_leaves_a_fork_alone():
    model, cache, ids = planned(1, 120)
    fork = copy.deepcopy(cache)
    cache.activate_past_recording()
    other = some_ids(1, 40, seed=3)
    expected = masked_logits(model, cache.plan, torch.cat([ids, other], 1))[:, -40:]
    for held in (fork, cache):
        torch.testing.assert_close(feed(model, held, other), expected, atol=2e-4, rtol=1e-4)


def test_a_fork_shares_pages_until_one_side_writes():
    model, cache, ids = planned(1, 200)
    alone = cache.nbytes
    forks = [copy.deepcopy(cache) for _ in range(4)]
    assert cache.nbytes == alone
    for seed, fork in enumerate([cache, *forks]):
        other = some_ids(1, 25, seed=seed)
        expected = masked_logits(model, cache.plan, torch.cat([ids, other], 1))[:, -25:]
        torch.testing.assert_close(feed(model, fork, other), expected, atol=2e-4, rtol=1e-4)
    grown = cache.nbytes
    del fork, forks
    cache.crop(0)
    assert cache.nbytes < grown


def test_batch_is_repeated_selected_and_reordered_by_page_tables():
    model, cache, ids = planned(2, 70)
    before = cache.nbytes
    cache.batch_repeat_interleave(3)
    assert cache.nbytes == before
    rows = ids.repeat_interleave(3, 0)
    order = torch.tensor([5, 0, 0, 3, 2, 4])
    cache.reorder_cache(order)
    rows = rows[order]
    step = some_ids(6, 20, seed=2)
    feed(model, cache, step)
    rows = torch.cat([rows, step], 1)
    held = cache.nbytes
    chosen = torch.tensor([4, 1])
    cache.batch_select_indices(chosen)
    assert cache.batch_size == 2
    assert cache.nbytes < held
    last = some_ids(2, 3, seed=4)
    expected = masked_logits(model, cache.plan, torch.cat([rows[chosen], last], 1))[:, -3:]
    torch.testing.assert_close(feed(model, cache, last), expected, atol=2e-4, rtol=1e-4)


def test_reset_frees_everything_and_starts_over():
    model, cache, _ = planned(2, 50)
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
    ids = some_ids(1, 30)
    torch.testing.assert_close(feed(model, cache, ids), masked_logits(model, cache.plan, ids), atol=2e-4, rtol=1e-4)


def test_offload_and_prefetch_change_nothing():
    model, cache, ids = planned(1, 60)
    other = some_ids(1, 9, seed=3)
    cache.offload()
    assert all(layer.storage.pool.pages.device.type == "cpu" for layer in cache.layers)
    cache.prefetch(layer_idx=1)
    cache.prefetch()
    expected = masked_logits(model, cache.plan, torch.cat([ids, other], 1))[:, -9:]
    torch.testing.assert_close(feed(model, cache, other), expected, atol=2e-4, rtol=1e-4)


def test_a_cache_made_in_inference_mode_goes_on_outside_of_it():
    model, cache, _ = planned()
    with torch.inference_mode():
        model(some_ids(1, 30), **cache_argument(model, cache))
    logits = feed(model, cache, some_ids(1, 5, seed=2))
    assert logits.isfinite().all()


def test_print_says_tokens_heads_and_bytes():
    model, cache, _ = planned(2, 100)
    text = str(cache)
    assert "\n" not in text
    full = cache.plan.num_global
    assert "100 tokens x 2 sequences" in text
    assert f"{full} global + {8 - full} local heads" in text
    assert f"{cache.nbytes / 1024:.1f} KiB resident" in text
    assert f"dense {cache.dense_nbytes / 1024:.1f} KiB, {cache.dense_nbytes / cache.nbytes:.1f}x less" in text
    assert "0 tokens x 0 sequences" in str(RedKnotCache(model.config, cache.plan))


def test_a_step_that_broke_off_is_noticed():
    model, cache, _ = planned(1, 40)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, some_ids(1, 3))
    hook.remove()
    with pytest.raises(RuntimeError, match=r"a forward pass broke off.*cache\.reset\(\)"):
        feed(model, cache, some_ids(1, 3))
    cache.reset()
    ids = some_ids(1, 30)
    torch.testing.assert_close(feed(model, cache, ids), masked_logits(model, cache.plan, ids), atol=2e-4, rtol=1e-4)


def test_the_callers_mask_may_be_reused():
    model, cache, _ = planned()
    buffer = torch.ones(2, 60, dtype=torch.bool)
    buffer[1, :5] = False
    model(some_ids(2, 30), attention_mask=buffer[:, :30], **cache_argument(model, cache))
    buffer[:] = True
    cache.crop(-25)
    assert cache.layers[0].storage.rows.lengths.tolist() == [5, 0]


@pytest.mark.parametrize("how", ["delete", "reset"])
def test_the_pages_of_a_fork_that_is_gone_go_too(how):
    model, cache, _ = planned(1, 100)
    fork = copy.deepcopy(cache)
    feed(model, fork, some_ids(1, 400))
    held = cache.nbytes
    if how == "delete":
        del fork
    else:
        fork.reset()
    feed(model, cache, some_ids(1, 1))
    assert cache.nbytes < held / 2


def test_autocast_stores_what_attention_sees():
    model, cache, _ = planned()
    ids = some_ids(1, 60)
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.cat([feed(model, cache, ids[:, a:b]) for a, b in [(0, 40), (40, 41), (41, 60)]], 1)
        expected = masked_logits(model, cache.plan, ids)
    assert cache.layers[0].storage.pool.pages.keys.dtype == torch.bfloat16
    exact = masked_logits(model, cache.plan, ids)
    assert (logits.float() - exact).abs().max() <= 2 * (expected.float() - exact).abs().max()


def test_another_dtype_is_refused():
    _, cache, _ = planned(1, 10)
    with pytest.raises(ValueError, match=r"holds torch\.float32 and got values of torch\.bfloat16.*new cache"):
        feed(make_model("llama", torch.bfloat16), cache, some_ids(1, 1))


def test_a_cache_survives_pickling():
    model, cache, ids = planned(2, 70)
    copied = pickle.loads(pickle.dumps(cache))
    other = some_ids(2, 20, seed=3)
    expected = masked_logits(model, cache.plan, torch.cat([ids, other], 1))[:, -20:]
    for held in (cache, copied):
        torch.testing.assert_close(feed(model, held, other), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "chosen", [torch.tensor([-1, 0]), torch.tensor([True, False, True])], ids=["negative", "flags"]
)
def test_sequences_are_chosen_by_whatever_indexes_a_batch(chosen):
    model, cache, _ = planned()
    ids, mask = some_ids(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[2, :7] = 0
    model(ids, attention_mask=mask, **cache_argument(model, cache))
    lengths = cache.layers[0].storage.rows.lengths
    cache.batch_select_indices(chosen)
    assert cache.layers[1].storage.rows.lengths.tolist() == lengths[chosen.numpy()].tolist()
