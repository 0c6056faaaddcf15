"""Figures: what is drawn is what was given, the files repeat to the byte, the text is readable at half a page."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from aevlp import plots

RNG = np.random.default_rng(3)
TARGETS = RNG.random((60, 5)) < 0.3
PROBS = np.clip(RNG.normal(0.3, 0.1, TARGETS.shape) + 0.4 * TARGETS, 0, 1)
NAMES = ["cat", "dog", "key", "moon", "star"]


def curve():
    rows = [{"negative_ratio": r, "test_map": 50 + 10 * r + s, "seed": s} for r in (0, 0.25, 0.5) for s in range(3)]
    return pd.DataFrame(rows)


def quality():
    e = np.arange(1, 5)
    return pd.DataFrame(
        {
            "epoch": e,
            "precision": [0.6, 0.7, 0.8, 0.7],
            "recall": [0.3, 0.2, 0.3, 0.4],
            "accumulated_precision": 0.6 - 0.01 * e,
            "accumulated_recall": 0.3 + 0.03 * e,
        }
    )


def scores():
    s = {
        "global_probs": np.array([0.1, 0.5, 0.2, 0.1, 0.1]),
        "aggregated": np.array([0.1, 0.9, 0.3, 0.0, 0.05]),
        "average": np.array([0.1, 0.4, 0.2, 0.02, 0.08]),
        "local_threshold": np.array([0.25]),
        "pseudo": np.array([0, 1, 0, -1, 0]),
    }
    return s | {"final": (s["global_probs"] + s["aggregated"]) / 2}


def figures():
    image = RNG.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    boxes = np.array([[0, 0, 60, 40], [0, 0, 33, 22], [28, 0, 60, 21], [0, 18, 32, 40], [28, 19, 60, 40]])
    learning = quality().assign(loss=[4, 3, 2, 1], val_map=[10, 20, 30, 25], method="AN")
    return {
        "probability_histograms": plots.probability_histograms({"AN": (PROBS, TARGETS), "GR": (PROBS**2, TARGETS)}),
        "delta_neg_curves": plots.delta_neg_curves(curve()),
        "pseudo_quality": plots.pseudo_quality(quality(), {"precision": 0.65, "recall": 0.25}),
        "learning_curves": plots.learning_curves(learning),
        "patches_over_image": plots.patches_over_image(image, boxes, selected=1),
        "similarity_heatmap": plots.similarity_heatmap(RNG.random((5, 5)), NAMES, [1], 0),
        "scores_bar": plots.scores_bar(scores(), NAMES, 0.5, [1]),
    }


@pytest.fixture(scope="module")
def all_figures():
    return figures()


def test_histograms_are_shares_of_each_group(all_figures):
    ax = all_figures["probability_histograms"].axes[0]
    negative, positive = [p.get_data() for p in ax.patches]
    for (share, edges, _), group in ((negative, PROBS[~TARGETS]), (positive, PROBS[TARGETS])):
        assert share.sum() == pytest.approx(100)
        low, high = edges[7], edges[8]
        assert share[7] == pytest.approx(100 * np.mean((group >= low) & (group < high)))
    medians = sorted(line.get_xdata()[0] for line in ax.lines)
    assert medians == pytest.approx(sorted([np.median(PROBS[TARGETS]), np.median(PROBS[~TARGETS])]))


@pytest.mark.parametrize("name", ["$x_{$", "$$", "a$b$c", "<b>", "a;b\nc"])
def test_names_are_drawn_as_they_are(name):
    """No name is taken for mathematics, of which this one would be wrong."""
    with plots.style():
        fig, ax = plots.canvas()
        ax.set(title=name, xlabel=name)
        ax.plot([0, 1], label=name)
        ax.legend()
        assert plots.png(fig)[:4] == b"\x89PNG"
        assert not any(text.get_parse_math() for text in fig.findobj(lambda a: hasattr(a, "get_parse_math")))


def test_histograms_of_one_kind_only():
    fig = plots.probability_histograms({"AN": (PROBS, np.zeros_like(TARGETS))})
    assert plots.png(fig).startswith(b"\x89PNG")


def test_delta_curve_is_mean_and_interval_over_seeds(all_figures):
    ax = all_figures["delta_neg_curves"].axes[0]
    line = ax.lines[0]
    assert line.get_xdata() == pytest.approx([0, 25, 50])
    assert line.get_ydata() == pytest.approx([51, 53.5, 56])
    band = ax.collections[0].get_paths()[0].vertices
    half = 4.302653 / 3**0.5  # Student's t for three seeds, whose deviation is 1
    assert band[:, 1].min() == pytest.approx(51 - half) and band[:, 1].max() == pytest.approx(56 + half)
    assert "56.0" in [t.get_text() for t in ax.texts]


def test_delta_curve_of_one_seed_has_no_band():
    ax = plots.delta_neg_curves(curve().query("seed == 1")).axes[0]
    vertices = ax.collections[0].get_paths()[0].vertices
    assert np.isfinite(vertices).all() and vertices[:, 1].max() == pytest.approx(56)


def test_quality_draws_average_accumulated_and_baseline(all_figures):
    precision, recall = all_figures["pseudo_quality"].axes
    lines = {line.get_label(): line for line in precision.lines}
    assert lines["average"].get_ydata()[0] == pytest.approx(0.7)
    assert lines["accumulated"].get_ydata() == pytest.approx(quality()["accumulated_precision"].to_numpy())
    assert lines["fixed labels"].get_ydata()[0] == pytest.approx(0.65)
    assert {line.get_label(): line for line in recall.lines}["average"].get_ydata()[0] == pytest.approx(0.3)
    for ax in (precision, recall):
        low, high = ax.get_ylim()
        data = np.concatenate([np.atleast_1d(line.get_ydata()) for line in ax.lines])
        assert low <= data.min() and data.max() <= high


def test_bars_are_sorted_and_signed(all_figures):
    ax = all_figures["scores_bar"].axes[0]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == ["+ ★ dog", "key", "cat", "star", "− moon"]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx(sorted(scores()["final"], reverse=True))
    upright = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2]
    assert sorted(x for x, _ in upright) == pytest.approx([0.25, 0.5])


def test_patches_leave_out_the_global_view(all_figures):
    ax = all_figures["patches_over_image"].axes[0]
    assert [t.get_text() for t in ax.texts] == ["1", "2", "3", "4"]
    drawn = {tuple(p.get_bbox().extents) for p in ax.patches}
    assert drawn == {(0, 0, 33, 22), (28, 0, 60, 21), (0, 18, 32, 40), (28, 19, 60, 40)}


def test_channels_first_pictures_are_accepted():
    first = RNG.integers(0, 255, (3, 30, 50), dtype=np.uint8)
    a, b = (plots.png(plots.patches_over_image(im, [[0, 0, 20, 20]])) for im in (first, first.transpose(1, 2, 0)))
    assert a == b


def test_text_is_readable_at_half_a_page(all_figures):
    """At 3.4 inches, half a page's width, no text is below 5 points (for the single image: as wide as it is)."""
    for name, fig in all_figures.items():
        plots.png(fig)
        factor = min(1, 3.4 / fig.get_size_inches()[0])
        sizes = [t.get_fontsize() for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]
        assert min(sizes) * factor >= 5, (name, min(sizes), factor)


