"""What the explorer draws: signs and orders of a table by hand, and whether markup is whole."""

from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from aevlp.draw import curve_html, heat_html, history_html, labels_html, matrix_html, opinions_html


def test_labels_come_by_score_and_names_are_text():
    same = {k: np.array([[0.1, 0.9, 0.2]]) for k in ("global_probs", "aggregated", "final", "average")}
    scores = SimpleNamespace(**same, pseudo=np.array([[0, 1, -1]]), local_threshold=np.array([0.3]))
    names, signs = ["a<b", "c", "d"], ["given", "wrong", "negative"]
    table = labels_html(names, signs, scores, 0.5, [1, 0, 0], ("other & one", ["given", "", ""]))
    assert table.count("<tr") == 1 + 3
    assert "a&lt;b" in table and "other &amp; one" in table and "a<b" not in table
    assert "− d" in table and table.index("c</td>") < table.index("a&lt;b</td>")


def test_epochs_and_opinions_are_said_in_words():
    assert "positive in" in history_html(["a"], np.array([[1], [0]]), [0])
    assert "not there" in opinions_html(["a"], {"m": ([0.5], [0.4])}, [0], [0])


@pytest.mark.parametrize(
    "picture",
    [
        matrix_html(np.array([[2, 1], [0, 3]]), ["a", "b&c"], "{a} with {b}"),
        curve_html({"loss": [3, 2, None]}),
        f"<p>{heat_html(np.full((5, 3), 0.2), ['a', 'b<', 'c&d'], given=[1], selected=2)}</p>",
    ],
)
def test_pictures_are_whole(picture):
    ElementTree.fromstring(picture)


def test_a_heat_map_has_a_cell_a_view_and_says_what_it_left_out():
    probs = np.array([[0.5, 0.1, 0.0, 0.2], [0.4, 0.3, 0.01, 0.1]])
    picture = heat_html(probs, list("abcd"), most=3)
    assert picture.count("<rect") == 2 * 3 and "1 class below 0.011 left out" in picture
    assert "patch 1, b: 0.300" in picture and "whole picture, d: 0.200" in picture
