"""Pictures of sweeps and comparisons: the numbers that they are given are where they belong."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pyro_vae import plots

BETA, RATE = np.array([0.5, 1.0, 4.0]), np.array([9.0, 5.0, 1.0])
DISTORTION = np.array([16.0, 18.0, 24.0])


def straight_lines(axes, style):
    return [line for line in axes.lines if line.get_linestyle() == style and len(line.get_xdata())]


def test_rate_and_distortion_with_lines_of_constant_elbo():
    figure = plots.rate_distortion(
        BETA, RATE, DISTORTION, active_units=[8, 7, 0], title="t", rate_error=0 * RATE + 0.1
    )
    FigureCanvasAgg(figure).draw()
    axes, units = figure.axes
    assert [text.get_text() for text in axes.texts] == ["0.5", "1", "4"]
    assert [text.xy for text in axes.texts] == list(zip(RATE, DISTORTION, strict=True))
    (best,) = straight_lines(axes, "--")
    assert best.get_xdata() + best.get_ydata() == pytest.approx(23)  # of beta 1
    assert "-ELBO = 23.00" in best.get_label()
    for line in axes.lines:
        if line.get_color() == "0.85":
            assert np.ptp(line.get_xdata() + line.get_ydata()) < 1e-9
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    assert left < 1 < 9 < right
    assert bottom < 16 < 24 < top
    assert [bar.get_height() for bar in units.patches] == [8, 7, 0]


def test_runs_that_coincide_share_a_label_and_one_run_is_enough():
    rate, distortion = np.array([5.0, 0.0, 1e-4]), np.array([18.0, 27.0, 27.001])
    (axes,) = plots.rate_distortion(np.array([1.0, 2.0, 4.0]), rate, distortion, title="t").axes
    assert [text.get_text() for text in axes.texts] == ["1", "2, 4"]
    figure = plots.rate_distortion(BETA[:1], RATE[:1], DISTORTION[:1], title="t")
    FigureCanvasAgg(figure).draw()


def test_families_with_their_runs_means_and_intervals():
    figure = plots.families_and_runs(
        ["a", "b"],
        [[[0.0, 0.0], [-0.5, -0.3]]],
        [[0.0, -0.4]],
        [[0.0, 0.2]],
        labels=["log p(x)"],
        title="t",
    )
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    bottom, top = axes.get_ylim()
    assert bottom > top  # the first one stands on top
    (bar,) = [segment for lines in axes.collections for segment in lines.get_segments()]
    assert bar[:, 0] == pytest.approx([-0.6, -0.2])
    assert bar[:, 1] == pytest.approx([1, 1])
    dots = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    assert any(np.array_equal(dot, [-0.5, -0.3]) for dot in dots)


def test_prior_and_aggregate_have_a_labelled_panel_per_dimension():
    aggregate, prior = np.arange(20.0).reshape(10, 2), np.arange(20.0).reshape(10, 2) + 1
    figure = plots.prior_and_aggregate(aggregate, prior, ["z[0]", "z[1]"], title="t")
    FigureCanvasAgg(figure).draw()
    assert [axes.get_title() for axes in figure.axes] == ["z[0]", "z[1]"]
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("value of the coordinate", "draws")
    assert [entry.get_text() for entry in figure.legends[0].get_texts()] == ["prior", "aggregate"]
