"""Decode and prefill attention against PyTorch's SDPA backends, in one run, with the memory roofline.

    python kernels/benchmarks/attention.py --impl triton --out evals/results/attention_gpu.jsonl

Shapes are those of Llama-3.1-8B: 32 query and 8 KV heads of 128. Decoding reads every kept key and value once, so its
floor is bytes over the read bandwidth, which is measured first. Times are medians; the last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from redknot_kernels import UNBOUNDED, HeadRules, implementation
from torch.nn.attention import SDPBackend, sdpa_kernel

HEADS, GROUP, DIM = 8, 4, 128
PAGE = 64
LOCAL = (256, 4)
PLANS = {
    "all global": [(UNBOUNDED, 0)] * HEADS,
    "1/8 global": [(UNBOUNDED, 0)] + [LOCAL] * (HEADS - 1),
    "all local": [LOCAL] * HEADS,
}
_TURNS = 256 << 20  # bytes of inputs that take turns: several times what a chip caches
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


class Timer:
    """Medians of a function's time, on one device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def __call__(self, function) -> float:
        """Seconds of one call, after warm-up; long calls are repeated for a second, three times at least."""
        for _ in range(3):
            function()
        times = []
        while len(times) < self.repeats and (len(times) < 3 or sum(times) < 1):
            self._wait()
            start = time.perf_counter()
            function()
            self._wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def captured(self, functions: list, calls: int = 20) -> float:
        """Seconds of one call as it runs inside a CUDA graph, where launches cost next to nothing; they take turns."""
        if self.device.type != "cuda":
            return self(functions[0])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            functions[0]()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                functions[i % len(functions)]()
        return self(graph.replay) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def bandwidth(timer: Timer, nbytes: int = 2**31) -> float:
    """Bytes a second that a sum over a large tensor reads."""
    data = torch.ones(nbytes // 4 if timer.device.type == "cuda" else 2**22, device=timer.device)
    return data.nbytes / timer(data.sum)


def sets(nbytes: int, device: torch.device) -> int:
    """How many sets of inputs take turns, so that no call finds its own in the chip's cache."""
    return min(20, 1 + (_TURNS // nbytes if device.type == "cuda" else 0))


def decode_row(kernels, timer: Timer, plan: str, batch: int, length: int, dtype: torch.dtype) -> dict:
    """One step of decoding, at the end of rows of `length` tokens: append, attend and count."""
    rules = HeadRules.make(*zip(*PLANS[plan], strict=True), page_size=PAGE)
    held = [min(-(-length // PAGE), most) for most in rules.max_pages]
    kept = sum(min(length, w + s) for w, s in PLANS[plan])
    nbytes = 2 * batch * kept * DIM * torch.finfo(dtype).bits // 8
    make = lambda *shape: torch.randn(*shape, dtype=dtype, device=timer.device)  # noqa: E731

    def step():
        ids = torch.randperm(batch * sum(held), device=timer.device).int()
        table = torch.zeros(batch, HEADS, max(held), dtype=torch.int32, device=timer.device)
        for b, part in enumerate(ids.split(sum(held))):
            for h, pages in enumerate(part.split(held)):
                table[b, h, : len(pages)] = pages
        pages = make(len(ids), PAGE, DIM), make(len(ids), PAGE, DIM)
        query, *new = make(batch, HEADS * GROUP, 1, DIM), make(batch, HEADS, 1, DIM), make(batch, HEADS, 1, DIM)
        counts = torch.full((batch + 1,), length - 1, dtype=torch.int32, device=timer.device)

        def run():
            counts.fill_(length - 1)  # every call takes the last place
            kernels.step(query, *pages, *new, table, counts, None, rules, scale=DIM**-0.5)

        return run

    fill = torch.zeros(batch + 1, dtype=torch.int32, device=timer.device)
    steps = [step() for _ in range(sets(nbytes, timer.device))]
    seconds = timer.captured(steps) - timer.captured([lambda: fill.fill_(0)])
    return {"s": seconds, "nbytes": nbytes}


def dense_row(timer: Timer, batch: int, length: int, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """SDPA over dense keys and values, by backend; laid out as a model's projections are."""
    make = lambda heads, n: torch.randn(batch, n, heads, DIM, dtype=dtype, device=timer.device).transpose(1, 2)  # noqa: E731
    cached = lambda: torch.randn(batch, HEADS, length, DIM, dtype=dtype, device=timer.device)  # noqa: E731
    past = cached if tokens == 1 else lambda: make(HEADS, length)
    count = sets(2 * batch * length * HEADS * DIM * 2, timer.device) if tokens == 1 else 1
    inputs = [(make(HEADS * GROUP, tokens), past(), past()) for _ in range(count)]
    found = {}
    for name, backend in BACKENDS.items():
        if name == "math" and timer.device.type == "cuda":
            continue

        def run(query, key, value, backend=backend):
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(query, key, value, is_causal=tokens > 1, enable_gqa=True)

        runs = [lambda x=x, run=run: run(*x) for x in inputs]
        try:
            found[name] = timer.captured(runs, 20 if tokens == 1 else 1)
        except RuntimeError as error:  # the backend does not take these shapes on this device
            print(f"  {name} at {batch} x {length}: {str(error).splitlines()[0]}")
    return found


def prefill_row(kernels, timer: Timer, plan: str, length: int, dtype: torch.dtype) -> dict:
    """Prefill of one sequence without a past."""
    rules = HeadRules.make(*zip(*PLANS[plan], strict=True), page_size=PAGE)
    make = lambda heads: torch.randn(1, length, heads, DIM, dtype=dtype, device=timer.device).transpose(1, 2)  # noqa: E731
    query, key, value = make(HEADS * GROUP), make(HEADS), make(HEADS)
    run = lambda: kernels.prefill(query, key, value, None, rules, scale=DIM**-0.5)  # noqa: E731
    return {"s": timer.captured([run], 1)}


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
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    hardware = {"device": name, "torch": torch.__version__, "read_bytes_per_s": read}
    line = json.dumps({"benchmark": "attention", "impl": args.impl, "hardware": hardware, "rows": rows})
    if args.out:
        with args.out.open("a") as file:
            file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
