"""The first page: short, and its figures are those of the committed results."""

import json
import re

import pytest
import yaml
from pages import ROOT, blocks

from evals.real.speed import better, read

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "evals" / "results"
KINDS = ("numbers", "words", "codes", "copied")


def row(name):
    """The cells of the table's row that begins so, as numbers; None where a cell is empty."""
    (line,) = (line for line in README.splitlines() if line.replace("*", "").startswith(f"| {name}"))
    cells = [re.sub(r"[*x% ]", "", cell) for cell in line.strip("|").split("|")[1:]]
    return [float(cell) if cell else None for cell in cells]


def test_it_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 150


def test_its_citation_is_that_of_the_file():
    (entry,) = blocks(ROOT / "README.md", "bibtex")
    said = dict(re.findall(r"^  (\w+) = \{+(.*?)\}+,?$", entry, re.M))
    file = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (said["title"], said["version"]) == (file["title"], file["version"])
    assert said["author"] == file["authors"][0]["name"]


def test_answers_are_those_of_the_real_model():
    lines = map(json.loads, (RESULTS / "real" / "frontier.jsonl").read_text().splitlines())
    found = {(line["method"], line["budget"]): line for line in lines}

    def right(method, budget):
        return sum(found[method, budget]["tasks"][kind]["right"] for kind in KINDS) / len(KINDS)

    dense = right("dense", 1.0)
    assert f"{dense:.0f} % of four kinds" in README
    times = read(RESULTS / "real" / "speed.jsonl")
    for name, method, budget, timed in (
        ("RedKnot, plan for 28 %", "fisher", 0.28, "fisher 0.28"),
        ("RedKnot, plan for 20 %", "fisher", 0.2, "fisher 0.2"),
        ("RedKnot, plan for 10 %", "fisher", 0.1, "fisher 0.1"),
        ("every head in int8", "int8 everywhere", 0.53, "int8 everywhere"),
        ("every head in int4", "int4 everywhere", 0.28, "int4 everywhere"),
        ("`QuantizedCache`, quanto, 4 bits", "transformers quanto 4 bits", 0.28, "transformers quanto 4 bits"),
        ("kvpress, AdaKV over SnapKV", "kvpress AdaKV SnapKV", 0.2, "kvpress AdaKV SnapKV"),
        ("windows by attention mass", "mass", 0.2, "mass 0.2"),
        ("a sliding window with sink", "streaming", 0.2, "streaming 0.2"),
    ):
        kept = found[method, budget]["kept"]
        sooner, tokens = (factor and round(factor, 1) for factor in better(times, timed) or (None, None))
        assert row(name) == [round(1 / kept, 1), sooner, tokens, round(100 * right(method, budget) / dense)], name


def test_times_on_the_real_model_are_beside_dense_of_the_length_that_is_told():
    rows = read(RESULTS / "real" / "speed.jsonl")
    assert {row["length"] for row in rows} == {7168}
    (dense,) = (row for row in rows if (row["method"], row["how"], row["batch"]) == ("dense", "eager", 1))
    assert f"{1e3 * dense['first_s']:.0f} ms to the first token and {1e3 * dense['token_s']:.1f} ms a token" in README
    tokens = {(row["method"], row["how"], row["batch"]): row["times_tokens"] for row in rows}
    plans = {
        how: [tokens[f"fisher {budget}", how, 32] for budget in (0.28, 0.2, 0.1)] for how in ("captured", "eager")
    }
    compiled = [tokens["dense", "compiled", batch] for batch in (1, 32)]
    others = [tokens[name, "eager", 32] for name in ("transformers quanto 4 bits", "kvpress AdaKV SnapKV")]
    text, measured = (" ".join(page.split()) for page in (README, (ROOT / "docs" / "measured.md").read_text()))
    assert f"(`StaticCache`, compiled: {compiled[0]:.1f} x)" in text
    more = "{:.1f}, {:.1f} and {:.1f} x as much, a compiled `StaticCache` {:.1f} x"
    assert more.format(*plans["captured"], compiled[1]) in text
    less = "decode {:.2f}, {:.2f} and {:.2f} x the tokens/s, quanto {:.2f} x and kvpress {:.2f} x"
    assert less.format(*plans["eager"], *others) in measured


NAMES = {
    "dense": "dense", "by fisher": "fisher", "by drift": "drift", "by drift at 2K": "drift at 2K",
    "plan by fisher": "fisher", "plan by drift": "drift", "windows only, by drift": "windows only",
    "int8 everywhere": "int8 everywhere", "int4 everywhere": "int4 everywhere", "streaming": "streaming",
    "windows, by attention mass": "mass", "windows by attention mass": "mass",
    "drift's choices, dealt at random": "random 0", "kvpress, AdaKV over SnapKV": "kvpress AdaKV SnapKV",
    "kvpress, AdaKV over expected attention": "kvpress AdaKV ExpectedAttention",
    "QuantizedCache, quanto, 4 bits": "transformers quanto 4 bits",
    "QuantizedCache, hqq, 4 bits": "transformers hqq 4 bits",
    "QuantizedCache, quanto, 2 bits": "transformers quanto 2 bits",
}  # fmt: skip


