"""train.py's flags: what they make, what is refused in one line, what a resume may change."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from data import Images
from metrics import METRICS, FeatureDistance
from neighbours.guidance import Classifier
from neighbours.variance import LearnedVariance
from refiner import DDPM, CasDM, DDPMx0, DualDiffusion
from runs import (
    SMALL,
    assert_same_run,
    error_of,
    new_run,
    one_error,
    run,
    settings_of,
    usage_error,
)
from support.models import class_of
from support.settings import classes, reopen, set_size
from unet import UNet

# ---- what flags make ----


def test_the_papers_command_has_the_papers_settings():
    """`--model casdm --lpips 0.1 --data cifar10` is Cas-DM Sec. 4.1."""
    settings = settings_of("--model", "casdm", "--lpips", "0.1", "--data", "cifar10")
    paper = {
        "channels": 128,
        "res_blocks": 3,
        "T": 4000,
        "schedule": "cosine",
        "lambda_eps": 1,
        "lambda_x0": 1,
        "lambda_mu": 1,
        "metric": {"lpips": 0.1},
        "refiner": "unet",
        "refiner_input": "x0",
        "batch_size": 128,
        "lr": 1e-4,
        "iterations": 400_000,
        "image_size": 32,
        "dropout": 0.0,
        "ema": 0.9999,
        "precision": "fp32",
        "sampler": "ddim",
        "sample_steps": 100,
        "learn_sigma": False,
        "objective": "simple",
    }
    assert {key: settings[key] for key in paper} == paper


def test_what_is_typed_wins_over_the_datas_defaults():
    settings = settings_of("--data", "cifar10", "--channels", 64, "--T", 1000, "--image-size", 16)
    expected = {"channels": 64, "T": 1000, "image_size": 16, "res_blocks": 3}
    assert {key: settings[key] for key in expected} == expected


def test_shapes_are_small_and_need_no_flag():
    settings = settings_of()
    expected = {"data": "shapes", "model": "casdm", "image_size": 16, "channels": 32}
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize(
    "line, model, metrics",
    [
        ("--model ddpm", DDPM, {}),
        ("--model ddpm --predict x0", DDPMx0, {}),
        ("--model ddpm --predict x0 --lpips 0.1", DDPMx0, {"lpips": 0.1}),
        ("--model dual", DualDiffusion, {}),
        ("--model dual --lpips 0.1", DualDiffusion, {"lpips": 0.1}),
        ("--model casdm", CasDM, {}),
        ("--model casdm --lpips 0.1", CasDM, {"lpips": 0.1}),
        ("--metric resnet=0.1", CasDM, {"resnet": 0.1}),
        ("--metric inception=0.1", CasDM, {"inception": 0.1}),
        ("--metric swin=0.1", CasDM, {"swin": 0.1}),
        ("--metric squeezenet=0.1", CasDM, {"squeezenet": 0.1}),
        ("--metric ssim=0.1 --metric haarpsi=0.2", CasDM, {"ssim": 0.1, "haarpsi": 0.2}),
        ("--metric ssim=0", CasDM, {}),
        ("--refiner fixres", CasDM, {}),
        ("--refiner fixres --lpips 0.1", CasDM, {"lpips": 0.1}),
        ("--refiner fixres --refiner-input x0+eps", CasDM, {}),
        ("--model classifier --sample-every 0", Classifier, {}),
        ("--model ddpm --learn-sigma", LearnedVariance, {}),
    ],
)
def test_every_row_of_the_tables_is_a_command_line(line, model, metrics):
    """Cas-DM Tables 1, 3 and 4; and the neighbours."""
    settings = settings_of("--data", "cifar10", *line.split())
    assert class_of(settings) is model and settings["metric"] == metrics


@pytest.mark.parametrize("model", ["ddpm", "dual", "casdm", "casdm --refiner fixres"])
@pytest.mark.parametrize("data, size", [("cifar10", 32), ("celebahq", 64), ("lsun-bedroom", 64)])
def test_every_data_set_brings_its_size_and_the_papers_network(model, data, size):
    settings = settings_of("--data", data, "--model", *model.split())
    expected = {"T": 4000, "image_size": size, "channels": 128}
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize(
    "line, says",
    [
        ("--model gan", "gan"),
        ("--mod ddpm", "--mod"),
        ("--model ddpm --refiner unet", "--refiner means nothing to --model ddpm"),
        ("--model dual --predict x0", "--predict means nothing to --model dual"),
        ("--model ddpm --lambda-mu 2", "--lambda-mu means nothing to --model ddpm"),
        ("--model ddpm --predict x0 --lambda-eps 2", "--lambda-eps means nothing to"),
        ("--lambda-x0 -1", "-1"),
        ("--model ddpm --lpips 0.1", "eps mode"),
        ("--lpips inf", "inf"),
        ("--lpips -0.1", "-0.1"),
        ("--metric vgg=1", "vgg=1"),
        ("--metric ssim", "ssim"),
        ("--metric ssim=x", "'x'"),
        ("--model dual --init-eps f.pt", "--init-eps"),
        ("--model classifier --init-eps f.pt", "--init-eps"),
        ("--model ddpm --predict x0 --init-eps f.pt", "--init-eps"),
        ("--model ddpm --self-perceptual a.pt=1 --init-eps f.pt", "--init-eps"),
        ("--image-size 30", "30"),
        ("--channels 48", "48"),
        ("--dropout 1", "'1'"),
        ("--T 0", "'0'"),
        ("--T 150 --sample-steps 151", "--sample-steps 151"),
        ("--sample-steps 0", "'0'"),
        ("--schedule linear --T 20 --sample-every 0", "beta = 1"),
        ("--lr nan", "nan"),
        ("--lr 0", "'0'"),
        ("--lr -1", "'-1'"),
        ("--ema 1.1", "1.1"),
        ("--iterations 0", "'0'"),
        ("--batch-size 2.5", "2.5"),
        ("--batch-size 16 --accumulate 3", "multiple of 1 processes x --accumulate 3"),
        ("--seed -1", "-1"),
        ("--data folder --data-dir elsewhere", "--data-dir"),
        ("--device tpu9", "tpu9"),
    ],
)
def test_what_the_flags_alone_show_to_be_wrong_is_one_line_and_exit_2(line, says, capsys):
    assert says in usage_error(capsys, *line.split())


def test_help_shows_a_default_of_zero(capsys):
    with pytest.raises(SystemExit):
        settings_of("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "(default: 0.0)" in said and "(default: 0)" in said and "(default: 4000" in said
    assert "(default: {})" not in said and "(default: False)" not in said


# ---- what files and devices bring ----


@pytest.mark.parametrize(
    "line, says",
    [
        ("--data nowhere", "nowhere"),
        ("--data celebahq", "--data-dir"),
        ("--resume --out nowhere", "nowhere"),
        ("--data shapes --device cuda:77", "cuda:77"),
    ],
)
def test_what_depends_on_files_or_devices_is_one_line_and_exit_1(
    line, says, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(*line.split()) == 1
    assert says in error_of(capsys)
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_all_that_is_missing_is_named_at_once(monkeypatch, capsys, tmp_path):
    """CIFAR-10 and the VGG weights both: what, how large, from where, where to put it."""

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    flags = ["--lpips", 0.1, "--metric-size", 64, "--data", "cifar10", "--device", "cpu"]
    assert run("--model", "casdm", *flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    files = ["cifar-10-python.tar.gz", "vgg16-397923af.pth", "lpips_weights.pt"]
    for word in [*files, "170 MB", "cs.toronto.edu", "528 MB", "by hand", "--data shapes"]:
        assert word in error, word


@pytest.mark.parametrize(
    "labels, missing", [([1, 2, 3], "0"), ([0, 5, 5], "1"), ([2**60, 0, 1], "2")]
)
@pytest.mark.parametrize("flags", [["--class-cond"], ["--model", "classifier"]])
def test_labels_with_a_gap_are_refused_and_the_missing_ones_named(
    labels, missing, flags, tmp_path, capsys
):
    """A class without images would be trained by nothing and sampled all the same."""
    pixels = np.zeros((3, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "gap.npz", arr_0=pixels, arr_1=np.array(labels))
    flags = [*SMALL, *flags, "--iterations", 1, "--data", tmp_path / "gap.npz"]
    assert run(*flags, "--out", tmp_path / "run") == 1
    assert f"no image of {missing};" in error_of(capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_begun_with_a_gap_in_its_labels_can_still_go_on():
    settings = settings_of("--class-cond")
    gap = Images(np.zeros((2, 16, 16, 3), np.uint8), np.array([1, 2]), "gap.npz", "")
    assert classes(settings | {"num_classes": 3}, gap) == 3


def test_a_frozen_model_of_another_image_size_is_refused_where_the_images_bring_theirs(
    images, tmp_path, capsys
):
    frozen = tmp_path / "frozen/checkpoint.pt"
    flags = [*SMALL, "--iterations", 1]
    large = ["--model", "ddpm", "--image-size", 32]
    assert run(*flags, *large, "--out", tmp_path / "frozen") == 0
    flags += ["--data", images, "--self-perceptual", f"{frozen}=1"]
    assert run(*flags, "--out", tmp_path / "run") == 1
    assert "has image_size 32 where the other model has 16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_metric_size_is_the_networks_own_and_stays_with_the_run(tmp_path, monkeypatch, images):
    """--metric-size replaces the paper's 224, for networks alone, and a resumed run has it too."""
    made = []

    def network():
        extractor = torch.nn.Identity()
        extractor.forward = lambda x: {"pixels": x}
        made.append(FeatureDistance(extractor))
        return made[-1]

    monkeypatch.setitem(METRICS, "squeezenet", network)
    flags = [*SMALL, "--data", images, "--metric", "squeezenet=0.1", "--out", tmp_path]
    assert run(*flags, "--metric", "ssim=0.1", "--metric-size", 48, "--iterations", 1) == 0
    assert run("--resume", "--out", tmp_path, "--iterations", 2, "--device", "cpu") == 0
    assert [metric.size for metric in made] == [48, 48]
    assert made[0].features(torch.zeros(1, 3, 16, 16))[0].shape == (1, 3, 48, 48)


