"""Figures: colours read on light and dark pages, and the names of curves do not overlap."""

from __future__ import annotations

import pytest
from PIL import Image

from bench import drawing

PAGES = ("#ffffff", "#131416")  # a light page, and the dark one of the theme of the documentation


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    shares = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("colour", [drawing.GREY, *drawing.COLOURS])
def test_a_colour_contrasts_with_a_page(colour, page):
    low, high = sorted((luminance(colour), luminance(page)))
    assert (high + 0.05) / (low + 0.05) >= 3


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], []),
        ([0.5, 0.1], [0.5, 0.1]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.8, 0.52, 0.5], [0.8, 0.56, 0.46]),
        ([0.1, 0.1, 0.15, 0.9], [0.1 - 0.25 / 3, 0.1 + 0.05 / 3, 0.1 + 0.35 / 3, 0.9]),
    ],
)
def test_names_are_moved_apart(places, expected):
    assert drawing.apart(places, 0.1) == pytest.approx(expected)


def test_a_figure_is_transparent_and_names_its_curves(tmp_path):
    file = tmp_path / "folder" / "figure.png"
    with drawing.canvas(file) as (axes,):
        axes.plot([1, 2], [1.0, 1.0])
        axes.plot([1, 2], [1.0, 1.01])
        axes.set(ylim=(0, 2))
        drawing.name_ends(axes, [("one", 2, 1.0, drawing.COLOURS[0]), ("other", 2, 1.01, drawing.COLOURS[1])])
        axes.figure.canvas.draw()
        one, other = (text.get_window_extent() for text in axes.texts)
        assert [text.get_text() for text in axes.texts] == ["one", "other"]
        assert one.y1 <= other.y0
    image = Image.open(file)
    assert image.size == (1080, 660)
    assert image.convert("RGBA").getpixel((0, 0))[3] == 0
