r"""The neighbouring methods as their users run them: command lines, resumed runs, and on `shapes` what each of them promises.

IDDPM    arXiv:2102.09672v1     ADM   arXiv:2105.05233v4     CFG   arXiv:2207.12598v1     SP   arXiv:2401.00110
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import diffusion
from support import edges
import sample
import train
from support.curves import read_log
from neighbours.guidance import classifier_free, classifier_gradient
from neighbours.variance import bits_per_dim

ROOT = Path(__file__).parent.parent.parent
SMALL = ["--T", "20", "--batch-size", "4", "--sample-every", "0", "--device", "cpu"]


def trained(folder, *flags, steps=3):
    assert (
        edges.run(
            train.main, [*SMALL, "--iterations", str(steps), "--out", str(folder), *map(str, flags)]
        )
        == 0
    )
    return folder / "checkpoint.pt"


def sampled(capsys, *argv):
    """(exit code, what was printed)"""
    capsys.readouterr()
    try:
        code = edges.run(sample.main, [str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out + out.err


# ---- command lines ----


def test_schedules_are_drawn_side_by_side(tmp_path, capsys):
    assert edges.run(diffusion.main, [str(tmp_path / "schedules.png")]) == 0
    assert Image.open(tmp_path / "schedules.png").size[0] > 500 and [
        p.name for p in tmp_path.iterdir()
    ] == ["schedules.png"]
    assert edges.run(diffusion.main, [str(tmp_path / "nowhere/schedules.png")]) == 1


@pytest.mark.parametrize(
    "line, says",
    [
        ("--model casdm --learn-sigma", "--learn-sigma"),
        ("--model dual --objective vlb", "--objective"),
        ("--model ddpm --predict x0 --learn-sigma", "eps mode"),
        ("--model ddpm --objective hybrid", "--learn-sigma"),
        ("--model ddpm --learn-sigma --objective simple", "simple"),
        ("--label-dropout 0.1", "--class-cond"),
        ("--class-cond --label-dropout 2", "'2'"),
        ("--model classifier --class-cond", "--class-cond"),
        ("--model classifier --ssim 1", "--ssim"),
        ("--model classifier --metric ssim=1", "classifier"),
        ("--model classifier --eval-every 5", "--eval-every"),
        ("--self-perceptual 1", "CKPT=W"),
        ("--self-perceptual a.pt=0", "'0'"),
        ("--model ddpm --learn-sigma --self-perceptual a.pt=1", "--learn-sigma"),
        ("--schedule linear --T 20", "beta = 1"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line_and_exit_2(line, says, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(line.split())
    error = capsys.readouterr().err
    assert (
        end.value.code == 2
        and error.startswith("error: ")
        and error.count("\n") == 1
        and says in error
    ), error


def test_learn_sigma_is_the_hybrid_objective_unless_vlb_is_asked_for():
    assert train.parse_args("--model ddpm --learn-sigma".split())[0]["objective"] == "hybrid"
    assert (
        train.parse_args("--model ddpm --learn-sigma --objective vlb".split())[0]["objective"]
        == "vlb"
    )
    assert train.parse_args([])[0]["objective"] == "simple"


@pytest.mark.parametrize(
    "flags",
    [
        ["--model", "ddpm", "--learn-sigma"],
        ["--class-cond", "--label-dropout", "0.3"],
        ["--model", "classifier"],
        ["--model", "ddpm", "--learn-sigma", "--objective", "vlb", "--T", "2"],
    ],
    ids=["hybrid", "labels", "classifier", "vlb"],
)
def test_two_goes_equal_one_go_with_every_neighbour(flags, tmp_path):
    """Weights, optimiser, log and the importance sampler's memory, which decides by step 7 with T = 2."""
    for name, parts in (("one", [13]), ("two", [7, 13])):
        trained(tmp_path / name, *flags, steps=parts[0])
        for steps in parts[1:]:
            assert (
                edges.run(
                    train.main,
                    [
                        "--resume",
                        "--iterations",
                        str(steps),
                        "--out",
                        str(tmp_path / name),
                        "--device",
                        "cpu",
                    ],
                )
                == 0
            )
    one, two = (
        sample.read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two")
    )
    for key in ("model", "ema"):
        assert all(torch.equal(one[key][k], two[key][k]) for k in one[key])
    if "vlb" in flags:
        assert (
            torch.equal(one["importance"]["seen"], two["importance"]["seen"])
            and one["importance"]["counts"].min() > 10
        )
    assert [row["loss"] for row in read_log(tmp_path / "one")] == [
        row["loss"] for row in read_log(tmp_path / "two")
    ]


