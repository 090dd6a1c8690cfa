"""`redknot serve`: an engine behind OpenAI's API. What it needs is imported when it is called."""

from __future__ import annotations

import gc
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from warnings import warn

import typer

from . import options
from .terminal import fail, tell, told

if TYPE_CHECKING:
    from redknot_hf.serving import Engine
    from redknot_hf.serving.server import Settings

# Whose server parts tell thoughts and calls from text.
_LEAST = (5, 23)

Memory = Annotated[str, typer.Option(help="For pages: bytes, such as 24GiB, or a share of what is free.")]
Key = Annotated[
    str | None, typer.Option(envvar="REDKNOT_API_KEY", help="Clients must bring it: Authorization: Bearer KEY.")
]


def serve(  # noqa: PLR0913 - every one is an option of the command
    model: options.Model,
    plan: Annotated[Path, typer.Option(help="Rule of every KV head.")],
    store: Annotated[
        str | None, typer.Option(help="Where /v1/segments are kept: a folder, a URL, or memory alone.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; others than this machine need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key: Key = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Anyone who reaches the server may use it.")] = False,
    name: Annotated[str | None, typer.Option(help="What clients call the model; MODEL by default.")] = None,
    memory: Memory = "0.9",
    max_batch: Annotated[int, typer.Option(help="Requests that hold pages at once, at most.")] = 32,
    max_len: Annotated[int | None, typer.Option(help="Tokens of a prompt and its answer; the model's limit.")] = None,
    chunk: Annotated[int, typer.Option(help="Tokens of prompts read in a step, at most.")] = 2048,
    preempt: Annotated[str, typer.Option(help="Whoever gives way: swap, recompute, or none does.")] = "swap",
    parked: Annotated[float, typer.Option(help="Share of the pages for prefixes kept for later.")] = 0.5,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile steps of decoding on a GPU: shorter ones, a longer start.")
    ] = False,
    queue: Annotated[int, typer.Option(help="Requests that wait, at most; others are told to come again.")] = 256,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which an answer is given up.")] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request, at most.")] = 8 << 20,
    chat_template: Annotated[Path | None, typer.Option(help="File of one, instead of the tokenizer's own.")] = None,
    drain: Annotated[
        float | None, typer.Option(min=0, help="Seconds that answers may take at the end: 30, under torchrun 20.")
    ] = None,
    balance: Annotated[bool, typer.Option("--balance", help="Ranks (torchrun) hold as many bytes each.")] = False,
    revision: options.Revision = None,
    gguf_file: options.Gguf = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
) -> None:
    """Serve MODEL under a plan to many users at once, through OpenAI's API; it listens to this machine only."""
    with told():
        check_parts()
        from redknot_hf.plan.plan import HeadPlan
        from redknot_hf.reuse.store import SegmentStore
        from redknot_hf.serving import Engine, Sampling
        from redknot_hf.serving.server import Settings
        from redknot_hf.serving.server.running import bound
        from redknot_hf.serving.server.settings import check_door

        from . import ranks
        from .loading import Source

        ranks.check(store, device, balance)
        held, source = HeadPlan.load(plan), Source(model, revision, gguf_file, dtype, device)
        settings = Settings(
            name=name or model, key=api_key, hosts=check_door(host, api_key, no_auth), timeout=timeout,
            max_body=max_body,
            chat_template=chat_template.read_text(encoding="utf-8") if chat_template else None,
        )  # fmt: skip
        leads = not ranks.number()
        listening = bound(host, port) if leads else None
        loaded = source.model(ranks.count()).eval()
        held = ranks.balanced(loaded, held, max_len) if balance else held
        segments = None if store is None else SegmentStore(loaded, held, path=None if store == "memory" else store)
        engine = Engine(
            loaded, held, tokenizer=source.tokenizer() if leads else None, store=segments, memory=memory,
            max_batch=max_batch, max_len=max_len, chunk=chunk, preempt=None if preempt == "none" else preempt,
            parked=parked, queue=queue, compiled=compiled,
        )  # fmt: skip
        if compiled and ranks.count() == 1:  # before anybody waits for it
            engine.generate([[0]], Sampling(max_new_tokens=2, ignore_eos=True))
        if leads:
            # torchrun kills what has not ended half a minute after it was told to.
            _run(engine, settings, listening, drain if drain is not None else 30 if ranks.count() == 1 else 20)
        else:
            ranks.follow(engine)
        ranks.leave()


def check_parts() -> None:
    """Checks that all is installed that a server needs.

    Raises:
        ImportError: Something is missing, or too old.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as e:
        raise ImportError(f"a server needs {e.name}: pip install redknot-hf[serve]") from e
    found = version("transformers")
    if tuple(map(int, found.split(".")[:2])) < _LEAST:
        raise ImportError(
            f"a server needs transformers {'.'.join(map(str, _LEAST))} or newer, and this is {found}: upgrade it, or "
            "call redknot_hf.serving.Engine from Python"
        )


def _run(engine: Engine, settings: Settings, listening: Any, drain: float) -> None:
    from redknot_hf.serving.server import app_for
    from redknot_hf.serving.server.running import Server

    host, port = listening.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    app = app_for(engine, settings)
    longest, pages = app.state.service.longest, engine.memory.used()["total"]

    def ready() -> None:
        gc.collect()
        gc.freeze()  # what is there stays: to look through all of it again and again would hold steps up
        tell(f"{settings.name}: {where} is a page to look at, {where}/v1 the API")
        tell(f"{pages / 2**20:,.0f} MiB of pages: {engine.max_batch} requests at once, of up to {longest:,} tokens")

    if longest < engine.max_len:
        warn(
            f"the memory holds requests of {longest:,} tokens, of the {engine.max_len:,} that --max-len allows",
            stacklevel=1,
        )
    lost = lambda: engine.ranks.count > 1 and engine.error is not None  # noqa: E731
    server = Server(app, engine, drain, ready, lost, log_level="warning")
    with engine, suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    gc.unfreeze()
    if lost() and engine.error is not None:
        fail(engine.error)
