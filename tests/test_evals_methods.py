"""Methods: what each holds, and what none may pretend."""

import importlib.util
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from evaluated import LENGTH, asked
from families import make_model
from pages import ROOT, blocks
from transformers import DynamicCache

from evals.measuring import Asked, measure
from evals.method import Context, Method, dense, read
from evals.methods import Setting, kvpress, load, load_all
from evals.methods.dense import _BACKENDS, quantised, static
from evals.methods.redknot import RedKnot, all_global, kept_share, misplaced, redknot, stored, streaming, wrong_heads
from evals.running import Group, _ask
from redknot_hf import HeadPlan, HeadSpec, RedKnotCache


@pytest.fixture(scope="module")
def model():
    return make_model("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def plan(model):
    return HeadPlan.with_global(model.config, [(0, 1), (1, 0), (2, 3), (3, 3)], HeadSpec(window=16, sink=2))


def answers(records):
    return [record["answer_ids"] for record in records]


def test_all_global_and_static_are_exactly_dense(model):
    reference, held = measure(model, dense(), asked(), 1)
    for method in (all_global(model.config), static()):
        records, _ = measure(model, method, asked(), 1, held)
        assert answers(records) == answers(reference)
        assert all(record["audited"] for record in records)
        assert max(abs(kl) for record in records for kl in record["fidelity"]["kl"]) < 1e-6
        assert all(record["fidelity"]["first_divergence"] is None for record in records)


@pytest.mark.parametrize(
    "make", [lambda model, plan: dense(), lambda model, plan: redknot(plan)], ids=["dense", "redknot"]
)
def test_batches_answer_as_single_questions_do(model, plan, make):
    several = asked((LENGTH, 90, 131), (0, 0, 1, 2, 2))
    _, held = measure(model, dense(), several, 1)
    together, _ = measure(model, make(model, plan), several, 2, held)
    for i, row in enumerate(several.rows):
        context = Context((several.context.rows[row],), ((),), several.context.room)
        alone, _ = measure(model, make(model, plan), Asked(context, several.questions[i : i + 1], (0,)), 1, [held[i]])
        assert together[i]["answer_ids"] == alone[0]["answer_ids"]
        assert together[i]["fidelity"]["nll"] == pytest.approx(alone[0]["fidelity"]["nll"], rel=1e-4)
        assert together[i]["audited"]


def test_a_plan_costs_fidelity_and_saves_bytes(model, plan):
    records, held = measure(model, dense(), asked(), 1)
    ours, _ = measure(model, redknot(plan), asked(), 1, held)
    assert answers(ours) != answers(records)
    assert max(kl for record in ours for kl in record["fidelity"]["kl"]) > 1e-3
    assert all(record["audited"] for record in ours)
    dense_bytes = 2 * 4 * 4 * LENGTH * 16 * 4  # keys and values, layers, heads, tokens, elements, bytes
    assert records[0]["cost"]["resident_bytes"] == dense_bytes
    assert ours[0]["cost"]["resident_bytes"] == read(model, RedKnotCache(model.config, plan), asked().context).nbytes  # pyright: ignore


@dataclass(frozen=True)
class Liar(RedKnot):
    """Holds another plan than it says."""

    def prepare(self, model, context):
        return read(model, RedKnotCache(model.config, misplaced(self.plan)), context)


def test_a_shuffled_plan_is_caught(model, plan):
    with pytest.raises(ValueError, match="another plan"):
        measure(model, Liar("liar", "redknot", plan=plan), asked(), 1)


class FirstDense(DynamicCache):
    """Shows everything in the first step after a fork, and only the last tokens later: two ways for one answer."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == 0:
            self.steps = getattr(self, "steps", -1) + 1  # the first is the context
        if self.steps > 1:
            values = values.clone()
            values[:, :, : LENGTH - 8] = 0
        return keys, values


@dataclass(frozen=True)
class TwoWays(Method):
    def prepare(self, model, context):
        return read(model, FirstDense(config=model.config), context)


def test_another_path_for_the_first_token_is_caught(model):
    records, _ = measure(model, TwoWays("two ways"), asked(), 1)
    assert not any(record["audited"] for record in records)
    assert min(record["audit_gap"] for record in records) > 0.1


def test_misplaced_plan_keeps_as_much_in_the_wrong_heads(model, plan):
    wrong, config = misplaced(plan), model.config
    assert wrong.num_global == plan.num_global
    assert not any(
        a.is_global and b.is_global for x, y in zip(plan, wrong, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert wrong == misplaced(plan)
    assert wrong != misplaced(plan, seed=1)
    assert kept_share(wrong, 1000, config) == kept_share(plan, 1000, config) == pytest.approx((4 + 12 * 0.018) / 16)
    assert wrong_heads(plan).identity["plan"] != redknot(plan).identity["plan"]


def test_streaming_takes_the_plans_share(model, plan):
    method = load("streaming", Setting(model.config, 1000, plan))
    assert isinstance(method, RedKnot)
    assert method.plan is not None
    config = model.config
    assert kept_share(method.plan, 1000, config) == pytest.approx(kept_share(plan, 1000, config), abs=1e-3)
    assert load("streaming:window=9,sink=1", Setting(model.config, 1000)) == streaming(model.config, 9, 1)


def test_what_is_missing_is_named(model, plan, monkeypatch):
    setting = Setting(model.config, 100)
    with pytest.raises(ValueError, match="choose one of dense, static"):
        load("nothing", setting)
    with pytest.raises(ValueError, match="--plan"):
        load("redknot", setting)
    with pytest.raises(ValueError, match="name=value"):
        load("streaming:9", setting)
    with pytest.raises(ValueError, match="unexpected keyword"):
        load("streaming:size=9", setting)
    with pytest.raises(ValueError, match="twice"):
        load_all(["dense", "dense"], setting, [])
    monkeypatch.setattr(kvpress, "PYTHON", SimpleNamespace(exists=lambda: False))
    with pytest.raises(FileNotFoundError, match=r"make \.venv-kvpress"):
        load("adakv-snapkv", Setting(model.config, 100, plan))
    with pytest.raises(ValueError, match="choose one of quanto, hqq"):
        quantised("other")


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantised_caches_beside_ours_at_about_equal_bytes(model, backend, monkeypatch):
    method = quantised(backend)
    if importlib.util.find_spec(_BACKENDS[backend].partition(".")[0]) is None:
        with pytest.raises(ImportError, match=r"needs .*redknot-hf\[quantised\]"):
            method.prepare(model, asked().context)
        return
    several = asked((600,), (0,))
    reference, held = measure(model, dense(), several, 1)
    theirs, ours = (measure(model, one, several, 1, held)[0] for one in (method, stored(model.config, "int4")))
    assert all(record["audited"] for record in (*theirs, *ours))
    dense_bytes, *held_bytes = (one[0]["cost"]["resident_bytes"] for one in (reference, theirs, ours))
    assert max(held_bytes) < 0.75 * dense_bytes  # of 16 dims scales weigh much, and of 600 tokens what is recent
    assert 0 < max(kl for record in (*theirs, *ours) for kl in record["fidelity"]["kl"]) < 1


def test_a_backend_that_is_missing_is_told_in_its_row(model, monkeypatch):
    monkeypatch.setattr("evals.methods.dense._installed", lambda module: False)
    found, told = [], []
    method, ours = quantised("hqq"), stored(model.config)
    assert [one.name for one in (method, ours)] == ["quantised by hqq, 4 bits", "redknot, int8"]
    with pytest.raises(ImportError, match="needs hqq"):
        method.prepare(model, asked().context)
    bench = SimpleNamespace(model=model)
    group = Group((SimpleNamespace(id="a"),), asked(rows=(0,)), ("c",))
    keep = lambda name, group, answers: found.append(name)  # noqa: E731
    fail = lambda names, reason: told.append((*names, str(reason)))  # noqa: E731
    left = {one.name: {"a"} for one in (method, ours)}
    _ask(bench, SimpleNamespace(batch_size=1), [method, ours], group, left, keep, fail)
    assert found == ["redknot, int8"]
    assert told == [("quantised by hqq, 4 bits", "the quantised cache needs hqq: pip install 'redknot-hf[quantised]'")]


def test_stored_plans_by_name(model, plan):
    setting = Setting(model.config, 600, plan.stored("int8"))
    records = {}
    _, held = measure(model, dense(), asked((600,), (0,)), 1)
    for spec in ("redknot", "stored:storage=int8", "stored:storage=int4"):
        (records[spec],), _ = measure(model, load(spec, setting), asked((600,), (0,)), 1, held)
    sizes = [record["cost"]["resident_bytes"] for record in records.values()]
    assert sizes == sorted(sizes)[:1] + sorted(sizes[1:], reverse=True)
    assert kept_share(plan.stored("int4"), 600, model.config) < setting.kept() < kept_share(plan, 600, model.config)
    swapped = misplaced(plan.stored("int8", heads=[(0, 1)]))
    assert swapped.num_global == plan.num_global
    assert sum(spec.storage == "int8" for layer in swapped for spec in layer) == 1


def test_several_plans_go_by_their_names(model, plan, tmp_path):
    other = HeadPlan.uniform(model.config, HeadSpec())
    plans = [(tmp_path / "a.json", plan), (tmp_path / "b.json", other)]
    methods = load_all(["dense", "redknot"], Setting(model.config, 100, plan), plans)
    assert [method.name for method in methods] == ["dense", "redknot, a", "redknot, b"]


def test_a_method_of_ones_own_is_that_of_the_page(model, tmp_path, monkeypatch):
    (code,) = blocks(ROOT / "evals" / "README.md", "python")
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    setting = Setting(model.config, 256)
    made = load("mine.pyramid:widest=64", setting)
    layers = model.config.num_hidden_layers
    assert [layer[0].window for layer in made.plan] == [64 * (layers - i) // layers for i in range(layers)]
    assert made.name == "pyramid of 64"
    with pytest.raises(ValueError, match="mine has no function cone"):
        load("mine.cone", setting)
    with pytest.raises(ValueError, match=r"as module\.function"):
        load("cone", setting)
