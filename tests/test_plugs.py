"""Where things plug in: any neighbour can be deleted, and one of five kinds added in one row."""

import ast
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import fid
import metrics
import neighbours
import refiner
import sample
from diffusion import Prediction, at_step, mix, q_sample
from losses import squared_norm
from refiner import DDPM
from runs import ROOT, exit_code, run
from support.images import Frames
from support.models import load_model

ROOMS = (".", "support", "neighbours")  # what the scripts need
NEIGHBOURS = sorted(
    path.stem
    for path in (ROOT / "neighbours").glob("*.py")
    if path.stem not in ("__init__", "plug")
)
TINY = "--channels 32 --res-blocks 1 --T 10 --iterations 2 --batch-size 2 --sample-every 0"


# ---- a neighbour can be deleted ----


def project_without(neighbour, folder):
    """A copy of the project: the neighbour's file and its two rows in the table are gone."""
    for room in ROOMS:
        (folder / room).mkdir(exist_ok=True)
        for path in (ROOT / room).glob("*.py"):
            shutil.copy(path, folder / room)
    (folder / "neighbours" / f"{neighbour}.py").unlink()
    table = folder / "neighbours/__init__.py"
    text = table.read_text()
    name = re.search(rf"^from neighbours\.{neighbour} import (\w+)$", text, re.M)[1]
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if not re.search(rf"\b{name}\b", line)]
    assert len(kept) == len(lines) - 2
    table.write_text("".join(kept))


TRAIN_AND_SAMPLE = """
import sample, train
from support import cli
tiny = "{tiny} --iterations 1 --device cpu --out run"
assert cli.run(train.main, tiny.split()) == 0
two = "run/checkpoint.pt --n 2 --steps 2 --device cpu"
assert cli.run(sample.main, two.split()) == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_without_a_neighbour_the_paper_still_trains_and_samples(neighbour, tmp_path):
    project_without(neighbour, tmp_path)
    command = [sys.executable, "-c", TRAIN_AND_SAMPLE.format(tiny=TINY)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.png").exists()


def imported(path):
    """The neighbours that a file imports by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in NEIGHBOURS if f"neighbours.{name}" in found}


def test_only_their_table_knows_the_neighbours_by_name():
    """Not the paper, not its support, and not one another."""
    assert imported(ROOT / "neighbours/__init__.py") == set(NEIGHBOURS)
    for room in ROOMS:
        for path in (ROOT / room).glob("*.py"):
            if path != ROOT / "neighbours/__init__.py":
                assert imported(path) == set(), path


def test_every_neighbour_has_its_row():
    rows = {type(row).__module__ for row in neighbours.NEIGHBOURS}
    assert rows == {f"neighbours.{name}" for name in NEIGHBOURS}


# ---- one of each kind can be added ----


def trained(folder, line=""):
    """The checkpoint of two steps."""
    argv = [*TINY.split(), "--device", "cpu", "--out", folder / "run", *line.split()]
    assert run(*argv) == 0
    return folder / "run/checkpoint.pt"


def sampled(checkpoint, line=""):
    """Two images, uint8 [2, H, W, 3]."""
    out = checkpoint.parent / "images.npz"
    how = ["--n", 2, "--steps", 2, "--device", "cpu", "--out", out]
    assert exit_code(sample.main, checkpoint, *how, *line.split()) == 0
    return np.load(out)["arr_0"]


@pytest.fixture
def scored(monkeypatch, capsys):
    """What fid.py prints of a against b, by random weights."""
    monkeypatch.setattr(fid, "frechet_distance", lambda *sides: 0.0)  # it takes seconds

    def score(a, b):
        capsys.readouterr()
        flags = ["--weights", "random", "--json", "--device", "cpu"]
        assert exit_code(fid.main, a, b, *flags) == 0
        return json.loads(capsys.readouterr().out)

    return score