@pytest.mark.parametrize("metric", [[], ["--metric", "ssim=0.1"]])
def test_metric_size_without_a_network_is_one_line(metric, tmp_path, capsys):
    assert run(*SMALL, *metric, "--metric-size", 64, "--out", tmp_path / "run") == 1
    assert error_of(capsys).startswith("error: --metric-size 64")
    assert not (tmp_path / "run").exists()


def test_a_metric_size_that_a_network_cannot_take_is_one_line():
    networks = [FeatureDistance(torch.nn.Identity()) for _ in range(2)]
    networks[1].smallest = 75
    with pytest.raises(ValueError, match="--metric-size 74: a metric's network needs at least 75"):
        set_size(networks, 74)
    set_size(networks, 75)
    assert [network.size for network in networks] == [75, 75]


def test_the_place_of_cifar10_is_kept_where_the_run_found_it(tmp_path, monkeypatch):
    """Without --data-dir it is ./data: of the folder in which the run began, not of any later."""
    monkeypatch.chdir(tmp_path)
    assert settings_of("--data", "cifar10")["data_dir"] == str(tmp_path / "data")
    typed = settings_of("--data", "cifar10", "--data-dir", "cifar10")
    assert typed["data_dir"] == str(tmp_path / "cifar10")


# ---- what a resume may change ----


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--lr 0.5", "--lr"),
        ("--model casdm", "--model"),
        ("--metric ssim=0.2", "--metric"),
        ("--lambda-mu 2", "--lambda-mu"),
        ("--seed 3", "--seed"),
    ],
)
def test_resume_refuses_a_changed_setting_and_names_it(flags, names, begun_run, capsys):
    before = (begun_run / "checkpoint.pt").read_bytes()
    go_on = ["--resume", "--iterations", 2, "--out", begun_run]
    assert run(*go_on, *flags.split()) == 1
    assert names in error_of(capsys)
    assert (begun_run / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "begun, changed, says",
    [
        ("", "--accumulate 3", "multiple of 1 processes x --accumulate 3"),
        ("", "--accumulate 16", "multiple of 1 processes x --accumulate 16"),
        ("--model classifier", "--sample-every 5", "makes no images"),
        ("--model classifier", "--eval-every 5", "makes no images"),
        ("--model classifier", "--eval-at 5", "makes no images"),
        ("", "--eval-at 1,3", "--eval-at 3; expected at most the 2 of --iterations"),
        ("--T 150", "--sample-steps 151", "at most the 150 steps of --T"),
        ("--iterations 2", "--iterations 1", "--iterations 1: the run has done 2 steps"),
        ("--iterations 2", "--eval-at 1", "--eval-at 1: the run has done 2 steps"),
    ],
)
def test_a_resume_is_checked_on_the_settings_it_comes_to(begun, changed, says, tmp_path, capsys):
    """Before anything is done: one line, exit 1, since it depends on the checkpoint."""
    flags = [*SMALL, "--model", "ddpm", "--iterations", 1, *begun.split()]
    assert run(*flags, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    capsys.readouterr()
    go_on = ["--resume", "--iterations", 2, "--out", tmp_path / "run"]
    assert run(*go_on, *changed.split()) == 1
    out, error = capsys.readouterr()
    assert says in one_error(error) and not out
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


def test_a_resume_by_another_number_of_processes_is_checked(one_step, monkeypatch):
    monkeypatch.setattr("support.parallel.processes", lambda: 3)
    with pytest.raises(ValueError, match="--batch-size 4: expected a multiple of 3 processes"):
        reopen(one_step, {})


def test_a_run_and_its_images_can_be_moved(images, tmp_path):
    """The run's folder and its .npz go elsewhere between two steps; the end is bitwise the same."""
    common = [*SMALL, "--model", "ddpm", "--data", images]
    assert run(*common, "--iterations", 3, "--out", tmp_path / "one") == 0
    assert run(*common, "--iterations", 1, "--out", tmp_path / "two") == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place, moved = elsewhere / "two", elsewhere / "pixels.npz"
    (tmp_path / "two").rename(place)
    images.rename(moved)
    go_on = ["--resume", "--out", place, "--device", "cpu"]
    assert run(*go_on, "--data", moved, "--iterations", 2) == 0
    assert run(*go_on, "--iterations", 3) == 0, "the new place was not kept"
    assert_same_run(tmp_path / "one", place)


@pytest.mark.parametrize("typed", [True, False])
def test_a_resume_with_other_images_in_an_npz_is_refused(typed, images, tmp_path, capsys):
    """Whether they lie at a new place or took the old one."""
    flags = [*SMALL, "--model", "ddpm", "--data", images, "--iterations", 1]
    assert run(*flags, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    other = tmp_path / "other.npz" if typed else images
    np.savez(other, arr_0=np.zeros((10, 16, 16, 3), np.uint8))
    capsys.readouterr()
    change = ["--data", other] if typed else []
    assert run("--resume", "--out", tmp_path / "run", "--iterations", 2, *change) == 1
    assert f"error: {other} is not what this run began with" in error_of(capsys)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("old, new", [("shapes", "images.npz"), ("images.npz", "shapes")])
def test_a_named_set_and_a_path_are_never_one_anothers_place(
    old, new, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = [*SMALL, "--model", "ddpm", "--data", old, "--iterations", 1]
    assert run(*flags, "--out", "run") == 0
    assert run("--resume", "--out", "run", "--iterations", 2, "--data", new) == 1
    assert "expected the same" in capsys.readouterr().err


@pytest.mark.slow
def test_a_copied_folder_of_images_is_another_place_with_a_note(tmp_path, monkeypatch, capsys):
    """Its fingerprint holds times, which a copy may change, so that it cannot prove a change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(old / f"{i}.png")
    flags = [*SMALL, "--data", old, "--image-size", 16]
    assert run(*flags, "--iterations", 1, "--out", tmp_path / "run") == 0
    old.rename(new)
    go_on = ["--resume", "--out", tmp_path / "run", "--device", "cpu", "--data", new]
    assert run(*go_on, "--iterations", 2) == 0
    assert "note:" not in capsys.readouterr().err
    os.utime(new / "0.png", (1, 1))
    assert run(*go_on, "--iterations", 3) == 0
    assert f"note: files in {new} have changed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_self_perceptual_model_can_be_moved_but_its_weight_stays(tmp_path, capsys):
    old, new = tmp_path / "frozen/checkpoint.pt", tmp_path / "moved.pt"
    assert run(*SMALL, "--model", "ddpm", "--iterations", 1, "--out", tmp_path / "frozen") == 0
    common = [*SMALL, "--self-perceptual", f"{old}=1"]
    assert run(*common, "--iterations", 2, "--out", tmp_path / "one") == 0
    assert run(*common, "--iterations", 1, "--out", tmp_path / "two") == 0
    old.rename(new)
    go_on = ["--resume", "--out", tmp_path / "two", "--device", "cpu", "--iterations", 2]
    assert run(*go_on) == 1 and str(old) in capsys.readouterr().err
    assert run(*go_on, "--self-perceptual", f"{new}=2") == 1
    assert "expected the same" in capsys.readouterr().err
    assert run(*go_on, "--self-perceptual", f"{new}=1") == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


# ---- published weights ----


@pytest.mark.slow
def test_a_resume_needs_no_published_weights(tmp_path):
    """What the run began with is in its checkpoint, trained further."""
    published = tmp_path / "published.pt"
    torch.save(UNet(3, 3, 16, channels=32, res_blocks=1).state_dict(), published)
    common = [*SMALL, "--init-eps", published]
    assert run(*common, "--iterations", 2, "--out", tmp_path / "one") == 0
    assert run(*common, "--iterations", 1, "--out", tmp_path / "two") == 0
    published.unlink()
    go_on = ["--resume", "--out", tmp_path / "two", "--device", "cpu"]
    assert run(*go_on, "--iterations", 2) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "flags, channels",
    [("--model casdm", 3), ("--model ddpm", 3), ("--model ddpm --learn-sigma", 6)],
)
def test_published_weights_start_the_network_that_predicts_eps(flags, channels, tmp_path):
    """Of a file with a learned variance a DDPM with one keeps all channels, others eps alone."""
    theirs = UNet(3, 6, 16, channels=32, res_blocks=1)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.05)
    torch.save(theirs.state_dict(), tmp_path / "published.pt")
    r = new_run(tmp_path, *flags.split(), "--init-eps", tmp_path / "published.pt")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 20])
    for model in (r.raw_model.eval(), r.ema):
        expected = theirs.eval()(x, model.time(t, x))
        pred = model(x, t)
        torch.testing.assert_close(pred.eps_hat, expected[:, :3], rtol=0, atol=0)
        if channels == 6:
            torch.testing.assert_close(pred.v, expected[:, 3:], rtol=0, atol=0)


def test_published_weights_of_another_kind_are_one_line(tmp_path, capsys):
    """A torch file that holds a list, or a head without a variance where one is to be learned."""
    file = tmp_path / "published.pt"
    flags = [*SMALL, "--model", "ddpm", "--init-eps", file, "--out", tmp_path / "run"]
    torch.save([torch.zeros(3)], file)
    assert run(*flags) == 1
    assert error_of(capsys).startswith(f"error: {file} holds a list; expected a dict")
    torch.save(UNet(3, 3, 16, channels=32, res_blocks=1).state_dict(), file)
    assert run(*flags, "--learn-sigma") == 1
    wrong = f"error: {file} has [3, 32, 3, 3] where this U-Net has out.2.weight"
    assert error_of(capsys).startswith(wrong)
    assert not (tmp_path / "run").exists()
