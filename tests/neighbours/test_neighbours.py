"""The neighbours as their users run them: command lines, resumed runs, and what each promises.

IDDPM   arXiv:2102.09672v1   ADM   arXiv:2105.05233v4   CFG   arXiv:2207.12598v1
SP      arXiv:2401.00110
"""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
from neighbours.classifier_free import guide_theta
from neighbours.guidance import guided
from neighbours.perceptual import frozen_model
from neighbours.variance import Ancestral, bits_per_dim
from runs import ROOT, exit_code, one_error, run, settings_of, usage_error
from support.checkpoint import read_checkpoint
from support.models import load_model
from support.pictures import read_log

SMALL = ["--T", "20", "--batch-size", "4", "--sample-every", "0", "--device", "cpu"]


def trained(folder, *flags, steps=3):
    """The checkpoint of a small run on shapes."""
    assert run(*SMALL, "--iterations", steps, "--out", folder, *flags) == 0
    return folder / "checkpoint.pt"


def sampled(capsys, *argv):
    """(exit code, what was printed)"""
    capsys.readouterr()
    code = exit_code(sample.main, *argv)
    out, err = capsys.readouterr()
    return code, out + err


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{name: a checkpoint of one step}, without the optimiser, which sampling does not read."""
    folder = tmp_path_factory.mktemp("checkpoints")
    flags = {
        "PLAIN": "--model ddpm",
        "LABELS": "--model ddpm --class-cond --label-dropout 0.1",
        "CLASSIFIER": "--model classifier",
        "OTHER": "--model classifier --T 30",
        "SIGMA": "--model ddpm --learn-sigma",
    }
    found = {name: trained(folder / name, *line.split(), steps=1) for name, line in flags.items()}
    for path in found.values():
        state = torch.load(path, weights_only=True)
        del state["optimizer"]
        torch.save(state, path)
    return found


# ---- training ----


@pytest.mark.parametrize(
    "line, says",
    [
        ("--model casdm --learn-sigma", "--learn-sigma"),
        ("--model dual --objective vlb", "--objective"),
        ("--model ddpm --predict x0 --learn-sigma", "eps mode"),
        ("--model ddpm --objective hybrid", "--learn-sigma"),
        ("--model ddpm --learn-sigma --objective simple", "simple"),
        ("--model ddpm --learn-sigma --self-perceptual a.pt=1", "--learn-sigma"),
        ("--label-dropout 0.1", "--class-cond"),
        ("--class-cond --label-dropout 2", "'2'"),
        ("--model classifier --class-cond", "--class-cond"),
        ("--model classifier --metric ssim=1", "classifier"),
        ("--model classifier --eval-every 5", "--eval-every"),
        ("--model ddpm --predict x0 --self-perceptual a.pt=1 --metric ssim=1", "--metric ssim"),
        ("--self-perceptual 1", "CKPT=W"),
        ("--self-perceptual a.pt=0", "'0'"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line_and_exit_2(line, says, capsys):
    assert says in usage_error(capsys, *line.split())


@pytest.mark.parametrize(
    "line, objective",
    [
        ("", "simple"),
        ("--model ddpm --learn-sigma", "hybrid"),
        ("--model ddpm --learn-sigma --objective vlb", "vlb"),
    ],
)
def test_learn_sigma_is_the_hybrid_objective_unless_vlb_is_asked_for(line, objective):
    assert settings_of(*line.split())["objective"] == objective


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "--model ddpm --learn-sigma",
        "--model ddpm --class-cond --label-dropout 0.3",
        "--model classifier",
        "--model ddpm --learn-sigma --objective vlb --T 2",
    ],
    ids=["hybrid", "labels", "classifier", "vlb"],
)
def test_two_goes_equal_one_go_with_every_neighbour(line, tmp_path):
    """Weights, log and the importance sampler's memory, which decides by step 7 with T = 2."""
    trained(tmp_path / "one", *line.split(), steps=13)
    trained(tmp_path / "two", *line.split(), steps=7)
    again = ["--resume", "--iterations", 13, "--device", "cpu", "--out", tmp_path / "two"]
    assert run(*again) == 0
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])
    if "vlb" in line:
        assert torch.equal(one["importance"]["seen"], two["importance"]["seen"])
        assert one["importance"]["counts"].min() > 10
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]