def test_a_metric_is_a_function_and_a_row(tmp_path, monkeypatch):
    seen = []

    def mean_colour():
        def distance(x0_hat, x0):
            seen.append(x0_hat.shape)
            return (x0_hat.mean((2, 3)) - x0.mean((2, 3))).square().mean(1)

        return distance

    monkeypatch.setitem(metrics.METRICS, "mean-colour", mean_colour)
    checkpoint = trained(tmp_path, "--model casdm --metric mean-colour=0.5")
    assert seen == [(2, 3, 16, 16)] * 2  # once a step
    assert sampled(checkpoint).shape == (2, 16, 16, 3)


@pytest.mark.slow
def test_a_data_set_is_a_function_and_a_row(tmp_path, monkeypatch, scored):
    def open_greys(image_size, data_dir):
        pixels = np.arange(4, dtype=np.uint8)[:, None, None, None] * 60
        pixels = np.broadcast_to(pixels, (4, image_size, image_size, 3)).copy()
        return Frames(pixels, np.array([0, 0, 1, 1]), "greys", image_size)

    monkeypatch.setitem(data.DATASETS, "greys", data.Dataset(16, open_greys))
    checkpoint = trained(tmp_path, "--data greys --class-cond")
    assert load_model(checkpoint)[0].num_classes == 2
    sampled(checkpoint)
    found = scored(checkpoint.parent / "images.npz", "greys")
    assert (found["n_a"], found["n_b"]) == (2, 4)


class Renoise:
    """The mixed clean image, noised again to the step before."""

    def __init__(self, noise):
        self.noise = noise

    def __call__(self, x_t, t, estimates, chain):
        x0 = mix(estimates.x0_hat, estimates.x0_star, estimates.r_t)
        return q_sample(x0, t - 1, self.noise(), chain)


def renoise(args, settings):
    return lambda noise, y: Renoise(noise)


def test_a_sampler_is_a_class_and_a_row(tmp_path, monkeypatch):
    monkeypatch.setitem(sample.SAMPLERS, "renoise", renoise)
    checkpoint = trained(tmp_path)
    theirs, ours = sampled(checkpoint, "--sampler renoise"), sampled(checkpoint)
    assert theirs.shape == ours.shape
    assert not np.array_equal(theirs, ours)


class DDPMv(DDPM):
    """One U-Net predicts v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0."""

    terms = ("v",)

    def forward(self, x_t, t, y=None):
        v = self.theta(x_t, self.time(t, x_t), y)
        signal, noise = self.roots(t, x_t)
        eps_hat, x0_hat = noise * x_t + signal * v, signal * x_t - noise * v
        return Prediction(eps_hat, x0_hat, torch.zeros_like(x_t[:, :1]))

    def losses(self, pred, batch):
        signal, noise = self.roots(batch.t, batch.x_t)
        v = signal * batch.eps - noise * batch.x0
        v_hat = signal * pred.eps_hat - noise * pred.x0_hat
        return {"v": squared_norm(v - v_hat)}

    def roots(self, t, like):
        abar = self.schedule.alpha_bar
        return at_step(abar.sqrt(), t, like), at_step((1 - abar).sqrt(), t, like)


def test_a_model_that_predicts_v_is_a_class_and_a_row(tmp_path, monkeypatch):
    monkeypatch.setitem(refiner.PREDICTIONS, "v", DDPMv)
    checkpoint = trained(tmp_path, "--model ddpm --predict v")
    assert type(load_model(checkpoint)[0]) is DDPMv
    assert sampled(checkpoint).shape == (2, 16, 16, 3)


@pytest.mark.slow
def test_a_score_is_a_function_and_a_row(tmp_path, monkeypatch, scored):
    def score_means(a, b):
        return {"distance_of_means": float(np.linalg.norm(a.mu - b.mu))}

    monkeypatch.setattr(fid, "SCORES", (*fid.SCORES, score_means))
    checkpoint = trained(tmp_path)
    sampled(checkpoint)
    black = tmp_path / "black.npz"
    np.savez(black, arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    found = scored(checkpoint.parent / "images.npz", black)
    assert found["distance_of_means"] > 0
    assert list(found)[-4:] == ["distance_of_means", "n_a", "n_b", "weights"]
