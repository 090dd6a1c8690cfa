"""What a report says first, how it colours, and that it shows no number that cannot be."""

import dataclasses

import pytest
from evaluated import records

from evals.figures import STYLES, _colours
from evals.head_map import heads, portrait
from evals.headline import digest, headline, mood
from evals.intervals import Estimate
from evals.report import write_report
from evals.summary import _believable, _over_zero, summarize
from redknot_hf import HeadPlan, HeadSpec

PLAN = HeadPlan(
    [[HeadSpec(), HeadSpec(8)], [HeadSpec(storage="int8"), HeadSpec(storage="int4")], [HeadSpec(8), HeadSpec(16)]]
)


def rows(count=300, **wrong):
    """Of methods that are wrong in so many of the answers, here and there."""
    methods = {
        name: [int(n == 0 or i % (count // n) != 0) for i in range(count)] for name, n in {"dense": 0, **wrong}.items()
    }
    return summarize(records(**methods))


def test_the_first_sentence_has_the_verdict():
    good = rows(redknot=0, streaming=150)
    assert headline(good).endswith("redknot answers as dense does, and holds 40% of its keys and values.")
    assert "redknot loses 50.0 points against dense, and holds" in headline(rows(redknot=150))
    assert "on 2 contexts, too few to be sure" in headline(rows(20, redknot=10))
    assert "0.3 points from dense; " in headline(rows(redknot=1))
    assert headline(rows()).startswith("Only the dense cache has answered")


def test_three_rows_say_the_rest():
    table = digest(rows(redknot=30))
    assert table["head"] == ["", "dense", "redknot"]
    assert [row[0] for row in table["body"]] == [
        "right answers (score of 100)", "memory of the context", "first token, each later one"
    ]  # fmt: skip
    assert table["body"][0][1:] == ["100.0", "90.0"]
    assert digest(rows())["body"] == []


@pytest.mark.parametrize(
    ("wrong", "count", "coloured"),
    [(0, 300, "none"), (9, 300, "slight"), (150, 300, "large"), (10, 20, "large unsure"), (0, 20, "none unsure")],
)
def test_a_verdict_is_coloured_by_the_size_of_the_loss_and_by_certainty(wrong, count, coloured):
    found = {row.name: row for row in rows(count, other=wrong)}
    assert mood(found["other"]) == coloured
    assert mood(found["dense"]) == "plain"
    assert mood(dataclasses.replace(found["other"], unaudited=1)) == "large"


def test_a_method_has_its_colour_in_every_report():
    style = STYLES["light", "wide"]
    few, many = _colours(rows(redknot=0), style), _colours(rows(streaming=1, mine=2, redknot=0, zebra=3), style)
    assert all(many[name] == colour for name, colour in few.items())
    assert len(set(many.values())) == len(many)
    alone = _colours(rows(mine=2), style)
    assert alone["mine"] == many["mine"]


def test_no_number_is_shown_that_cannot_be(tmp_path):
    assert _over_zero(Estimate(-1e-12, -2e-12, 1e-12)) == Estimate(0.0, 0.0, 1e-12)
    assert _over_zero(Estimate(0.5, None, None)) == Estimate(0.5, None, None)
    assert (_believable(5.0, 9.0), _believable(None, 9.0), _believable(9.5, 9.0)) == (None, None, 9.5)
    found = [dataclasses.replace(row, peak_bytes=None) for row in rows(redknot=0)]
    page = write_report(found, tmp_path).read_text()
    assert "redknot answers as dense does" in page
    assert "**On " in (tmp_path / "report.md").read_text()


def test_heads_lie_with_layers_to_the_right():
    style = STYLES["dark", "wide"]
    for figure in (heads(PLAN, "a plan", style), portrait(PLAN, "a plan", (64, 64), style)):
        axes = figure.axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "KV head")
        assert axes.collections[0].get_array().shape == (2, 3)
        named = [text.get_text() for text in figure.legends[0].get_texts()]
        assert named == ["window 8", "window 16", "global, int4", "global, int8", "global"]
        figure.canvas.draw()
