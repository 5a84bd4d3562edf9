"""Pictures: what is in them, for images of every kind and for vectors."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyro_vae import plots
from pyro_vae.app.pictures import _name
from pyro_vae.evaluation.latent_codes import label_dimensions

RANDOM = np.random.default_rng(0)


def pixels(figure):
    """Return the picture as it is written, ``(height, width, 4)``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


IMAGES = [(1, 8, 8), (8, 8), (8, 8, 1), (3, 8, 8), (8, 8, 3), (1, 4, 40), (64, 64)]
VECTORS = [(1,), (2,), (3,), (100,), (2, 3), (5, 2, 2)]


@pytest.mark.parametrize("shape", IMAGES)
def test_images_are_recognised(shape):
    assert plots.is_image(shape)


@pytest.mark.parametrize("shape", VECTORS)
def test_vectors_are_recognised(shape):
    assert not plots.is_image(shape)


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("count", [1, 7, 64])
def test_every_sample_has_a_place_of_its_own(shape, count):
    figure = plots.samples(RANDOM.random((count, *shape)), RANDOM.random((3, *shape)), title="t")
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    assert not axes.axison
    places = [image.get_extent() for image in axes.images]
    assert len(set(map(tuple, places))) == count
    assert [text.get_text() for text in axes.texts] == ["t"]
    width, height = figure.get_size_inches()
    for left, right, bottom, top in places:
        assert 0 <= left < right <= width
        assert 0 <= bottom < top <= height - 0.3  # the title's line is free
    image_height, image_width = (size for size in shape if size not in (1, 3))
    left, right, bottom, top = places[0]
    assert (right - left) / (top - bottom) == pytest.approx(image_width / image_height)


def test_reconstructions_of_images_stand_below_their_data():
    data = RANDOM.random((12, 1, 8, 8))
    figure = plots.reconstructions(data, 1 - data, title="t")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["t", "data", "rebuilt"]
    above, below = axes.images[:12], axes.images[12:]
    for datum, top, bottom in zip(data, above, below, strict=True):
        np.testing.assert_array_equal(top.get_array(), datum[0])
        np.testing.assert_array_equal(bottom.get_array(), 1 - datum[0])
        assert top.get_extent()[:2] == bottom.get_extent()[:2]
        assert top.get_extent()[2] > bottom.get_extent()[3]


@pytest.mark.parametrize("shape", [(1, 8, 8), (8, 8), (8, 8, 1)])
def test_ink_is_dark_on_white(shape):
    image = np.zeros((1, *shape))
    image.reshape(8, 8)[:4] = 1  # the upper half is ink
    picture = pixels(plots.image_grid([image], title=""))
    paper, centre = picture[5, 5, :3], picture.shape[1] // 2
    column = picture[:, 20, :3].astype(int).sum(1)
    assert (paper == 255).all()
    assert centre > 20
    inside = column[-95:-10]  # the only image, 87 pixels high, at the lower edge
    assert inside[10] == 0
    assert inside[70] == 765


def test_limits_are_white_and_black():
    image = np.full((1, 8, 8), -2.0)
    image[0, :4] = 6.0
    (axes,) = plots.image_grid([image], title="", limits=(-2.0, 6.0)).axes
    assert axes.images[0].get_clim() == (-2, 6)
    colour = np.full((1, 3, 8, 8), 2.0)
    (axes,) = plots.image_grid([colour], title="", limits=(-2.0, 6.0)).axes
    assert (axes.images[0].get_array() == 0.5).all()


def test_colours_keep_their_order_and_are_clipped():
    image = np.zeros((1, 3, 8, 8))
    image[:, 0], image[:, 1] = 2.0, -1.0
    (axes,) = plots.image_grid([image], title="").axes
    shown = axes.images[0].get_array()
    assert shown.shape == (8, 8, 3)
    pixels(axes.figure)
    np.testing.assert_array_equal(shown[0, 0], [1, 0, 0])
    (axes,) = plots.image_grid([np.moveaxis(image, 1, -1)], title="").axes
    np.testing.assert_array_equal(axes.images[0].get_array(), shown)


def test_a_title_is_wide_enough_for_one_image():
    title = "12 test data and their reconstructions (z from the guide, mean of p(x|z))"
    figure = plots.image_grid([np.zeros((1, 8, 8))], title=title)
    figure.draw_without_rendering()
    box = figure.axes[0].texts[0].get_window_extent()
    assert box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("shape", VECTORS)
