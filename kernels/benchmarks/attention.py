"""Decode and prefill attention against PyTorch's SDPA backends, in one run, with the memory roofline.

    python kernels/benchmarks/attention.py --impl triton --out evals/results/attention_gpu.jsonl

Shapes are those of Llama-3.1-8B: 32 query and 8 KV heads of 128. Decoding reads every kept key and value once, so its
floor is bytes over the read bandwidth, which is measured first. Times are medians. At the end bars are judged, and on
a GPU the kernels behind the shortest prefill and decoding at both ends are listed. The last line is one JSON object.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from redknot_kernels import UNBOUNDED, HeadRules, implementation
from shapes import DIM, GROUP, HEADS, LOCAL, PAGE, step_on_rows
from timing import Timer, bandwidth, sets, write_line
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

PLANS = {
    "all global": [(UNBOUNDED, 0)] * HEADS,
    "1/8 global": [(UNBOUNDED, 0)] + [LOCAL] * (HEADS - 1),
    "all local": [LOCAL] * HEADS,
}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


def decode_row(kernels, timer: Timer, plan: str, batch: int, length: int, dtype: torch.dtype, tokens: int = 1) -> dict:
    """One step of decoding, its tokens the last of rows of `length`: append, attend and count."""
    rules = HeadRules.make(*zip(*PLANS[plan], strict=True), page_size=PAGE)
    nbytes = 2 * batch * sum(min(length, w + s) for w, s in PLANS[plan]) * DIM * torch.finfo(dtype).bits // 8
    count = sets(nbytes, timer.device)
    steps = [step_on_rows(kernels, rules, batch, length, dtype, timer.device, tokens) for _ in range(count)]
    return {"s": timer.steps(steps, batch), "nbytes": nbytes}


def dense_row(timer: Timer, batch: int, length: int, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """SDPA over dense keys and values, by backend; laid out as a model's projections are.

    Where queries are fewer than keys, each sees all keys.
    """
    prefills = tokens == length
    make = lambda heads, n: torch.randn(batch, n, heads, DIM, dtype=dtype, device=timer.device).transpose(1, 2)  # noqa: E731
    cached = lambda: torch.randn(batch, HEADS, length, DIM, dtype=dtype, device=timer.device)  # noqa: E731
    past = (lambda: make(HEADS, length)) if prefills else cached
    count = 1 if prefills else sets(2 * batch * length * HEADS * DIM * 2, timer.device)
    inputs = [(make(HEADS * GROUP, tokens), past(), past()) for _ in range(count)]
    found = {}
    for name, backend in BACKENDS.items():
        if name == "math" and timer.device.type == "cuda":
            continue

        def run(query, key, value, backend=backend):
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(query, key, value, is_causal=prefills, enable_gqa=True)

        runs = [lambda x=x, run=run: run(*x) for x in inputs]
        try:
            found[name] = timer.captured(runs, 1 if prefills else 20)
        except RuntimeError as error:  # the backend does not take these shapes on this device
            print(f"  {name} at {batch} x {length}: {str(error).splitlines()[0]}")
    return found


def prefill_row(kernels, timer: Timer, plan: str, length: int, dtype: torch.dtype) -> dict:
    """Prefill of one sequence without a past."""
    return {"s": timer.captured([prefill_run(kernels, timer, plan, length, dtype)], 1)}


def prefill_run(kernels, timer: Timer, plan: str, length: int, dtype: torch.dtype) -> Callable:
    """Prefill of random tokens, laid out as a model's projections are."""
    rules = HeadRules.make(*zip(*PLANS[plan], strict=True), page_size=PAGE)
    make = lambda heads: torch.randn(1, length, heads, DIM, dtype=dtype, device=timer.device).transpose(1, 2)  # noqa: E731
    query, key, value = make(HEADS * GROUP), make(HEADS), make(HEADS)
    return lambda: kernels.prefill(query, key, value, None, rules, scale=DIM**-0.5)


def doubling_rows(kernels, timer: Timer, longest: int, dtype: torch.dtype) -> list[dict]:
    """Prefill of local heads alone, at lengths that double: what each takes times the one before."""
    rows: list[dict] = []
    for length in (longest >> i for i in reversed(range(5))):
        row = {"length": length, **prefill_row(kernels, timer, "all local", length, dtype)}
        rows.append({**row, "ratio": row["s"] / rows[-1]["s"] if rows else None})
        print(f"prefill all local   1 x {length:6}: {1e3 * row['s']:8.2f} ms, {rows[-1]['ratio'] or 0:.2f}x the last")
    return rows


def step_rows(kernels, timer: Timer, length: int, dtype: torch.dtype) -> list[dict]:
    """Steps of several tokens, as assisted generation takes them; from 17 on a group's queries need two tiles."""
    rows = []
    for tokens in (8, 16, 17, 32, 64):
        dense = dense_row(timer, 1, length, tokens, dtype)
        for plan in ("all global", "1/8 global"):
            row = decode_row(kernels, timer, plan, 1, length, dtype, tokens)
            rows.append({"plan": plan, "tokens": tokens, "length": length, **row, "dense": dense})
            print(f"step of {tokens:2} {plan:11} 1 x {length:6}: {1e6 * row['s']:8.1f} us, "
                  f"{min(dense.values()) / row['s']:5.2f}x the best of SDPA")  # fmt: skip
    return rows


