"""Parts of the server by themselves: routes, room for answers, what is counted, and where it listens."""

import asyncio
import copy
import time

import pytest
from listening import make_served

from redknot_hf.serving import Sampling
from redknot_hf.serving.load import Load
from redknot_hf.serving.server import chat, completions, models, responses, segments, status
from redknot_hf.serving.server.app import app_for
from redknot_hf.serving.server.errors import RequestError
from redknot_hf.serving.server.guard import Guard, _name
from redknot_hf.serving.server.metrics import Metrics
from redknot_hf.serving.server.running import bound
from redknot_hf.serving.server.served import Served
from redknot_hf.serving.server.service import Service, longest
from redknot_hf.serving.server.settings import Settings


@pytest.fixture(scope="module")
def engine(byte_tokenizer):
    return make_served(copy.deepcopy(byte_tokenizer))


def test_an_app_starts_nothing_and_has_the_routes_of_its_parts(engine):
    app = app_for(engine, Settings(name="x"))
    assert engine._thread is None
    assert isinstance(engine, Served)
    paths = set(app.openapi()["paths"])
    for part in (chat, completions, models, responses, segments, status):
        own = {route.path.replace(":path", "") for route in part.routes(app.state.service).routes}
        assert own
        assert own <= paths


def test_room_is_what_the_longest_sequence_leaves(engine):
    service = Service(engine, Settings(name="x"))
    assert service.longest == engine.max_len == 200
    assert service.room([1] * 150, None) == 51, "the last token is not read"
    assert service.room([1] * 150, None, usual=16) == 16
    assert service.room([1] * 150, 51) == 51
    for prompt, new in ((150, 52), (201, None)):
        with pytest.raises(RequestError, match=f"{prompt} tokens of prompt") as refused:
            service.room([1] * prompt, new)
        assert refused.value.code == "context_length_exceeded"
    for most in range(9):
        assert longest(lambda n, most=most: n <= most, 8) == most


def test_what_is_held_is_told_by_class_and_once(engine):
    prompt = list(range(5, 65))
    requests = engine.submit_many(prompt, 3, Sampling(max_new_tokens=30))
    for _ in range(12):
        engine.step()
    load = Load.of(engine)
    assert load.running == 3
    assert load.used == engine.memory.used()["used"] > 0, "pages that forks and prefixes share count once"
    assert 0 < load.busy < load.used, "the rings of the prefix are nobody else's"
    assert load.held["global", "model"] > 0
    assert load.held["local", "model"] > 0
    assert [one["prompt"] for one in load.requests] == [60] * 3
    for request in requests:
        request.cancel()
    engine.step()
    load = Load.of(engine)
    assert (load.running, load.busy) == (0, 0)
    assert load.parked == load.used > 0
    while engine.memory.evict():
        pass
    assert Load.of(engine).used == 0


def test_a_place_is_free_when_requests_have_ended_as_before(engine, monkeypatch):
    told = []
    engine.observe = lambda name, value: told.append(name)
    metrics = Metrics(engine)
    assert metrics.seconds_to_a_place == 1
    for moment in (0, 3, 6, 9):
        monkeypatch.setattr(time, "monotonic", lambda moment=moment: float(moment))
        metrics.observe("length", 1)
    assert metrics.seconds_to_a_place == 3
    monkeypatch.setattr(time, "monotonic", lambda: 9_999.0)
    metrics.observe("stop", 1)
    metrics.observe("moved", 2)
    assert metrics.seconds_to_a_place == 60
    assert told == ["length"] * 4 + ["stop", "moved"], "whoever observed before still does"
    assert b"redknot_requests_moved_total 2.0" in metrics.text()


def test_an_address_that_is_taken_is_said_at_once():
    first = bound("127.0.0.1", 0)
    with first:
        first.listen()
        with pytest.raises(OSError, match="choose another port"):
            bound("127.0.0.1", first.getsockname()[1])


def test_what_is_open_is_open_where_it_is_mounted():
    counted, sent = [], []

    async def answer(_, __, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message.get("status"))

    guard = Guard(answer, Settings(name="x", key="k"), lambda *told: counted.append(told))
    for path in ("/x/health", "/x/status"):
        scope = {"type": "http", "path": path, "root_path": "/x", "headers": []}
        asyncio.run(guard(scope, receive, send))
    assert counted == [("/health", 200), ("/status", 401)]


@pytest.mark.parametrize(
    ("host", "name"), [("a:80", "a"), ("A", "a"), ("[::1]:80", "::1"), ("127.0.0.1", "127.0.0.1"), ("", "")]
)
def test_a_host_has_a_name_and_a_port(host, name):
    assert _name(host) == name
