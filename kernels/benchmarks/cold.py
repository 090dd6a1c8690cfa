"""Decoding over int8 and int4 pages against the bfloat16 kernel of the same plan, in one run.

    python kernels/benchmarks/cold.py --out evals/results/cold_gpu.jsonl

Shapes are those of Llama-3.1-8B: 32 query and 8 KV heads of 128, pages of 64 tokens, the last 128 hot. Times are
medians of a step inside a CUDA graph. `--sweep` times other tiles of the cold pages first and takes the best. The last
line is one JSON object: every row, its bytes, and the bars.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import triton
from redknot_kernels import UNBOUNDED, Cold, HeadRules, cold_pool, implementation
from redknot_kernels.triton import decode
from shapes import DIM, HEADS, LOCAL, PAGE, step_on_rows
from timing import Timer, bandwidth, sets, write_line

HOT = 128
BITS = {"bf16": 0, "int8": 8, "int4": 4}
SHAPES = [(1, 4096), (8, 4096), (1, 32768), (8, 32768), (1, 131072)]
PLANS = {"all global": HEADS, "1/8 global": 1}
LEAST = {"int8": 1.3, "int4": 1.5}
SWEEP = {"cold": (32, 64), "limits": ({}, {"maxnreg": 168}), "programs": (2, 3, 4)}


def rules_of(plan: str, storage: str) -> HeadRules:
    """Rules of a layer whose global heads have this storage."""
    stored = PLANS[plan]
    heads = [(UNBOUNDED, 0)] * stored + [LOCAL] * (HEADS - stored)
    bits = (BITS[storage],) * stored + (0,) * (HEADS - stored)
    return HeadRules.make(*zip(*heads, strict=True), page_size=PAGE, storage=bits, hot=HOT)


def step_of(kernels, timer: Timer, plan: str, storage: str, batch: int, length: int) -> tuple[Callable, int]:
    """A step on rows of its own, with shuffled pages, and the bytes that it reads."""
    rules, device = rules_of(plan, storage), timer.device
    cold, columns = None, rules.cold_pages(length)
    nbytes = 2 * 2 * DIM * batch * sum(min(length, sum(LOCAL)) for _ in rules.local_heads)
    if rules.stored_heads:
        stored = len(rules.stored_heads)
        pool = cold_pool(batch * stored * columns, BITS[storage], PAGE, (DIM, DIM), device)
        pool.codes.random_(0, 256)
        pool.scales.uniform_(0.001, 0.02)
        cold_table = torch.zeros(batch, HEADS, columns, dtype=torch.int32, device=device)
        cold_table[:, :stored] = torch.randperm(len(pool.codes), device=device).int().view(batch, stored, columns)
        done = torch.zeros(batch, HEADS, dtype=torch.int32, device=device)
        done[:, :stored] = columns
        int8, int4 = (pool if bits == BITS[storage] else None for bits in (8, 4))
        cold = Cold(int8, int4, cold_table, done)
        nbytes += sum(x.nbytes for x in pool) + 4 * DIM * batch * stored * (length - columns * PAGE)
    else:
        nbytes += 4 * DIM * batch * len(rules.global_heads) * length
    return step_on_rows(kernels, rules, batch, length, torch.bfloat16, device, cold=cold), nbytes


def row(kernels, timer: Timer, plan: str, storage: str, batch: int, length: int) -> dict:
    """Seconds and bytes of a step."""
    first, nbytes = step_of(kernels, timer, plan, storage, batch, length)
    others = (step_of(kernels, timer, plan, storage, batch, length)[0] for _ in range(sets(nbytes, timer.device) - 1))
    seconds = timer.steps([first, *others], batch)
    return {"plan": plan, "storage": storage, "batch": batch, "length": length, "s": seconds, "nbytes": nbytes}


def tiles() -> list[dict]:
    """The tiles of a sweep."""
    return [
        {"programs": programs, "keys": 64, "cold": cold, "options": {"num_warps": 4, "num_stages": 3, **limit}}
        for cold, limit, programs in itertools.product(*SWEEP.values())
    ]


@contextmanager
def tiled(tile: dict | None) -> Iterator[None]:
    """Lets kernels of stored rows run with this tile; `None` leaves them theirs."""
    known = decode.configuration
    if tile is not None:
        decode.configuration = lambda *of, **more: known(*of, **more) if of[2] == "rows" else tile
    yield
    decode.configuration = known


def compile_one(number: int) -> None:
    """Compiles what a sweep runs with one tile, into Triton's cache."""
    kernels, timer = implementation("triton"), Timer(torch.device("cuda"), 1)
    with tiled(tiles()[number]):
        for storage, batch in itertools.product(LEAST, (1, 8)):
            step_of(kernels, timer, "all global", storage, batch, 1024)[0]()
    torch.cuda.synchronize()