def test_a_model_with_classes_makes_a_row_a_class_or_one_class(tmp_path, capsys):
    checkpoint = trained(tmp_path / "run", "--class-cond", "--label-dropout", "0.1")
    assert (
        sampled(capsys, checkpoint, "--n", 7, "--steps", 2, "--out", tmp_path / "all.png")[0] == 0
    )
    assert Image.open(tmp_path / "all.png").size == (
        3 * 18 + 2,
        3 * 18 + 2,
    )  # three classes, three columns, the last two cells black
    assert (
        sampled(capsys, checkpoint, "--n", 7, "--steps", 2, "--out", tmp_path / "all.npz")[0] == 0
    )
    assert (
        sampled(
            capsys, checkpoint, "--n", 7, "--steps", 2, "--label", 1, "--out", tmp_path / "ones.npz"
        )[0]
        == 0
    )
    every, ones = (
        np.load(tmp_path / name)["arr_0"].astype(int) for name in ("all.npz", "ones.npz")
    )
    same = [np.abs(a - b).max() <= 1 for a, b in zip(every, ones)]
    assert same[1] and same[4] and not all(same)
    grid = np.array(Image.open(tmp_path / "all.png")).astype(int)
    assert (
        np.abs(grid[2:18, 20:36] - every[3]).max() == 0 and not grid[38:54, 38:54].any()
    )  # row 0, column 1 is image 3