def test_vectors_are_shown_beside_the_data(shape):
    drawn, data = RANDOM.random((30, *shape)), RANDOM.random((50, *shape))
    figure = plots.samples(drawn, data, title="t")
    axes = figure.axes[0]
    title = figure.get_suptitle() if len(figure.axes) > 1 else axes.get_title(loc="left")
    assert title == "t"
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"data", "drawn"}
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    pixels(figure)


def test_points_in_the_plane_are_all_shown():
    drawn, data = RANDOM.random((30, 2)), RANDOM.random((50, 2))
    shown = [
        np.asarray(points.get_offsets())
        for points in plots.samples(drawn, data, title="").axes[0].collections
    ]
    np.testing.assert_array_equal(shown[0], data)
    np.testing.assert_array_equal(shown[1], drawn)


def test_many_coordinates_are_shown_by_their_quantiles():
    data = np.tile(np.arange(101.0)[:, None], (1, 5))
    lines = plots.samples(data, data, title="").axes[0].containers
    for bars in lines:
        np.testing.assert_allclose(bars.lines[0].get_ydata(), 50)
        for segment in bars.lines[2][0].get_segments():
            np.testing.assert_allclose(segment[:, 1], [5, 95])


def test_bits_are_shown_by_their_share_of_ones():
    data = (RANDOM.random((40, 6)) < 0.3).astype(float)
    axes = plots.samples(RANDOM.random((20, 6)), data, title="").axes[0]
    np.testing.assert_allclose(axes.containers[0].lines[0].get_ydata(), data.mean(0))
    assert axes.get_ylabel() == "share of ones"
    axes = plots.reconstructions(data, RANDOM.random((40, 6)), title="").axes[0]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"data 0", "data 1"}


@pytest.mark.parametrize("shape", VECTORS)
def test_reconstructed_vectors_are_shown_value_against_value(shape):
    data, rebuilt = RANDOM.random((30, *shape)), RANDOM.random((30, *shape))
    (axes,) = plots.reconstructions(data, rebuilt, title="t").axes
    points = np.asarray(axes.collections[0].get_offsets())
    expected = np.stack([data.reshape(-1), rebuilt.reshape(-1)], 1)
    np.testing.assert_array_equal(points, expected[:5000])


def history(epochs, validation=True):
    rows = {}
    for name in ("elbo", "rate", "distortion"):
        rows[f"train_{name}"] = RANDOM.random(epochs)
        rows[f"validation_{name}"] = RANDOM.random(epochs) if validation else np.full(epochs, np.nan)
    return rows


@pytest.mark.parametrize(("epochs", "validation"), [(1, False), (1, True), (2, False), (60, True)])
def test_training_curves_have_three_panels(epochs, validation):
    rows = history(epochs, validation)
    figure = plots.training_curves(rows, title="t")
    assert [axes.get_title() for axes in figure.axes] == ["ELBO", "rate (KL)", "distortion"]
    for axes, name in zip(figure.axes, ("elbo", "rate", "distortion"), strict=True):
        assert len(axes.lines) == 1 + validation
        np.testing.assert_array_equal(axes.lines[0].get_ydata(), rows[f"train_{name}"])
        assert axes.lines[0].get_xdata().tolist() == list(range(1, epochs + 1))
        assert (axes.lines[0].get_marker() == "o") is (epochs <= 20)
    pixels(figure)


def test_the_fall_of_the_first_epochs_does_not_flatten_the_rest():
    rows = history(100, validation=False)
    rows["train_distortion"][0] = 1e6
    axes = plots.training_curves(rows, title="").axes[2]
    assert axes.get_ylim()[1] < 2


def test_a_diverged_curve_is_still_drawn():
    rows = history(30)
    rows["train_elbo"][25:] = np.inf
    rows["validation_rate"][25:] = np.nan
    pixels(plots.training_curves(rows, title=""))


def test_no_global_state_is_touched():
    before = dict(matplotlib.rcParams)
    pixels(plots.samples(np.zeros((4, 8, 8)), np.zeros((4, 8, 8)), title=""))
    assert dict(matplotlib.rcParams) == before


def test_weight_diagnostics_mark_the_limit_and_leave_a_missing_curve_out():
    k = np.array([0.1, 0.9, 0.8])
    both = plots.weight_diagnostics(k, np.array([1, 10]), np.array([-3.0, -2.0]), title="t")
    assert len(both.axes) == 2
    assert "2 of 3" in both.axes[0].get_title()
    assert "flat does not mean right" in both.axes[1].get_title()
    alone = plots.weight_diagnostics(np.array([0.1, 0.6, np.nan]), None, None, title="t", limit=0.5)
    assert len(alone.axes) == 1
    assert alone.axes[0].get_title() == "1 of 3 above 0.5, 1 not known"


