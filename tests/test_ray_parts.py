"""Parts of the Ray application by themselves: what it is told, where requests go, and how answers go on elsewhere."""

import asyncio
import builtins
import sys
from collections import OrderedDict
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from families import make_model
from served import SIZES, plan_of

from redknot_hf import SegmentStore
from redknot_hf.serving import Engine, Sampling, State
from redknot_hf.serving.load import Load
from redknot_hf.serving.ray import app
from redknot_hf.serving.request import Request, Token
from redknot_hf.serving.routing import marks

pytest.importorskip("ray.serve", reason="ray is missing: pip install redknot-hf[ray]")
from ray.serve.request_router import ReplicaID

from redknot_hf.serving.ray import build
from redknot_hf.serving.ray.board import TOLD
from redknot_hf.serving.ray.catalogue import Catalogue
from redknot_hf.serving.ray.errand import MARK, Errand, Facts, News, Want
from redknot_hf.serving.ray.fleet import Fleet, total
from redknot_hf.serving.ray.flight import TRIES, Flight, GoneError
from redknot_hf.serving.ray.options import Options
from redknot_hf.serving.ray.replica import Answerer, Reader
from redknot_hf.serving.ray.router import SegmentRouter

TEXT = tuple(range(3, 140))


def test_without_ray_it_is_said_what_is_missing(monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return found(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "redknot_hf.serving.ray.build")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"need ray: pip install 'redknot-hf\[ray\]'"):
        app({})


def test_deployments_have_their_settings(tmp_path, monkeypatch):
    plan = tmp_path / "plan.json"
    plan_of(make_model("llama")).save(plan)
    told = {"model": "m", "plan": str(plan), "store": str(tmp_path), "prefill": 2, "max_replicas": 4, "most": 8}
    bound = app(told)
    door = bound._bound_deployment
    answer, read = (one._bound_deployment for one in door.init_args[1:])
    assert (door.name, answer.name, read.name, read.num_replicas) == ("door", "answer", "read", 2)
    assert (answer.func_or_class, read.func_or_class) == (Answerer, Reader)
    assert answer.max_ongoing_requests == 8
    config = answer._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (1, 4, 6)
    assert answer._deployment_config.health_check_period_s == 10
    with pytest.raises(ValueError, match="api-key is empty"):
        app({**told, "api_key": ""})
    monkeypatch.chdir(tmp_path)
    near = app({**told, "plan": "plan.json", "store": "kv", "chat_template": "plan.json"})._bound_deployment.init_args[
        0
    ]
    assert (near.plan, near.store, near.model) == (str(plan), str(tmp_path / "kv"), "m"), "replicas run elsewhere"
    assert (near.chat_template, near.name) == (str(plan), "m")
    assert build.settings_of(Options(**told)).hosts, "without a key, names of this machine alone"
    assert not build.settings_of(Options(**told, api_key="k")).hosts


def test_a_replica_whose_engine_has_ended_is_not_well():
    replica = object.__new__(Answerer)
    replica.engine = SimpleNamespace(alive=True, error=None)
    replica.check_health()
    replica.engine = SimpleNamespace(alive=False, error=ValueError("of CUDA"))
    with pytest.raises(RuntimeError, match="has ended"):
        replica.check_health()


# Who gets a request


class Queues(dict):
    """What Ray's router knows of queues."""


def replica(name, most=4, **stats):
    return SimpleNamespace(replica_id=ReplicaID(name, None), max_ongoing_requests=most, routing_stats=stats or None)


def router(replicas, **queues):
    made = object.__new__(SegmentRouter)
    made.initialize_state(trust=60)
    made._replica_queue_len_cache = Queues({one.replica_id: queues.get(one.replica_id.unique_id) for one in replicas})
    return made


def order(made, replicas, want=None):
    request = SimpleNamespace(args=[want] if want else [], routing_context=SimpleNamespace(should_backoff=False))
    ranks = asyncio.run(made.choose_replicas(replicas, request))
    assert request.routing_context.should_backoff
    assert all(len(rank) == 1 for rank in ranks)
    return "".join(rank[0].replica_id.unique_id for rank in ranks)


