"""The loop and its promises: what a run leaves, resuming bit for bit, signals, bad numbers."""

import importlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import train
from diffusion import q_sample
from losses import Batch, objective, training_losses
from made import random_pixels
from metrics import METRICS
from runs import (
    ROOT,
    SMALL,
    assert_same_run,
    error_of,
    file_names,
    new_run,
    rows,
    run,
    started,
    wait_for,
)
from sample import load_model
from support import cli
from support.checkpoint import read_checkpoint
from support.pictures import read_log
from support.run import Run
from tiny import Tiny


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """Evaluations by a small stand-in for FID's network, and a cache of the test's own."""
    monkeypatch.setattr("fid.InceptionFeatures", Tiny)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- what a run leaves ----


def test_a_run_leaves_a_checkpoint_a_log_curves_and_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("support.run.GRID", 4)
    monkeypatch.setattr("support.run.LOG_EVERY", 2)
    flags = [*SMALL, "--T", 4, "--iterations", 2, "--sample-every", 2]
    assert run(*flags, "--out", tmp_path / "run") == 0
    left = ["checkpoint.pt", "curves.png", "log.jsonl", "samples_000002.png"]
    assert file_names(tmp_path / "run") == left
    said = capsys.readouterr().out
    assert str(tmp_path / "run") in said and "sample.py" in said.splitlines()[-2]
    [row] = read_log(tmp_path / "run")
    assert row["step"] == 2 and row["images_per_second"] > 0
    assert row["loss"] == pytest.approx(row["eps"] + row["x0"] + row["mu"])


def test_zero_means_never_but_the_last_step_is_saved(tmp_path):
    flags = [*SMALL, "--model", "ddpm", "--iterations", 2, "--save-every", 0]
    assert run(*flags, "--out", tmp_path / "run") == 0
    assert file_names(tmp_path / "run") == ["checkpoint.pt"]
    assert read_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 2


FIXRES = "--refiner fixres --refiner-input x0+eps"


@pytest.mark.parametrize(
    "flags",
    [
        "--model ddpm",
        "--model ddpm --predict x0 --metric ssim=0.1",
        "--model dual --metric ssim=0.1 --metric haarpsi=0.1",
        pytest.param(FIXRES, marks=pytest.mark.slow),
        pytest.param("--precision bf16 --metric ssim=1", marks=pytest.mark.slow),
    ],
)
def test_every_model_learns_one_repeated_image(flags, tmp_path, monkeypatch):
    """Its loss falls, and its checkpoint opens."""
    monkeypatch.setattr("support.run.LOG_EVERY", 4)
    np.savez(tmp_path / "one.npz", arr_0=np.full((1, 16, 16, 3), 200, np.uint8))
    flags = [*SMALL, *flags.split(), "--batch-size", 2, "--iterations", 12, "--lr", 2e-3]
    assert run(*flags, "--data", tmp_path / "one.npz", "--out", tmp_path / "run") == 0
    first, *_, last = rows(tmp_path / "run")
    assert last["loss"] < 0.7 * first["loss"]
    load_model(tmp_path / "run/checkpoint.pt")