@pytest.mark.parametrize(
    "argv, code, says",
    [
        ("PLAIN --label 0", 1, "no classes"),
        ("LABELS --label 3", 1, "0 to 2"),
        ("PLAIN --cfg 1", 1, "--label-dropout"),
        ("PLAIN --guidance 1", 2, "--classifier"),
        ("PLAIN --classifier LABELS", 1, "model of images"),
        ("CLASSIFIER", 1, "classifier"),
        ("PLAIN --variance small", 2, "--sampler ddpm"),
        ("PLAIN --sampler ddpm --variance learned", 1, "--learn-sigma"),
        ("PLAIN --sampler ddpm --eta 0", 2, "--eta"),
        ("PLAIN --bits-per-dim", 2, "--data"),
        ("PLAIN --data shapes", 2, "--bits-per-dim"),
        ("PLAIN --bits-per-dim --data shapes --cfg 1", 2, "--cfg"),
        ("PLAIN --cfg -1", 2, "'-1'"),
        ("LABELS --bits-per-dim --data IMAGES", 1, "labels"),
        ("PLAIN --classifier nowhere.pt", 1, "nowhere.pt"),
        ("PLAIN --classifier OTHER", 1, "T 30"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(argv, code, says, checkpoints, capsys, tmp_path):
    images = tmp_path / "images.npz"
    np.savez(images, arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    argv = [
        str(checkpoints.get(word, images if word == "IMAGES" else word)) for word in argv.split()
    ]
    found, text = sampled(capsys, *argv, "--steps", 2, "--n", 2, "--out", tmp_path / "out.png")
    assert (
        found == code and text.startswith("error: ") and text.count("\n") == 1 and says in text
    ), text
    assert not (tmp_path / "out.png").exists()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "PLAIN": trained(folder / "plain", "--model", "ddpm"),
        "LABELS": trained(folder / "labels", "--class-cond"),
        "CLASSIFIER": trained(folder / "classifier", "--model", "classifier"),
        "OTHER": trained(folder / "other", "--model", "classifier", "--T", "30"),
        "SIGMA": trained(folder / "sigma", "--model", "ddpm", "--learn-sigma"),
    }


def test_bits_per_dim_prints_every_term_and_their_sum(checkpoints, capsys):
    code, text = sampled(
        capsys,
        checkpoints["SIGMA"],
        "--bits-per-dim",
        "--data",
        "shapes",
        "--n",
        5,
        "--steps",
        4,
        "--batch-size",
        3,
    )
    terms = [float(value) for value in re.findall(r"^t +\w+ +([\d.e-]+)$", text, re.M)]
    total = float(
        re.search(
            r"^([\d.]+) \+- [\d.]+ bits/dim of 5 images of shapes, 4 steps, learned variance$",
            text,
            re.M,
        )[1]
    )
    assert code == 0 and len(terms) == 5 and abs(sum(terms) - total) < 1e-3 * total


@pytest.mark.parametrize(
    "flags",
    [
        "--sampler ddpm",
        "--sampler ddpm --variance large",
        "--classifier CLASSIFIER --guidance 2 --label 1",
        "--classifier CLASSIFIER --sampler ddpm",
        "--classifier CLASSIFIER --trace TRACE",
    ],
)
def test_every_way_of_sampling_writes_its_picture(flags, checkpoints, capsys, tmp_path):
    flags = [
        str(checkpoints.get(word, tmp_path / "trace.png" if word == "TRACE" else word))
        for word in flags.split()
    ]
    code, text = sampled(
        capsys, checkpoints["SIGMA"], *flags, "--steps", 4, "--n", 4, "--out", tmp_path / "out.png"
    )
    assert code == 0 and (tmp_path / ("trace.png" if "--trace" in flags else "out.png")).exists(), (
        text
    )


def test_labels_are_needed_where_they_are_asked_for(tmp_path, capsys):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    for flags in (["--class-cond"], ["--model", "classifier"]):
        assert (
            edges.run(
                train.main,
                [
                    "--data",
                    str(tmp_path / "images.npz"),
                    "--channels",
                    "32",
                    "--out",
                    str(tmp_path / "run"),
                    *flags,
                ],
            )
            == 1
        )
        assert "has no labels" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["ddpm", "casdm"])
def test_the_self_perceptual_metric_trains_from_a_checkpoint(model, checkpoints, tmp_path, capsys):
    """In DDPM alone, from the frozen model's own weights; in Cas-DM beside its three losses. No download."""
    run = trained(
        tmp_path / "run",
        "--model",
        model,
        "--self-perceptual",
        f"{checkpoints['PLAIN']}=0.5",
        steps=10,
    )
    row = read_log(run.parent)[-1]
    assert set(row) - {"step", "images_per_second", "loss"} == (
        {"self-perceptual"} if model == "ddpm" else {"eps", "x0", "mu", "self-perceptual"}
    )
    assert row["self-perceptual"] > 0
    if model == "ddpm":
        start = sample.read_checkpoint(checkpoints["PLAIN"])["ema"]
        state = sample.read_checkpoint(run)
        assert all((state["model"][k] - start[k]).abs().max() < 0.1 for k in start)
    assert not any("frozen" in k for k in sample.read_checkpoint(run)["model"])


def test_a_judge_of_other_noise_or_of_another_prediction_is_refused(checkpoints, tmp_path, capsys):
    for flags in (["--T", "30"], ["--schedule", "linear", "--T", "40"]):
        assert (
            edges.run(
                train.main,
                [
                    *SMALL,
                    *flags,
                    "--self-perceptual",
                    f"{checkpoints['PLAIN']}=1",
                    "--out",
                    str(tmp_path / "run"),
                ],
            )
            == 1
        )
        assert "the same noisy images" in capsys.readouterr().err
    for name in ("CLASSIFIER", "LABELS"):
        assert (
            edges.run(
                train.main,
                [
                    *SMALL,
                    "--self-perceptual",
                    f"{checkpoints[name]}=1",
                    "--out",
                    str(tmp_path / "run"),
                ],
            )
            == 1
        )
    assert (
        edges.run(
            train.main,
            [
                *SMALL,
                "--model",
                "ddpm",
                "--predict",
                "x0",
                "--self-perceptual",
                f"{checkpoints['PLAIN']}=1",
                "--out",
                str(tmp_path / "run"),
            ],
        )
        == 1
    )
    assert "it predicts eps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- what they promise, on shapes ----


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A small DDPM that knows labels, no label, and its variance; a classifier to guide it; and another to judge it."""
    folder = tmp_path_factory.mktemp("shapes")
    lines = {
        "model": "--model ddpm --class-cond --label-dropout 0.2 --learn-sigma --iterations 800 --sample-every 0",
        "guide": "--model classifier --iterations 1500 --lr 3e-4",
        "judge": "--model classifier --iterations 1500 --seed 1",
    }
    runs = [
        subprocess.Popen(
            [
                sys.executable,
                ROOT / "train.py",
                *line.split(),
                "--out",
                folder / name,
                "--device",
                "cpu",
            ],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        for name, line in lines.items()
    ]
    assert [run.wait() for run in runs] == [0, 0, 0]
    return {name: folder / name / "checkpoint.pt" for name in lines}


def share(judge, x, y):
    """Of the images, those that the judge takes for the class that was asked for."""
    with torch.no_grad():
        return (
            (judge(x, torch.ones(len(x), dtype=torch.int64)).argmax(1) == y).double().mean().item()
        )


class Unlabelled(nn.Module):
    """The model without its label."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x_t, t, y=None):
        return self.model(x_t, t, torch.full((len(x_t),), self.model.null_label))


@pytest.mark.slow
@pytest.mark.parametrize("variance", [None, "learned"], ids=["ddim", "ancestral"])
def test_classifier_guidance_raises_the_share_of_the_asked_class(variance, shapes):
    """An unlabelled model, guided at scales 0, 1 and 4, judged by a classifier of another seed (ADM Sec. 4)."""
    model, (guide, judge) = (
        sample.load_model(shapes["model"])[0],
        (sample.load_model(shapes[name], classifier=True)[0] for name in ("guide", "judge")),
    )
    x0, y = data.from_pixels(data.shapes(16)[0][:256]), sample.labels(0, 64, 3)
    assert share(judge, x0, torch.from_numpy(data.shapes(16)[1][:256])) > 0.9
    shares = [
        share(
            judge,
            sample.sample(
                Unlabelled(model),
                model.schedule,
                (64, 3, 16, 16),
                0,
                25,
                y=y,
                variance=variance,
                gradient=lambda x_t, t, y: classifier_gradient(guide, x_t, t, y, scale),
            ),
            y,
        )
        for scale in (0.0, 1.0, 4.0)
    ]
    assert shares[0] < 0.5 and shares[0] < shares[1] < shares[2] and shares[2] > shares[0] + 0.2, (
        shares
    )


@pytest.mark.slow
def test_classifier_free_guidance_raises_the_share_of_the_asked_class(shapes):
    """w = 0 and 4, judged by a classifier (CFG Eq. 6); the label alone does better than chance."""
    judge, y, shares = (
        sample.load_model(shapes["judge"], classifier=True)[0],
        sample.labels(0, 64, 3),
        [],
    )
    for w in (0.0, 4.0):
        model = sample.load_model(shapes["model"])[0]
        classifier_free(model, w)
        shares.append(
            share(judge, sample.sample(model, model.schedule, (64, 3, 16, 16), 0, 25, y=y), y)
        )
    assert 0.5 < shares[0] < shares[1] and shares[1] > 0.9, shares


@pytest.mark.slow
def test_the_learned_variance_has_fewer_bits_than_both_fixed_ones(shapes):
    """At 25 steps, on 64 images, from the same noise (IDDPM Fig. 2's point at few steps)."""
    model = sample.load_model(shapes["model"])[0]
    pixels, labels = data.shapes(16)
    x0, y = data.from_pixels(pixels[:64]), torch.from_numpy(labels[:64])
    bits = {}
    for kind in ("small", "large", "learned"):
        noise = torch.Generator().manual_seed(0)
        bits[kind] = (
            bits_per_dim(model, x0, 25, kind, lambda: torch.randn(x0.shape, generator=noise), y)
            .sum(1)
            .mean()
            .item()
        )
    assert bits["learned"] + 0.5 < bits["large"] < bits["small"], bits
