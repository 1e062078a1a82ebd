"""experiments/colours.py: colours, contrast and saturation of images made by hand."""

import numpy as np
import pytest

from experiments.colours import colour_distance, look, main
from runs import exit_code


def flat(*colours):
    """An image of each colour, uint8 [n, 4, 4, 3]."""
    return np.tile(np.uint8(colours)[:, None, None], (1, 4, 4, 1))


def test_one_colour_has_no_contrast_and_a_grey_no_saturation():
    grey = look(flat([10, 10, 10], [200, 200, 200]))
    assert grey.contrast == pytest.approx(0) and grey.saturation == 0
    red = look(flat([255, 0, 0], [0, 0, 255]))
    assert red.contrast == pytest.approx(0) and red.saturation == 1


def test_black_and_white_halves_have_the_greatest_contrast():
    halves = flat([0, 0, 0], [0, 0, 0])
    halves[:, :2] = 255
    assert look(halves).contrast == pytest.approx(0.5)


def test_the_distance_of_shifted_colours_is_the_square_of_the_shift():
    colours = np.random.default_rng(0).integers(0, 200, (50, 3))
    a, b = look(flat(*colours)), look(flat(*(colours + 51)))
    assert colour_distance(a, a) == 0
    assert colour_distance(a, b) == pytest.approx(1000 * 3 * 0.2**2)


def test_the_distance_of_doubled_colours_is_their_mean_squared_and_their_variance():
    """The covariance is four times as large: tr(C + 4 C - 2 sqrt(4 C^2)) = tr(C)."""
    colours = np.random.default_rng(0).integers(0, 100, (50, 3))
    a, b = look(flat(*colours)), look(flat(*(2 * colours)))
    mean, variance = colours.mean(0) / 255, colours.var(0, ddof=1) / 255**2
    assert colour_distance(a, b) == pytest.approx(1000 * (mean @ mean + variance.sum()))


def test_the_table_has_a_line_for_each_and_the_reference_last(tmp_path, capsys):
    colours = np.random.default_rng(0).integers(0, 256, (9, 3))
    np.savez(tmp_path / "a.npz", arr_0=flat(*colours))
    np.savez(tmp_path / "b.npz", arr_0=flat(*colours[::-1]))
    np.savez(tmp_path / "one.npz", arr_0=flat([1, 2, 3]))
    a, b, one = (tmp_path / name for name in ("a.npz", "b.npz", "one.npz"))
    assert exit_code(main, a, "--reference", b) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| images | colour | contrast | saturation |" and len(lines) == 4
    assert lines[2].startswith(f"| {a} | 0.00 | 0.000 |")  # the order of images is no matter
    assert lines[3].startswith(f"| {b} | 0.00 | 0.000 |")

    assert exit_code(main, one, "--reference", b) == 1
    assert "got 1 images" in capsys.readouterr().err
