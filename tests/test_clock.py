from redknot_hf.profiling import clock
from redknot_hf.profiling.clock import Clock


def test_time_is_kept_back(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    bounded, free = Clock(10), Clock(None)
    now[0] = 104.0
    assert (bounded.taken, bounded.left(), bounded.left(5.0), bounded.left(7.0)) == (4.0, 6.0, 1.0, 0.0)
    assert free.left(1e9) == float("inf")