def test_requests_go_where_their_segments_are():
    replicas = [replica("c"), replica("b", segments=["x", "z"]), replica("a", segments=["y"], prefixes=marks(TEXT))]
    made = router(replicas, a=2, b=1, c=0)
    assert order(made, replicas) == "cba"
    assert order(made, replicas, Want({"x": 5, "y": 9})) == "abc"
    assert order(made, replicas, Want({"x": 5, "z": 5, "y": 9})) == "bac"
    assert order(made, replicas, Want(prompt=TEXT)) == "acb"
    assert order(made, replicas, Want(prompt=TEXT, avoid=frozenset("a"))) == "cba"
    assert order(router(replicas, a=2, b=4, c=0), replicas, Want({"x": 5, "z": 5, "y": 9})) == "acb", "b is full"


def test_a_router_remembers_who_got_what():
    replicas = [replica("a"), replica("b")]
    made, want = router(replicas), Want({"x": 5}, TEXT)
    assert order(made, replicas, want) == "ab"
    made.on_request_routed(SimpleNamespace(args=[want]), replicas[1].replica_id, None)
    assert order(made, replicas, Want({"x": 5})) == "ba"
    assert order(made, replicas, Want(prompt=TEXT)) == "ba"
    made._sent = OrderedDict((key, 0.0) for key in made._sent)
    assert order(made, replicas, Want({"x": 5})) == "ab", "for some time"


# Answers that go on elsewhere


class Stream:
    """What a replica sends, before it goes or not."""

    def __init__(self, *news, error=None):
        self.news, self.error, self.cancelled = news, error, False

    def cancel(self):
        self.cancelled = True

    async def __aiter__(self):
        for one in self.news:
            yield one
            await asyncio.sleep(0)
        if self.error is not None:
            raise self.error


def tokens(index, *which, end=None, cached=0):
    reasons = {State.DONE: "length", State.FAILED: "error", State.CANCELLED: "shutdown"}
    return News(index, [Token(i) for i in which], cached, end, reasons.get(end, ""), "what went wrong" if end else "")


def fly(streams, n=1, ready=None, **options):
    requests = [Request([1, 2], Sampling(max_new_tokens=5, seed=i), **options) for i in range(n)]
    sent, told, left = [], [], list(streams)

    def send(want, errand):
        sent.append((want, errand))
        return left.pop(0) if left else Stream("x", error=GoneError("it is gone"))

    async def prepare(errand):
        if ready is not None:
            raise ready
        return errand

    errand = Errand((1, 2), n, Sampling(max_new_tokens=5, seed=0))
    flight = Flight(send, prepare, lambda *what: told.append(what), requests, Want({"s": 1}), errand)
    asyncio.run(flight.run())
    return requests, sent, told


def test_an_answer_goes_on_where_it_was_left():
    first = Stream("a", [tokens(0, 7, cached=2)], [tokens(0, 8)], error=GoneError("killed"))
    (request,), sent, told = fly([first, Stream("b", [tokens(0, 9, 10, 11, end=State.DONE)])])
    assert (request.ids, request.state, request.reason, request.cached) == ([7, 8, 9, 10, 11], State.DONE, "length", 2)
    assert [(want.avoid, errand.answered) for want, errand in sent] == [(frozenset(), ()), (frozenset("a"), (7, 8))]
    assert first.cancelled
    assert [name for name, _ in told] == ["first", "next", "moved", "next", "next", "next", "length"]


def test_of_several_answers_those_go_on_that_have_not_ended():
    first = Stream("a", [tokens(0, 5, end=State.DONE), tokens(1, 6)], [tokens(1, end=State.CANCELLED)])
    requests, sent, _ = fly(
        [first, Stream("b", [tokens(0, 7, end=State.DONE)]), Stream("c", [tokens(0, 8, end=State.DONE)])], n=3
    )
    assert [request.ids for request in requests] == [[5], [6, 7], [8]]
    assert [(errand.n, errand.sampling.seed, errand.answered) for _, errand in sent] == [
        (3, 0, ()), (1, 1, (6,)), (1, 2, ()),
    ]  # fmt: skip


def test_answers_that_cannot_go_on_fail():
    (request,), sent, _ = fly([])
    assert (request.state, len(sent)) == (State.FAILED, TRIES)
    (request,), sent, _ = fly([Stream("a", [tokens(0, 4)])])  # it stops without an end
    assert (request.ids, request.state, len(sent)) == ([4], State.FAILED, TRIES)
    (request,), sent, _ = fly([Stream("a", error=ValueError("an errand that is off"))])
    assert (request.state, str(request.error), len(sent)) == (State.FAILED, "an errand that is off", 1)
    (request,), sent, _ = fly([Stream("a")], ready=ZeroDivisionError("of who prepares"))
    assert (request.state, str(request.error), sent) == (State.FAILED, "of who prepares", [])
    (request,), sent, _ = fly([Stream("a", [tokens(0, 4, end=State.FAILED)])])
    assert (request.state, str(request.error), len(sent)) == (State.FAILED, "what went wrong", 1)