@pytest.mark.parametrize(("page", "rows"), [("plans", 33), ("measured", 11)])
def test_tables_of_the_real_model_are_the_results(page, rows):
    lines = map(json.loads, (RESULTS / "real" / "frontier.jsonl").read_text().splitlines())
    found = {(line["method"], round(100 * line["kept"])): line["tasks"] for line in lines}
    text = (ROOT / "docs" / f"{page}.md").read_text().replace("`", "")
    told = re.findall(rf"^\| (\d+) % \| ({'|'.join(NAMES)}) \| (.*) \|$", text, re.M)
    assert len(told) == rows
    for kept, name, cells in told:
        tasks = found[NAMES[name], int(kept)]
        for cell, task in zip(filter(None, cells.split(" | ")), (*KINDS, "text"), strict=False):
            right, kl = tasks[task]["right"], tasks[task]["kl"][0]
            assert cell.strip("| ") in ("", f"{right:.1f}", f"{right:.1f} ({kl:.3f})"), (kept, name, task)


OTHERS = {
    "4096": (r"\| 4K \| (\d+) % \| ([^|]*) \| (.*) \|", 11),
    "2048": (r"\| 2K \| (\d+) % \| ([^|]*) \| (.*) \|", 11),
    "more": (r"\| (\d+) % \| (dense on these|fisher, \d+ prompts|loss, from fisher of 32) \| (.*) \|", 9),
}
MORE = {"dense on these": "dense", "fisher, 32 prompts": "fisher", "fisher, 80 prompts": "fisher 10"}


@pytest.mark.parametrize("name", OTHERS)
def test_tables_of_other_lengths_and_prompts_are_the_results(name):
    lines = map(json.loads, (RESULTS / "real" / f"frontier_{name}.jsonl").read_text().splitlines())
    found = {(line["method"], round(100 * line["kept"])): line["tasks"] for line in lines}
    pattern, rows = OTHERS[name]
    told = re.findall(f"^{pattern}$", (ROOT / "docs" / "plans.md").read_text(), re.M)
    assert len(told) == rows
    for kept, plan, cells in told:
        method = f"loss {int(kept) / 100:g}" if plan.startswith("loss") else (NAMES | MORE)[plan]
        for cell, task in zip(cells.split(" | "), (*KINDS, "text"), strict=True):
            right, kl = found[method, int(kept)][task]["right"], found[method, int(kept)][task]["kl"][0]
            assert cell in (f"{right:.1f}", f"{right:.1f} ({kl:.3f})"), (kept, plan, task)


def test_what_drift_takes_on_a_cpu_is_the_result():
    lines = map(json.loads, (RESULTS / "profiling_cpu.jsonl").read_text().splitlines())
    (took,) = (line for line in lines if line["benchmark"] == "real_profile")
    assert (took["profile"], took["length"], took["prompts"], took["held_out"]) == ("drift", 2048, 32, 32)
    page = (ROOT / "docs" / "plans.md").read_text()
    assert (
        f"it took {took['cpu_seconds']:.0f} CPU seconds of {['', 'one', 'two'][took['hardware']['threads']]} threads"
        in page
    )
    assert f"clock, at {took['seconds']:.0f} s" in page
    assert f"{took['cpu_seconds']:.0f} CPU seconds, of 32" in page
    assert f"is {took['cpu_seconds'] / 120:.1f} minutes of two cores" in page


def test_how_often_drift_finds_the_true_heads_on_a_cpu_is_the_result():
    lines = map(json.loads, (RESULTS / "profiling_cpu.jsonl").read_text().splitlines())
    found = sorted(round(10 * line["recall"]) for line in lines if line.get("stage") == "seeds")
    assert found == [9] * 3 + [10] * 9
    page = " ".join((ROOT / "docs" / "plans.md").read_text().split())
    assert "`drift` finds all ten nine times, and nine of them three times" in page


def test_times_are_those_of_the_8b_shape():
    last = json.loads((RESULTS / "speed_gpu.jsonl").read_text().splitlines()[-1])
    found = {one["method"]: one for one in last["rows"] if one["batch"] == 1 and one["length"] == 131072}
    dense, static, ours = (found[name] for name in ("dynamic", "static", "1/8 global, captured"))
    assert f"{dense['kv_bytes'] / 2**30:.1f} GiB, {dense['first_s']:.1f} s to the first token" in README
    assert f"{1e3 * dense['token_s']:.0f} ms a token" in README
    times = [dense[name] / ours[name] for name in ("kv_bytes", "first_s", "token_s")]
    assert row("RedKnot, 1/8 of the heads") == [*(round(time, 1) for time in times), None]
    times = [dense[name] / static[name] for name in ("kv_bytes", "token_s")]
    assert row("StaticCache, compiled") == [round(times[0], 1), None, round(times[1], 1), None]


def test_links_lead_somewhere():
    for page in (
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "kernels").glob("*.md"),
        ROOT / "evals" / "README.md",
        ROOT / "CONTRIBUTING.md",
    ):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text()):
            target = next(filter(None, link))
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