def sweep(kernels, timer: Timer) -> list[dict]:
    """Times of other tiles, which are compiled side by side first."""
    every = tiles()
    unlike = [i for i, tile in enumerate(every) if tile["programs"] == SWEEP["programs"][0]]
    command = [sys.executable, __file__, "--compile"]
    for done in [subprocess.Popen([*command, str(i)], stderr=subprocess.DEVNULL) for i in unlike]:
        done.wait()
    found = []
    for tile, storage, (batch, length) in itertools.product(every, LEAST, [(8, 32768), (1, 131072)]):
        with tiled(tile):
            try:
                seconds = row(kernels, timer, "all global", storage, batch, length)["s"]
            except triton.runtime.errors.OutOfResources as error:
                print(f"{tile}: {error}", flush=True)
                continue
        found.append({"storage": storage, "batch": batch, "length": length, "s": seconds, "tile": tile})
        print(f"{storage} {batch} x {length} {tile}: {1e6 * seconds:.1f} us", flush=True)
    return found


def best_tile(found: list[dict], storage: str) -> dict | None:
    """The tile of a sweep with the least product of times."""
    products: dict[str, float] = {}
    for one in found:
        if one["storage"] == storage:
            key = json.dumps(one["tile"])
            products[key] = products.get(key, 1.0) * one["s"]
    return json.loads(min(products, key=lambda key: products[key])) if products else None


def bars(rows: list[dict]) -> list[dict]:
    """What the kernels are to reach, and what they do."""
    found, at = [], {(r["plan"], r["storage"], r["batch"], r["length"]): r for r in rows}
    for (plan, storage, batch, length), one in at.items():
        if storage == "bf16":
            continue
        plain, where = at[plan, "bf16", batch, length], f"{storage}, {plan}, {batch} x {length}"
        if plan == "all global" and (batch, length) in ((8, 32768), (1, 131072)):
            faster = plain["s"] / one["s"]
            found.append({"bar": f"{where}: bf16 / ours >= {LEAST[storage]}", "found": round(faster, 3),
                          "met": faster >= LEAST[storage]})  # fmt: skip
        if (batch, length) == (1, 4096):
            slower = 1e6 * (one["s"] - plain["s"])
            found.append({"bar": f"{where}: at most 2 us slower", "found": round(slower, 2), "met": slower <= 2})
    return found


def main(argv: list[str] | None = None) -> None:
    """Runs the measurements that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="time other tiles too")
    parser.add_argument("--out", type=Path, help="file to append the JSON line to")
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile is not None:
        return compile_one(args.compile)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer, kernels = Timer(device, args.repeats), implementation("triton")
    read = bandwidth(timer)
    found = sweep(kernels, timer) if args.sweep else []
    rows, best = [], {storage: best_tile(found, storage) for storage in BITS}
    for plan, (batch, length), storage in itertools.product(PLANS, SHAPES, BITS):
        with tiled(best[storage]):
            one = row(kernels, timer, plan, storage, batch, length)
        one["times_bf16"] = rows[-("bf16", "int8", "int4").index(storage)]["s"] / one["s"] if BITS[storage] else 1.0
        rows.append(one)
        print(f"{plan:11} {storage} {batch} x {length:6}: {1e6 * one['s']:7.1f} us, {one['times_bf16']:.2f}x bf16, "
              f"{one['nbytes'] / one['s'] / 1e12:.2f} TB/s", flush=True)  # fmt: skip
    judged = bars(rows)
    for one in judged:
        print(f"{'met   ' if one['met'] else 'MISSED'} {one['bar']}: {one['found']}")
    line = {"benchmark": "cold", "rows": rows, "bars": judged, "tiles": best, "sweep": found}
    write_line(args.out, line, device, triton=triton.__version__, read_bytes_per_s=read)


if __name__ == "__main__":
    main()
