"""The loop and its promises: settings, resuming bit for bit, signals, non-finite numbers, full disks."""
import argparse
import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support import edges
import losses
import train
from support.curves import read_log
from data import Images
from refiner import build_model
from sample import load_model, read_checkpoint
from unet import UNet

ROOT = Path(__file__).parent.parent
SMALL = ["--channels", "32", "--res-blocks", "1", "--T", "20", "--batch-size", "4", "--sample-every", "0", "--device", "cpu"]


@pytest.fixture
def images(tmp_path):
    """Ten 16 x 16 images: with batches of 4 an epoch ends inside the third step."""
    path = tmp_path / "images.npz"
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8))
    return path


def run(*argv):
    return edges.run(train.main, [str(a) for a in argv])


def started(*argv, cwd=ROOT, **how):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, argv)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


def wait_for(path, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def assert_same_run(a, b):
    """Weights, averages, optimiser, sums and log are bitwise equal; only the clock may differ."""
    a_state, b_state = read_checkpoint(a / "checkpoint.pt"), read_checkpoint(b / "checkpoint.pt")
    different = [key for key in a_state if key != "settings" and not same(a_state[key], b_state[key])]
    assert not different, f"{different} differ"
    assert rows(a) == rows(b)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list) else a == b


def rows(folder):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_log(folder)]


# ---- settings ----

def test_the_papers_command_has_the_papers_settings():
    """`--model casdm --lpips 0.1 --data cifar10` is Cas-DM Sec. 4.1 (paper.md, Settings)."""
    s, _ = train.parse_args(["--model", "casdm", "--lpips", "0.1", "--data", "cifar10"])
    want = dict(channels=128, res_blocks=3, T=4000, schedule="cosine", batch_size=128, lr=1e-4, iterations=400_000, image_size=32,
                metric={"lpips": 0.1}, refiner="unet", refiner_input="x0", dropout=0.0, ema=0.9999, precision="fp32")
    assert {key: s[key] for key in want} == want


def test_what_is_typed_wins_over_the_datas_defaults():
    s, _ = train.parse_args(["--data", "cifar10", "--channels", "64", "--T", "1000", "--image-size", "16"])
    assert (s["channels"], s["T"], s["image_size"], s["res_blocks"]) == (64, 1000, 16, 3)


def test_shapes_are_small_and_need_no_flag():
    s, _ = train.parse_args([])
    assert (s["data"], s["model"], s["image_size"], s["channels"]) == ("shapes", "casdm", 16, 32)


TABLES = ["--model ddpm", "--model ddpm --predict x0", "--model ddpm --predict x0 --lpips 0.1", "--model dual", "--model dual --lpips 0.1", "--model casdm",
          "--model casdm --lpips 0.1", "--metric resnet=0.1", "--metric inception=0.1", "--metric swin=0.1", "--metric squeezenet=0.1", "--metric ssim=0.1 --metric haarpsi=0.2",
          "--refiner fixres", "--refiner fixres --lpips 0.1", "--refiner fixres --refiner-input x0+eps", "--data celebahq", "--data lsun-bedroom", "--data imagenet64"]


@pytest.mark.parametrize("line", TABLES)
def test_every_row_of_the_tables_is_a_command_line(line):
    """Cas-DM Tables 1, 3 and 4."""
    s, _ = train.parse_args(("--data cifar10 " * ("--data" not in line) + line).split())
    assert s["T"] == 4000


