"""The pictures of the documents.

python -m experiments.figures schedules        the schedules alone
python -m experiments.figures results          all that table1.py left, of the `cpu` preset
python -m experiments.figures lengths          the scores of its longer and shorter runs
python -m experiments.figures longest          those runs themselves
python -m experiments.figures expect RUN ...   folders of train.py --sample-every 100

schedules.png   abar_t, its signal-to-noise ratio, an image on its way to noise, the spacings
rows.png        Table 1's rows, one a line, every column from the same noise
gate.png        r_t over t: how much of a step comes from x0', and how much should
refined.png     figure 2's trace of Cas-DM + metric
curves.png      FID-768 against sampling steps, and against training iterations
lengths.png     every Frechet distance against training iterations
longest.png     samples of the longest runs of Table 1's rows
gates.png       r_t over t of Cas-DM + metric, after ever more iterations
pulls.png       the pull of L_mu on that r_t, over t
expect.png      samples of each RUN after 100, 300, 600 and 1,200 steps; prints its log's means
"""

import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import sample
from data import from_pixels, shapes, to_pixels
from diffusion import SCHEDULES, clean_estimates, evenly, q_sample
from experiments import table1
from experiments.rows import CURVES, STEPS, TABLE1, at_lengths
from experiments.tables import (
    PRINTED,
    by_iterations,
    by_steps,
    markdown,
    markdown_header,
    scores_of,
    standard_error,
)
from losses import Batch, mu_loss
from neighbours.solvers import SPACINGS
from support import cli
from support.draws import stream
from support.files import existing
from support.models import load_model
from support.pictures import pyplot, read_log, save_figure
from support.run import grid_path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MILESTONES = (100, 300, 600, 1200)  # training steps
DISTANCES = ("fid", "fid_768", "fd_judge", "fd_judge_rotations")  # Frechet's, of tables.PRINTED
# Whose r_t is drawn.
GATED = [
    *(row for row in TABLE1 if row.startswith(("Dual", "Cas-DM"))),
    "L_mu / coef1^2, clamped",
]


def draw_schedules(path, T=1000):
    """abar_t, abar_t / (1 - abar_t), one image noised alike by each, and which t steps visit.

    IDDPM Figs. 3, 5.  Twenty steps of each spacing.
    """
    steps = [f"{name} steps" for name in SCHEDULES]
    layout = [["abar", "snr"], *([name, name] for name in SCHEDULES), steps]
    heights = [3, *([1] * len(SCHEDULES)), 2]
    figure, axes = pyplot().subplot_mosaic(layout, figsize=(9, 7.5), height_ratios=heights)
    shown = torch.linspace(1, T, 12).long()
    x0 = from_pixels(shapes(32)[0][:1]).expand(len(shown), -1, -1, -1)
    noise = stream(0, "schedules", 0).standard_normal((1, *x0.shape[1:]), dtype="float32")
    eps = torch.from_numpy(noise)
    for name, make in SCHEDULES.items():
        schedule = make(T)
        t, abar = schedule.step[1:].numpy(), schedule.alpha_bar[1:].numpy()
        axes["abar"].plot(t, abar, label=name)
        axes["snr"].semilogy(t, abar / (1 - abar), label=name)
        noised = to_pixels(q_sample(x0, shown, eps, schedule))
        axes[name].imshow(torch.cat([*noised], 1).numpy())
        axes[name].set(ylabel=name, yticks=[])
        middles = [32 * i + 16 for i in range(len(shown))]
        axes[name].set_xticks(middles, [f"t = {t}" for t in shown])
        draw_spacings(axes[f"{name} steps"], name, schedule)
    axes["abar"].set(title="abar_t", xlabel="t")
    axes["snr"].set(title="abar_t / (1 - abar_t)", xlabel="t")
    axes["abar"].legend()
    figure.tight_layout()
    save(figure, path, 80)


def draw_spacings(axis, name, schedule, n=20):
    """A row of dots a spacing: the t that n steps of it visit."""
    T = len(schedule.beta) - 1
    visited = {"even": evenly(T, n)}
    for spacing, steps in SPACINGS.items():
        visited[spacing] = steps(schedule, n)
    for row, kept in enumerate(visited.values()):
        axis.plot(kept, [row] * n, ".")
    axis.set_yticks(range(len(visited)), visited)
    axis.invert_yaxis()
    axis.set(title=f"{n} steps, {name}", xlabel="t")


def draw_rows(experiment, rows, steps, path, columns=14):
    """The same images of every row, seed 0, with so many sampling steps.

    Image i starts from the same noise in each.
    """
    figure, axes = pyplot().subplots(len(rows), 1, figsize=(0.75 * columns, 0.78 * len(rows)))
    for axis, row in zip(axes, rows, strict=True):
        drawn = experiment.place(row, 0) / f"{steps}.npz"
        drawn = existing(drawn, "run's samples, which experiments/table1.py draws")
        images = np.load(drawn)["arr_0"][:columns]
        axis.imshow(np.concatenate(list(images), 1))
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(row, rotation=0, ha="right", va="center")
    save(figure, path)