def test_what_calls_back_and_raises_ends_its_own_answer_alone():
    def calls(request, token):
        if request.sampling.seed == 0 and token is not None:
            raise KeyError("of my own")

    first = Stream("a", [tokens(0, 4), tokens(1, 5)], [tokens(0, 6, end=State.DONE), tokens(1, 7, end=State.DONE)])
    requests, sent, told = fly([first], n=2, callback=calls)
    assert [request.state for request in requests] == [State.FAILED, State.DONE]
    assert isinstance(requests[0].error, KeyError)
    assert (requests[1].ids, len(sent)) == ([5, 7], 1)
    assert [name for name, _ in told] == ["error", "first", "next", "length"]
    endless = Stream("a", *[[tokens(0, 4)]] * 1000)
    (request,), sent, told = fly([endless], callback=calls)
    assert (request.state, request.ids, endless.cancelled, len(sent)) == (State.FAILED, [4], True, 1)
    gone = Stream("a", [tokens(0, 4), tokens(1, 5)], [tokens(0, end=State.CANCELLED), tokens(1, end=State.CANCELLED)])
    requests, sent, _ = fly([gone, Stream("b", [tokens(0, 6, end=State.DONE)])], n=2, callback=calls)
    assert [(request.state, request.ids) for request in requests] == [(State.FAILED, [4]), (State.DONE, [5, 6])]
    assert [errand.answered for _, errand in sent] == [(), (5,)]


def test_answers_that_take_too_long_are_given_up():
    stream = Stream("a", *[[tokens(0, 4)]] * 100_000)
    (request,), _, told = fly([stream], timeout=0.05)
    assert (request.state, request.reason, stream.cancelled) == (State.CANCELLED, "deadline", True)
    assert told[-1] == ("deadline", 1)


# What stands for replicas


@pytest.fixture(scope="module")
def engine():
    model = make_model("llama")
    plan = plan_of(model)
    return Engine(model, plan, store=SegmentStore(model, plan, page_size=16), **SIZES)


def facts_of(engine):
    model, store = engine.model, engine.documents.store
    return Facts(
        model.config, model.generation_config, torch.float32, store.identity, "", engine.words, 256, 200, 16, 8
    )


def test_names_are_those_that_stores_give(engine):
    store, asked = engine.documents.store, []

    def find(address):
        asked.append(address)
        return ((4, 5, 6), (1,)) if address == ref.address else None

    ref = store.ref([4, 5, 6], [1])
    names = Catalogue(facts_of(engine), engine.plan, find)
    assert names.ref([4, 5, 6], [1]).address == ref.address
    assert names.ref([4, 5]).address == store.ref([4, 5]).address
    for _ in range(2):
        found = names.named(ref.address)
        assert (found.ids, found.prefix, found.store) == (ref.ids, ref.prefix, names)
    assert asked == [ref.address], "of what is known nobody is asked"
    with pytest.raises(ValueError, match="there is no segment"):
        names.named("0" * 64)
    for ids in ([], [10_000]):
        with pytest.raises(ValueError, match=r"no tokens|the model knows 0 to"):
            names.ref(ids)
    assert names.weights((ref,)) == {ref.address[:MARK]: engine.plan.nbytes(3, engine.model.config, torch.float32)}
    assert names.verdict().passed


def test_a_fleet_tells_the_sum_of_its_replicas(engine):
    engine.documents.store.add([5, 6, 7])
    load = asdict(Load.of(engine))
    both = total([load, load])
    assert (both.seats, both.total) == (2 * load["seats"], 2 * load["total"])
    assert both.store.computed == 2 * load["store"]["computed"] > 0
    assert total([load, {**load, "store": None}]).store is None
    handle = SimpleNamespace(deployment_name="sums")
    fleet = Fleet(Options(model="m", plan="p"), facts_of(engine), None, engine.plan, handle)
    assert not fleet.alive
    TOLD["sums"] = {"a": {"load": load}, "b": {}}
    assert (fleet.alive, fleet.load().seats) == (True, load["seats"])
    assert [fleet.memory.ever_fits(n) for n in (200, 201)] == [True, False]
    del TOLD["sums"]
