"""How an engine is asked from threads, and how it ends: drained, shut down, full or broken."""

import asyncio
import collections
import threading
import time

import pytest
from families import make_model
from served import SIZES, alone, free_at_the_end, kept_after_its_end, plan_of, prompts_of

from redknot_hf.serving import Engine, QueueFullError, Sampling, State
from redknot_hf.serving.loop import Loop


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


def test_threads_hand_requests_in_and_take_tokens_out(model):
    plan = plan_of(model)
    prompts, _ = prompts_of(13, 6)
    expected = [alone(model, plan, p, 15) for p in prompts]
    found, called = [None] * len(prompts), []
    with Engine(model, plan, **SIZES) as engine:

        def ask(i):
            request = engine.submit(prompts[i], Sampling(15), callback=lambda r, t: called.append((r.number, t)))
            found[i] = [token.id for token in request]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        async def stream():
            requests = [engine.submit(p, Sampling(15)) for p in prompts]
            return [[token.id async for token in r] for r in requests[:3]] + [await r for r in requests[3:]]

        assert asyncio.run(stream()) == expected
        assert engine.generate(prompts[:2], Sampling(15), progress=True)[1].ids == expected[1]
    assert found == expected
    assert sum(token is None for _, token in called) == len(prompts)
    assert sum(token is not None for _, token in called) == 15 * len(prompts)
    with pytest.raises(RuntimeError, match="takes no requests any more"):
        engine.submit(prompts[0])


def test_drain_waits_and_shutdown_does_not(model):
    engine = Engine(model, plan_of(model), **SIZES).start()
    first = engine.submit([5] * 30, Sampling(30))
    assert engine.drain(timeout=60)
    assert len(first.result()) == 30
    engine.shutdown()
    engine = Engine(model, plan_of(model), **SIZES).start()
    free = free_at_the_end(engine)
    long = engine.submit([5] * 30, Sampling(200))
    while not long.tokens:
        time.sleep(0.001)
    engine.shutdown()
    assert (long.state, long.reason) == (State.CANCELLED, "shutdown")
    assert not engine.alive
    assert free[0]


class Graph:
    """Stands for a captured graph."""

    def replay(self):
        """Nothing."""


def test_an_engine_that_has_ended_holds_neither_pages_nor_captured_steps(model):
    """Whoever still holds the engine, its requests or a fork of its cache, and without a collection of garbage."""
    engine = Engine(model, plan_of(model).stored("int8"), **SIZES)
    engine.reader.seats.captures = True  # as on a device with graphs; here its replays are steps
    requests = [engine.submit([5] * 100, Sampling(9)), engine.submit([5] * 40, Sampling(100))]
    while not requests[0].state.ended:
        engine.step()
    assert len(engine.memory.prefixes)
    fork, steps = engine.memory.root.fork(), engine.reader.seats.graphs
    for size in steps:
        steps[size]._graph._graph = Graph()
    assert [*steps] == [1, 2]
    assert not kept_after_its_end(engine)
    assert requests[1].reason == "shutdown"
    assert engine.memory.used() == {"total": 0, "used": 0, "host": 0, "parked": 0}
    assert fork.nbytes == 0
    engine.shutdown()  # a second end changes nothing


def test_a_callback_may_end_the_engine_and_may_not_wait_for_it(model):
    engine, said = Engine(model, plan_of(model), **SIZES), []

    def asks(request, token):
        waiting = [engine.step, engine.drain, lambda: engine.shutdown(1), lambda: engine.generate([[5]])]
        for waits in (*waiting, *([] if token is None else [request.result])):
            with pytest.raises(RuntimeError, match=r"within one, by what|its own step") as raised:
                waits()
            said.append(str(raised.value))
        assert engine.between_steps(lambda: 5) == 5
        engine.shutdown()
        assert not engine.alive

    last, other = engine.submit([5] * 30, Sampling(50), callback=asks), engine.submit([6] * 9, Sampling(50))
    with engine:
        assert (last.result(60), other.result(60)) == ([last.ids[0]], other.ids)
    assert [request.reason for request in (last, other)] == ["shutdown", "shutdown"]
    assert said[0].startswith("engine.step() waits for steps")
    assert len(said) == 9, "its end is told of within the same step"


def test_the_queue_has_an_end(model):
    engine = Engine(model, plan_of(model), **SIZES | {"queue": 2})
    for _ in range(2):
        engine.submit([5])
    with pytest.raises(QueueFullError, match="2 requests wait"):
        engine.submit([5])


def test_a_broken_engine_tells_everyone(model, monkeypatch):
    engine = Engine(model, plan_of(model), **SIZES)
    request = engine.submit([5] * 30, Sampling(100))
    monkeypatch.setattr(engine.scheduler, "plan", lambda: 1 / 0)
    engine.start()
    with pytest.raises(RuntimeError, match="failed: division by zero"):
        request.result(timeout=30)
    assert not engine.alive
    with pytest.raises(RuntimeError, match="division by zero"):
        engine.submit([5])


class Steps(Loop):
    """Steps that do nothing, or break."""

    idle, breaks = True, False

    def step(self):
        self._inbox.answer()
        return 1 / 0 if self.breaks else False

    def _end_all(self, *_):
        pass


def test_what_waits_for_the_end_of_a_step_is_done_or_hears_that_it_will_not_be():
    loop = Steps(1)
    assert loop.between_steps(threading.get_ident) == threading.get_ident()
    with loop.start():
        assert loop.between_steps(threading.get_ident) != threading.get_ident()
        with pytest.raises(KeyError):
            loop.between_steps(lambda: {}["nothing"])
        loop.breaks = True
        with pytest.raises(RuntimeError, match="does nothing any more: division by zero"):
            collections.deque(iter(lambda: loop.between_steps(lambda: None), 1), 0)  # again and again
    assert not loop.alive