def test_column_labels_stand_above_their_columns():
    rows = [RANDOM.random((3, 8, 8)), RANDOM.random((3, 8, 8))]
    (axes,) = plots.image_grid(rows, title="t", column_labels=["a", "b", "c"]).axes
    labels = {text.get_text(): text.get_position() for text in axes.texts}
    for label, image in zip("abc", axes.images[:3], strict=True):
        left, right, _, top = image.get_extent()
        across, up = labels[label]
        assert left < across < right
        assert top < up < labels["t"][1]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_what_is_not_there_is_tinted(shape):
    image = np.zeros((1, *shape))
    image[..., :4, :] = np.nan
    picture = pixels(plots.image_grid([image], title=""))[-95:-10, 20, :3]
    assert len(set(picture[10])) > 1  # blue, neither paper nor ink
    assert len(set(picture[70])) == 1


def test_every_code_is_shown_in_the_colour_of_its_class():
    codes, labels = RANDOM.normal(size=(60, 2)), np.arange(60) % 3
    figure = plots.latent_scatter(codes, labels, title="t", axis_labels=("a", "b"))
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("a", "b")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "1", "2"]
    for value, points in enumerate(axes.collections):
        np.testing.assert_array_equal(points.get_offsets(), codes[labels == value])
    assert len({tuple(points.get_facecolor()[0]) for points in axes.collections}) == 3
    pixels(figure)


def test_pictures_name_latents_as_results_do():
    names = label_dimensions({"z": torch.zeros(1, 2)})
    assert names == [_name(0), _name(1)] == ["z[0]", "z[1]"]
    (axes,) = plots.latent_scatter(np.zeros((3, 2))).axes
    assert [axes.get_xlabel(), axes.get_ylabel()] == names


@pytest.mark.parametrize("labels", [None, np.arange(60)])
def test_codes_without_few_classes_have_no_legend(labels):
    (axes,) = plots.latent_scatter(RANDOM.normal(size=(60, 2)), labels, title="").axes
    assert axes.get_legend() is None
    assert len(axes.collections[0].get_offsets()) == 60


@pytest.mark.parametrize("labels", [None, np.arange(60) % 2])
def test_a_single_latent_is_shown_by_histograms(labels):
    figure = plots.latent_scatter(RANDOM.normal(size=(60, 1)), labels, title="")
    assert figure.axes[0].patches
    pixels(figure)


def test_the_sphere_has_its_outline():
    figure = plots.latent_scatter(np.zeros((5, 2)), title="", unit_circle=True)
    assert [patch.radius for patch in figure.axes[0].patches] == [1]
    pixels(figure)


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_images_of_a_manifold_stand_where_their_latents_are(shape, rows):
    data = RANDOM.random((rows, 4, *shape))
    first, second = np.linspace(-2, 2, 4), np.linspace(-1, 1, rows)
    figure = plots.manifold(data, first, second, title="t", limits=(0, 1))
    (axes,) = figure.axes
    assert len(axes.images) == 4 * rows
    places = [image.get_extent() for image in axes.images]
    # The first row of data lies lowest, its first column leftmost.
    assert places[0][0] == min(left for left, *_ in places)
    assert places[0][2] == min(bottom for _, _, bottom, _ in places)
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks == ["-2.00", "-0.67", "0.67", "2.00"]
    pixels(figure)


@pytest.mark.parametrize(("shape", "rows"), [((1,), 5), ((3,), 1), ((2, 3), 1), ((100,), 2)])
def test_the_manifold_of_vectors_has_a_panel_per_coordinate(shape, rows):
    data = RANDOM.random((rows, 4, *shape))
    figure = plots.manifold(data, np.arange(4.0), np.arange(float(rows)), title="t")
    named = [axes for axes in figure.axes if axes.get_title()]
    assert len(named) == min(9, np.prod(shape))
    pixels(figure)


@pytest.mark.parametrize("shape", [(1,), (2, 3), (100,), *IMAGES[:4]])
def test_traversals_and_interpolations_of_every_kind(shape):
    data, values = RANDOM.random((3, 5, *shape)), np.sort(RANDOM.random((3, 5)))
    walks = plots.traversals(data, values, ["a", "b", "c"], title="t")
    ways = plots.interpolations(data[:, 0], data.swapaxes(0, 1), data[:, 4], title="t")
    pixels(walks)
    pixels(ways)
    if plots.is_image(shape):
        assert len(walks.axes[0].images) == 15
        assert len(ways.axes[0].images) == 21  # the data at both ends too
        texts = [text.get_text() for text in ways.axes[0].texts]
        assert texts == ["t", "from", "0", "0.25", "0.5", "0.75", "1", "to"]
    else:
        assert [axes.get_xlabel() for axes in walks.axes[:3]] == ["a", "b", "c"]


