"""What the Ray application is told, by arguments and by the environment."""

import pytest

pytest.importorskip("ray.serve", reason="ray is missing: pip install redknot-hf[ray]")
from redknot_hf.serving.ray.options import Options


def test_what_an_application_is_told(monkeypatch):
    monkeypatch.setenv("REDKNOT_MODEL", "m")
    monkeypatch.setenv("REDKNOT_REPLICAS", "3")
    options = Options.of({"plan": "p.json", "replicas": "2", "gpus": "0.5", "store": "memory"})
    assert (options.model, options.replicas, options.gpus, options.kept) == ("m", 2, 0.5, None)
    assert [Options.of({"plan": "p", "memory": m}).memory for m in ("8GiB", "0.5", 0.5)] == ["8GiB", "0.5", 0.5]
    assert (options.taken, Options.of({"plan": "p", "most": "9"}).taken) == (options.max_batch, 9)
    for told, match in (
        ({"plan": "p", "replica": 2}, "replica: there is no such argument; there are model, plan"),
        ({}, "plan is missing: give plan=..., or set REDKNOT_PLAN"),
        ({"plan": "p", "replicas": "no"}, "replicas: "),
        ({"plan": "p", "dtype": "float17"}, "dtype: Input should be 'auto', 'float32'"),
        ({"plan": "p", "preempt": "never"}, "preempt: Input should be 'swap'"),
        ({"plan": "p", "memory": "lots"}, "^memory='lots': give bytes"),
        ({"plan": "p", "device": "auto"}, "^device='auto' spreads layers, and a replica has one device"),
        ({"plan": "p", "device": "gpu"}, "^device='gpu' is none: give cuda or cpu"),
        ({"plan": "p", "device": "meta"}, "^device='meta' is none"),
        ({"plan": "p", "prefill": 1}, "prefill needs a store that all replicas share"),
        ({"plan": "p", "prefill": 1, "store": "memory"}, "prefill needs a store that all replicas share"),
        ({"plan": "p", "max_replicas": 2}, "replicas=3 lies outside of min_replicas=1 and max_replicas=2"),
    ):
        with pytest.raises(ValueError, match=match):
            Options.of(told)
