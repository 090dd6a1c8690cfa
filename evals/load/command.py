"""Load on a server that speaks OpenAI's protocol: latency and throughput, with percentiles.

    redknot serve MODEL --plan plan.json &
    python -m evals serve http://127.0.0.1:8000/v1 --rate 4 --requests 200 --prompt 128-2048 --new ~128

Requests arrive as a Poisson process and are timed from when they are due. Prompts are random token ids, sent to
`/v1/completions`. The last line is JSON; `--out` appends it to a file.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .sending import Server, models_of, send
from .workload import Shared, Workload, draw_workload, length, lengths_of

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command(help=__doc__)
def main(  # noqa: PLR0913 - options of a command
    url: Annotated[str, typer.Argument(help="of the server, with its /v1")],
    model: Annotated[str | None, typer.Option(help="the server's name for it; by default what it serves")] = None,
    requests: Annotated[int, typer.Option(min=1, help="how many")] = 100,
    rate: Annotated[float | None, typer.Option(min=1e-6, help="a second, on average; all at once by default")] = None,
    most: Annotated[int | None, typer.Option(min=1, help="under way at once; by default whatever is due")] = None,
    prompt: Annotated[str, typer.Option(help="tokens of a prompt: 512, 128-2048, or ~512 (exponential)")] = "512",
    new: Annotated[str, typer.Option(help="tokens of an answer, in the same words")] = "128",
    lengths: Annotated[
        Path | None, typer.Option(help='in place of both: JSON lines {"prompt": 512, "new": 64}')
    ] = None,
    prefix_share: Annotated[float, typer.Option(help="of the prompts, begin with a prefix that others have")] = 0.0,
    prefixes: Annotated[int, typer.Option(help="of them there are so many")] = 4,
    prefix_tokens: Annotated[int, typer.Option(help="of each")] = 1024,
    segment_share: Annotated[float, typer.Option(help="of the requests, name stored documents (redknot serve)")] = 0.0,
    segments: Annotated[int, typer.Option(help="of them there are so many")] = 16,
    segment_tokens: Annotated[int, typer.Option(help="of each")] = 1024,
    segments_each: Annotated[int, typer.Option(help="that a request names")] = 4,
    boundary: Annotated[float | None, typer.Option(help="share of each segment that is recomputed")] = None,
    words: Annotated[int, typer.Option(min=4, help="ids are drawn below this; no more than the vocabulary")] = 1000,
    seed: Annotated[int, typer.Option(help="of all draws")] = 0,
    key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="if the server asks for one")] = "none",
    timeout: Annotated[float, typer.Option(help="seconds that a request may take")] = 600.0,
    more: Annotated[
        str, typer.Option(help="JSON, sent with every request")
    ] = '{"ignore_eos": true, "temperature": 0}',
    warm: Annotated[int, typer.Option(min=0, help="requests beforehand that do not count")] = 2,
    device: Annotated[str, typer.Option(help="the server's, if it is of this machine: cpu, cuda")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="file of results; a line is appended")] = None,
) -> None:
    """Asks, shows a table, and appends a line to a file."""
    from rich.console import Console

    from .figures import table_of

    draw = random.Random(seed)
    drawn = [length(told) for told in (prompt, new)]
    if lengths is not None:
        given = lengths_of(lengths)
        wanted = [given[i % len(given)] for i in range(requests)]
    else:
        wanted = [(drawn[0](draw), drawn[1](draw)) for _ in range(requests)]
    beginnings = Shared(prefix_share, prefixes, prefix_tokens)
    documents = Shared(segment_share, segments, segment_tokens, segments_each)
    load = draw_workload(wanted, rate, words, seed, prefixes=beginnings, segments=documents)
    server = Server(url, model or "", key, timeout, most, _fields(more), boundary)
    if model is None:
        server = replace(server, model=_only(asyncio.run(models_of(server))))
    if warm:
        first = draw_workload([(16, 8)] * warm, None, words, seed + 1)
        asyncio.run(send(replace(server, most=1), first))
    row = _asked(server, load)
    Console(stderr=True).print(table_of(row))
    described = {
        "rate": rate, "most": most, "prompt": prompt, "new": new, "lengths": lengths and lengths.name, "seed": seed,
        "prefixes": asdict(beginnings), "segments": asdict(documents), "boundary": boundary, "words": words,
    }  # fmt: skip
    found = {"benchmark": "serve", "server": url, "model": server.model, "workload": described, "rows": [row]}
    _write(out, found, device)
    raise typer.Exit(1 if row["failed"] else 0)


def _asked(server: Server, load: Workload) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    from .figures import summed_up

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("answers", total=len(load.requests))
        return summed_up(asyncio.run(send(server, load, lambda answer: bar.advance(task))))


def _write(out: Path | None, found: dict[str, Any], device: str) -> None:
    import torch

    from evals.result_file import write_line

    write_line(out, found, torch.device(device))


def _only(names: list[str]) -> str:
    if len(names) != 1:
        raise ValueError(f"the server has the models {', '.join(names) or 'none'}: name one, --model")
    return names[0]


def _fields(more: str) -> dict[str, Any]:
    try:
        found = json.loads(more)
    except ValueError as e:
        raise ValueError(f"--more {more!r}: give JSON, such as '{{\"temperature\": 0}}'") from e
    if not isinstance(found, dict):
        raise ValueError(f"--more {more!r}: give an object, such as '{{\"temperature\": 0}}'")
    return found