def test_walks_of_few_coordinates_are_lines_at_the_values():
    data, values = RANDOM.random((2, 5, 3)), np.sort(RANDOM.random((2, 5)))
    figure = plots.traversals(data, values, ["a", "b"], title="")
    for axes, walk, value in zip(figure.axes, data, values, strict=True):
        for coordinate, line in enumerate(axes.lines):
            np.testing.assert_array_equal(line.get_xdata(), value)
            np.testing.assert_array_equal(line.get_ydata(), walk[:, coordinate])


def test_completed_images_stand_between_what_was_seen_and_the_truth():
    truth, mean = RANDOM.random((2, 1, 8, 8)), RANDOM.random((2, 1, 8, 8))
    missing = np.zeros(truth.shape, dtype=bool)
    missing[..., 4:, :] = True
    draws = RANDOM.random((3, 2, 1, 8, 8))
    figure = plots.completions(truth, missing, mean, mean, draws, title="t")
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["t", "observed", "mean", "draw", "draw", "draw", "truth"]
    shown = [np.ma.filled(image.get_array(), np.nan) for image in axes.images[:6]]
    np.testing.assert_array_equal(shown[0], np.where(missing, np.nan, truth)[0, 0])
    np.testing.assert_array_equal(shown[1], mean[0, 0])
    np.testing.assert_array_equal(shown[4], draws[2, 0, 0])
    np.testing.assert_array_equal(shown[5], truth[0, 0])
    pixels(figure)


def test_completed_vectors_are_shown_where_they_were_missing():
    truth, mean = RANDOM.random((6, 4)), RANDOM.random((6, 4))
    missing = RANDOM.random((6, 4)) < 0.5
    figure = plots.completions(truth, missing, mean, mean, truth[None], title="t")
    (bars,) = figure.axes[0].containers
    np.testing.assert_array_equal(bars.lines[0].get_xdata(), truth[missing])
    np.testing.assert_array_equal(bars.lines[0].get_ydata(), mean[missing])
    pixels(figure)
    bits = plots.completions((truth < 0.5) * 1.0, missing, mean, mean, truth[None], title="t")
    names = {text.get_text() for text in bits.axes[0].get_legend().get_texts()}
    assert names == {"truth 0", "truth 1"}
    pixels(bits)


def test_curves_are_drawn_beside_data_and_over_their_reconstructions():
    data, drawn = RANDOM.random((30, 2, 15)), RANDOM.random((40, 2, 15))
    left, right = plots.samples(drawn, data, title="t").axes
    for axes, values in ((left, data), (right, drawn)):
        assert len(axes.lines) == 20 * 2
        np.testing.assert_array_equal(axes.lines[3].get_ydata(), values[1, 1])
    places = plots.reconstructions(data, drawn[:30], title="t").axes
    shown = [axes for axes in places if axes.lines]
    assert len(shown) == 12
    np.testing.assert_array_equal(shown[5].lines[2].get_ydata(), drawn[5, 0])


def test_correlations_of_a_table_are_those_drawn_against_those_of_the_data():
    mixing = np.array([[1.0, 0.8, -0.5, 0.0], [0.0, 1.0, 0.3, 0.0], [0.0, 0.0, 1.0, 0.0]])
    data, drawn = RANDOM.normal(size=(200, 3)) @ mixing, RANDOM.normal(size=(300, 3)) @ mixing
    axes = plots.samples(drawn, data, title="t").axes[1]
    points = axes.collections[0].get_offsets()
    assert points.shape == (3, 2)  # the last column does not vary
    np.testing.assert_allclose(
        points[0], [np.corrcoef(x[:, 0], x[:, 1])[0, 1] for x in (data, drawn)]
    )


def test_a_figure_shows_itself_as_a_cell_s_last_line():
    figure = plots.image_grid([np.zeros((3, 1, 4, 4))], title="three blanks")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_picture_needs_no_title():
    images = np.zeros((3, 8, 8))
    bare, titled = (plots.image_grid([images], title=title) for title in ("", "three"))
    assert titled.get_size_inches()[1] - bare.get_size_inches()[1] == pytest.approx(0.3)
    assert plots.training_curves(history(3, validation=True)).get_suptitle() == ""