def draw_gate(experiment, rows, path):
    """r_t over t: its mean over images and positions; dashed, the best r for all of them."""
    figure, axis = pyplot().subplots(figsize=(6, 3.5))
    for row, gate in gates(experiment, rows):
        (line,) = axis.plot(gate.t, gate.learned, label=row)
        axis.plot(gate.t, gate.best, "--", color=line.get_color())
    title = "weight of x0': learned, and (dashed) the best for these images"
    axis.set(xlabel="t", ylabel="r_t", title=title)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def draw_pulls(experiment, rows, path):
    """How hard L_mu pulls r_t at each t.

    The marker points up where L_mu raises r_t, and down where it lowers it.
    """
    figure, axis = pyplot().subplots(figsize=(6, 3.5))
    for row, gate in gates(experiment, rows):
        (line,) = axis.semilogy(gate.t, np.abs(gate.pulls), linewidth=0.5, label=row)
        for step, pulled in zip(gate.t, gate.pulls, strict=True):
            marker = "^" if pulled > 0 else "v"
            axis.plot(step, abs(pulled), marker, color=line.get_color(), markersize=4)
    axis.set(xlabel="t", title="|d L_mu / d logit of r_t|: up where it raises r_t")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


class Gate(NamedTuple):
    """r_t of one run at 25 steps: what it learned, what would be best, how hard L_mu pulls."""

    t: list
    learned: list  # the means of r_t
    best: list  # of `best_r`
    pulls: list  # of `pull`


def gates(experiment, rows, n=64):
    """(row, Gate) of seed 0, of n training images noised alike, where the run is there."""
    x0 = np.load(experiment.folder / "reference.npz")["arr_0"][:n]
    x0 = from_pixels(torch.from_numpy(x0))
    eps = torch.from_numpy(stream(0, "gate", 0).standard_normal(x0.shape, dtype="float32"))
    for row in rows:
        checkpoint = experiment.place(row, 0) / "checkpoint.pt"
        if checkpoint.exists():
            yield row, gate_of(checkpoint, x0, eps)


def gate_of(checkpoint, x0, eps):
    """The Gate of a run's checkpoint; its steps are spread evenly over 1..T."""
    model, schedule, _ = load_model(checkpoint)
    model.requires_grad_(False)
    steps = np.linspace(1, len(schedule.beta) - 1, 25).round().astype(int).tolist()
    learned, best, pulls = [], [], []
    for step in steps:
        t = torch.full((len(x0),), step)
        x_t = q_sample(x0, t, eps, schedule)
        pred = model(x_t, t)
        estimates = clean_estimates(x_t, t, pred, schedule)
        learned.append(estimates.r_t.mean().item())
        best.append(best_r(x0, estimates.x0_star, estimates.x0_hat))
        pulls.append(pull(pred, Batch(x0, t, eps, x_t), schedule))
    return Gate(steps, learned, best, pulls)


def pull(pred, batch, schedule):
    """-d L_mu / d logit of r_t, a logit for all images and positions: above 0 it raises r_t."""
    shift = torch.zeros((), dtype=pred.r_t.dtype, requires_grad=True)
    r_t = (pred.r_t.logit() + shift).sigmoid()
    loss = mu_loss(pred._replace(r_t=r_t), batch, schedule).mean()
    return -torch.autograd.grad(loss, shift)[0].item()


def best_r(x0, x0_star, x0_hat):
    """The r at which r x0' + (1 - r) x0* is nearest to x0: a number, not always in 0..1.

    <x0 - x0*, x0' - x0*> / ||x0' - x0*||^2      of [B, C, H, W], -1..1
    """
    towards = x0_hat - x0_star
    return (((x0 - x0_star) * towards).sum() / towards.square().sum()).item()


def draw_curves(experiment, path):
    """FID (or FID-768) of `rows.CURVES` against sampling steps, and against iterations.

    The mean over seeds and its standard error.
    """
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.5))
    lines, unit = experiment.lines(), experiment.preset.iterations
    score = scores_of(lines)[0]
    for row in CURVES:
        draw_points(left, by_steps(lines, row, score), row)
    draw_lengths_of(right, lines, CURVES, score, unit)
    left.set(xscale="log", xlabel="sampling steps", ylabel=PRINTED[score].name)
    name_ticks(left)
    left.legend()
    save(figure, path)


def draw_lengths(experiment, path):
    """Each Frechet distance that the lines hold against iterations, of every row of Table 1."""
    lines, unit = experiment.lines(), experiment.preset.iterations
    scores = [score for score in DISTANCES if any_row_has(lines, score)]
    size = (4.5 * len(scores), 4)
    figure, axes = pyplot().subplots(1, len(scores), squeeze=False, figsize=size)
    for axis, score in zip(axes[0], scores, strict=True):
        draw_lengths_of(axis, lines, TABLE1, score, unit)
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save(figure, path)


def any_row_has(lines, score):
    """Whether a row of Table 1 has the score with the fewest sampling steps."""
    return any(by_iterations(lines, row, score, STEPS[-1]) for row in TABLE1)


