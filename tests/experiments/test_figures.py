"""figures.py: the schedules, and from tiny runs every picture of what table1.py left."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import SCHEDULES, Prediction, q_sample
from experiments import figures, table1
from experiments.rows import ROWS, STEPS, at_lengths
from losses import Batch, mu_loss
from made import random_pixels
from runs import error_of, exit_code, run
from support.files import save_npz


def draw(what, work, out):
    argv = ["--work", work, "--results", work / "lines.jsonl", "--out", out]
    return exit_code(figures.main, what, *argv)


def test_the_schedules_are_drawn_alone(tmp_path):
    assert draw("schedules", tmp_path, tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["schedules.png"]
    assert min(Image.open(tmp_path / "schedules.png").size) > 300


def test_a_folder_that_is_not_there_is_one_line(tmp_path, capsys):
    assert draw("schedules", tmp_path, tmp_path / "nowhere") == 1
    says = f"error: {tmp_path / 'nowhere'} does not exist; expected a folder"
    assert error_of(capsys).startswith(says)


def test_without_runs_it_is_one_line_that_says_what_makes_them(tmp_path, capsys):
    assert draw("results", tmp_path, tmp_path) == 1
    says = "100.npz does not exist; expected a run's samples, which experiments/table1.py draws"
    assert says in error_of(capsys)
    assert not list(tmp_path.iterdir())


def test_the_best_r_is_the_one_that_the_image_was_mixed_with():
    """x0 = 0.3 x0' + 0.7 x0*, and anything at right angles to x0' - x0* changes nothing."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 4, 3, 4, 4, generator=generator, dtype=torch.float64)
    x0_star, x0_hat, other = drawn
    towards = x0_hat - x0_star
    across = other - (other * towards).sum() / towards.square().sum() * towards
    x0 = 0.3 * x0_hat + 0.7 * x0_star + across
    assert figures.best_r(x0, x0_star, x0_hat) == pytest.approx(0.3, abs=1e-12)


def test_the_pull_is_what_a_small_change_of_the_logit_takes_off_l_mu():
    """Upwards, towards r_t = 1, where x0' is exact; downwards where x0* is."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, other = torch.randn(3, 4, 3, 4, 4, generator=generator, dtype=torch.float64)
    t, schedule = torch.tensor([1, 5, 20, 50]), SCHEDULES["cosine"](50)
    batch = Batch(x0, t, eps, q_sample(x0, t, eps, schedule))
    logit = torch.full((4, 1, 4, 4), 0.3, dtype=torch.float64)

    def pred(x0_hat, eps_hat, more=0.0):
        return Prediction(eps_hat, x0_hat, (logit + more).sigmoid())

    assert figures.pull(pred(x0, other), batch, schedule) > 0
    assert figures.pull(pred(other, eps), batch, schedule) < 0
    after, before = (
        mu_loss(pred(other, other, more), batch, schedule).mean().item() for more in (1e-5, -1e-5)
    )
    found = figures.pull(pred(other, other), batch, schedule)
    assert found == pytest.approx((before - after) / 2e-5, rel=1e-6)


@pytest.fixture
def drawn(monkeypatch):
    """{file name: figure} of all that is drawn."""
    found, save = {}, figures.save

    def keep(figure, path, *dpi):
        found[path.name] = figure
        save(figure, path, *dpi)

    monkeypatch.setattr(figures, "save", keep)
    return found


def test_the_curves_are_means_over_seeds_against_steps_and_iterations(tmp_path, drawn):
    experiment = table1.Experiment("cpu", tmp_path, tmp_path / "lines.jsonl")
    with open(tmp_path / "lines.jsonl", "w") as f:
        for seed in (0, 1):
            for row, how in ROWS.items():
                steps = how.steps or experiment.steps
                scores = {str(n): {"fid_768": 1 + seed + 10 / n} for n in steps}
                f.write(json.dumps({"row": row, "seed": seed} | scores) + "\n")
    figures.draw_curves(experiment, tmp_path / "curves.png")
    by_steps, by_iterations = drawn["curves.png"].axes
    points = by_steps.containers[0].lines[0].get_xydata()
    np.testing.assert_allclose(points, [[x, 1.5 + 10 / x] for x in (5, 10, 20, 50, 100)])
    points = by_iterations.containers[0].lines[0].get_xydata()
    iterations = (1250, 2500, 5000, 10_000, 20_000)
    np.testing.assert_allclose(points, [[x, 2.5] for x in iterations])
    labels = [label.get_text() for label in by_iterations.get_xticklabels()]
    assert labels == ["1,250", "2,500", "5,000", "10,000", "20,000"]


def test_lengths_are_every_distance_of_every_row_that_has_one(tmp_path, drawn):
    distances = {"fid_768": 1.0, "fd_judge": 2.0}
    names = {"Dual": 1.0, "Dual, 2 x the iterations": 0.5, "Cas-DM": 3.0}
    with open(tmp_path / "lines.jsonl", "w") as f:
        for row, times in names.items():
            scores = {score: times * value for score, value in distances.items()} | {"kid": 9.0}
            f.write(json.dumps({"row": row, "seed": 0, "10": scores}) + "\n")
    assert draw("lengths", tmp_path, tmp_path) == 0
    panels = drawn["lengths.png"].axes
    assert [panel.get_ylabel() for panel in panels] == [
        "FID-768, 10 steps",
        "FD of classes, 10 steps",
    ]
    points = {of.get_label(): of.lines[0].get_xydata().tolist() for of in panels[1].containers}
    assert points == {"Dual": [[2500, 2.0], [5000, 1.0]], "Cas-DM": [[2500, 6.0]]}


def test_what_to_expect_are_the_runs_first_grids_and_mean_losses(
    tmp_path, drawn, monkeypatch, capsys
):
    """The top quarter of each grid; the log's rows of the 50 steps before, and no earlier ones."""
    monkeypatch.setattr(figures, "MILESTONES", (100, 200))
    folder = tmp_path / "my-run"
    folder.mkdir()
    for step in (100, 200):
        pixels = np.full((64, 64, 3), 255, np.uint8)
        pixels[:16] = step
        Image.fromarray(pixels).save(folder / f"samples_{step:06d}.png")
    losses = {50: 9.0, 90: 1.0, 100: 2.0, 150: 9.0, 180: 3.0, 200: 4.0}
    rows = [{"step": step, "eps": eps, "loss": 0.0} for step, eps in losses.items()]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert exit_code(figures.main, "expect", folder, "--out", tmp_path) == 0
    for axis, step in zip(drawn["expect.png"].axes, (100, 200), strict=True):
        shown = axis.images[0].get_array()
        assert shown.shape == (16, 64, 3)
        assert (shown == step).all()
    said = capsys.readouterr().out
    assert "| 100 | 1.5 |\n| 200 | 3.5 |\n" in said


