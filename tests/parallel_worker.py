"""One rank of a tensor-parallel run: `parallel_worker.py FOLDER`, the folder with model, plans and prompt."""

import json
import os
import runpy
import sys
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from pages import typed
from safetensors.torch import load_file, save_file
from served import SIZES, free_at_the_end, prompts_of
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM

from redknot_hf import HeadPlan, RedKnotCache
from redknot_hf.parallel import over_ranks, reorder_heads
from redknot_hf.serving import Engine, Sampling

# Bytes of pages of a rank that serves, by the name of its plan: too few for all requests.
MEMORY = {"first rank global": 250_000, "balanced": 175_000}
# Of the benchmark that a page starts under torchrun.
TOY = [*("--shape", "toy", "--device", "cpu", "--requests", "3", "--length", "100", "--new", "8", "--memory", "8MiB")]
OPTIONS = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}


def run(model, plan: HeadPlan, prompt: dict) -> tuple[dict[str, torch.Tensor], list[int], int]:
    """Tokens and logits of greedy decoding and of beams, pages of each KV head of layer 0 then, and all bytes."""
    found = {}
    for name, options in {"greedy": {}, "beams": {"num_beams": 3}}.items():
        cache = RedKnotCache(model.config, plan, page_size=16)
        out = model.generate(**prompt, past_key_values=cache, **OPTIONS | options)
        found |= {f"{name}.tokens": out.sequences.contiguous(), f"{name}.logits": torch.stack(out.logits)}
    pages = (cache.layers[0].storage.rows.table[0] >= 0).sum(-1).tolist()
    return found, pages, cache.nbytes


def make_engine(model, plan: HeadPlan, memory: int, rank_timeout: float = 60) -> tuple[Engine, list[int]]:
    """An engine whose pages do not suffice for all, and the bytes of pages that it uses before each step."""
    engine, used = Engine(model, plan, **SIZES | {"memory": memory, "chunk": 20}, rank_timeout=rank_timeout), []
    engine.scheduler.ahead, planned = 1, engine.scheduler.plan

    def plan_step() -> Any:
        work = planned()
        used.append(engine.memory.used()["used"])
        return work

    engine.scheduler.plan = plan_step
    return engine, used


def raises(*given: Any) -> None:
    """Stands for a callback and a processor with a fault of their own."""
    raise ValueError("of its own")


def serve(engine: Engine) -> dict[str, Any]:
    """Answers to requests that come one after another, greedy and drawn, some of which fail or are cancelled."""
    prompts, draw = prompts_of(2, 6)
    asked = []
    for i, prompt in enumerate(prompts):
        how = Sampling(draw.randint(6, 40), temperature=(0, 0.8)[i % 2], seed=i)
        asked.append(engine.submit(prompt, how, priority=i % 3 == 2))
        for _ in range(draw.randint(0, 6)):
            engine.step()
    asked += engine.submit_many(prompts[0], 2, Sampling(9, temperature=0.8, seed=5))
    asked.append(engine.submit(prompts[5], Sampling(9), answered=[7, 8]))
    faults = [
        engine.submit(prompts[1], Sampling(30, processors=[raises])),
        engine.submit(prompts[2], Sampling(30), callback=raises),
        engine.submit(prompts[3], Sampling(30), timeout=0),
    ]
    gone = engine.submit(prompts[4], Sampling(30))
    gone.cancel()
    for _ in range(3):  # the last two in peace: they begin alike
        while engine.step():
            pass
        asked.append(engine.submit(prompts[6], Sampling(4)))
    while engine.step():
        pass
    last = engine.submit(prompts[4], Sampling(30), callback=lambda *_: engine.shutdown())
    while engine.alive:
        engine.step()
    return {
        "tokens": [request.result() for request in asked],
        "reasons": [request.reason for request in (*faults, gone, last)],
        "preempted": sum(engine.scheduler.preemptions.values()),
        "hits": engine.memory.prefixes.hit_tokens,
    }


def served(model, plan: HeadPlan, memory: int) -> dict[str, Any]:
    """What a rank finds: the first one answers, and what it and the others hold."""
    engine, used = make_engine(model, plan, memory)
    free = free_at_the_end(engine)
    found = serve(engine) if engine.ranks.leads else engine.follow()
    counted = {"used": used, "longest": engine.memory.longest, "free": free[0]}
    counted["captured"] = engine.reader.seats.replays
    return counted | (found or {})


def broken(model, plan: HeadPlan, hangs: bool) -> str:
    """What ranks say when the second one hangs, or fails in the middle of a step."""
    engine, _ = make_engine(model, plan, 1 << 22, 1.5 if hangs else 60)
    if not engine.ranks.leads:
        engine.reader.run = raises
    try:
        if hangs and not engine.ranks.leads:
            time.sleep(4)
            engine.ranks.end(None)
            return "nothing"
        _ = engine.generate([[5] * 40], Sampling(4)) if engine.ranks.leads else engine.follow()
    except RuntimeError as e:
        return str(e)
    return "nothing"


def launched(words: list[str]) -> None:
    """Runs what torchrun is told to start, in this process, as each of those that torchrun starts."""
    asked = get_args_parser().parse_args(words[1:])
    assert asked.nproc_per_node == os.environ["WORLD_SIZE"]
    sys.argv = [asked.training_script, *asked.training_script_args]
    start = runpy.run_module if asked.module else runpy.run_path
    with suppress(SystemExit):
        start(asked.training_script, run_name="__main__")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    launched([*typed("torchrun --nproc-per-node 2 -m evals bench ranks"), *TOY])
    # That group has ended with it; the next one is found by a file, since the first one's port may not be free yet.
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    with Path(f"answer.{rank}").open("w") as file, redirect_stdout(file):
        launched(typed("torchrun --nproc-per-node 2 answer.py"))
    model = AutoModelForCausalLM.from_pretrained(folder, **over_ranks(), attn_implementation="redknot")
    prompt = load_file(folder / "prompt.safetensors")

    def leave(name: str, plan: HeadPlan) -> None:
        found, pages, nbytes = run(model, plan, prompt)
        save_file(found, folder / f"{name}.{rank}.safetensors")
        told: dict[str, Any] = {"pages": pages, "nbytes": nbytes}
        if name in MEMORY:
            told["served"] = served(model, plan, MEMORY[name])
        (folder / f"{name}.{rank}.json").write_text(json.dumps(told))

    for path in sorted(folder.glob("*.plan")):
        leave(path.stem, HeadPlan.load(path))
    placement = HeadPlan.load(folder / "first rank global.plan").balanced(2, 72, model.config)
    reorder_heads(model, placement)
    leave("balanced", placement.plan)
    for hangs in (True, False):
        (folder / f"broken.{hangs}.{rank}").write_text(broken(model, placement.plan, hangs))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
