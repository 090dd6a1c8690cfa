"""How an engine is asked from threads, and how it ends: drained, shut down, full or broken."""

import asyncio
import collections
import threading
import time

import pytest
from families import make_model
from served import SIZES, all_free, alone, plan_of, prompts_of

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
    long = engine.submit([5] * 30, Sampling(200))
    while not long.tokens:
        time.sleep(0.001)
    engine.shutdown()
    assert (long.state, long.reason) == (State.CANCELLED, "shutdown")
    assert not engine.alive
    assert all_free(engine)


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
