"""Tensor parallelism: each of two processes holds half of the KV heads, and the rules of just those."""

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, make_model
from oracle import random_plan
from pages import ROOT, blocks
from parallel_worker import MEMORY, run, served
from safetensors.torch import load_file, save_file
from served import SIZES
from services import run_ranks
from texts import prompts

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument
from redknot_hf.parallel import reorder_heads
from redknot_hf.plan.per_layer import kv_sources
from redknot_hf.plan.placement import Placement
from redknot_hf.serving import Engine, Request, Sampling, engine
from redknot_hf.serving.orders import Orders
from redknot_hf.serving.ranks import Ranks
from redknot_hf.serving.scheduler import Sequence

WORKER = Path(__file__).with_name("parallel_worker.py")
LOCAL = HeadSpec(window=7, sink=2)
# What the page of ranks takes as given, before its own lines.
GIVEN = """
from redknot_hf import HeadPlan, RedKnotCache
name, plan, documents = ".", HeadPlan.load("first rank global.plan"), [[5, 6, 7, 8, 9]]
"""
PLANS = {
    "global": lambda config: HeadPlan.uniform(config, HeadSpec()),
    "first rank global": lambda config: HeadPlan.with_global(
        config, [(i, h) for i in range(2) for h in (0, 1)], LOCAL
    ),
    "second rank global": lambda config: HeadPlan.with_global(
        config, [(i, h) for i in range(2) for h in (2, 3)], LOCAL
    ),
    "mixed": random_plan,
}


@pytest.fixture(scope="module")
def model():
    return make_model("llama", vocab_size=98)  # the output layer is split by vocabulary


@pytest.fixture(scope="module")
def prompt():
    ids, mask = prompts(2, 60, (0, 9))
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def folder(model, prompt, tmp_path_factory):
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("parallel")
    model.save_pretrained(folder)
    save_file(prompt, folder / "prompt.safetensors")
    for name, make in PLANS.items():
        make(model.config).save(folder / f"{name}.plan")
    (folder / "answer.py").write_text("\n".join((GIVEN, *blocks(ROOT / "docs" / "scaling.md", "python")[:2])))
    run_ranks(WORKER, folder)
    return folder


def test_programs_that_the_page_starts_under_torchrun_do_what_it_says(model, folder):
    alone = Engine(model, PLANS["first rank global"](model.config), **SIZES)
    (answer,) = alone.generate([[5, 6, 7, 8, 9]], Sampling(max_new_tokens=8))
    assert [(folder / f"answer.{rank}").read_text() for rank in range(2)] == [f"{answer.ids}\n", ""]
    (row,) = map(json.loads, (folder / "ranks.jsonl").read_text().splitlines())
    assert (row["ranks"], row["requests"], row["steps"]) == (2, 3, 6)


@pytest.mark.parametrize("name", PLANS)
def test_two_processes_find_what_one_does(model, prompt, folder, name):
    alone, *_ = run(model, PLANS[name](model.config), prompt)
    compare(alone, folder, name)


def test_a_model_whose_heads_are_reordered_finds_the_same_and_its_ranks_hold_the_same(model, prompt, folder):
    """The plan's global heads are all of the first rank; in another order each rank has as many."""
    alone, *_ = run(model, PLANS["first rank global"](model.config), prompt)
    compare(alone, folder, "balanced")
    plain, level = ([left(folder, name, rank)["nbytes"] for rank in range(2)] for name in MEMORY)
    assert max(plain) > 1.3 * min(plain)
    assert max(level) <= 1.05 * min(level)


def left(folder, name: str, rank: int) -> dict:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def compare(alone, folder, name: str) -> None:
    for rank in range(2):
        found = load_file(folder / f"{name}.{rank}.safetensors")
        for what, expected in alone.items():
            if what.endswith("tokens"):
                assert torch.equal(found[what], expected)
            else:
                torch.testing.assert_close(found[what], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PLANS)
def test_each_process_holds_the_pages_of_its_own_heads(model, prompt, folder, name):
    _, alone, _ = run(model, PLANS[name](model.config), prompt)
    assert [left(folder, name, rank)["pages"] for rank in range(2)] == [alone[:2], alone[2:]]


@pytest.mark.parametrize("family", FAMILIES)
def test_reordered_heads_compute_what_they_did(family):
    """In one process: any order of heads, under any plan, gives the logits of the model as it was."""
    model, ids = make_model(family), prompts(1, 40, (0,))[0]
    plan, chosen = random_plan(model.config), random.Random(0)
    orders = [tuple(chosen.sample(range(len(layer)), len(layer))) for layer in plan]
    order = tuple(orders[source] for source in kv_sources(model.config))
    moved = HeadPlan([[layer[head] for head in places] for layer, places in zip(plan, order, strict=True)])
    placement = Placement(moved, order, 1, (0,))
    with torch.no_grad():
        before = model(ids, use_cache=True, **cache_argument(model, RedKnotCache(model.config, plan))).logits
        reorder_heads(model, placement)
        after, old = (
            model(ids, use_cache=True, **cache_argument(model, RedKnotCache(model.config, p))).logits
            for p in (placement.plan, plan)
        )
    torch.testing.assert_close(after, before, atol=3e-4, rtol=1e-4)
    assert not torch.allclose(old, before, atol=1e-3), "the order changes nothing"


