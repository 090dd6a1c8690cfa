"""The bundled model's training: its forward pass, its texts, its state, and a small run of the whole."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evals.tiny import card, checkpoint
from evals.tiny.corpus import Corpus
from evals.tiny.curriculum import CURRICULUM, RANDOM, REPEATED, Lessons, Order, draw_counts, order
from evals.tiny.examination import Score, grade, set_exams
from evals.tiny.lexicon import Lexicon
from evals.tiny.network import Network
from evals.tiny.settings import Settings
from evals.tiny.train import Training, first_model, main
from redknot_hf import HeadPlan, HeadSpec, RedKnotCache, cache_argument

TINY = Path(__file__).parents[1] / "evals" / "tiny"


@pytest.fixture(scope="module")
def model():
    model = first_model(0, TINY)
    model.set_attn_implementation("redknot")
    return model.eval()


@pytest.fixture(scope="module")
def plan(model):
    return HeadPlan.load(TINY / "plan.json", model.config)


@pytest.fixture(scope="module")
def ids():
    corpus = Corpus(Lexicon(), 0)
    return torch.tensor(np.stack([corpus.sample(384, 6)[0] for _ in range(2)]))


def small(**changes):
    values = {"minutes": None, "steps": 4, "plain": False, "rate": 1e-3, "tokens": 256, "max_length": 256, "seed": 3}
    return Settings(**{**values, **changes})


def training(out, settings, **options):
    return Training(settings, out, "cpu", compiled=False, workers=0, held_out=4, **options)


@torch.no_grad()
@pytest.mark.parametrize("sink", [0, 4, 11])
def test_network_is_the_model_dense_and_planned(model, plan, ids, sink):
    plan = HeadPlan([[spec if spec.is_global else HeadSpec(128, sink) for spec in layer] for layer in plan.heads])
    network = Network(model, plan, torch.float32, compiled=False)
    dense = model(ids, use_cache=False).logits
    planned = model(ids, **cache_argument(model, RedKnotCache(model.config, plan))).logits
    assert (dense - planned).abs().max() > 1  # the plan does hide something
    torch.testing.assert_close(network.logits(ids, planned=False), dense, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(network.logits(ids, planned=True), planned, atol=2e-4, rtol=1e-4)


def test_network_learns_as_the_model_does(model, plan, ids):
    weights = torch.rand(ids.shape)
    Network(model, plan, torch.float32, compiled=False).loss(ids, weights, planned=False).backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    logits = model(ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    ((losses * weights[:, 1:]).sum() / weights[:, 1:].sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-3)
    model.zero_grad()


def test_network_names_what_it_cannot_do(model, plan, ids):
    with pytest.raises(ValueError, match="length is 300"):
        Network(model, plan, torch.float32, compiled=False).logits(ids[:, :300], planned=True)
    mixed = [[HeadSpec(128), HeadSpec(64), HeadSpec(), HeadSpec()] for _ in plan.heads]
    with pytest.raises(ValueError, match="window=64"):
        Network(model, HeadPlan(mixed), torch.float32, compiled=False)


def test_a_plan_of_global_heads_changes_nothing(model, ids):
    network = Network(model, HeadPlan.uniform(model.config, HeadSpec()), torch.float32, compiled=False)
    with torch.no_grad():
        assert torch.equal(network.logits(ids, planned=True), network.logits(ids, planned=False))


@pytest.mark.parametrize("length", [128, 256, 1024, 8192])
def test_every_drawn_fact_fits(length):
    lexicon = Lexicon()
    corpus = Corpus(lexicon, 0)
    for _ in range(60 if length < 1024 else 12):
        counts = draw_counts(corpus.rng, length)
        exam = corpus.exam(length, counts)
        assert len(exam.ids) == length
        assert len(exam.answers) == sum(counts.values())
        assert lexicon.decode(exam.ids.tolist()).count("question :") == len(exam.answers)


def test_lessons_are_decided_by_seed_and_order():
    lessons = Lessons(tokens=2048, seed=1)
    ids, weights = lessons[Order(5, 128, 0.25)]
    assert ids.shape == weights.shape == (16, 128)
    again, _ = Lessons(tokens=2048, seed=1)[Order(5, 128, 0.25)]
    other, _ = lessons[Order(6, 128, 0.25)]
    assert torch.equal(ids, again)
    assert not torch.equal(ids, other)
    for row, weight in zip(ids[:4], weights[:4], strict=True):
        period = int((weight.float() - RANDOM).abs().lt(1e-4).sum())
        assert 32 <= period <= 64
        assert torch.equal(row[period:], row[: len(row) - period].repeat(2)[: len(row) - period])
        assert (weight[period + 1 :] == REPEATED).all()
    assert not (weights[4:].float() - RANDOM).abs().lt(1e-4).any()


def test_curriculum_goes_from_short_to_long():
    assert sum(stage.share for stage in CURRICULUM) == pytest.approx(1)
    assert {order(step, 0.05, 8192, 0).length for step in range(20)} == {128}
    assert {order(step, 0.95, 8192, 0).length for step in range(80)} == {256, 1024, 4096, 8192}
    assert {order(step, 0.95, 1024, 0).length for step in range(80)} == {256, 1024}
    assert {order(step, 0.95, 128, 0).length for step in range(20)} == {128}
    assert order(7, 1.2, 8192, 0) == order(7, 0.99, 8192, 0)


def test_held_out_texts_are_marked_right(model, plan):
    exams = set_exams(256, "plain", 12, seed=0) + set_exams(256, "dependent", 6, seed=0)
    lexicon = Lexicon()
    for exam in exams:
        assert all(exam.ids[stop - 1] == lexicon.id["."] for _, _, stop in exam.answers)
        assert all(
            lexicon.decode(exam.ids[start - 3 : start].tolist()) == "? answer :" for _, start, _ in exam.answers
        )
        assert (exam.weights == 1).sum() == sum(stop - start for _, start, stop in exam.answers)
    scores = grade(Network(model, plan, torch.float32, compiled=False), exams, planned=True)
    assert scores["code"].accuracy > 0.9  # the bundled model finds codes without fault
    assert sum(score.answers for score in scores.values()) == sum(len(exam.answers) for exam in exams)


@pytest.mark.parametrize("part", ["plain", "dependent"])
def test_the_words_suffice_for_the_longest_held_out_texts(part):
    (exam,) = set_exams(16384, part, 100, seed=0)
    assert len(exam.answers) == 120


def test_score_counts_whole_answers_and_tokens():
    score = Score()
    score.add(np.array([True, True]))
    score.add(np.array([True, False]))
    assert (score.exact, score.accuracy) == (0.5, 0.75)


def test_a_restart_continues_the_same_training(tmp_path):
    whole = training(tmp_path / "whole", small())
    whole.run(stop=2)
    whole.save()
    whole.run()
    broken = training(tmp_path / "broken", small())
    broken.run(stop=2)
    broken.save()
    del broken
    resumed = training(tmp_path / "broken", small())
    assert resumed.step == 2
    resumed.run()
    assert (resumed.step, resumed.tokens) == (whole.step, whole.tokens) == (4, 4 * 256)
    for ours, theirs in zip(resumed.network.model.parameters(), whole.network.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    files = list((tmp_path / "broken" / "checkpoint").iterdir())
    assert all(path.stat().st_size < 16 * 2**20 for path in files)
    assert not [path for path in files if path.suffix == ".partial"]
    with pytest.raises(ValueError, match="other settings"):
        training(tmp_path / "broken", small(seed=4))


def test_skipping_begins_later_in_the_curriculum(tmp_path):
    run = training(tmp_path, small(skip=0.5))
    assert [run._lesson(step) for step in (0, 2, 4)] == [0.5, 0.75, 1]


def test_a_state_is_exact(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
        optimizer.step()
    checkpoint.save(tmp_path, model, optimizer, {"step": 2})
    other = LlamaForCausalLM(config)
    fresh = torch.optim.AdamW(other.parameters())
    assert checkpoint.restore(tmp_path, other, fresh) == {"step": 2}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[a][name], fresh.state[b][name])
    with pytest.raises(ValueError, match="another model"):
        checkpoint.restore(tmp_path, torch.nn.Linear(2, 2), fresh)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="one of the two"):
        small(minutes=1.0)
    with pytest.raises(ValueError, match="skip is 1"):
        small(skip=1)
    for wrong in ({"tokens": 1000}, {"max_length": 128}):
        with pytest.raises(ValueError, match="whole texts"):
            small(**wrong)


def test_first_weights_of_another_model_are_refused(tmp_path):
    checkpoint.write_tensors(tmp_path / "model.safetensors", {"model.norm.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="does not hold the weights"):
        first_model(0, tmp_path)


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_leaves_a_model_and_its_card(tmp_path, monkeypatch, capsys, plain):
    calls = []
    loss = Network.loss
    monkeypatch.setattr(Network, "loss", lambda self, *args: calls.append(args[2]) or loss(self, *args))
    arguments = f"--out {tmp_path} --steps 2 --tokens 256 --max-length 256 --device cpu --no-compile --workers 0"
    arguments += " --lengths 256 --answers 6 --held-out 4"
    main([*arguments.split(), *(["--plain"] if plain else ["--init", str(TINY)])])
    assert calls == ([False, False] if plain else [False, True])
    assert re.search(r"step 2 100% rate \S+ loss \d.*Mtok/s wait \d+% \| dense 256:", capsys.readouterr().out)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(TINY))
    assert set(checkpoint.load_file(tmp_path / "model.safetensors")) == {n for n, _ in model.named_parameters()}
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(evaluation["lengths"]["256"]["plain"]) == ({"dense"} if plain else {"dense", "plan"})
    assert evaluation["lengths"]["256"]["dependent"]["dense"]["all"]["answers"] >= 6
    card.main([str(tmp_path / "evaluation.json")])
    text = capsys.readouterr().out
    assert "| companion |" in text
    assert f"{evaluation['lengths']['256']['plain']['dense']['all']['accuracy']:.3f}" in text


def test_card_tells_what_is_not_reached_and_describes_the_plan(tmp_path):
    def part(dense, plan):
        marks = {"answers": 9, "tokens": 30, "accuracy": dense, "exact": dense}
        return {"dense": {"all": marks}, "plan": {"all": {**marks, "accuracy": plan}}}

    lengths = {"1024": part(0.98, 0.976), "8192": part(0.96, 0.95)}
    evaluation = {"bytes": 12, "lengths": {n: {"plain": p, "dependent": p} for n, p in lengths.items()}}
    assert card.missed(evaluation) == ["at 8192 the plan gives 0.9500, dense 0.9600"]
    evaluation["lengths"]["1024"]["plain"] = part(0.96, 0.96)
    assert card.missed(evaluation)[0] == "dense accuracy at 1024 is 0.9600, below 0.97"
    path = tmp_path / "plan.json"
    path.write_bytes((TINY / "plan.json").read_bytes())
    card.describe_plan(path, evaluation)
    before, after = HeadPlan.load(TINY / "plan.json"), HeadPlan.load(path)
    assert after == before
    assert after.provenance["answer_token_accuracy"]["plan"] == [0.96, 0.95]
    del evaluation["lengths"]["8192"]["plain"]["plan"]
    with pytest.raises(ValueError, match="plainly trained"):
        card.describe_plan(path, evaluation)