@pytest.mark.parametrize("ema", [0.9999, 0.15], ids=["ramp", "capped from the second step"])
def test_three_steps_equal_adamw_and_the_moving_average_written_out(ema, tmp_path):
    """ema <- d ema + (1 - d) weights with d = min(--ema, (1 + k) / (10 + k)), k = 0, 1, ...

    torch's fused AdamW on both sides, so that the weights are the same bit for bit.
    """
    flags = ["--iterations", 3, "--ema", ema]
    r = new_run(tmp_path, *flags)
    plain = new_run(tmp_path, *flags)  # the same weights and draws
    model, average = plain.raw_model, [p.double().clone() for p in plain.averages]
    lr = plain.settings["lr"]
    adamw = torch.optim.AdamW(plain.weights, lr=lr, weight_decay=0.0, fused=True)
    for k in range(3):
        plain.step = k
        [(x0, t, eps, rest)] = plain.draw()
        x_t = q_sample(x0, t, eps, plain.schedule)
        batch = Batch(x0, t, eps, x_t, **rest)
        adamw.zero_grad()
        objective(training_losses(model, batch, {}), plain.lambdas, batch)["loss"].backward()
        adamw.step()
        d = min(ema, (1 + k) / (10 + k))
        for mean, p in zip(average, plain.weights, strict=True):
            mean.mul_(d).add_(p.detach(), alpha=1 - d)
    assert train.train(r)
    for ours, theirs in zip(r.weights, plain.weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for ours, theirs in zip(r.averages, average, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_metrics_never_enter_the_model_or_the_checkpoint(tmp_path, monkeypatch):
    home = ROOT / "../shared/data/torch_home"
    if not home.exists():
        pytest.skip("no SqueezeNet weights in ../shared/data")
    monkeypatch.setenv("TORCH_HOME", str(home))
    states = []
    for name, flags in (("plain", []), ("metric", ["--metric", "squeezenet=0.1"])):
        assert run(*SMALL, "--iterations", 1, "--out", tmp_path / name, *flags) == 0
        states.append(read_checkpoint(tmp_path / name / "checkpoint.pt"))
    plain, metric = states
    for part in ("model", "ema"):
        assert plain[part].keys() == metric[part].keys()
    assert len(plain["optimizer"]["state"]) == len(metric["optimizer"]["state"])


@pytest.mark.slow
def test_evaluations_are_logged_and_the_best_checkpoint_is_kept(images, scored, tmp_path):
    """best.pt is the checkpoint of the least FID; the data's statistics are computed once."""
    flags = [*SMALL, "--model", "ddpm", "--T", 4, "--data", images, "--lr", 0.01]
    flags += ["--eval-every", 1, "--eval-samples", 8, "--iterations", 4]
    assert run(*flags, "--out", tmp_path / "run") == 0
    scores = [row for row in read_log(tmp_path / "run") if "loss" not in row]
    assert [row["step"] for row in scores] == [1, 2, 3, 4]
    assert all({"n", "fid", "sfid", "is"} <= row.keys() for row in scores)
    best = min(scores, key=lambda row: row["fid"])
    assert read_checkpoint(tmp_path / "run/best.pt")["step"] == best["step"]
    assert len(list((tmp_path / "cache").rglob("*inception-0*"))) == 1
    load_model(tmp_path / "run/best.pt")


@pytest.mark.slow
def test_an_evaluation_that_was_cut_off_is_made_up_for(images, scored, tmp_path, monkeypatch):
    """The run was stopped in its last evaluation: --resume does it, and nothing is left to do."""
    flags = [*SMALL, "--model", "ddpm", "--T", 4, "--data", images]
    flags += ["--eval-every", 2, "--eval-samples", 4, "--iterations", 4]
    assert run(*flags, "--out", tmp_path / "one") == 0

    def stops(self, evaluate=Run.evaluate):
        self.stop.asked = self.step == 4
        self.stop.check()
        evaluate(self)

    with monkeypatch.context() as m:
        m.setattr(Run, "evaluate", stops)
        assert run(*flags, "--out", tmp_path / "two") == 130
    assert len(rows(tmp_path / "two")) == 1
    assert run("--resume", "--out", tmp_path / "two", "--device", "cpu") == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


# ---- stopping and going on ----


@pytest.mark.parametrize(
    "cut, end, flags",
    [(3, 4, ["--dropout", "0.1"]), pytest.param(4, 5, [], marks=pytest.mark.slow)],
)
def test_two_goes_equal_one_go_bit_for_bit(cut, end, flags, images, tmp_path, monkeypatch):
    """Weights, EMA, optimiser and log.

    The cut at 3 lies between two rows of the log, and the run crosses the end of an epoch.
    """
    monkeypatch.setattr("support.run.LOG_EVERY", 2)
    common = [*SMALL, *flags, "--data", images]
    one = [*common, "--iterations", end, "--save-every", 0]
    two = [*common, "--iterations", cut, "--save-every", 2]
    assert run(*one, "--out", tmp_path / "one") == 0
    assert run(*two, "--out", tmp_path / "two") == 0
    go_on = ["--resume", "--out", tmp_path / "two", "--device", "cpu"]
    assert run(*go_on, "--iterations", end) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_resume_of_a_finished_run_says_so_and_changes_nothing(begun_run, capsys):
    def left():
        files = begun_run.iterdir()
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = left()
    assert run("--resume", "--out", begun_run) == 0
    assert "finished" in capsys.readouterr().out
    assert left() == before


@pytest.mark.parametrize("left", ["log.jsonl", "best.pt", "samples_000600.png"])
def test_what_a_run_without_a_checkpoint_left_is_not_taken_for_the_next_ones(
    left, tmp_path, capsys
):
    (tmp_path / left).touch()
    assert run(*SMALL, "--iterations", 1, "--out", tmp_path) == 1
    error = error_of(capsys)
    assert f"{left} is of a run that has no checkpoint.pt" in error
    assert "remove it" in error
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_another_run_is_never_written_over(begun_run, capsys):
    before = (begun_run / "checkpoint.pt").read_bytes()
    assert run(*SMALL, "--iterations", 1, "--out", begun_run) == 1
    assert "holds a run" in capsys.readouterr().err
    assert (begun_run / "checkpoint.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("saved", [1, 2])
def test_a_row_that_a_killed_process_left_unfinished_is_cut_off(
    saved, images, tmp_path, monkeypatch
):
    """So is a row beyond the checkpoint."""
    monkeypatch.setattr("support.run.LOG_EVERY", 2)
    common = [*SMALL, "--model", "ddpm", "--data", images]
    assert run(*common, "--iterations", 4, "--out", tmp_path / "one") == 0
    assert run(*common, "--iterations", saved, "--out", tmp_path / "two") == 0
    with open(tmp_path / "two/log.jsonl", "a") as f:
        f.write('{"step": 4, "eps": 0.1, "loss": 0.1}\n{"step": 6, "ep')
    go_on = ["--resume", "--out", tmp_path / "two", "--device", "cpu"]
    assert run(*go_on, "--iterations", 4) == 0
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(flags, folder) of a run with grids and evaluations in which no signal comes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    np.savez(folder / "images.npz", arr_0=random_pixels(10, 16, 16))
    flags = [*SMALL, "--model", "dual", "--T", 4, "--data", folder / "images.npz"]
    flags += ["--iterations", 4, "--sample-every", 2, "--eval-every", 2, "--eval-samples", 4]
    with pytest.MonkeyPatch.context() as m:
        m.setattr("fid.InceptionFeatures", Tiny)
        m.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        m.setattr("support.run.GRID", 4)
        assert run(*flags, "--out", folder / "run") == 0
    return flags, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment, number, once_there_is",
    [
        ("train.training_losses", INT, ""),  # in a step
        ("support.run.write_checkpoint", TERM, ""),  # around and inside a save
        ("torch.save", TERM, ""),
        ("os.replace", INT, "checkpoint.pt"),
        ("support.pictures.save_grid", TERM, "checkpoint.pt"),  # in a grid
        ("sample.clean_estimates", INT, "checkpoint.pt"),
        ("support.run.features_of", TERM, "checkpoint.pt"),  # in an evaluation
        ("fid.frechet_distance", INT, "checkpoint.pt"),
        ("sample.clean_estimates", TERM, "samples_000002.png"),
        ("fid.frechet_distance", INT, "samples_000004.png"),  # in the last
    ],
)
def test_a_signal_inside_any_moment_saves_and_nothing_is_lost(
    moment, number, once_there_is, undisturbed, scored, tmp_path, monkeypatch, capsys
):
    """It exits with 130, and going on ends where the undisturbed run does."""
    monkeypatch.setattr("support.run.GRID", 4)
    (flags, one), two = undisturbed, tmp_path / "two"
    module, _, name = moment.rpartition(".")
    original = getattr(importlib.import_module(module), name)
    sent = []

    def interrupted(*args, **how):
        if not sent and (two / once_there_is).exists():
            sent.append(number)
            signal.raise_signal(number)
        return original(*args, **how)

    with monkeypatch.context() as m:
        m.setattr(moment, interrupted)
        code = run(*flags, "--out", two)
    assert sent
    if once_there_is != "samples_000004.png":  # there nothing is left to abandon
        assert code == 130 and "python train.py --resume --out" in capsys.readouterr().out
    load_model(two / "checkpoint.pt")
    assert run("--resume", "--out", two, "--device", "cpu") == 0
    assert_same_run(one, two)
    assert file_names(one) == file_names(two)


@pytest.fixture(scope="module")
def sixty_steps(tmp_path_factory):
    """(flags, folder) of a DDPM's run that nothing stops."""
    folder = tmp_path_factory.mktemp("sixty_steps")
    np.savez(folder / "images.npz", arr_0=random_pixels(10, 16, 16))
    flags = [*SMALL, "--model", "ddpm", "--data", folder / "images.npz", "--iterations", 60]
    assert run(*flags, "--out", folder / "run") == 0
    return flags, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_go_on_and_exits_130(number, sixty_steps, tmp_path):
    """And going on by that very command ends bitwise where the undisturbed run does."""
    flags, one = sixty_steps
    p = started(*flags, "--save-every", 0, "--out", tmp_path / "two", cwd=tmp_path)
    wait_for(tmp_path / "two/log.jsonl", p)
    p.send_signal(number)
    said = p.communicate(timeout=60)[0]
    assert p.returncode == 130, said
    script, *argv = said.split("to go on: python ")[1].split()
    again = [sys.executable, ROOT / script, *argv, "--device", "cpu"]
    subprocess.run(again, cwd=tmp_path, check=True, capture_output=True)
    assert_same_run(one, tmp_path / "two")


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_with_the_last_checkpoint_whole(images, tmp_path):
    """A second apart, in a step that takes several: it is left undone."""
    flags = [*SMALL, "--batch-size", 512, "--iterations", 100, "--save-every", 1]
    p = started(*flags, "--data", images, "--out", tmp_path / "run")
    wait_for(tmp_path / "run/checkpoint.pt", p)
    p.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=20)[0]
    assert p.returncode == 130 and "stopped at step" not in said
    load_model(tmp_path / "run/checkpoint.pt")


@pytest.mark.slow
def test_a_kill_leaves_the_last_checkpoint_and_going_on_loses_nothing(sixty_steps, tmp_path):
    flags, one = sixty_steps
    p = started(*flags, "--save-every", 1, "--out", tmp_path / "two")
    for _ in range(2):
        wait_for(tmp_path / "two/checkpoint.pt")
        time.sleep(1)
        p.kill()
        p.communicate()
        p = started("--resume", "--out", tmp_path / "two", "--device", "cpu")
    assert p.wait(timeout=120) == 0
    assert_same_run(one, tmp_path / "two")
    assert not list((tmp_path / "two").glob(".*partial"))


# ---- numbers, and disks ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_term_stops_the_run_before_the_step_and_is_named(
    value, images, tmp_path, monkeypatch, capsys
):
    """What stands there then is the run of one step, saved after it."""
    calls = []

    def fails_on_the_second(x0_hat, x0):
        calls.append(1)
        distance = (x0_hat - x0).square().mean((1, 2, 3))
        return distance * value if len(calls) == 2 else distance

    monkeypatch.setitem(METRICS, "ssim", lambda: fails_on_the_second)
    common = [*SMALL, "--data", images, "--model", "ddpm", "--predict", "x0"]
    common += ["--metric", "ssim=0.5", "--save-every", 1]
    assert run(*common, "--iterations", 9, "--out", tmp_path / "bad") == 1
    assert error_of(capsys).startswith("error: step 2: ssim is not finite")
    calls.clear()
    assert run(*common, "--iterations", 1, "--out", tmp_path / "good") == 0
    assert_same_run(tmp_path / "bad", tmp_path / "good")


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_whole_and_says_so(tmp_path):
    """The file size limit stands in for the full disk: the second checkpoint does not fit."""
    assert run(*SMALL, "--iterations", 1, "--out", tmp_path / "run") == 0
    before = (tmp_path / "run/checkpoint.pt").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    go_on = ["--resume", "--iterations", 2, "--out", tmp_path / "run", "--device", "cpu"]
    p = started(*go_on, preexec_fn=limit)
    said = p.communicate(timeout=120)[0].splitlines()[-1]
    assert p.returncode == 1 and said.startswith("error: no room for")
    assert "checkpoint.pt" in said and "MB" in said
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert file_names(tmp_path / "run") == ["checkpoint.pt"]


@pytest.mark.slow
def test_compiled_training_follows_eager_training(images, tmp_path, monkeypatch):
    monkeypatch.setattr("support.run.LOG_EVERY", 3)
    common = [*SMALL, "--model", "dual", "--data", images, "--iterations", 3]
    assert run(*common, "--out", tmp_path / "eager") == 0
    assert run(*common, "--compile", "--out", tmp_path / "compiled") == 0
    [eager], [compiled] = rows(tmp_path / "eager"), rows(tmp_path / "compiled")
    assert compiled == {key: pytest.approx(value, rel=1e-3) for key, value in eager.items()}


def test_the_script_gives_the_signals_back(tmp_path):
    """Whoever calls train.main in a program of his own keeps his Ctrl-C."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    flags = [*SMALL, "--model", "ddpm", "--iterations", 1]
    assert run(*flags, "--out", tmp_path / "run") == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert not isinstance(before[0], cli.Stop)
