"""A few steps of decoding and appending under NVIDIA's compute-sanitizer.

    python kernels/benchmarks/sanitize.py --out evals/results/sanitizer.jsonl

Every tool runs this file once more, with `--steps`, and its summary is one JSON line. Tensors are then allocated one
by one, so that what lies behind one is not another's.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from redknot_kernels import UNBOUNDED, Cold, HeadRules, Pages, cold_pool, implementation

TOOLS = ["memcheck", "racecheck", "synccheck", "initcheck"]


def steps() -> None:
    """Runs steps of one and of several tokens on rows of very different length, pages shuffled; then cold ones."""
    kernels, device = implementation("triton"), torch.device("cuda")
    rules = HeadRules.make((UNBOUNDED, 30), (0, 4), page_size=16, slack=40)
    lengths, room = [0, 1, 700, 33], 768
    held = [-(-room // 16), min(-(-room // 16), rules.max_pages[1])]
    order = torch.randperm(4 * sum(held), device=device).int()
    table = torch.zeros(4, 2, max(held), dtype=torch.int32, device=device)
    table[:, 0], table[:, 1, : held[1]] = order[: 4 * held[0]].view(4, -1), order[4 * held[0] :].view(4, -1)
    pages = Pages(*torch.randn(2, len(order), 16, 24, device=device, dtype=torch.bfloat16))
    counts = torch.tensor([*lengths, max(lengths)], dtype=torch.int32, device=device)
    for tokens in (1, 5, 16, 40, 1):  # 40 of two heads are two tiles
        query, k_new, v_new = (
            torch.randn(4, tokens, h, 24, device=device, dtype=torch.bfloat16).transpose(1, 2) for h in (4, 2, 2)
        )
        real = torch.rand(4, tokens, device=device) < 0.7
        kernels.step(query, pages, k_new, v_new, table, counts, real, rules, scale=0.2)
    long = torch.randn(4, 2, 50, 24, device=device, dtype=torch.bfloat16)
    kernels.append(pages, long, long, table, torch.tensor([0, 1, 700, 33], device=device), rules)
    print(counts.tolist(), stored_steps())


def stored_steps() -> list[int]:
    """Runs steps on rows whose heads are int8, int4, and windows; pages cool in the midst of them."""
    kernels, device, heads = implementation("triton"), torch.device("cuda"), 4
    windows, sinks, bits = (UNBOUNDED, UNBOUNDED, 30, UNBOUNDED), (0, 0, 4, 0), (8, 4, 0, 8)
    rules = HeadRules.make(windows, sinks, page_size=16, slack=40, storage=bits, hot=32)
    room = 768
    held = [min(-(-room // 16), most) for most in rules.max_pages]
    table = torch.zeros(2, heads, max(held), dtype=torch.int32, device=device)
    order = torch.randperm(2 * sum(held), device=device).int()
    for row, part in zip(table, order.split(sum(held)), strict=True):
        for pages, mine in zip(row, part.split(held), strict=True):
            pages[: len(mine)] = mine
    pages = Pages(*torch.zeros(2, len(order), 16, 32, device=device, dtype=torch.bfloat16))
    columns, pools = -(-room // 16), {}
    cold_table = torch.zeros(2, heads, columns, dtype=torch.int32, device=device)
    for kind, group in rules.stored_groups:
        pools[kind] = cold_pool(2 * len(group) * columns, kind, 16, (32, 32), device)
        every = torch.randperm(len(pools[kind].codes), device=device).int()
        cold_table[:, list(group)] = every.view(2, len(group), columns)
    cold = Cold(pools[8], pools[4], cold_table, torch.zeros(2, heads, dtype=torch.int32, device=device))
    counts = torch.zeros(3, dtype=torch.int32, device=device)
    long = torch.randn(2, 600, heads, 32, device=device, dtype=torch.bfloat16).transpose(1, 2)
    kernels.append(pages, long, long, table, counts[:-1], rules, cold)
    counts += 600
    for tokens in (1, 5, 16, 40, 1):
        query, k_new, v_new = (
            torch.randn(2, tokens, h, 32, device=device, dtype=torch.bfloat16).transpose(1, 2)
            for h in (2 * heads, heads, heads)
        )
        kernels.step(query, pages, k_new, v_new, table, counts, None, rules, cold=cold, scale=0.2)
    torch.cuda.synchronize()
    return [*counts.tolist(), *cold.counts.flatten().tolist()]


def check(tool: str) -> dict:
    """What one tool says about the steps."""
    command = ["compute-sanitizer", "--tool", tool, sys.executable, __file__, "--steps"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    summaries = re.findall(r"=+ (\w+ SUMMARY: .*)", done.stdout)
    clean = not done.returncode and bool(summaries) and "SUMMARY: 0 " in summaries[-1]
    if not clean:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
    summary = summaries[-1].strip() if summaries else "did not run"
    return {"tool": tool, "summary": summary, "clean": clean}


def main() -> None:
    """Runs the tools, or the steps for one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--steps", action="store_true", help="run the steps, under no tool")
    parser.add_argument("--out", type=Path, help="file to append the JSON lines to")
    args = parser.parse_args()
    if args.steps:
        return steps()
    hardware = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for tool in args.tools:
        line = json.dumps({"benchmark": "sanitizer", **check(tool), "hardware": hardware})
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
