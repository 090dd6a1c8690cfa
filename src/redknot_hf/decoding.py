"""Decoding whose every token is one replay of a CUDA graph, behind `generate(custom_generate=captured_decoding)`.

`generate`'s own compiled decoding replays a graph too, but prepares inputs, picks a token and looks whether it is the
last one from the host, which waits for the device at every step. Here the graph holds the forward pass and the choice
of a token, and the host looks only once in a while.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from redknot_hf.cache.argument import OF_GENERATE, cache_argument
from redknot_hf.cache.cache import RedKnotCache

# Tokens after which the host looks whether all sequences have ended; a page at most, so that they can be taken back.
LOOK = 16

Ids = Int[Tensor, "batch tokens"]


@torch.no_grad()
def captured_decoding(
    model: PreTrainedModel,
    input_ids: Ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Int[Tensor, "batch longer"] | GenerateDecoderOnlyOutput:
    """Greedy decoding and sampling as `generate` does them, with a RedKnotCache of `max_cache_len`; batches too.

    The prompt is read at once (or in chunks of `prefill_chunk_size`), outside of the graph. Logits processors run
    between the replays. On a device without CUDA graphs the same steps run one by one. transformers hands no streamer
    on to a `custom_generate`.

    Raises:
        ValueError: The cache cannot be captured, or something is asked that only `generate`'s own decoding does.
    """
    cache = _check(model, generation_config, stopping_criteria, model_kwargs)
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    past = cache.get_seq_length()
    prompt = input_ids[:, past:] if mask.shape[1] == input_ids.shape[1] else input_ids
    longest = generation_config.max_length - input_ids.shape[1]
    if past + prompt.shape[1] + longest - 1 > cache.get_max_length():
        raise ValueError(
            f"{past + prompt.shape[1]} slots of prompt and {longest} new tokens exceed "
            f"max_cache_len={cache.get_max_length()}: make the cache with a larger max_cache_len"
        )
    logits = _read(model, prompt, mask, cache, generation_config.prefill_chunk_size)
    chooser = _Chooser(generation_config, logits_processor, input_ids, longest)
    chooser.put(logits)
    chooser.count += 1
    step = _Step(model, cache, chooser, mask)
    # As in generate's own loop: experts then do not ask the host how many tokens each one got.
    # A graph is captured on the current device, which may be another.
    with torch.cuda.device_of(input_ids), model._optimize_model_for_decode():  # pyright: ignore[reportCallIssue]
        while chooser.count < longest and not chooser.all_ended():
            for _ in range(min(LOOK, longest - chooser.count)):
                step()
    tokens, kept = chooser.finish()
    if chooser.count > kept:
        cache.crop(kept - chooser.count)
    sequences = torch.cat([input_ids, tokens], 1)
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences, **{OF_GENERATE: cache})  # pyright: ignore
    return sequences


@lru_cache
def capture_stream(device: torch.device) -> Any:
    """The stream on which steps of a device are captured: torch's own is of the device that it was first used on.

    It is always the same one, since libraries take memory for each stream that they meet.
    """
    return torch.cuda.Stream(device)


class _Chooser:
    """Chooses tokens and keeps them: on the device, without a word to the host."""

    def __init__(self, config: GenerationConfig, processors: LogitsProcessorList, prompt: Ids, longest: int) -> None:
        device = prompt.device
        self.sample, self.processors = bool(config.do_sample), processors
        self.prompt = prompt
        self.tokens = torch.zeros(len(prompt), longest, dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.last = torch.zeros(len(prompt), 1, dtype=torch.long, device=device)
        self.count = 0
        eos = config.eos_token_id
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        self.eos = torch.tensor(eos, dtype=torch.long, device=device)
        self.pad = config.pad_token_id if config.pad_token_id is not None else eos[0] if eos else 0

    @property
    def plain(self) -> bool:
        """Whether the largest logit is chosen as it is, which a graph can do."""
        return not self.sample and not self.processors

    def put(self, logits: Float[Tensor, "batch words"]) -> None:
        """Chooses and keeps a token; may be captured where the choice is plain."""
        if not self.plain:
            seen = torch.cat([self.prompt, self.tokens[:, : self.count]], 1)
            logits = self.processors(seen, logits.float())  # pyright: ignore[reportArgumentType]
        chosen = torch.multinomial(logits.float().softmax(-1), 1) if self.sample else logits.argmax(-1, keepdim=True)
        self.last.copy_(chosen)
        self.tokens.index_copy_(1, self.at, chosen)
        self.at += 1

    def ends(self) -> Int[Tensor, " batch"]:
        """Tokens of each sequence up to its end-of-sequence token, or all there are."""
        ended = torch.isin(self.tokens[:, : self.count], self.eos)
        return torch.where(ended.any(1), ended.int().argmax(1) + 1, self.count + 1)

    def all_ended(self) -> bool:
        """Whether every sequence has ended; waits for the device."""
        return len(self.eos) > 0 and bool((self.ends() <= self.count).all())

    def finish(self) -> tuple[Ids, int]:
        """The tokens, padded behind each sequence's end, and how many were kept."""
        ends = self.ends()
        kept = min(self.count, int(ends.max()))
        places = torch.arange(kept, device=self.tokens.device)
        return self.tokens[:, :kept].masked_fill(places >= ends[:, None], self.pad), kept


