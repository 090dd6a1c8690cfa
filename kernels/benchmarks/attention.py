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
PLANS = {"all global": [(UNBOUNDED, 0)] * HEADS, "1/8 global": [(UNBOUNDED, 0)] + [(256, 4)] * (HEADS - 1)}
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

    def captured(self, function) -> float:
        """Seconds of one call as it runs inside a CUDA graph, where launches cost next to nothing."""
        if self.device.type != "cuda":
            return self(function)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph, calls = torch.cuda.CUDAGraph(), 20
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        return self(graph.replay) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def bandwidth(timer: Timer, nbytes: int = 2**31) -> float:
    """Bytes a second that a sum over a large tensor reads."""
    data = torch.ones(nbytes // 4 if timer.device.type == "cuda" else 2**22, device=timer.device)
    return data.nbytes / timer(data.sum)


def decode_row(kernels, timer: Timer, plan: str, batch: int, length: int, dtype: torch.dtype) -> dict:
    """One step of decoding for rows of `length` tokens: append and attend."""
    rules = HeadRules.make(*zip(*PLANS[plan], strict=True), page_size=64)
    held = [min(-(-length // 64), most) for most in rules.max_pages]
    ids = torch.randperm(batch * sum(held), device=timer.device).int()
    table = torch.zeros(batch, HEADS, max(held), dtype=torch.int32, device=timer.device)
    start = 0
    for b in range(batch):
        for h, pages in enumerate(held):
            table[b, h, :pages] = ids[start : start + pages]
            start += pages
    make = lambda *shape: torch.randn(*shape, dtype=dtype, device=timer.device)  # noqa: E731
    k_pages, v_pages = make(len(ids), 64, DIM), make(len(ids), 64, DIM)
    query, k_new, v_new = make(batch, HEADS * GROUP, 1, DIM), make(batch, HEADS, 1, DIM), make(batch, HEADS, 1, DIM)
    lengths = torch.full((batch,), length, device=timer.device)
    before = lengths - 1

    def attend():
        kernels.decode(query, k_pages, v_pages, table, lengths, rules, scale=DIM**-0.5)

    def step():
        kernels.append(k_pages, v_pages, k_new, v_new, table, before, rules)
        attend()

    kept = sum(min(length, w + s) for w, s in PLANS[plan])
    seconds = {"s": timer.captured(step), "attend_s": timer.captured(attend)}
    return {**seconds, "nbytes": 2 * batch * kept * DIM * query.element_size()}


def dense_row(timer: Timer, batch: int, length: int, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """SDPA over dense keys and values, by backend."""
    make = lambda heads, n: torch.randn(batch, heads, n, DIM, dtype=dtype, device=timer.device)  # noqa: E731
    query, key, value = make(HEADS * GROUP, tokens), make(HEADS, length), make(HEADS, length)
    found = {}
    for name, backend in BACKENDS.items():
        if name == "math" and timer.device.type == "cuda":
            continue

        def run(backend=backend):
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(query, key, value, is_causal=tokens > 1, enable_gqa=True)

        try:
            found[name] = timer.captured(run) if tokens == 1 else timer(run)
        except RuntimeError as error:  # the backend does not take these shapes on this device
            print(f"  {name} at {batch} x {length}: {str(error).splitlines()[0]}")
    return found


def prefill_row(kernels, timer: Timer, plan: str, length: int, dtype: torch.dtype) -> dict:
    """Prefill of one sequence without a past."""
    rules = HeadRules.make(*zip(*PLANS[plan], strict=True), page_size=64)
    make = lambda heads: torch.randn(1, heads, length, DIM, dtype=dtype, device=timer.device)  # noqa: E731
    query, key, value = make(HEADS * GROUP), make(HEADS), make(HEADS)
    return {"s": timer(lambda: kernels.prefill(query, key, value, None, rules, scale=DIM**-0.5))}


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
                      f"({floor / row['s']:4.0%}), {best / row['s']:5.2f}x the best of {', '.join(dense)}, "
                      f"{best / row['attend_s']:5.2f}x without the append")  # fmt: skip
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
