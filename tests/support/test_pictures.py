"""Pictures: grids, and what is drawn of a log, also under a notebook's settings."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from runs import ROOT, file_names
from support import pictures
from support.pictures import read_log, save_grid


@pytest.mark.parametrize(
    "n, classes, rows, columns",
    [
        (64, None, 8, 8),
        (64, 3, 3, 22),
        (64, 10, 10, 7),
        (10, 10, 10, 1),
        (64, 1000, 8, 8),
        (1000, 1000, 32, 32),
    ],
)
def test_a_grid_has_a_row_a_class_where_that_is_no_ribbon(n, classes, rows, columns, tmp_path):
    save_grid(np.zeros((n, 2, 2, 3), np.uint8), tmp_path / "grid.png", classes)
    assert Image.open(tmp_path / "grid.png").size == (columns * 4 + 2, rows * 4 + 2)


def test_image_i_lies_in_the_row_of_its_class(tmp_path):
    """i mod classes; columns fill in the order of i, and what is missing is black."""
    pixels = (
        np.full((5, 2, 2, 3), 0, np.uint8) + np.arange(10, 15, dtype=np.uint8)[:, None, None, None]
    )
    save_grid(pixels, tmp_path / "grid.png", classes=3)
    middles = np.asarray(Image.open(tmp_path / "grid.png"))[2::4, 2::4, 0]
    assert middles.tolist() == [[10, 13], [11, 14], [12, 0]]


def test_a_log_is_read_up_to_a_line_that_was_not_finished(tmp_path):
    assert read_log(tmp_path) == []
    (tmp_path / "log.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"st')
    assert read_log(tmp_path) == [{"step": 10}, {"step": 20}]


@pytest.mark.parametrize("order", [1, -1])
def test_a_log_of_which_some_evaluations_lack_n_is_drawn(order, monkeypatch, tmp_path):
    """Those of a release that did not write it, before or after others; n itself is no score."""
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path, dpi: drawn.append(figure))
    rows = [{"step": 1, "fid": 5.0}, {"step": 2, "n": 8, "fid": 4.0}][::order]
    pictures.draw_curves(rows, tmp_path / "curves.png")
    [line] = drawn[0].axes[1].lines
    assert line.get_label() == "fid" and line.get_ydata().tolist() == [5, 4][::order]
    pictures.pyplot().close(drawn[0])


DRAWING = """
from pathlib import Path
import numpy
from support.pictures import draw_curves, save_trace
draw_curves([], Path("curves.png"))
save_trace([("t = 1", {"x_t": numpy.zeros((8, 8, 3), "uint8")})], Path("trace.png"))
"""


@pytest.mark.slow
def test_a_notebooks_backend_that_is_missing_here_does_not_matter(tmp_path):
    """With it, the import of matplotlib fails, before any backend can be chosen."""
    other = {"MPLBACKEND": "no_such_notebook", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRAWING]
    subprocess.run(command, cwd=tmp_path, env=os.environ | other, check=True)
    assert file_names(tmp_path) == ["curves.png", "trace.png"]