@pytest.mark.parametrize("argv", [["expect"], ["schedules", "runs/a"]])
def test_runs_belong_to_what_to_expect_alone(argv, capsys):
    assert exit_code(figures.main, *argv) == 2
    assert "expected some with expect, and none otherwise" in error_of(capsys)


def tiny_run(experiment, row):
    """What table1.py leaves of a row: a checkpoint and its samples."""
    tiny = "--channels 32 --res-blocks 1 --T 100 --iterations 1 --batch-size 2 --sample-every 0"
    model = ROWS[row].flags.split(" --metric")[0]
    argv = ["--data", experiment.folder / "images.npz", *tiny.split(), *model.split()]
    place = experiment.place(row, 0)
    assert run(*argv, "--out", place) == 0
    for steps in STEPS:
        save_npz(np.full((20, 16, 16, 3), 128, np.uint8), place / f"{steps}.npz")


@pytest.mark.slow
def test_every_picture_is_drawn_from_the_runs_and_their_lines(tmp_path, drawn, monkeypatch):
    experiment = table1.Experiment("cpu", tmp_path)
    images = random_pixels(2, 16, 16)
    save_npz(images, tmp_path / "images.npz")
    save_npz(images, tmp_path / "reference.npz")
    longest = [at_lengths(row)[-1] for row in figures.TABLE1]
    for row in {*figures.TABLE1, *figures.GATED, *longest}:
        tiny_run(experiment, row)
    line = {"row": "Cas-DM", "seed": 0, "100": {"fid_768": 1.0}, "10": {"fid_768": 2.0}}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
    assert draw("results", tmp_path, tmp_path) == 0
    assert draw("longest", tmp_path, tmp_path) == 0
    names = (
        "rows.png",
        "gate.png",
        "refined.png",
        "curves.png",
        "longest.png",
        "gates.png",
        "pulls.png",
    )
    for name in names:
        assert min(Image.open(tmp_path / name).size) > 100

    labels = [line.get_label() for line in drawn["gates.png"].axes[0].lines[::2]]
    assert labels == ["Cas-DM + metric", at_lengths("Cas-DM + metric")[-1]]

    lines = drawn["gate.png"].axes[0].lines
    learned = [line for line in lines if line.get_linestyle() == "-"]
    best = [line for line in lines if line.get_linestyle() == "--"]
    assert [line.get_label() for line in learned] == figures.GATED
    assert len(best) == len(learned)
    for line in learned:  # the sigmoid of nearly 0
        assert 0.4 < line.get_ydata().min() <= line.get_ydata().max() < 0.6

    (experiment.place(figures.GATED[-1], 0) / "checkpoint.pt").unlink()  # only Table 1 was run
    figures.draw_gate(experiment, figures.GATED, tmp_path / "gate.png")
    assert len(drawn["gate.png"].axes[0].lines) == len(lines) - 2
