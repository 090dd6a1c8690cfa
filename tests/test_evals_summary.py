"""Intervals, verdicts and the report that shows them."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from evaluated import records, run

from evals.intervals import difference, estimate, mean
from evals.report import write_report
from evals.summary import summarize
from redknot_hf import HeadPlan, HeadSpec
from redknot_hf.profiling import HeadProfile


def test_intervals_cover_what_they_should():
    """About 95 % of the intervals hold the truth, and of those that take answers one by one far fewer."""
    rng = np.random.default_rng(0)
    hits = alone = 0
    for trial in range(60):
        shift = rng.normal(0, 1, 20).repeat(8)  # contexts differ, and their questions go together
        values = (shift + rng.normal(0, 0.3, 160)).tolist()
        found = mean(np.arange(20).repeat(8).tolist(), values, seed=trial)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
        error = np.std(values) / 160**0.5
        alone += abs(np.mean(values)) <= 1.96 * error
    assert hits >= 50
    assert alone < 45


def test_intervals_at_the_edges():
    few = mean(["a", "b"], [1.0, 0.0])
    assert (few.low, few.high) == (None, None)
    clusters = [i // 10 for i in range(300)]
    equal = difference(clusters, [1.0] * 300, [1.0] * 300)
    assert equal.value == 0
    assert equal.high == pytest.approx(0.00994, abs=1e-5)  # the rule of three: 300 equal pairs leave 1 % possible
    apart = difference(clusters, [0.0] * 300, [1.0] * 300)
    assert (apart.low, apart.value, apart.high) == (-1, -1, -1)
    ratio = estimate(clusters, ([2.0] * 299 + [3.0], [4.0] * 300), lambda a, b: a / b)
    assert ratio.low is not None
    assert ratio.low <= ratio.value == pytest.approx(601 / 1200)


def test_verdicts():
    rng = np.random.default_rng(1)
    dense = [1] * 300
    some = [int(i not in (3, 150)) for i in range(300)]
    bad = (rng.random(300) < 0.5).astype(int).tolist()
    rows = {row.name: row for row in summarize(records(dense=dense, same=dense, near=some, bad=bad))}
    assert rows["dense"].verdict == "the reference"
    assert rows["same"].verdict == "within 1 point of dense, 95 % sure"
    assert rows["near"].verdict.startswith("not shown to be within 1 point of dense: -")
    assert re.fullmatch(r"worse than dense by \d\d\.\d points, 95 % sure of at least \d\d\.\d", rows["bad"].verdict)
    apart = rows["bad"].score_difference
    assert apart is not None
    assert apart.high is not None
    assert apart.value == pytest.approx(100 * (np.mean(bad) - 1))
    assert apart.high < 0
    assert rows["bad"].kl.value == pytest.approx(1 - np.mean(bad))
    assert rows["bad"].perplexity_difference.value == pytest.approx(np.exp(0.5) - np.exp(0.25))
    assert rows["bad"].dense_share == 0.4
    assert rows["bad"].ttft_s == 1.5
    assert rows["bad"].tokens_per_s == 100


def test_answers_that_failed_the_audit_void_a_method():
    found = records(dense=[1] * 60, cheat=[1] * 60)
    found.answers[run("cheat").key, "7"]["audited"] = False
    row = next(row for row in summarize(found) if row.name == "cheat")
    assert row.verdict == "void: 1 of 60 answers did not come from the cache that was measured"


class Page(HTMLParser):
    """What a page holds: its tags, their attributes, its words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_report_is_whole_in_one_page(tmp_path):
    rows = summarize(records(dense=[1] * 60, **{"<redknot>": [1] * 59 + [0]}), kinds=True)
    config = type("Config", (), {"num_hidden_layers": 4, "num_key_value_heads": 2})
    plan = HeadPlan.with_global(config, [(0, 1)], HeadSpec(window=8))
    errors = np.linspace(0, 1, 16).reshape(8, 2)[:, ::-1]
    profile = HeadProfile(
        "loss", (2,) * 4, (HeadSpec(8, 4), HeadSpec(32, 4)), errors, (errors, errors), length=64,
        head_dims=((1, 1),) * 4, itemsize=4, target={"global_ratio": 0.5},
    )  # fmt: skip
    path = write_report(rows, tmp_path, [("plan.json", plan)], profiles=[("profile.json", profile)])
    page = Page(path.read_text())
    figures = ("differences", "frontier", "times", "heads", "profile")
    assert [attrs["id"] for tag, attrs in page.tags if tag == "figure"] == list(figures)
    sources = [attrs for tag, attrs in page.tags if tag == "source"]
    medias = {attrs["media"] for attrs in sources}
    assert len(sources) == 3 * len(figures)  # each figure for light and dark, desk and phone; one is the image itself
    assert medias == {
        "(max-width: 40rem) and (prefers-color-scheme: dark)", "(max-width: 40rem)", "(prefers-color-scheme: dark)"
    }  # fmt: skip
    held = [attrs.get("src") or attrs.get("srcset") for tag, attrs in page.tags if tag in ("img", "source")]
    assert all(url.startswith("data:image/svg+xml;base64,") for url in held)
    assert not [attrs for tag, attrs in page.tags if tag in ("script", "link")]
    assert any("width=device-width" in attrs.get("content", "") for tag, attrs in page.tags if tag == "meta")
    assert "<redknot>" in page.words
    tables = [tag for tag, _ in page.tags if tag == "table"]
    assert len(tables) == sum(attrs.get("class") == "scroll" for _, attrs in page.tags) == 4
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in figures)
    lines = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    assert [line["method"]["name"] for line in lines if not line["kind"]] == ["dense", "<redknot>"]
    assert "| <redknot> | 60 | 98.3 [" in (tmp_path / "report.md").read_text()
