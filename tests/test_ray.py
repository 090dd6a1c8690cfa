"""Replicas of Ray Serve on the loopback: shared documents, a router, prompts read apart, and what goes missing."""

import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest
from replicas import LONG, Single, running

_draw = random.Random(0)


def until(true, seconds=60):
    """Waits for something to become true, of processes that need their time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.1)


def ids(count):
    return [_draw.randrange(3, 1280) for _ in range(count)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_replicas(tmp_path, subtests):
    with running(tmp_path) as replicas:
        single = Single()
        for check in (routes, read_apart, routing, a_replica_that_is_full, an_outage, a_replica_that_dies):
            with subtests.test(check.__name__):
                check(replicas, single)


def routes(replicas, single):
    assert replicas.get("/health").json() == {"status": "ok"}
    until(lambda: replicas.get("/ready").status_code == 200)
    assert replicas.get("/v1/models").json()["data"][0]["id"] == "tiny"
    prompt = ids(40)
    assert replicas.tokens(prompt=prompt, max_tokens=12) == [single.tokens(prompt, 12)]
    several = replicas.tokens(prompt=prompt, max_tokens=12, n=2, temperature=0.8, seed=7)
    assert several == [single.tokens(prompt, 12, temperature=0.8, seed=seed) for seed in (7, 8)]
    refused = httpx.post(f"{replicas.url}/v1/completions", json={"prompt": ids(9), "max_tokens": 4000})
    assert refused.status_code == 400
    assert replicas.ask(prompt=prompt, max_tokens=1, segments=replicas.store(ids(30)))["choices"]
    asked = {"prompt": prompt, "max_tokens": 500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{replicas.url}/v1/completions", json=asked, timeout=60) as answer:
        next(answer.iter_lines())
    until(lambda: all(not stats["load"]["running"] for stats in replicas.told().values()))  # nobody listens
    assert sum(stats["load"]["written"] for stats in replicas.told().values()) < 500


def read_apart(replicas, single):
    prompt = ids(LONG + 50)
    answer = replicas.ask(prompt=prompt, max_tokens=12, ignore_eos=True, logprobs=0)
    assert answer["choices"][0]["logprobs"]["tokens"] == single.tokens(prompt, 12)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1, "all but the last token"


def routing(replicas, single):
    documents = [ids(60) for _ in range(15)]
    with ThreadPoolExecutor(3) as threads:
        addresses = [one for (one,) in threads.map(replicas.store, documents)]
    held = [replicas.holders(address) for address in addresses]
    assert all(len(one) == 1 for one in held)
    assert len({name for (name,) in held}) == 2, "both replicas have some"
    order = _draw.sample([*range(15)] * 2, 30)
    ask = lambda i: replicas.ask(prompt=[5, 6, 7, 10 + i], max_tokens=2, segments=[addresses[i]])  # noqa: E731
    fetched, computed = replicas.count("hits", "remote"), replicas.count("computed")
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(ask, order))
    missed = replicas.count("hits", "remote") - fetched
    assert missed <= 0.1 * len(order) + 1, "one fetch more: what all texts begin with"
    assert replicas.count("computed") - computed <= 1


def a_replica_that_is_full(replicas, single):
    (address,) = replicas.store(ids(50))
    (holder,) = replicas.holders(address)
    question = ids(5)
    before = {name: stats["load"]["written"] for name, stats in replicas.told().items()}
    with ThreadPoolExecutor(6) as threads:  # three at once are what a replica takes
        ask = lambda _: replicas.tokens(prompt=question, max_tokens=40, segments=[address])  # noqa: E731
        answers = [*threads.map(ask, range(6))]
    assert all(answer == answers[0] for answer in answers)
    after = {name: stats["load"]["written"] for name, stats in replicas.told().items()}
    assert all(after[name] > before[name] for name in after), holder


def a_replica_that_dies(replicas, single):
    """In the middle of a stream: another goes on, with what the dead one put into Redis, where a value was altered."""
    question, new = ids(12), 100
    first, address, holder = _kept(replicas, 150)  # the longest, so who holds it is asked
    second, altered, _ = _kept(replicas, 64, holder)
    replicas.alter(altered)
    process = replicas.told()[holder]["pid"]
    (other,) = [name for name in replicas.told() if name != holder]
    before = replicas.told(other)[other]["load"]["store"]
    body = {"prompt": question, "segments": [address, altered], "max_tokens": new, "ignore_eos": True, "stream": True}
    body |= {"logprobs": 0, "stream_options": {"include_usage": True}}
    tokens, ends = [], []
    with httpx.stream("POST", f"{replicas.url}/v1/completions", json=body, timeout=120) as answer:
        lines = [line for line in _killing(answer.iter_lines(), process) if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    for choice in (choice for event in events for choice in event["choices"]):
        tokens += choice["logprobs"]["tokens"]
        ends += [choice["finish_reason"]] if choice["finish_reason"] else []
    assert tokens == single.tokens(question, new, [first, second]), "none twice, and none lost"
    assert ends == ["length"]
    assert events[-1]["usage"]["completion_tokens"] == new
    assert replicas.metric("redknot_requests_moved_total") == 1
    after = replicas.told(other)[other]["load"]["store"]
    more = {name: after[name] - before[name] for name in ("computed", "recomputed", "damaged")}
    assert more == {"computed": 0, "recomputed": 1, "damaged": 1}, "the altered one is refused, and read again"
    assert after["hits"]["remote"] == before["hits"].get("remote", 0) + 1, "the other is fetched"


def _kept(replicas, size, name=None):
    """A document that one replica holds, a named one or any, and Redis besides; with its address and the holder."""
    for _ in range(200):
        document = ids(size)
        address = replicas.in_redis(document)
        holders = [] if address is None else replicas.holders(address)
        if len(holders) == 1 and name in (None, holders[0]):
            return document, address, holders[0]
        time.sleep(0.1)
    raise AssertionError("no document is where it is wanted")


def _killing(lines, process):
    """Lines, while a process dies."""
    for i, line in enumerate(lines):
        if i == 10:
            os.kill(process, signal.SIGKILL)
        yield line


def an_outage(replicas, single):
    """Redis goes, and comes back with nothing in it."""
    document, question = ids(64), ids(6)
    replicas.redis.stop()
    assert replicas.tokens(prompt=question, segments=[document], max_tokens=8) == [
        single.tokens(question, 8, [document])
    ]
    until(lambda: replicas.metric("redknot_store_unreachable_total") > 0)
    logs = (replicas.home / "session_latest" / "logs").rglob("*")
    assert any(b"does not answer" in log.read_bytes() for log in logs if log.is_file()), "and it is said why"
    replicas.redis.start()
    until(lambda: replicas.in_redis(ids(20)))
