r"""A run's log.jsonl and its picture, curves.png.

    a training row      {"step": 10, "eps": ..., "x0": ..., "mu": ..., "lpips": ..., "loss": ..., "images_per_second": ...}
                        each term times its lambda, the mean over the steps since the row before
    an evaluation       {"step": 20000, "fid": ..., "sfid": ..., "is": ..., "is_std": ...}
"""
import json

import matplotlib

from support import edges

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402   the backend comes first


def read_log(folder):
    """The rows of log.jsonl; a last line that a killed process left unfinished is no row."""
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_curves(rows, path):
    """The losses over the steps, and the scores where the run evaluates, as one picture."""
    losses, scores = ([row for row in rows if ("loss" in row) == wanted] for wanted in (True, False))
    figure, axes = plt.subplots(1, 2 if scores else 1, figsize=(16 if scores else 8, 4.5), squeeze=False)
    for axis, kind, label in zip(axes[0], (losses, scores), ("loss, each term times its lambda", "score")):
        for name in kind[0] if kind else ():
            if name not in ("step", "images_per_second"):
                axis.semilogy([row["step"] for row in kind], [row[name] for row in kind], label=name, marker="" if kind is losses else "o")
        axis.set(xlabel="step", ylabel=label)
        if kind:
            axis.legend()
    with edges.atomic(path) as f:
        figure.savefig(f, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