def within(tick, axis):
    place, (low, high) = tick.get_position()[axis.axis_name == "y"], sorted(axis.get_view_interval())
    return low <= place <= high


def test_nothing_is_cut_off(all_figures):
    for name, fig in all_figures.items():
        plots.png(fig)
        renderer, frame = fig.canvas.get_renderer(), fig.bbox
        for ax in fig.axes:
            ticks = [t for axis in (ax.xaxis, ax.yaxis) for t in axis.get_majorticklabels() if within(t, axis)]
            for text in [ax.title, ax.xaxis.label, ax.yaxis.label, *ticks]:
                box = text.get_window_extent(renderer)
                if text.get_text().strip() and text.get_visible() and ax.axison:
                    assert frame.x0 - 2 <= box.x0 and box.x1 <= frame.x1 + 2, (name, text.get_text())
                    assert frame.y0 - 2 <= box.y0 and box.y1 <= frame.y1 + 2, (name, text.get_text())


def simulate(rgb, kind):
    """How a dichromat sees a colour (Viénot, Brettel and Mollon 1999), linear RGB."""
    linear = np.asarray(rgb) ** 2.2
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    seen = np.linalg.inv(to_lms) @ (protan if kind == "protan" else deutan) @ to_lms @ linear
    return np.clip(seen, 0, 1) ** (1 / 2.2)


@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_the_two_main_colours_differ_for_the_colour_blind(kind):
    a, b = (simulate(to_rgb(c), kind) for c in (plots.BLUE, plots.VERMILLION))
    assert np.abs(a - b).sum() > 0.6


DRAW = "import sys; sys.path.insert(0, 'tests'); import test_plots as t; from aevlp import plots\n"
DRAW += "for n, f in t.figures().items(): plots.save(f, sys.argv[1] + '/' + n)"


def test_saved_files_repeat_to_the_byte(tmp_path):
    digests = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        subprocess.run([sys.executable, "-c", DRAW, folder], check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()})
    assert len(digests[0]) == 21 and digests[0] == digests[1]
    text = (tmp_path / "1/scores_bar.svg").read_text()
    assert "<dc:date>" not in text and Image.open(tmp_path / "1/scores_bar.png").size[0] > 800


def test_nothing_outside_a_figure_changes():
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    before = dict(mpl.rcParams)
    plots.png(plots.delta_neg_curves(curve()))
    assert dict(mpl.rcParams) == before and plt.get_fignums() == []