def kernels_of(run: Callable) -> list[dict]:
    """The kernels that one call launches on a GPU, with their time."""
    run()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        run()
        torch.cuda.synchronize()
    found = [e for e in profiled.key_averages() if e.device_time_total > 0]
    return [{"kernel": e.key[:80], "calls": e.count, "us": round(e.device_time_total, 1)} for e in found]


def profiles(kernels, timer: Timer, lengths: list[int], dtype: torch.dtype) -> list[dict]:
    """What the shortest prefill, and decoding at the shortest and the longest length, consist of."""
    if timer.device.type != "cuda":
        return []
    runs: list[tuple[str, str, int, Callable]] = []
    for plan, heads in PLANS.items():
        rules = HeadRules.make(*zip(*heads, strict=True), page_size=PAGE)
        short = prefill_run(kernels, timer, plan, min(lengths), dtype)
        runs.append(("prefill", plan, min(lengths), short))
        for batch, length in ((8, min(lengths)), (1, max(lengths))):
            runs.append(
                (f"decode of {batch}", plan, length, step_on_rows(kernels, rules, batch, length, dtype, timer.device))
            )
    found = [{"what": w, "plan": p, "length": n, "kernels": kernels_of(run)} for w, p, n, run in runs]
    for one in found:
        print(f"kernels of {one['what']}, {one['plan']}, {one['length']}:")
        for kernel in one["kernels"]:
            print(f"  {kernel['us']:9.1f} us in {kernel['calls']} of {kernel['kernel']}")
    return found


def bars(rows: list[dict], doubling: list[dict], read: float) -> list[dict]:
    """What the kernels are to reach, and what they do."""
    found = []
    for row in rows:
        where = f"{row['what']}, {row['plan']}, {row['batch']} x {row['length']}"
        best, decodes, whole = min(row["dense"].values()), row["what"] == "decode", row["plan"] == "all global"
        add = lambda text, value, met, where=where: found.append(  # noqa: E731
            {"bar": f"{where}: {text}", "found": float(f"{value:.3g}"), "met": bool(met)}
        )
        faster = best / row["s"]
        if whole:
            least = 1.0 if decodes else 0.95
            add(f"best of SDPA / ours >= {least}", faster, faster >= least)
        if decodes and whole and (row["batch"], row["length"]) in ((1, 131072), (8, 16384)):
            share = row["nbytes"] / read / row["s"]
            add("share of the read bandwidth >= 0.85", share, share >= 0.85)
        if row["plan"] == "1/8 global" and decodes:
            allowed = 1.25 * row["nbytes"] / read + 5e-6
            add(f"us <= 1.25 x bytes / bandwidth + 5 us = {1e6 * allowed:.1f}", 1e6 * row["s"], row["s"] <= allowed)
            if row["length"] <= 4096:
                add("best of SDPA / ours >= 1", faster, faster >= 1)
            if (row["batch"], row["length"]) == (1, 131072) and "flash" in row["dense"]:
                flash = row["dense"]["flash"] / row["s"]
                add("flash SDPA / ours >= 7", flash, flash >= 7)
        if row["plan"] == "1/8 global" and not decodes and row["length"] >= 131072:
            add("best of SDPA / ours >= 5", faster, faster >= 5)
    for row in doubling[1:]:
        text = f"prefill, all local, 1 x {row['length']}: times the half's within 15 % of 2"
        found.append({"bar": text, "found": round(row["ratio"], 3), "met": 1.7 <= row["ratio"] <= 2.3})
    for one in found:
        print(f"{'met   ' if one['met'] else 'MISSED'} {one['bar']}: {one['found']}")
    return found


def main(argv: list[str] | None = None) -> None:
    """Runs the measurements that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", default="triton", choices=["torch", "triton"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 32768, 131072])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="file to append the JSON line to")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    timer, kernels = Timer(device, args.repeats), implementation(args.impl)
    read = bandwidth(timer)
    rows = []
    for length in args.lengths:
        for batch in args.batches:
            dense = dense_row(timer, batch, length, 1, dtype)
            for plan in PLANS:
                row = decode_row(kernels, timer, plan, batch, length, dtype)
                floor = row["nbytes"] / read
                rows.append({"what": "decode", "plan": plan, "batch": batch, "length": length, **row, "dense": dense})
                best = min(dense.values())
                print(f"decode  {plan:11} {batch} x {length:6}: {1e6 * row['s']:8.1f} us, floor {1e6 * floor:7.1f} us "
                      f"({floor / row['s']:4.0%}), {best / row['s']:5.2f}x the best of SDPA")  # fmt: skip
        dense = dense_row(timer, 1, length, length, dtype)
        for plan in PLANS:
            row = prefill_row(kernels, timer, plan, length, dtype)
            rows.append({"what": "prefill", "plan": plan, "batch": 1, "length": length, **row, "dense": dense})
            best = min(dense.values())
            print(
                f"prefill {plan:11} 1 x {length:6}: {1e3 * row['s']:8.2f} ms, {best / row['s']:5.2f}x the best of SDPA"
            )
    doubling = doubling_rows(kernels, timer, max(args.lengths), dtype)
    steps = step_rows(kernels, timer, sorted(args.lengths)[len(args.lengths) // 2], dtype)
    extra = {"doubling": doubling, "steps": steps, "bars": bars(rows, doubling, read)}
    extra["profiles"] = profiles(kernels, timer, args.lengths, dtype)
    found = {"benchmark": "attention", "impl": args.impl, "rows": rows, **extra}
    write_line(args.out, found, device, read_bytes_per_s=read)


if __name__ == "__main__":
    main()
