"""steps.py: each score is taken once, of the way that it names, and shown."""

import json

import numpy as np
import pytest
import torch

from data import from_pixels
from experiments import steps
from made import random_pixels
from models import write_ddpm
from neighbours.judge import Judge, save_judge
from runs import error_of, exit_code
from scores import frechet_distance


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A tiny DDPM in its run's folder; two ways, of two and of one number of steps."""
    ways = {"a": steps.Way("ddim", None, 4), "b": steps.Way("dpm++", "logsnr", 2)}
    monkeypatch.setattr(steps, "WAYS", ways)
    monkeypatch.setattr(steps, "STEPS", (2, 4))
    (tmp_path / "tiny").mkdir()
    path = tmp_path / "tiny/checkpoint.pt"
    write_ddpm(path)
    return path


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_each_score_is_taken_once_and_shown(checkpoint, tmp_path, capsys, monkeypatch):
    """A score whose line is lost is computed again, alone, and comes out equal."""
    results = tmp_path / "steps.jsonl"
    torch.manual_seed(0)
    judge = {"image_size": 16, "classes": 2, "channels": 8, "task": "classes"}
    save_judge(tmp_path / "j.pt", Judge(judge).eval(), 0.5)
    argv = [checkpoint, "--n", 5, "--judge", tmp_path / "j.pt", "--results", results]
    assert exit_code(steps.main, *argv) == 0
    table = capsys.readouterr().out
    found = [json.loads(line) for line in results.read_text().splitlines()]
    taken = [(line["way"], line["steps"]) for line in found]
    assert taken == [("a", 2), ("a", 4), ("b", 2)]
    numbers = [f"{line['distance']:.3f}" for line in found]
    assert f"| tiny | a | {numbers[0]} | {numbers[1]} |" in table
    assert f"| tiny | b | {numbers[2]} |  |" in table

    results.write_text("\n".join(json.dumps(line) for line in found[1:]) + "\n")
    picture = tmp_path / "steps.png"
    assert exit_code(steps.main, *argv, "--out", picture) == 0
    again = [json.loads(line) for line in results.read_text().splitlines()]
    assert again == [*found[1:], found[0]] and picture.exists()


def test_the_score_is_the_distance_of_the_pixels():
    """Of n samples to the images that are not among the n that stand for a perfect model."""
    images, samples = random_pixels(60, 2, 2), random_pixels(20, 2, 2, seed=1) // 2
    scorer = steps.Scorer(steps.Pixels(), images, 20)
    rows = from_pixels(samples).flatten(1).numpy()
    found = scorer.features(samples)
    np.testing.assert_allclose(found.mu, rows.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.sigma, np.cov(rows, rowvar=False), rtol=1e-5, atol=1e-6)
    assert scorer.reference.n == 40
    want = frechet_distance(found.mu, found.sigma, scorer.reference.mu, scorer.reference.sigma)
    assert scorer.distance(samples) == want > scorer.perfect > 0


def test_more_samples_than_images_are_refused(checkpoint, tmp_path, capsys):
    argv = [checkpoint, "--n", 4095, "--results", tmp_path / "steps.jsonl"]
    assert exit_code(steps.main, *argv) == 1
    assert "--n 4095 of 4096 images; expected fewer" in error_of(capsys)


def test_without_lines_and_checkpoints_there_is_one_line(tmp_path, capsys):
    assert exit_code(steps.main, "--results", tmp_path / "none.jsonl") == 1
    assert "none.jsonl has no line; expected scores" in error_of(capsys)
