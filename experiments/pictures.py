r"""The pictures of the README's results, drawn from what table1.py left: its runs and its lines.

    python -m experiments.pictures --preset cpu      assets/rows.png     Table 1's rows, one a line, every column from the same noise
                                               assets/gate.png     r_t over t: how much of a step the learned mix takes from x0', and how much it should
                                               assets/refined.png  figure 2's trace of Cas-DM + metric
                                               assets/curves.png   FID-768 against sampling steps, and against training iterations
"""
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent

from support import edges
import sample
from experiments import table1
from data import from_pixels, stream
from diffusion import clean_estimates, q_sample

ROWS = [row for group, row in table1.ROWS if group == "table 1" and row != table1.REAL]
GATED = [*(row for row in ROWS if row.startswith(("Dual", "Cas-DM"))), "L_mu / coef1^2, clamped"]      # whose r_t is drawn


def draw_rows(experiment, path, columns=14):
    """The same images of every row of Table 1, seed 0, most sampling steps: image i starts from the same noise in each."""
    drawn = [edges.existing(experiment.place(row, 0) / f"{table1.STEPS[0]}.npz", "run's samples, which experiments/table1.py draws") for row in ROWS]
    images = [np.load(samples)["arr_0"][:columns] for samples in drawn]
    plt = pyplot()
    figure, axes = plt.subplots(len(ROWS), 1, figsize=(0.75 * columns, 0.78 * len(ROWS)))
    for axis, row, shown in zip(axes, ROWS, images):
        axis.imshow(np.concatenate(list(shown), 1))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(row, rotation=0, ha="right", va="center")
    save(figure, path)


@torch.inference_mode()
def draw_gate(experiment, path, n=64):
    """r_t over t, of seed 0, for n training images noised alike: its mean over images and positions; dashed, the best r for all of them.

    Rows of GATED whose run is not there are left out.
    """
    x0 = from_pixels(torch.from_numpy(np.load(experiment.folder / "reference.npz")["arr_0"][:n]))
    eps = torch.from_numpy(stream(0, "gate", 0).standard_normal(x0.shape, dtype="float32"))
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.5))
    checkpoints = {row: checkpoint for row in GATED if (checkpoint := experiment.place(row, 0) / "checkpoint.pt").exists()}
    for row, checkpoint in checkpoints.items():
        model, schedule, _ = sample.load_model(checkpoint)
        steps, found = np.linspace(1, len(schedule.beta) - 1, 25).round().astype(int), []
        for step in steps.tolist():
            t = torch.full((len(x0),), step)
            x_t = q_sample(x0, t, eps, schedule)
            pred = model(x_t, t)
            found.append((pred.r_t.mean().item(), best_r(x0, *clean_estimates(x_t, t, pred, schedule))))
        learned, best = zip(*found)
        line, = axis.plot(steps, learned, label=row)
        axis.plot(steps, best, "--", color=line.get_color())
    axis.set(xlabel="t", ylabel="r_t", title="weight of x0': learned, and (dashed) the best for these images")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def best_r(x0, x0_star, x0_hat):
    """<x0 - x0*, x0' - x0*> / ||x0' - x0*||^2, the one r at which r x0' + (1 - r) x0* is nearest to x0.

    x0, x0_star, x0_hat : [B, C, H, W], -1..1        returns : a number, which may lie outside 0..1
    """
    towards = x0_hat - x0_star
    return (((x0 - x0_star) * towards).sum() / towards.square().sum()).item()


def draw_curves(experiment, path):
    """FID (or FID-768) of `table1.CURVES`, the mean over seeds and its standard error, against sampling steps and against iterations."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
    fewest, lines = table1.STEPS[-1], experiment.lines()
    score = table1.scores_of(lines)[0]
    for row in table1.CURVES:
        found = table1.curve(lines, row)
        at_steps = {steps: values for (share, steps), values in found.items() if share == 1}
        at_iterations = {experiment.preset.iterations * share: values for (share, steps), values in found.items() if steps == fewest}
        for axis, points in zip(axes, (at_steps, at_iterations)):
            x, values = zip(*sorted(points.items()))
            error = [np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0 for v in values]
            axis.errorbar(x, [np.mean(v) for v in values], error, marker="o", capsize=3, label=row)
    axes[0].set(xscale="log", xlabel="sampling steps", ylabel=score)
    axes[1].set(xscale="log", xlabel="iterations", ylabel=f"{score}, {fewest} steps")
    for axis in axes:
        at = sorted({x for line in axis.lines for x in line.get_xdata()})
        axis.set_xticks(at, [f"{x:,.0f}" for x in at])
        axis.minorticks_off()
    axes[0].legend()
    save(figure, path)


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def save(figure, path):
    """Writes the figure as a PNG, whole or not at all."""
    with edges.atomic(path) as f:
        figure.savefig(f, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)
    print(f"{path} written")


def main(argv=None):
    """All four pictures."""
    p = edges.Parser(__doc__)
    p.add_argument("--preset", choices=table1.PRESETS, default="cpu")
    p.add_argument("--work", type=Path, help="where table1.py's runs lie (default: runs/table1-PRESET)")
    p.add_argument("--results", type=Path, help="its lines (default: experiments/table1_PRESET.jsonl)")
    p.add_argument("--out", type=Path, default=ROOT / "assets")
    a = p.parse_args(argv)
    experiment = table1.Experiment(a.preset, a.work, a.results)
    draw_rows(experiment, a.out / "rows.png")
    draw_gate(experiment, a.out / "gate.png")
    sample.main([str(experiment.place("Cas-DM + metric", 0) / "checkpoint.pt"), "--trace", str(a.out / "refined.png")])
    draw_curves(experiment, a.out / "curves.png")


if __name__ == "__main__":
    sys.exit(edges.run(main))
