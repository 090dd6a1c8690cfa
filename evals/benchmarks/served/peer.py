"""The same requests by the engine and by transformers' continuous batching, `generate_batch`, over SDPA."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig

from redknot_hf.serving import Sampling

from .scene import PLAN, Scene, bar, check
from .work import Work


def peer(scene: Scene, work: Work) -> Iterator[dict[str, Any]]:
    """Rows of both; what compiles and captures is done before the clock runs."""
    prompts = scene.prompts(work.requests, work.length)
    mine = engine_row(scene, work, prompts)
    yield mine
    theirs = transformers_row(scene, work, prompts)
    ratio = mine["tokens_per_s"] / theirs["tokens_per_s"]
    yield {**theirs, "bars": {"tokens/s of the engine / of generate_batch": bar(ratio, least=20)}}


def engine_row(scene: Scene, work: Work, prompts: list[list[int]]) -> dict[str, Any]:
    """Serves the requests from the first to the last."""
    engine = scene.engine(work)
    check(engine.generate(scene.prompts(work.requests, work.length)[:1] * work.requests, Sampling(max_new_tokens=4)))
    scene.wait()
    start = time.perf_counter()
    asked = engine.generate(prompts, Sampling(max_new_tokens=work.new))
    scene.wait()
    seconds = time.perf_counter() - start
    check(asked)
    engine.shutdown()
    return _row(f"engine, {PLAN}", work, seconds)


def transformers_row(scene: Scene, work: Work, prompts: list[list[int]]) -> dict[str, Any]:
    """The time from the first request's arrival to the last token, as `generate_batch` has recorded it."""
    scene.collect()
    scene.model.set_attn_implementation("sdpa")
    config = GenerationConfig(max_new_tokens=work.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    answers = scene.model.generate_batch(prompts, generation_config=config, record_timestamps=True)
    ran = scene.model.config._attn_implementation
    scene.collect()
    tokens = [len(answer.generated_tokens) for answer in answers.values()]
    if len(answers) != work.requests or set(tokens) != {work.new}:
        raise RuntimeError(f"generate_batch answered {len(answers)} of {work.requests} requests, of {tokens} tokens")
    times = [answer.timestamps for answer in answers.values()]
    start = min(answer.created_time for answer in answers.values())
    row = _row("generate_batch", work, max(x[-1] for x in times) - start)
    decoding = max(x[-1] for x in times) - max(x[0] for x in times)
    return {**row, "attention": ran, "s_when_all_decode": decoding}


def _row(method: str, work: Work, seconds: float) -> dict[str, Any]:
    rate = work.requests * work.new / seconds
    sizes = {"requests": work.requests, "length": work.length, "new": work.new}
    return {"method": method, **sizes, "s": seconds, "tokens_per_s": rate}