@pytest.mark.parametrize("line", ["--class-cond", "--model classifier"])
def test_labels_are_needed_where_they_are_asked_for(line, tmp_path, capsys):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    argv = ["--data", tmp_path / "images.npz", "--channels", 32, *line.split()]
    assert run(*argv, "--out", tmp_path / "run") == 1
    assert "has no labels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_in_casdm_the_self_perceptual_metric_stands_beside_the_three_losses(
    checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr("support.run.LOG_EVERY", 2)
    frozen = f"{checkpoints['PLAIN']}=0.5"
    checkpoint = trained(tmp_path / "run", "--self-perceptual", frozen, steps=2)
    row = read_log(tmp_path / "run")[-1]
    terms = {"eps", "x0", "mu", "self-perceptual"}
    assert row.keys() == terms | {"step", "loss", "images_per_second"}
    assert row["self-perceptual"] > 0
    assert not any("frozen" in name for name in read_checkpoint(checkpoint)["model"])


@pytest.mark.slow
def test_a_ddpm_trained_by_it_alone_starts_from_the_frozen_models_weights(
    checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr("support.run.LOG_EVERY", 2)
    frozen = f"{checkpoints['PLAIN']}=0.5"
    flags = ["--model", "ddpm", "--self-perceptual", frozen]
    checkpoint = trained(tmp_path / "run", *flags, steps=2)
    row = read_log(tmp_path / "run")[-1]
    assert row.keys() == {"self-perceptual", "step", "loss", "images_per_second"}
    start, end = read_checkpoint(checkpoints["PLAIN"])["ema"], read_checkpoint(checkpoint)["model"]
    assert all((end[name] - start[name]).abs().max() < 0.1 for name in start)


@pytest.mark.parametrize(
    "frozen, line, says",
    [
        ("PLAIN", "--T 30", "the same noisy images"),
        ("PLAIN", "--schedule linear --T 40", "the same noisy images"),
        ("CLASSIFIER", "", "is a classifier"),
        ("LABELS", "", "classes"),
        ("PLAIN", "--model ddpm --predict x0", "it predicts eps"),
    ],
)
def test_a_frozen_model_of_other_noise_labels_or_prediction_is_refused(
    frozen, line, says, checkpoints, tmp_path, capsys
):
    argv = [*SMALL, *line.split(), "--self-perceptual", f"{checkpoints[frozen]}=1"]
    assert run(*argv, "--out", tmp_path / "run") == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- sampling ----


def test_a_model_with_classes_makes_a_row_a_class(checkpoints, tmp_path, capsys):
    """A row of no label, which a part of the images had in training, is none of them."""
    how = [checkpoints["LABELS"], "--n", 7, "--steps", 2, "--out"]
    assert sampled(capsys, *how, tmp_path / "all.png")[0] == 0
    assert sampled(capsys, *how, tmp_path / "all.npz")[0] == 0
    grid = np.array(Image.open(tmp_path / "all.png"))
    images = np.load(tmp_path / "all.npz")["arr_0"]
    assert grid.shape == (3 * 18 + 2, 3 * 18 + 2, 3)  # three classes, and columns; 2 pixels between
    assert (grid[2:18, 20:36] == images[3]).all()  # row 0, column 1
    assert not grid[38:54, 38:54].any()  # the last two cells stay black


def test_one_class_is_the_images_that_have_it_anyway(checkpoints, tmp_path, capsys):
    how = [checkpoints["LABELS"], "--n", 7, "--steps", 2]
    assert sampled(capsys, *how, "--out", tmp_path / "all.npz")[0] == 0
    assert sampled(capsys, *how, "--label", 1, "--out", tmp_path / "ones.npz")[0] == 0
    every = np.load(tmp_path / "all.npz")["arr_0"].astype(int)
    ones = np.load(tmp_path / "ones.npz")["arr_0"].astype(int)
    same = [np.abs(a - b).max() <= 1 for a, b in zip(every, ones, strict=True)]
    assert same[1]
    assert same[4]


@pytest.mark.parametrize(
    "line, code, says",
    [
        ("PLAIN --label 0", 1, "no classes"),
        ("LABELS --label 3", 1, "0 to 2"),
        ("PLAIN --cfg 1", 1, "--label-dropout"),
        ("PLAIN --cfg -1", 2, "'-1'"),
        ("PLAIN --guidance 1", 2, "--classifier"),
        ("PLAIN --classifier LABELS", 1, "model of images"),
        ("PLAIN --classifier nowhere.pt", 1, "nowhere.pt"),
        ("PLAIN --classifier OTHER", 1, "T 30"),
        ("CLASSIFIER", 1, "classifier"),
        ("PLAIN --variance small", 1, "--sampler ddpm"),
        ("PLAIN --steps 3 --spacing t=1,2", 2, "leave one out"),
        ("PLAIN --sampler ddpm --variance learned", 1, "--learn-sigma"),
        ("PLAIN --sampler ddpm --eta 0", 2, "--eta"),
        ("PLAIN --bits-per-dim", 2, "--data"),
        ("PLAIN --data shapes", 2, "--bits-per-dim"),
        ("PLAIN --bits-per-dim --data shapes --cfg 1", 2, "--cfg"),
        ("LABELS --bits-per-dim --data images.npz", 1, "labels"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(
    line, code, says, checkpoints, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    argv = [checkpoints.get(word, word) for word in line.split()]
    found, text = sampled(capsys, *argv, "--steps", 2, "--n", 2)
    assert found == code
    assert says in one_error(text)
    assert not list(tmp_path.glob("*.png"))


def test_bits_per_dim_prints_every_term_and_their_sum(checkpoints, capsys):
    flags = ["--bits-per-dim", "--data", "shapes", "--n", 5, "--steps", 4, "--batch-size", 3]
    code, text = sampled(capsys, checkpoints["SIGMA"], *flags)
    terms = [float(value) for value in re.findall(r"^t +\w+ +([\d.e-]+)$", text, re.M)]
    *_, last = text.splitlines()
    what = r"([\d.]+) \+- [\d.]+ bits/dim of 5 images of shapes, 4 steps, learned variance"
    total = float(re.fullmatch(what, last)[1])
    assert code == 0
    assert len(terms) == 5
    assert sum(terms) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(
    "line",
    [
        "--sampler ddpm",
        "--sampler ddpm --variance large",
        "--classifier CLASSIFIER --guidance 2 --label 1",
        "--classifier CLASSIFIER --sampler ddpm",
        "--sampler dpm++ --classifier CLASSIFIER",
        "--spacing trailing",
    ],
)
def test_every_way_of_sampling_writes_its_picture(line, checkpoints, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [checkpoints.get(word, word) for word in line.split()]
    code, text = sampled(capsys, checkpoints["SIGMA"], *argv, "--steps", 3, "--n", 2)
    assert code == 0, text
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]


def test_saved_weights_serve_the_neighbours_like_their_checkpoints(checkpoints, capsys, tmp_path):
    """A learned variance, a classifier and a frozen model."""
    saved = {name: tmp_path / f"{name}.pt" for name in ("SIGMA", "CLASSIFIER", "PLAIN")}
    for name, path in saved.items():
        assert sampled(capsys, checkpoints[name], "--save-weights", path)[0] == 0
    flags = ["--classifier", saved["CLASSIFIER"], "--sampler", "ddpm", "--steps", 2, "--n", 2]
    code, text = sampled(capsys, saved["SIGMA"], *flags, "--out", tmp_path / "images.npz")
    assert code == 0, text
    frozen = frozen_model(saved["PLAIN"], read_checkpoint(checkpoints["PLAIN"])["settings"])
    assert not frozen.training


# ---- what they promise, on shapes ----


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A DDPM that knows labels, none, and its variance; a classifier to guide it; and a judge."""
    folder = tmp_path_factory.mktemp("shapes")
    lines = {
        "model": "--model ddpm --class-cond --label-dropout 0.2 --learn-sigma --iterations 800",
        "guide": "--model classifier --iterations 1500 --lr 3e-4",
        "judge": "--model classifier --iterations 1500 --seed 1",
    }
    runs = []
    for name, line in lines.items():
        how = ["--out", folder / name, "--sample-every", "0", "--device", "cpu"]
        command = [sys.executable, ROOT / "train.py", *line.split(), *how]
        runs.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL))
    assert [run.wait() for run in runs] == [0, 0, 0]
    return {name: folder / name / "checkpoint.pt" for name in lines}


def classifier(path):
    return load_model(path, classifier=True)[0]


def share(judge, x, y):
    """Of the images, those that the judge takes for the class that was asked for."""
    with torch.no_grad():
        seen = judge(x, torch.ones(len(x), dtype=torch.int64)).argmax(1)
    return (seen == y).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("variance", [None, "learned"], ids=["ddim", "ancestral"])
def test_classifier_guidance_raises_the_share_of_the_asked_class(variance, shapes):
    """An unlabelled model, guided at scales 0, 1 and 4, judged by another seed (ADM Sec. 4)."""
    judge, guide = classifier(shapes["judge"]), classifier(shapes["guide"])
    pixels, labels = (torch.from_numpy(array[:256]) for array in data.shapes(16))
    assert share(judge, data.from_pixels(pixels), labels) > 0.9
    model = load_model(shapes["model"])[0]
    labelled = model.forward
    model.forward = lambda x_t, t, y: labelled(x_t, t, torch.full_like(y, 3))  # 3: no label

    def make_step(noise, y):
        return Ancestral(variance, noise) if variance else sample.Ddim()

    shares = []
    for scale in (0.0, 1.0, 4.0):
        sampler = sample.Sampler(model, 16, 25, make_step=guided(make_step, guide, scale))
        shares.append(share(judge, sampler(0, 256), sampler.labels(0, 256)))
    assert shares[0] < 0.5
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > shares[0] + 0.2


@pytest.mark.slow
def test_classifier_free_guidance_raises_the_share_of_the_asked_class(shapes):
    """w = 0 and 4, judged by a classifier (CFG Eq. 6); the label alone does better than chance."""
    judge, shares = classifier(shapes["judge"]), []
    for w in (0.0, 4.0):
        model = load_model(shapes["model"])[0]
        guide_theta(model, w)
        sampler = sample.Sampler(model, 16, 25)
        shares.append(share(judge, sampler(0, 64), sampler.labels(0, 64)))
    assert 0.5 < shares[0] < shares[1]
    assert shares[1] > 0.9


@pytest.mark.slow
def test_the_learned_variance_has_fewer_bits_than_both_fixed_ones(shapes):
    """At 25 steps, on 64 images, from the same noise (IDDPM Fig. 2's point at few steps)."""
    model = load_model(shapes["model"])[0]
    pixels, labels = (torch.from_numpy(array[:64]) for array in data.shapes(16))
    x0, bits = data.from_pixels(pixels), {}
    for kind in ("small", "large", "learned"):
        generator = torch.Generator().manual_seed(0)

        def noise(generator=generator):
            return torch.randn(x0.shape, generator=generator)

        bits[kind] = bits_per_dim(model, x0, 25, kind, noise, labels).sum(1).mean().item()
    assert bits["learned"] + 0.5 < bits["large"] < bits["small"]