def test_what_cannot_be_reordered_is_refused_before_anything_changes():
    model = make_model("llama")
    plan = random_plan(model.config)
    placement = replace(plan.balanced(2, 40), order=((3, 2, 1, 0),) * 2)
    last = model.model.layers[1].self_attn
    last.register_parameter("lora", torch.nn.Parameter(torch.zeros(1)))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match="layer 1 has a parameter lora"):
        reorder_heads(model, placement)
    del last.lora
    last.k_proj.weight = torch.nn.Parameter(last.k_proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer 1: k_proj.weight .* in torch.int8"):
        reorder_heads(model, placement)
    last.k_proj.weight = torch.nn.Parameter(before["model.layers.1.self_attn.k_proj.weight"])
    with pytest.raises(ValueError, match="the plan has"):
        reorder_heads(make_model("llama", num_key_value_heads=8), placement)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    shared = make_model("gemma4")
    apart = Placement(random_plan(shared.config), ((0, 1, 2, 3),) * 3 + ((1, 0, 2, 3),), 1, (0,))
    with pytest.raises(ValueError, match="share keys"):
        reorder_heads(shared, apart)


@pytest.fixture(scope="module")
def single(model):
    """What one process answers to the requests of the ranks."""
    return served(model, PLANS["first rank global"](model.config), 350_000)


@pytest.mark.parametrize("name", MEMORY)
def test_an_engine_of_two_ranks_answers_as_one_of_one_process(single, folder, name):
    """Greedy and drawn, in chunks, with sequences that give way, parked beginnings, forks and faults."""
    found = left(folder, name, 0)["served"]
    assert found["tokens"] == single["tokens"]
    assert found["reasons"] == single["reasons"] == ["error", "error", "deadline", "cancelled", "shutdown"]
    for one in (found, single):
        assert one["preempted"] > 0
        assert one["hits"] > 0
        assert one["free"]


@pytest.mark.parametrize("name", MEMORY)
def test_ranks_take_the_same_steps_and_balanced_ones_hold_the_same(folder, name):
    first, second = (left(folder, name, rank)["served"] for rank in range(2))
    assert second["free"]
    assert len(first["used"]) == len(second["used"])
    assert first["longest"] == second["longest"]
    more, less = sorted((sum(first["used"]), sum(second["used"])), reverse=True)
    assert more <= 1.05 * less if name == "balanced" else more > 1.3 * less


def test_a_rank_that_fails_ends_the_others_with_a_message(folder):
    said = [(folder / f"broken.False.{rank}").read_text() for rank in range(2)]
    assert all(f"rank {rank} of 2 is no longer in step" in text for rank, text in enumerate(said)), said
    assert "ValueError: of its own" in said[1]


def test_a_rank_that_hangs_does_not_hang_the_others(folder):
    said = (folder / "broken.True.0").read_text()
    assert "rank 0 of 2 is no longer in step" in said
    assert "more than 1.5 s" in said


def test_alone_a_process_leads_and_has_nobody_to_follow(model):
    ranks = Ranks(model)
    assert (ranks.number, ranks.count, ranks.leads, ranks.captures) == (0, 1, True, True)
    assert ranks.told("word") == "word"
    assert (ranks.least(3), ranks.most(3), ranks.all(False)) == (3, 3, False)
    with pytest.raises(RuntimeError, match="rank 0 of 1 leads"):
        Engine(model, HeadPlan.uniform(model.config, HeadSpec()), **SIZES).follow()
    with pytest.raises(KeyError), ranks.together():
        raise KeyError
    for shared, seconds in ((SimpleNamespace(tp_size=2), 0), (model, -1), (model, float("nan"))):
        with pytest.raises(ValueError, match=f"rank_timeout={seconds}: give the seconds"):
            Ranks(shared, seconds)


def test_an_engine_that_cannot_be_made_leaves_the_other_ranks(model, monkeypatch):
    ranks, left = Ranks(model), []
    ranks._group, ranks.count = "group", 2
    monkeypatch.setattr(engine, "Ranks", lambda *given: ranks)
    monkeypatch.setattr(engine, "SeatMemory", raises)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", left.append)
    with pytest.raises(RuntimeError, match="a reset"):
        Engine(model, HeadPlan.uniform(model.config, HeadSpec()), **SIZES)
    assert left == ["group"]


def test_what_holds_the_heads_of_one_process_is_refused_where_several_share_a_model(model):
    ranks = Ranks(model)
    ranks.check_alone(store=object())
    ranks.count, ranks.number = 2, 1
    with pytest.raises(ValueError, match="store= holds what one process has read"):
        ranks.check_alone(store=object(), source=None)
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 follows rank 0.*engine\.follow\(\)"):
        ranks.check_leads()


def test_a_rank_that_had_gone_is_told_at_the_end(model, monkeypatch):
    ranks, left = Ranks(model), []
    ranks._group, ranks.count = "group", 2
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *args, **options: raises())
    monkeypatch.setattr(torch.distributed, "destroy_process_group", left.append)
    with pytest.warns(UserWarning, match="another rank of 2 had gone before the engine was shut down: a reset"):
        ranks.end("over")
    assert left == ["group"]
    ranks.end("over")  # a second end changes nothing


def raises(*given, **named):
    raise RuntimeError("a reset")


def test_orders_make_the_same_sequences_elsewhere(model):
    first, fork, late = (
        Sequence(Request([5, 6], Sampling(7, processors=[print], stop=["x"]), priority=2), [5, 6]) for _ in range(3)
    )
    fork.after = first
    orders = pickle.loads(pickle.dumps(Orders.of([first, fork], [(late, "deadline")])))
    there = Engine(model, HeadPlan.uniform(model.config, HeadSpec()), **SIZES).scheduler
    there.add(late)
    ((gone, why),) = orders.taken(there)
    assert gone is late
    assert why == "deadline"
    mine, other, _ = there.waiting
    assert other.after is mine
    assert (mine.rank, mine.longest, mine.tokens) == (first.rank, first.longest, first.tokens)
    assert not mine.request.sampling.processors
