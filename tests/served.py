"""Engines of small models, prompts for them, and what `generate` makes of the same."""

import gc
import random
import weakref

import torch
from families import VOCABULARY

from redknot_hf import HeadPlan, HeadSpec, RedKnotCache

SIZES = {"max_batch": 4, "max_len": 256, "chunk": 24, "page_size": 16, "memory": 1 << 22}


def plan_of(model, local=True):
    rule = HeadSpec(window=20, sink=2)
    return HeadPlan.with_global(model.config, [(1, 1)], rule) if local else HeadPlan.uniform(model.config, HeadSpec())


def planned_here_and_there(model):
    """Heads of one layer that keep everything, one in the middle and one at the end; and the places of these two."""
    layers = len(model.model.layers)
    middle, last = (layers // 2, 2), (layers - 1, 3)
    plan = HeadPlan.with_global(model.config, [(1, 0), (1, 1), middle, last], HeadSpec(window=20, sink=2))
    return plan, middle, last


def prompts_of(seed, count, longest=90):
    """Random prompts, and two that begin like the first."""
    draw = random.Random(seed)
    made = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))] for _ in range(max(count, 2))]
    return [*made, made[0] + made[1], made[0] + made[-1]], draw


def alone(model, plan, prompt, new, seed=None, **options):
    """What `generate` gives for one prompt."""
    if seed is not None:
        torch.manual_seed(seed)
    cache = RedKnotCache(model.config, plan, page_size=16)
    options = {"do_sample": False, **options}
    out = model.generate(torch.tensor([prompt]), past_key_values=cache, max_new_tokens=new, **options)
    return out[0, len(prompt) :].tolist()


def all_free(engine):
    """Whether all pages are back when prefixes are let go."""
    while engine.memory.evict():
        pass
    return engine.memory.used()["used"] == 0 and engine.memory.host_used == 0


def free_at_the_end(engine):
    """A list that gets, each time the engine ends, whether all its pages are back; the first time says it."""
    found, close = [], engine.memory.close

    def closing():
        found.append(all_free(engine))
        close()

    engine.memory.close = closing
    return found


def kept_after_its_end(engine):
    """Pages, captured steps and their graphs that live when an engine has been shut down, without garbage collection.

    Whoever holds the engine, its requests or forks of its cache keeps none of them.
    """
    seats = engine.reader.seats
    steps = [*seats.graphs.values(), *seats.readings.values()]
    graphs = [x for step in steps for x in (step._graph, step._graph._graph) if x is not None]
    pools = [pool for storage in engine.memory.layers.values() for _, pool, _ in storage.held(0)]
    mortal = [*map(weakref.ref, (*steps, *graphs, *(part for pool in pools for part in pool.pages)))]
    assert len(mortal) >= 2 * len(engine.memory.layers)
    del seats, steps, graphs, pools
    gc.disable()
    try:
        engine.shutdown()
        return [x() for x in mortal if x() is not None]
    finally:
        gc.enable()