@pytest.mark.parametrize("line, says", [
    ("--model ddpm --lpips 0.1", "eps mode"), ("--model ddpm --refiner unet", "--refiner"), ("--model dual --predict x0", "--predict"),
    ("--model dual --init-eps f.pt", "--init-eps"), ("--model classifier --init-eps f.pt", "--init-eps"),
    ("--model ddpm --predict x0 --init-eps f.pt", "--init-eps"),
    ("--model ddpm --self-perceptual a.pt=1 --init-eps f.pt", "--init-eps"),
    ("--image-size 30", "30"), ("--channels 48", "48"), ("--lr nan", "nan"), ("--lr 0", "'0'"), ("--lr -1", "'-1'"),
    ("--lpips inf", "inf"), ("--lpips -0.1", "-0.1"), ("--metric vgg=1", "vgg=1"), ("--metric ssim", "ssim"), ("--metric ssim=x", "'x'"), ("--iterations 0", "'0'"), ("--batch-size 2.5", "2.5"),
    ("--dropout 1", "'1'"), ("--ema 1.1", "1.1"), ("--T 150", "100 sampling steps"), ("--T 150 --sample-every 0 --eval-every 5", "100 sampling steps"),
    ("--T 0", "'0'"), ("--model gan", "gan"), ("--mod ddpm", "--mod"), ("--seed -1", "-1"), ("--device tpu9", "tpu9"),
])
def test_what_the_flags_alone_show_to_be_wrong_is_one_line_and_exit_2(line, says, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(line.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and says in error, error


@pytest.mark.parametrize("line, says", [("--data nowhere", "nowhere"), ("--data celebahq", "--data-dir"), ("--resume --out nowhere", "nowhere"), ("--data shapes --device cuda:77", "cuda:77")])
def test_what_depends_on_files_or_devices_is_one_line_and_exit_1(line, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*line.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_all_that_is_missing_is_named_at_once(monkeypatch, capsys, tmp_path):
    """CIFAR-10 and the VGG weights both: what, how large, from where, where to put it, what to do instead."""
    def offline(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run("--model", "casdm", "--lpips", "0.1", "--metric-size", "64", "--data", "cifar10", "--device", "cpu") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    for word in ("cifar-10-python.tar.gz", "170 MB", "cs.toronto.edu", "vgg16-397923af.pth", "528 MB", "lpips_weights.pt", "by hand", "--data shapes"):
        assert word in error, word


@pytest.mark.parametrize("labels, missing", [([1, 2, 3], "0"), ([0, 5, 5], "1"),
                                             ([2 ** 60, 0, 1], "2")])
@pytest.mark.parametrize("flags", [["--class-cond"], ["--model", "classifier"]])
def test_labels_with_a_gap_are_refused_and_the_missing_ones_named(labels, missing, flags, tmp_path,
                                                                  capsys):
    """A class without images would be trained by nothing and sampled all the same."""
    pixels = np.zeros((3, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "gap.npz", arr_0=pixels, arr_1=np.array(labels))
    flags = [*SMALL, *flags, "--iterations", 1, "--data", tmp_path / "gap.npz"]
    assert run(*flags, "--out", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert f"no image of {missing};" in error and not (tmp_path / "run").exists()


def test_a_run_begun_with_a_gap_in_its_labels_can_still_go_on():
    s, _ = train.parse_args(["--class-cond"])
    gap = Images(np.zeros((2, 16, 16, 3), np.uint8), np.array([1, 2]), "gap.npz", "")
    assert train.classes(s | {"num_classes": 3}, gap) == 3


def test_a_judge_of_another_image_size_is_refused_where_the_images_bring_theirs(images, tmp_path,
                                                                               capsys):
    judge = tmp_path / "judge/checkpoint.pt"
    flags = [*SMALL, "--iterations", 1]
    large = ["--model", "ddpm", "--image-size", 32]
    assert run(*flags, *large, "--out", tmp_path / "judge") == 0
    flags += ["--data", images, "--self-perceptual", f"{judge}=1"]
    assert run(*flags, "--out", tmp_path / "run") == 1
    assert "has image_size 32 where the other model has 16" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- what a run leaves ----

def test_a_run_leaves_a_checkpoint_a_log_curves_and_samples(tmp_path, capsys):
    assert run(*SMALL, "--T", "10", "--iterations", "10", "--sample-every", "10", "--out", tmp_path / "run") == 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "curves.png", "log.jsonl", "samples_000010.png"]
    said = capsys.readouterr().out
    assert str(tmp_path / "run") in said and "sample.py" in said.splitlines()[-2]
    row, = read_log(tmp_path / "run")
    assert row["step"] == 10 and row["loss"] == pytest.approx(row["eps"] + row["x0"] + row["mu"]) and row["images_per_second"] > 0


def test_zero_means_never_but_the_last_step_is_saved(tmp_path):
    assert run(*SMALL, "--iterations", "2", "--save-every", "0", "--out", tmp_path / "run") == 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]
    assert read_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("flags", ["--model ddpm", "--model ddpm --predict x0 --metric ssim=0.1", "--model dual --metric ssim=0.1 --metric haarpsi=0.1",
                                   pytest.param("--refiner fixres --refiner-input x0+eps", marks=pytest.mark.slow), "--precision bf16 --metric ssim=1"])
def test_every_model_trains_and_samples(flags, tmp_path):
    """Its loss falls on one repeated image, and its checkpoint opens."""
    np.savez(tmp_path / "one.npz", arr_0=np.full((1, 16, 16, 3), 200, np.uint8))
    assert run(*SMALL, *flags.split(), "--iterations", "30", "--lr", "2e-3", "--data", tmp_path / "one.npz", "--out", tmp_path / "run") == 0
    first, *_, last = rows(tmp_path / "run")
    assert last["loss"] < 0.8 * first["loss"]
    load_model(tmp_path / "run/checkpoint.pt")


def test_the_moving_average_is_ramped_and_a_plain_recursion(tmp_path):
    """ema <- d ema + (1 - d) weights with d = min(0.9999, (1 + k) / (10 + k)), k = 0, 1, ..."""
    s, _ = train.parse_args([*SMALL, "--iterations", "3"])
    images, *_ = train.load_inputs(s)
    r = train.Run(s, tmp_path, torch.device("cpu"), images, {})
    want = r.averages[0].double().clone()
    for k in range(3):
        r.weights[0].data.add_(1.0)
        r.step = k
        d = (1 + k) / (10 + k)
        want = d * want + (1 - d) * r.weights[0].detach().double()
        r.update_ema()
    torch.testing.assert_close(r.averages[0].double(), want, rtol=0, atol=1e-5)
    assert not any(average.requires_grad for average in r.averages), "an average carries the graph of every step before it"


def test_metrics_never_enter_the_model_or_the_checkpoint(tmp_path, monkeypatch):
    home = ROOT / "../shared/data/torch_home"
    if not home.exists():
        pytest.skip("no SqueezeNet weights in ../shared/data")
    monkeypatch.setenv("TORCH_HOME", str(home))
    for name, flags in (("plain", []), ("metric", ["--metric", "squeezenet=0.1"])):
        assert run(*SMALL, "--iterations", "1", "--out", tmp_path / name, *flags) == 0
    plain, metric = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("plain", "metric"))
    for part in ("model", "ema"):
        assert plain[part].keys() == metric[part].keys()
    assert len(plain["optimizer"]["state"]) == len(metric["optimizer"]["state"])


def test_metric_size_is_the_networks_own_and_stays_with_the_run(tmp_path, monkeypatch, images):
    """--metric-size replaces the paper's 224, for networks alone, and a resumed run has it too."""
    made = []

    def network():
        extractor = torch.nn.Identity()
        extractor.forward = lambda x: {"pixels": x}
        made.append(losses.FeatureDistance(extractor))
        return made[-1]
    monkeypatch.setitem(losses.METRICS, "squeezenet", network)
    flags = [*SMALL, "--data", images, "--metric", "squeezenet=0.1", "--out", tmp_path]
    assert run(*flags, "--metric", "ssim=0.1", "--metric-size", "48", "--iterations", "1") == 0
    assert run("--resume", "--out", tmp_path, "--iterations", "2") == 0
    assert [metric.size for metric in made] == [48, 48]
    assert made[0].features(torch.zeros(1, 3, 16, 16))[0].shape == (1, 3, 48, 48)


@pytest.mark.parametrize("metric", [[], ["--metric", "ssim=0.1"]])
def test_metric_size_without_a_network_is_one_line(metric, tmp_path, capsys):
    assert run(*SMALL, *metric, "--metric-size", "64", "--out", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --metric-size 64") and error.count("\n") == 1 and not (tmp_path / "run").exists()


class Features(torch.nn.Module):
    """Stands in for FID's network: a few moments of the pixels."""
    name = "stand-in"

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(1, 1)

    def forward(self, batch):
        x = batch.flatten(2).float() / 255
        pool = torch.cat([x.mean(2), x.std(2)], 1)
        return pool, pool[:, :3], pool


@pytest.mark.slow
def test_evaluations_are_logged_and_the_best_checkpoint_is_kept(images, tmp_path, monkeypatch):
    """best.pt is the checkpoint of the least FID in the log, and the data's statistics are computed once."""
    monkeypatch.setattr(train.fid, "InceptionFeatures", Features)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [*SMALL, "--data", images, "--eval-every", 3, "--eval-samples", 8, "--lr", "0.01", "--iterations", 12]
    assert run(*flags, "--out", tmp_path / "run") == 0
    scored = [row for row in read_log(tmp_path / "run") if "loss" not in row]
    assert [row["step"] for row in scored] == [3, 6, 9, 12] and all({"fid", "sfid", "is"} <= row.keys() for row in scored)
    assert read_checkpoint(tmp_path / "run/best.pt")["step"] == min(scored, key=lambda row: row["fid"])["step"]
    assert len(list((tmp_path / "cache").rglob("*stand-in*"))) == 1
    load_model(tmp_path / "run/best.pt")


@pytest.mark.slow
def test_an_evaluation_that_was_cut_off_is_made_up_for(images, tmp_path, monkeypatch):
    """The run was stopped in its last evaluation: --resume does it, and then there is nothing left to do."""
    monkeypatch.setattr(train.fid, "InceptionFeatures", Features)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [*SMALL, "--data", images, "--eval-every", 2, "--eval-samples", 4, "--iterations", 4]
    assert run(*flags, "--out", tmp_path / "one") == 0
    with monkeypatch.context() as m:
        def stops(self, stop):
            stop.asked = self.step == 4
            if stop.asked:
                stop.check()
            evaluate(self, stop)
        evaluate = train.Run.evaluate
        m.setattr(train.Run, "evaluate", stops)
        run(*flags, "--out", tmp_path / "two")
    assert len(rows(tmp_path / "two")) == 1
    assert run("--resume", "--out", tmp_path / "two", "--device", "cpu") == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


# ---- stopping and going on ----

@pytest.mark.parametrize("cut, flags", [(7, ["--dropout", "0.1"]), pytest.param(20, [], marks=pytest.mark.slow)])
def test_two_goes_equal_one_go_bit_for_bit(cut, flags, images, tmp_path):
    """Weights, EMA, optimiser and log; the cut lies between two rows of the log and across an epoch's end."""
    common = [*SMALL, *flags, "--data", images]
    assert run(*common, "--iterations", 23, "--save-every", 0, "--out", tmp_path / "one") == 0
    assert run(*common, "--iterations", cut, "--save-every", 3, "--out", tmp_path / "two") == 0
    assert run("--resume", "--iterations", 23, "--out", tmp_path / "two", "--device", "cpu") == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_resume_of_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    assert run(*SMALL, "--iterations", 2, "--out", tmp_path / "run") == 0
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()}
    assert run("--resume", "--out", tmp_path / "run") == 0
    assert "finished" in capsys.readouterr().out
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("flags, names", [("--lr 0.5", "--lr"), ("--model dual", "--model"), ("--metric ssim=0.2", "--metric"), ("--seed 3", "--seed")])
def test_resume_refuses_a_changed_setting_and_names_it(flags, names, tmp_path, capsys):
    assert run(*SMALL, "--iterations", 1, "--out", tmp_path / "run") == 0
    assert run("--resume", "--iterations", 2, "--out", tmp_path / "run", *flags.split()) == 1
    assert names in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 1


def test_a_run_and_its_images_can_be_moved(images, tmp_path):
    """The run's folder and its .npz go elsewhere between two steps; the end is bitwise the same."""
    common = [*SMALL, "--data", images]
    assert run(*common, "--iterations", 4, "--out", tmp_path / "one") == 0
    assert run(*common, "--iterations", 2, "--out", tmp_path / "two") == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place, moved = elsewhere / "two", elsewhere / "pixels.npz"
    (tmp_path / "two").rename(place)
    images.rename(moved)
    go_on = ["--resume", "--out", place, "--device", "cpu"]
    assert run(*go_on, "--data", moved, "--iterations", 3) == 0
    assert run(*go_on, "--iterations", 4) == 0, "the new place was not kept"
    assert_same_run(tmp_path / "one", place)


@pytest.mark.parametrize("typed", [True, False])
def test_a_resume_with_other_images_in_an_npz_is_refused(typed, images, tmp_path, capsys):
    """Whether they lie at a new place or took the old one."""
    assert run(*SMALL, "--data", images, "--iterations", 1, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    other = tmp_path / "other.npz" if typed else images
    np.savez(other, arr_0=np.zeros((10, 16, 16, 3), np.uint8))
    capsys.readouterr()
    change = ["--data", other] if typed else []
    assert run("--resume", "--out", tmp_path / "run", "--iterations", 2, *change) == 1
    error = capsys.readouterr().err
    assert f"error: {other} is not what this run began with" in error and error.count("\n") == 1
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("old, new", [("shapes", "images.npz"), ("images.npz", "shapes")])
def test_a_named_set_and_a_path_are_never_one_anothers_place(old, new, images, tmp_path,
                                                             monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*SMALL, "--data", old, "--iterations", 1, "--out", "run") == 0
    assert run("--resume", "--out", "run", "--iterations", 2, "--data", new) == 1
    assert "expected the same" in capsys.readouterr().err


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


def test_the_place_of_cifar10_is_kept_where_the_run_found_it(tmp_path, monkeypatch):
    """Without --data-dir it is ./data: of the folder in which the run began, not of any later."""
    monkeypatch.chdir(tmp_path)
    s, _ = train.parse_args(["--data", "cifar10"])
    assert s["data_dir"] == str(tmp_path / "data")
    typed, _ = train.parse_args(["--data", "cifar10", "--data-dir", "cifar10"])
    assert typed["data_dir"] == str(tmp_path / "cifar10")


def test_a_resume_needs_no_published_weights(tmp_path):
    """What the run began with is in its checkpoint, trained further."""
    published = tmp_path / "published.pt"
    s, _ = train.parse_args(SMALL)
    torch.save(build_model(s).eps_net.state_dict(), published)
    common = [*SMALL, "--init-eps", published]
    assert run(*common, "--iterations", 2, "--out", tmp_path / "one") == 0
    assert run(*common, "--iterations", 1, "--out", tmp_path / "two") == 0
    published.unlink()
    go_on = ["--resume", "--out", tmp_path / "two", "--device", "cpu"]
    assert run(*go_on, "--iterations", 2) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("flags, channels", [("--model casdm", 3), ("--model ddpm", 3),
                                             ("--model ddpm --learn-sigma", 6)])
def test_published_weights_start_the_network_that_predicts_eps(flags, channels, tmp_path):
    """Of a file with a learned variance a DDPM with one keeps all channels, the others eps alone."""
    theirs = UNet(3, 6, 16, channels=32, res_blocks=1)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.05)
    torch.save(theirs.state_dict(), tmp_path / "published.pt")
    s, _ = train.parse_args([*SMALL, *flags.split(), "--init-eps", str(tmp_path / "published.pt")])
    images, *_ = train.load_inputs(s)
    r = train.Run(s, tmp_path, torch.device("cpu"), images, {})
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 20])
    for model in (r.model.eval(), r.ema):
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
    torch.save(UNet(3, 3, 16, channels=32, res_blocks=1).state_dict(), file)
    assert run(*flags, "--learn-sigma") == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {file} holds a list; expected a dict")
    assert second.startswith(f"error: {file} has [3, 32, 3, 3] where this U-Net has out.2.weight")
    assert not (tmp_path / "run").exists()


def test_a_self_perceptual_judge_can_be_moved_but_its_weight_stays(tmp_path, capsys):
    old, new = tmp_path / "judge/checkpoint.pt", tmp_path / "moved.pt"
    assert run(*SMALL, "--model", "ddpm", "--iterations", 1, "--out", tmp_path / "judge") == 0
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


@pytest.mark.parametrize("begun, changed, says", [
    ("", "--accumulate 3", "multiple of 1 processes x --accumulate 3"),
    ("", "--accumulate 16", "multiple of 1 processes x --accumulate 16"),
    ("--model classifier", "--sample-every 5", "makes no images"),
    ("--model classifier", "--eval-every 5", "makes no images"),
    ("--T 150", "--sample-every 5", "100 sampling steps"),
    ("--T 150", "--eval-every 5", "100 sampling steps"),
])
def test_a_resume_is_checked_on_the_settings_it_comes_to(begun, changed, says, tmp_path, capsys):
    """Before anything is done: one line, exit 1, since it depends on the checkpoint."""
    assert run(*SMALL, *begun.split(), "--iterations", 1, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert run("--resume", "--iterations", 2, "--out", tmp_path / "run", *changed.split()) == 1
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error and not out
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


def test_a_resume_by_another_number_of_processes_is_checked(tmp_path, monkeypatch):
    assert run(*SMALL, "--iterations", 1, "--out", tmp_path / "run") == 0
    monkeypatch.setattr("parallel.processes", lambda: 3)
    with pytest.raises(ValueError, match="--batch-size 4: expected a multiple of 3 processes"):
        train.reopen(tmp_path / "run", {})


def test_another_run_is_never_written_over(tmp_path, capsys):
    assert run(*SMALL, "--iterations", 1, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    assert run(*SMALL, "--iterations", 1, "--out", tmp_path / "run") == 1
    assert "holds a run" in capsys.readouterr().err and (tmp_path / "run/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("saved", [5, pytest.param(10, marks=pytest.mark.slow)])
def test_a_row_that_a_killed_process_left_unfinished_is_cut_off(saved, images, tmp_path):
    common = [*SMALL, "--data", images]
    assert run(*common, "--iterations", 20, "--out", tmp_path / "one") == 0
    assert run(*common, "--iterations", saved, "--out", tmp_path / "two") == 0
    with open(tmp_path / "two/log.jsonl", "a") as f:
        f.write('{"step": 20, "eps": 0.1, "loss": 0.1}\n{"step": 30, "ep')      # a row beyond the checkpoint, and half a row
    assert run("--resume", "--iterations", 20, "--out", tmp_path / "two", "--device", "cpu") == 0
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("moment, after", [
    ("train.training_losses", ""), ("support.run.write_checkpoint", ""), ("torch.save", ""), ("os.replace", "checkpoint.pt"), ("support.run.save_grid", "checkpoint.pt"),
    ("sample.p_sample", "checkpoint.pt"), ("fid.features_of", "checkpoint.pt"), ("fid.frechet_distance", "checkpoint.pt"), ("sample.p_sample", "samples_000002.png"),
    ("fid.frechet_distance", "samples_000004.png")])
def test_a_signal_inside_any_moment_saves_and_nothing_is_lost(moment, after, images, tmp_path, monkeypatch, capsys):
    """In a step, around and inside the writing of a checkpoint, in a grid, in sampling, in an evaluation, also the last: 130, and the same end."""
    monkeypatch.setattr(train.fid, "InceptionFeatures", Features)
    monkeypatch.setattr("support.run.GRID", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = [*SMALL, "--data", images, "--sample-every", 2, "--eval-every", 2, "--eval-samples", 4, "--iterations", 4]
    assert run(*flags, "--out", tmp_path / "one") == 0
    module, name = moment.split(".")
    original, sent = getattr(importlib.import_module(module), name), []

    def interrupted(*a, **how):
        if not sent and (tmp_path / "two" / after).exists():
            sent.append(signal.raise_signal(signal.SIGTERM if "s" in name else signal.SIGINT))
        return original(*a, **how)
    with monkeypatch.context() as m:
        m.setattr(moment, interrupted)
        code = run(*flags, "--out", tmp_path / "two")
    complete = code == 0 and after == "samples_000004.png"      # nothing was left to abandon
    assert sent and (complete or (code == 130 and "python train.py --resume --out" in capsys.readouterr().out))
    load_model(tmp_path / "two/checkpoint.pt")
    assert run("--resume", "--out", tmp_path / "two", "--device", "cpu") == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == sorted(f.name for f in (tmp_path / "two").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_exits_130(number, images, tmp_path):
    """And going on by that very command ends bitwise where the undisturbed run does."""
    flags = [*SMALL, "--data", images, "--iterations", 60, "--save-every", 0]
    assert run(*flags, "--out", tmp_path / "one") == 0
    p = started(*flags, "--out", tmp_path / "two", cwd=tmp_path)
    wait_for(tmp_path / "two/log.jsonl")
    p.send_signal(number)
    said = p.communicate(timeout=60)[0]
    assert p.returncode == 130, said
    command = said.split("to go on: python ")[1].split()
    subprocess.run([sys.executable, ROOT / command[0], *command[1:], "--device", "cpu"], cwd=tmp_path, check=True, capture_output=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_with_the_last_checkpoint_whole(images, tmp_path):
    """A second apart, in a step that takes several: it is left undone."""
    flags = ["--batch-size", 512, "--iterations", 100, "--save-every", 1]
    p = started(*SMALL, *flags, "--data", images, "--out", tmp_path / "run")
    wait_for(tmp_path / "run/checkpoint.pt")
    p.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=20)[0]
    assert p.returncode == 130 and "stopped at step" not in said
    load_model(tmp_path / "run/checkpoint.pt")


@pytest.mark.slow
def test_a_kill_leaves_the_last_checkpoint_and_going_on_loses_nothing(images, tmp_path):
    flags = [*SMALL, "--data", images, "--iterations", 60, "--save-every", 1]
    assert run(*flags, "--out", tmp_path / "one") == 0
    p = started(*flags, "--out", tmp_path / "two")
    for _ in range(3):
        wait_for(tmp_path / "two/checkpoint.pt")
        time.sleep(1)
        p.kill()
        p.communicate()
        p = started("--resume", "--out", tmp_path / "two", "--device", "cpu")
    assert p.wait(timeout=120) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert not list((tmp_path / "two").glob(".*partial"))


# ---- numbers, and disks ----

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_term_stops_the_run_before_the_step_and_is_named(value, images, tmp_path, monkeypatch, capsys):
    calls = []

    def fails_on_the_third():
        return lambda x0_hat, x0: (calls.append(1), (x0_hat - x0).square().mean((1, 2, 3)) * (value if len(calls) == 3 else 1))[1]
    monkeypatch.setitem(losses.METRICS, "ssim", fails_on_the_third)
    common = [*SMALL, "--data", images, "--metric", "ssim=0.5"]
    assert run(*common, "--iterations", 9, "--save-every", 1, "--out", tmp_path / "bad") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 3: ssim is not finite")
    calls.clear()
    assert run(*common, "--iterations", 2, "--out", tmp_path / "good") == 0
    assert_same_run(tmp_path / "bad", tmp_path / "good")


def test_a_non_finite_gradient_of_finite_losses_is_caught(tmp_path):
    """The weights, moments and later steps stay untouched, and the check names the gradient."""
    s, _ = train.parse_args([*SMALL])
    images, *_ = train.load_inputs(s)
    r = train.Run(s, tmp_path, torch.device("cpu"), images, {})
    for p in r.weights:
        p.grad = torch.ones_like(p)
    r.weights[3].grad[0] = float("nan")
    before = [p.detach().clone() for p in r.weights]
    r.note({name: torch.tensor(1.0) for name in r.terms})
    r.guard(argparse.Namespace(asked=False))
    r.optimizer.step()
    torch.testing.assert_close([p.detach() for p in r.weights], before, rtol=0, atol=0)
    with pytest.raises(ArithmeticError, match="step 1: gradient is not finite"):
        r.check()


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_whole_and_says_so(tmp_path):
    """The file size limit stands in for the full disk: the second checkpoint does not fit."""
    assert run(*SMALL, "--iterations", 1, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run/checkpoint.pt").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
    p = started("--resume", "--iterations", 2, "--out", tmp_path / "run", "--device", "cpu", preexec_fn=limit)
    said = p.communicate(timeout=120)[0].splitlines()[-1]
    assert p.returncode == 1 and said.startswith("error: no room for") and "checkpoint.pt" in said and "MB" in said
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint.pt"]


@pytest.mark.slow
def test_compiled_training_follows_eager_training(images, tmp_path):
    common = [*SMALL, "--data", images, "--iterations", 10]
    assert run(*common, "--out", tmp_path / "eager") == 0
    assert run(*common, "--compile", "--out", tmp_path / "compiled") == 0
    eager, compiled = rows(tmp_path / "eager")[0], rows(tmp_path / "compiled")[0]
    assert compiled == {k: pytest.approx(v, rel=1e-3) for k, v in eager.items()}
