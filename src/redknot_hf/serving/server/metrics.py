"""Metrics in Prometheus' format: what an engine says of its work, and what it holds when it is asked."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from redknot_hf.serving.load import Load

from .served import Served

FORMAT = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 5)
# By these names gateways (llm-d, the inference extension of the Gateway API) know what is ours by others.
_ALIASES = {
    "redknot_requests_waiting": "vllm:num_requests_waiting",
    "redknot_requests_running": "vllm:num_requests_running",
    "redknot_kv_usage_ratio": "vllm:kv_cache_usage_perc",
    "redknot_prompt_tokens": "vllm:prompt_tokens",
    "redknot_answer_tokens": "vllm:generation_tokens",
    "redknot_prefix_asked_tokens": "vllm:prefix_cache_queries",
    "redknot_prefix_hit_tokens": "vllm:prefix_cache_hits",
    "redknot_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "redknot_time_between_tokens_seconds": "vllm:inter_token_latency_seconds",
}


# Of a store's counts, those that are no one tier's.
_STORE = {
    "computed": "Segments that were read for the first time",
    "recomputed": "Segments that were read again because they were lost",
    "damaged": "Stored values that were refused",
    "failed_writes": "Segments that could not be written",
    "unreachable": "Times that a remote tier did not answer, or was left alone since it had not",
}


class Metrics(Collector):
    """Of one engine, in a registry of its own.

    Args:
        engine: Is observed from now on, besides whoever does already.
        load: Tells what it has to do and holds.
    """

    def __init__(self, engine: Served, load: Callable[[Any], Load] = Load.of) -> None:
        self.engine, self._load = engine, load
        self._first = Histogram(
            "redknot_time_to_first_token_seconds", "From a request's arrival to its first token",
            buckets=_SECONDS, registry=None,
        )  # fmt: skip
        self._between = Histogram(
            "redknot_time_between_tokens_seconds", "From a token to the next of the same request",
            buckets=_BETWEEN, registry=None,
        )  # fmt: skip
        self._ended = Counter("redknot_requests_ended", "Requests that have ended, by why", ["reason"], registry=None)
        self._moved = Counter(
            "redknot_requests_moved", "Answers that went on elsewhere, since who gave them was gone", registry=None
        )
        self._answered = Counter(
            "redknot_http_responses", "Responses, by route and status", ["route", "status"], registry=None
        )
        self._ends: deque[float] = deque(maxlen=64)
        self._before = engine.observe
        engine.observe = self.observe
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def observe(self, name: str, value: float | int) -> None:
        """What an engine tells, on its thread."""
        self._before(name, value)
        if name == "first":
            self._first.observe(value)
        elif name == "next":
            self._between.observe(value)
        elif name == "moved":
            self._moved.inc(value)
        else:
            self._ended.labels(name).inc()
            self._ends.append(time.monotonic())

    def answered(self, route: str, status: int) -> None:
        """Counts a response; of addresses that are none of ours, all alike."""
        self._answered.labels(route, str(status)).inc()

    @property
    def seconds_to_a_place(self) -> int:
        """About how long until a request ends and another may wait in its stead, 1 to 60."""
        ends = list(self._ends)
        if len(ends) < 2:
            return 1
        return min(max(math.ceil((ends[-1] - ends[0]) / (len(ends) - 1)), 1), 60)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)

    def describe(self) -> list[Metric]:
        """Nothing: names are settled, and need not be collected to be known."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, and aliases of some."""
        for family in self._families():
            yield family
            if family.name in _ALIASES:
                yield _renamed(family, _ALIASES[family.name])

    def _families(self) -> Iterator[Metric]:
        load = self._load(self.engine)
        yield from _plain(load)
        yield from _labelled(load)
        yield from _stored(load)
        for own in (self._first, self._between, self._ended, self._moved, self._answered):
            yield from map(_undated, own.collect())
        sizes = self.engine.memory.sizes
        blocks = GaugeMetricFamily(
            "vllm:cache_config_info", "Pages of a row that keeps everything", labels=["block_size", "num_gpu_blocks"]
        )
        blocks.add_metric([str(sizes.page_size), str(sizes.columns)], 1)
        yield blocks


def _plain(load: Load) -> Iterator[Metric]:
    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    yield gauge("redknot_requests_waiting", "Requests that hold no pages yet, or none any more", load.waiting)
    yield gauge("redknot_requests_running", "Requests that hold pages", load.running)
    yield gauge("redknot_seats", "Requests that may hold pages at once", load.seats)
    share = load.busy / load.total if load.total else 0  # of replicas that have not told yet
    yield gauge("redknot_kv_usage_ratio", "Share of all pages that running requests hold", share)
    yield gauge("redknot_kv_total_bytes", "Bytes of all pages", load.total)
    yield gauge("redknot_kv_parked_bytes", "Bytes of pages that only prefixes kept for later hold", load.parked)
    yield gauge("redknot_kv_host_bytes", "Bytes of sequences that were swapped out", load.host)
    yield counter("redknot_prompt_tokens", "Tokens of prompts that were read", load.read)
    yield counter("redknot_answer_tokens", "Tokens that were decoded", load.written)
    yield counter("redknot_prefix_asked_tokens", "Tokens of prompts that were looked for", load.asked)
    yield counter("redknot_prefix_hit_tokens", "Those of them that parked prefixes held", load.hits)
    yield counter("redknot_segment_hit_tokens", "Tokens of prompts that were taken from stored segments", load.reused)


def _labelled(load: Load) -> Iterator[Metric]:
    held = GaugeMetricFamily(
        "redknot_kv_bytes", "Bytes of pages in use, by class of heads and storage", labels=["class", "storage"]
    )
    for key, nbytes in load.held.items():
        held.add_metric(key, nbytes)
    yield held
    preempted = CounterMetricFamily(
        "redknot_preemptions", "Requests whose pages were taken for others, by how", labels=["how"]
    )
    total = CounterMetricFamily("vllm:num_preemptions", "The same, of all kinds", sum(load.preemptions.values()))
    for how, count in load.preemptions.items():
        preempted.add_metric([how], count)
    yield preempted
    yield total


def _stored(load: Load) -> Iterator[Metric]:
    if load.store is None:
        return
    counter = CounterMetricFamily
    hits = counter("redknot_store_hits", "Segments that the store had, by tier", labels=["tier"])
    for tier, count in load.store.hits.items():
        hits.add_metric([tier], count)
    yield hits
    for name, what in _STORE.items():
        yield counter(f"redknot_store_{name}", what, getattr(load.store, name))


def _undated(family: Metric) -> Metric:
    """Without the moment at which each series began."""
    family.samples = [x for x in family.samples if not x.name.endswith("_created")]
    return family


def _renamed(family: Metric, name: str) -> Metric:
    other = Metric(name, family.documentation, family.type)
    other.samples = [x._replace(name=name + x.name.removeprefix(family.name)) for x in family.samples]
    return other