class _Step:
    """One token: forward pass and choice, captured where the device has graphs."""

    def __init__(self, model: PreTrainedModel, cache: RedKnotCache, chooser: _Chooser, mask: Ids) -> None:
        self.chooser, self.cache, self.model = chooser, cache, model
        self.taken = cache_argument(model, cache)
        self.positions = mask.sum(1, keepdim=True).long()
        self.mask = mask
        if cache.is_compileable:  # of a captured step, only its own tokens are described
            self.mask = torch.ones(len(mask), 1, 1, 1, dtype=torch.bool, device=mask.device)
        self.forward: Callable[..., Any] = model.forward
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.steps = 0

    def __call__(self) -> None:
        """Runs the step; the first is traced, the second captured, all later ones are replays."""
        captures = self.model.device.type == "cuda"
        if self.steps == 0 and captures:
            self.forward = torch.compile(self.model.forward, fullgraph=True, dynamic=False)
        if self.steps == 1 and captures:
            self._capture()
        if self.graph is None:
            self._body()
        else:
            self.graph.replay()
        if not self.chooser.plain:
            self.chooser.put(self._logits())
        self.chooser.count += 1
        self.steps += 1

    def _body(self) -> None:
        if not self.cache.is_compileable:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        out = self.forward(
            input_ids=self.chooser.last, attention_mask=self.mask, position_ids=self.positions,
            use_cache=True, **self.taken,
        )  # fmt: skip
        logits = self.logits = out.logits[:, -1]
        self.positions += 1
        if self.chooser.plain:
            self.chooser.put(logits)

    def _logits(self) -> Float[Tensor, "batch words"]:
        assert self.logits is not None
        return self.logits

    def _capture(self) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=capture_stream(self.positions.device)):
            self._body()
        self.graph = graph


def _read(
    model: PreTrainedModel, prompt: Ids, mask: Int[Tensor, "batch slots"], cache: RedKnotCache, chunk: int | None
) -> Float[Tensor, "batch words"]:
    """Reads the prompt and gives the logits behind it."""
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -prompt.shape[1] :]
    start, logits = mask.shape[1] - prompt.shape[1], None
    size = chunk or prompt.shape[1]
    for part, where in zip(prompt.split(size, 1), positions.split(size, 1), strict=True):
        start += part.shape[1]
        logits = model(
            part, attention_mask=mask[:, :start], position_ids=where, use_cache=True, logits_to_keep=1,
            **cache_argument(model, cache),
        ).logits[:, -1]  # fmt: skip
    if logits is None:
        raise ValueError("the cache holds the whole prompt already: pass at least one token that it does not hold")
    return logits


def _check(
    model: PreTrainedModel, config: GenerationConfig, criteria: StoppingCriteriaList, kwargs: dict[str, Any]
) -> RedKnotCache:
    cache = kwargs.get(OF_GENERATE)
    device = model.device
    if not isinstance(cache, RedKnotCache) or cache.get_max_length() < 0:
        raise ValueError("captured_decoding needs past_key_values=RedKnotCache(..., max_cache_len=slots)")
    if device.type == "cuda" and not cache.is_compileable:
        raise ValueError("captured_decoding needs kernels that can be captured: make the cache with impl='triton'")
    if config.num_beams > 1 or config.output_scores or config.output_logits or config.output_hidden_states:
        raise ValueError(
            "captured_decoding decodes greedily or samples, and returns tokens: leave custom_generate out for beams, "
            "scores, logits or hidden states"
        )
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("captured_decoding reads input_ids: leave custom_generate out to pass inputs_embeds")
    known = {"MaxLengthCriteria", "EosTokenCriteria"}
    others = [type(c).__name__ for c in criteria if type(c).__name__ not in known]
    if others:
        raise ValueError(f"captured_decoding does not ask {others} after every token: leave custom_generate out")
    return cache
