"""Pictures, and the log that a run's curves are drawn from.

A row of log.jsonl is one of two:

    training     {"step": 10, "eps": ..., "x0": ..., "mu": ..., "lpips": ..., "loss": ...,
                  "images_per_second": ...}
                 each term times its lambda, the mean over the steps since the row before
    evaluation   {"step": 20000, "n": ..., "sampler": ..., "sample_steps": ..., "fid": ...,
                  "sfid": ..., "is": ..., "is_std": ...}
"""

import json
import math
import os
import shutil

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid

from support.files import atomic, partial_of


def save_grid(pixels, path, classes=None):
    """uint8 [N, H, W, 3] as one PNG, row by row, near square.

    classes : image i has label i mod `classes`; then a row a class, unless that would be more than
              ten times as high as wide
    """
    pixels = torch.as_tensor(pixels).permute(0, 3, 1, 2)
    columns = math.ceil(math.sqrt(len(pixels)))
    if classes and classes <= 10 * math.ceil(len(pixels) / classes):
        columns = math.ceil(len(pixels) / classes)
        missing = columns * classes - len(pixels)  # of the last images: black
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing))
        pixels = pixels.unflatten(0, (columns, classes)).transpose(0, 1).flatten(0, 1)
    grid = make_grid(pixels, nrow=columns).permute(1, 2, 0)
    with atomic(path) as f:
        Image.fromarray(grid.numpy()).save(f, "PNG")


def save_folder(pixels, path):
    """000000.png, 000001.png, ...; the folder appears when all of them are written."""
    partial = partial_of(path)
    partial.mkdir(parents=True)
    try:
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(partial / f"{i:06d}.png")
        if path.is_dir():  # empty: check_writable saw to it
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_trace(columns, path):
    """Figure 2's cascade of one image: a column a step, rows x_t, x0*, x0' and r_t.

    columns : (title, {row: [H, W, 3] uint8, or [H, W] in 0..1, 0 black and 1 white})
    """
    rows = list(columns[0][1])
    size = (1.2 * len(columns), 1.25 * len(rows))
    figure, axes = pyplot().subplots(len(rows), len(columns), figsize=size, squeeze=False)
    for column, (title, images) in enumerate(columns):
        axes[0][column].set_title(title, fontsize=8)
        for axis, (row, image) in zip(axes[:, column], images.items(), strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(row, rotation=0, ha="right", va="center")
    save_figure(figure, path, 150)


def read_log(folder):
    """The rows of log.jsonl; a last line that a killed process left unfinished is no row."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_curves(rows, path):
    """The losses over the steps, and the scores where the run evaluates, as one picture."""
    losses = [row for row in rows if "loss" in row]
    scores = [row for row in rows if "loss" not in row]
    panels = [(losses, "loss, each term times its lambda", "")]
    if scores:
        panels.append((scores, "score", "o"))
    size = (8 * len(panels), 4.5)
    figure, axes = pyplot().subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, (drawn, label, marker) in zip(axes[0], panels, strict=True):
        axis.set(xlabel="step", ylabel=label)
        if not drawn:
            continue
        for name in drawn[0]:
            if name not in ("step", "n", "sampler", "sample_steps", "images_per_second"):
                points = [(row["step"], row[name]) for row in drawn if name in row]
                axis.semilogy(*zip(*points, strict=True), label=name, marker=marker)
        axis.legend()
    save_figure(figure, path, 120)


def pyplot():
    """matplotlib.pyplot, for files alone: a notebook's own backend may be missing."""
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure, path, dpi):
    """Writes a figure as a PNG, whole or not at all, and forgets it."""
    with atomic(path) as f:
        figure.savefig(f, format="png", dpi=dpi, bbox_inches="tight")
    pyplot().close(figure)