def draw_lengths_of(axis, lines, rows, score, unit):
    """A score, with the fewest sampling steps, against iterations: `unit` times each length."""
    fewest = STEPS[-1]
    for row in rows:
        found = by_iterations(lines, row, score, fewest)
        if found:
            draw_points(axis, {unit * length: values for length, values in found.items()}, row)
    label = f"{PRINTED[score].name}, {fewest} steps"
    axis.set(xscale="log", xlabel="iterations", ylabel=label)
    name_ticks(axis)


def name_ticks(axis):
    """A tick at every point that was drawn, in plain numbers."""
    ticks = sorted({x for line in axis.lines for x in line.get_xdata()})
    axis.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
    axis.minorticks_off()


def draw_points(axis, points, label):
    """A line through {x: {seed: value}}, with the standard error of each mean."""
    x = sorted(points)
    values = [[*points[at].values()] for at in x]
    means = [np.mean(of_seeds) for of_seeds in values]
    errors = [standard_error(of_seeds) for of_seeds in values]
    axis.errorbar(x, means, errors, marker="o", capsize=3, label=label)


def draw_expected(runs, path):
    """A column a run: its first samples after each of MILESTONES; prints what its log says there.

    runs : the folders of runs of train.py with --sample-every 100
    """
    size = (4.5 * len(runs), 1.3 * len(MILESTONES))
    figure, axes = pyplot().subplots(len(MILESTONES), len(runs), squeeze=False, figsize=size)
    for column, run in zip(axes.T, runs, strict=True):
        for axis, step in zip(column, MILESTONES, strict=True):
            grid = existing(grid_path(run, step), "grid of train.py --sample-every 100")
            grid = np.asarray(Image.open(grid))
            axis.imshow(grid[: len(grid) // 4])  # two of its eight rows of images
            axis.set(xticks=[], yticks=[], ylabel=f"step {step:,}")
        column[0].set_title(run.name)
        print_log(run)
    save(figure, path)


def print_log(run, over=50):
    """The means of the log's losses and images a second, over so many steps before MILESTONES."""
    rows = [row for row in read_log(run) if "loss" in row]
    terms = [name for name in rows[0] if name not in ("step", "loss")]
    print(f"{run.name}\n")
    print(markdown_header("step", *terms))
    for step in MILESTONES:
        last = [row for row in rows if step - over < row["step"] <= step]
        means = [statistics.mean(row[term] for row in last) for term in terms]
        print(markdown(f"{step:,}", *(f"{mean:.3g}" for mean in means)))
    print()


def save(figure, path, dpi=110):
    """Writes the picture, and says where."""
    save_figure(figure, path, dpi)
    print(f"{path} written")


# ---- the script ----


def draw_results(experiment, folder):
    """The four pictures of table1.py's runs and lines."""
    draw_rows(experiment, TABLE1, STEPS[0], folder / "rows.png")
    draw_gate(experiment, GATED, folder / "gate.png")
    checkpoint = experiment.place("Cas-DM + metric", 0) / "checkpoint.pt"
    sample.main([str(checkpoint), "--trace", str(folder / "refined.png")])
    draw_curves(experiment, folder / "curves.png")


def main(argv=None):
    """The pictures that are named."""
    args = parse_args(argv)
    if not args.out.is_dir():
        raise FileNotFoundError(f"{args.out} does not exist; expected a folder; make it first")
    experiment = table1.Experiment(args.preset, args.work, args.results)
    if args.what == "schedules":
        draw_schedules(args.out / "schedules.png")
    elif args.what == "expect":
        draw_expected(args.runs, args.out / "expect.png")
    elif args.what == "lengths":
        draw_lengths(experiment, args.out / "lengths.png")
    elif args.what == "longest":
        rows = [at_lengths(name)[-1] for name in TABLE1]
        draw_rows(experiment, rows, STEPS[-1], args.out / "longest.png")
        draw_gate(experiment, at_lengths("Cas-DM + metric"), args.out / "gates.png")
        draw_pulls(experiment, at_lengths("Cas-DM + metric"), args.out / "pulls.png")
    else:
        draw_results(experiment, args.out)


def parse_args(argv):
    """The arguments; SystemExit 2, one line, for whatever they alone show to be wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("what", choices=("schedules", "results", "lengths", "longest", "expect"))
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="of expect")
    parser.add_argument("--preset", choices=table1.PRESETS, default="cpu", help="of the results")
    text = "where table1.py's runs lie (default: runs/table1-PRESET)"
    parser.add_argument("--work", type=Path, help=text)
    text = "its lines (default: experiments/table1_PRESET.jsonl)"
    parser.add_argument("--results", type=Path, help=text)
    parser.add_argument("--out", type=Path, default=ASSETS, metavar="FOLDER")
    args = parser.parse_args(argv)
    if bool(args.runs) != (args.what == "expect"):
        parser.error(
            f"{args.what}: got {len(args.runs)} runs; expected some with expect, and none otherwise"
        )
    return args


if __name__ == "__main__":
    sys.exit(cli.run(main))
