"""Time and memory of a whole model on one GPU: Llama-3.1-8B's shape with random weights, ours against transformers'.

    python -m evals bench speed_gpu --out evals/results/speed_gpu.jsonl

Everything runs through `model.generate`. The time to the first token is that of a prompt whose length was read once
before; a token's time is the median of the intervals at which `generate` hands tokens on, or, of `captured_decoding`,
what 64 more tokens take longer (the median of five); its first time is that of 32 tokens. Bytes of the cache are what
the device's allocator holds more after than before. Reserved caches are compiled by `generate` itself: ours once for
all lengths, dense ones for each, since they read all that is reserved. A dense batch is the largest that fits, found
by trying. What matters most is measured first.

Bars were set on a device that reads 4.35 TB/s; times that reading bounds are also given scaled to this device's rate.
The last line is one JSON object; `--out` appends it to a file, also when the run is interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from evals.benchmarks.options import Decoded, Device, Lengths, Out, Shape, command, place_of

METHODS = [
    *("dynamic", "1/8 global", "1/8 global, captured", "all global, captured", "static"),
    *("all global", "1/8 global, reserved"),
]

app = command()


@app.command(help=__doc__)
def main(
    shape: Shape = "8b",
    lengths: Lengths = [32768, 131072],
    methods: Annotated[list[str], typer.Option("--method", help=f"of {', '.join(METHODS)}")] = METHODS,
    batch: Annotated[int, typer.Option(help="sequences of the batch rows; 0 leaves them out")] = 32,
    batch_length: int = 32768,
    stored: Annotated[bool, typer.Option(help="also batches of int8 and int4, and the most that 100 GB hold")] = False,
    tokens: Decoded = 24,
    device: Device = None,
    out: Out = None,
) -> None:
    """Measures, and appends a line to a file."""
    import torch

    from evals.benchmarks.bars import bars
    from evals.benchmarks.speed_gpu import Contest, reading_rate, unless_full
    from evals.result_file import write_line

    place = place_of(device)
    read = reading_rate(place)
    bench = Contest(shape, max(lengths), place)
    bench.run(bench.cache("dynamic"), torch.ones(1, 300, dtype=torch.long, device=place), 8)
    measures: list[Callable[[], list[dict]]] = [lambda m=m: bench.row(m, lengths, tokens) for m in methods]
    if batch and stored:
        ours = [f"1/8 global{storage}, captured" for storage in ("", " int8", " int4")]
        measures += [lambda m=m: bench.batch_row(m, batch, batch_length) for m in ours]
        measures += [lambda m=m: bench.held_row(m, batch_length) for m in ours]
    elif batch:
        # Ours first: what it leaves behind is the least. Reserved dense batches are slower, and take longest to find.
        measures[4:4] = [
            lambda: bench.batch_row("1/8 global, captured", batch, batch_length),
            lambda: bench.largest_row("dynamic", batch_length, tokens),
        ]
        measures.append(lambda: bench.largest_row("static", batch_length, tokens))
    rows: list[dict] = []
    try:
        for measure in measures:
            rows += unless_full(bench, measure)
    finally:
        found = {"benchmark": "speed_gpu", "shape": shape, "rows": rows, "bars": bars(rows, read)}
        weights = sum(p.nbytes for p in bench.model.parameters())
        write_line(out, found, place, read_bytes_per_s=read, weights_bytes=weights)
