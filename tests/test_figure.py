import numpy as np
import pytest

from redknot_hf import HeadSpec
from redknot_hf.profiling import HeadProfile
from redknot_hf.profiling.figure import heat_map


@pytest.mark.parametrize("errors", [np.linspace(0, 1, 10).reshape(5, 2)[::-1], np.zeros((5, 2)), np.ones((5, 2))])
def test_a_panel_for_each_window_and_a_frame_for_each_global_head(errors):
    profile = HeadProfile(
        "drift", (2, 3), (HeadSpec(4, 1), HeadSpec(16, 1)), errors, (errors, errors), length=100,
        head_dims=((1, 1),) * 2, itemsize=4,
    )  # fmt: skip
    plan = profile.plan(global_ratio=0.4)
    figure = heat_map(profile, plan)
    panels = [axes for axes in figure.axes if axes.images]
    assert [panel.get_title() for panel in panels] == ["window 4", "window 16"]
    for panel, window in zip(panels, profile.windows, strict=True):
        drawn = np.ma.filled(panel.images[0].get_array(), np.nan)
        expected = np.full((2, 3), np.nan)
        expected[0, :2], expected[1] = profile.table(window)
        np.testing.assert_array_equal(drawn, expected.T, "layers to the right, heads down")
        assert len(panel.lines) == plan.num_global == 2
    figure.draw_without_rendering()
    assert not heat_map(profile).axes[0].lines
    wide = heat_map(profile, plan, 9.0)
    wide.draw_without_rendering()
    assert wide.get_figwidth() == 9
    assert all(axes.get_position().x0 < 0.1 for axes in wide.axes), "few layers, and their scale, stand at the left"
