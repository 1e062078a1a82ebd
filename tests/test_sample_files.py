"""Checkpoints opened, pictures written: what sample.py promises about files."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sample
import train
from models import SMALL, without_zeros
from refiner import DEFAULTS, build_model
from runs import ROOT, error_of, exit_code, file_names
from support.checkpoint import PLACES, read_checkpoint, write_checkpoint

SETTINGS = DEFAULTS | SMALL | {"T": 20}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Cas-DM, all of whose weights are random; the average's differ from the trained."""
    return written(tmp_path_factory.mktemp("casdm") / "checkpoint.pt", SETTINGS)


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory):
    """The same of a DDPM, which is read in half the time."""
    path = tmp_path_factory.mktemp("ddpm") / "checkpoint.pt"
    return written(path, SETTINGS | {"model": "ddpm"})


def written(path, settings):
    """The path, once a model of the settings is there."""
    torch.manual_seed(0)
    model = build_model(settings)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    ema = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ema["theta.out.2.bias"] += 0.3
    write_checkpoint(path, settings, step=1, model=model.state_dict(), ema=ema)
    return path


def run(*argv):
    return exit_code(sample.main, *argv, "--device", "cpu")


def sampled(path, *argv):
    """The pixels that sample.py writes to an .npz, as whole numbers."""
    assert run(*argv, "--out", path) == 0
    return np.load(path)["arr_0"].astype(int)


# ---- what is written ----


def test_grid_npz_and_folder_hold_the_same_images_and_exactly_n(checkpoint, tmp_path):
    for out in ("a.png", "a.npz", "a"):
        assert run(checkpoint, "--n", 5, "--steps", 2, "--out", tmp_path / out) == 0
    pixels = np.load(tmp_path / "a.npz")["arr_0"]
    assert pixels.shape == (5, 16, 16, 3) and pixels.dtype == np.uint8
    assert file_names(tmp_path / "a") == [f"{i:06d}.png" for i in range(5)]
    for file, image in zip(sorted((tmp_path / "a").iterdir()), pixels, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image)
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    np.testing.assert_array_equal(grid[20:36, 2:18], pixels[3])  # first of the second row


def test_image_i_is_the_same_for_any_n_and_any_batch_size(checkpoint, tmp_path):
    """Within one level: a convolution's rounding may depend on the batch."""
    found = []
    for n, batch in ((5, 5), (3, 1), (5, 2)):
        flags = ["--n", n, "--batch-size", batch, "--steps", 2, "--eta", 1]
        found.append(sampled(tmp_path / "a.npz", checkpoint, *flags))
    a, b, c = found
    assert abs(a[:3] - b).max() <= 1 and abs(a - c).max() <= 1
    assert abs(a[0] - a[1]).max() > 8


@pytest.mark.slow
def test_the_seed_and_raw_change_the_images_and_bf16_hardly_moves_them(checkpoint, tmp_path):
    found = []
    for flags in ([], ["--seed", 1], ["--raw"], ["--precision", "bf16"]):
        found.append(sampled(tmp_path / "a.npz", checkpoint, "--n", 2, "--steps", 2, *flags))
    plain, seed, raw, bf16 = found
    assert abs(plain - seed).max() > 8
    assert abs(plain - raw).max() > 8
    assert 0 < abs(plain - bf16).mean() < 2


def test_the_trace_is_a_picture(checkpoint, tmp_path):
    """Figure 2: rows x_t, x0*, x0', r_t and ten columns are wider than high."""
    assert run(checkpoint, "--steps", 10, "--trace", tmp_path / "trace.png") == 0
    picture = np.asarray(Image.open(tmp_path / "trace.png").convert("RGB"))
    assert picture.shape[1] > 2 * picture.shape[0] > 400 and picture.std() > 30
    assert file_names(tmp_path) == ["trace.png"]


def test_only_the_first_process_writes_the_trace(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("support.parallel.rank", lambda: 1)
    assert run(checkpoint, "--steps", 2, "--trace", tmp_path / "trace.png") == 0
    assert not list(tmp_path.iterdir())


def test_load_model_gives_the_model_its_schedule_and_its_settings(checkpoint):
    model, schedule, settings = sample.load_model(checkpoint)
    assert schedule is model.schedule and len(schedule.beta) == 21
    assert settings == SETTINGS and not model.training


# ---- the weights alone ----


@pytest.mark.parametrize(
    "model",
    [
        {"model": "ddpm"},
        {"model": "ddpm", "predict": "x0"},
        {"model": "dual"},
        {"model": "casdm"},
    ],
    ids=["eps", "x0", "dual", "casdm"],
)
def test_images_of_saved_weights_are_within_one_level_of_the_checkpoints(model, tmp_path):
    """By DDIM of 10 steps; the layers that begin at zero have numbers, else theta would be mute."""
    torch.manual_seed(0)
    net = without_zeros(build_model(SETTINGS | model), std=0.02)
    full, saved = tmp_path / "full.pt", tmp_path / "saved.pt"
    write_checkpoint(full, SETTINGS | model, ema=net.state_dict())
    assert run(full, "--save-weights", saved) == 0
    how = ["--n", 2, "--steps", 10]
    ours, theirs = (sampled(tmp_path / "a.npz", path, *how) for path in (saved, full))
    assert abs(ours - theirs).max() <= 1
    assert theirs.std() > 20
    half = read_checkpoint(saved)["ema"]
    assert any((half[name].float() != p).any() for name, p in net.state_dict().items())


@pytest.mark.parametrize("flags, part", [([], "ema"), (["--raw"], "model")])
def test_saved_weights_are_one_set_in_float16_with_the_settings(
    flags, part, checkpoint, tmp_path, capsys
):
    path = tmp_path / "weights.pt"
    assert run(checkpoint, "--save-weights", path, *flags) == 0
    size = path.stat().st_size
    assert f", {size / 1e6:.1f} MB, written to {path}" in capsys.readouterr().out
    full, saved = read_checkpoint(checkpoint), read_checkpoint(path)
    assert saved.keys() == {"kind", "version", "settings", part}
    assert saved["settings"] == full["settings"]
    assert saved[part].keys() == full[part].keys()
    for name, weight in full[part].items():
        assert torch.equal(saved[part][name], weight.half()), name
    float32 = sum(4 * weight.numel() for weight in full[part].values())
    assert 0.5 < size / float32 < 0.53
    assert file_names(tmp_path) == ["weights.pt"]


def test_saved_weights_open_in_float32_and_may_be_saved_again(checkpoint, tmp_path):
    first, again = tmp_path / "first.pt", tmp_path / "again.pt"
    assert run(checkpoint, "--save-weights", first) == 0
    assert {p.dtype for p in sample.load_model(first)[0].parameters()} == {torch.float32}
    assert run(first, "--save-weights", again) == 0
    assert first.read_bytes() == again.read_bytes()


def test_saved_settings_name_no_place(checkpoint, tmp_path):
    """A file that is passed on says nothing of its maker's folders."""
    state = read_checkpoint(checkpoint)
    places = dict.fromkeys(PLACES, "/home/someone/images")
    write_checkpoint(tmp_path / "full.pt", state["settings"] | places, ema=state["ema"])
    assert run(tmp_path / "full.pt", "--save-weights", tmp_path / "saved.pt") == 0
    assert b"someone" in (tmp_path / "full.pt").read_bytes()
    assert b"someone" not in (tmp_path / "saved.pt").read_bytes()


@pytest.mark.parametrize(
    "saved, opened, says",
    [
        (
            [],
            ["--raw"],
            "holds the moving average alone; expected the trained weights; leave --raw",
        ),
        (["--raw"], [], "holds the trained weights alone; expected the moving average; give --raw"),
    ],
)
def test_weights_that_were_not_saved_are_named(saved, opened, says, checkpoint, tmp_path, capsys):
    path = tmp_path / "weights.pt"
    assert run(checkpoint, "--save-weights", path, *saved) == 0
    assert run(path, "--out", tmp_path / "out.png", *opened) == 1
    assert says in error_of(capsys)
    assert file_names(tmp_path) == ["weights.pt"]


def test_a_run_never_goes_on_from_saved_weights(checkpoint, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    assert run(checkpoint, "--save-weights", path) == 0
    assert exit_code(train.main, "--resume", "--out", tmp_path, "--device", "cpu") == 1
    assert f"{path} holds no step or no data; expected a run's checkpoint" in error_of(capsys)


def test_a_weight_beyond_float16_is_one_line_and_nothing_is_written(checkpoint, tmp_path, capsys):
    state = read_checkpoint(checkpoint)
    state["ema"]["theta.out.2.bias"][0] = -70_000
    write_checkpoint(tmp_path / "large.pt", SETTINGS, ema=state["ema"])
    assert run(tmp_path / "large.pt", "--save-weights", tmp_path / "saved.pt") == 1
    assert "theta.out.2.bias holds 70000; expected at most 65504" in error_of(capsys)
    assert file_names(tmp_path) == ["large.pt"]


@pytest.mark.parametrize("name", ["casdm-shapes", "casdm-metric-cifar10-16"])
def test_the_weights_of_the_repository_make_images(name, tmp_path):
    """Of 5 MB each; the images have the colours and contrast of images, not of noise or of grey."""
    path = ROOT / f"assets/{name}.pt"
    assert path.stat().st_size < 5e6
    assert not set(PLACES) & read_checkpoint(path)["settings"].keys()
    pixels = sampled(tmp_path / "a.npz", path, "--n", 8, "--sampler", "dpm++", "--steps", 5)
    assert pixels.shape == (8, 16, 16, 3)
    neighbours = abs(np.diff(pixels, axis=2)).mean()
    assert pixels.std() > 40 and neighbours < 0.8 * pixels.std()


def test_saved_weights_replace_no_file(checkpoint, tmp_path, capsys):
    """It may be a run's checkpoint, even the very one."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(checkpoint.read_bytes())
    assert run(path, "--save-weights", path) == 1
    assert f"{path} exists; expected a new file" in error_of(capsys)
    assert path.read_bytes() == checkpoint.read_bytes()


def test_weights_are_saved_whole_or_not_at_all(checkpoint, tmp_path, monkeypatch, capsys):
    def half(state, f):
        f.write(b"half")
        raise OSError("the disk is gone")

    monkeypatch.setattr("support.checkpoint.torch.save", half)
    assert run(checkpoint, "--save-weights", tmp_path / "saved.pt") == 1
    assert "the disk is gone" in error_of(capsys) and not list(tmp_path.iterdir())


# ---- refusals ----


def foreign(state):
    return {"state_dict": state["ema"]}


def a_list(state):
    return [1, 2]


def newer(state):
    return state | {"version": 99}


def other_width(state):
    return state | {"settings": SETTINGS | {"channels": 64}}


def other_model(state):
    return state | {"settings": SETTINGS | {"model": "dual"}}


def no_settings(state):
    del state["settings"]
    return state


def nonsense_settings(state):
    return state | {"settings": {"T": "many", "channels": None}}


def nan_weights(state):
    state["ema"]["theta.out.2.bias"][0] = float("nan")
    return state


@pytest.mark.parametrize(
    "change, says",
    [
        (foreign, "not a checkpoint of ours"),
        (a_list, "not a checkpoint of ours"),
        (newer, "version 99"),
        (other_width, "do not fit"),
        (other_model, "do not fit"),
        (no_settings, "holds no settings"),
        (nonsense_settings, "do not fit"),
        (nan_weights, "not finite"),
    ],
)
def test_a_wrong_checkpoint_is_one_line_and_nothing_is_written(
    change, says, ddpm, tmp_path, capsys
):
    torch.save(change(torch.load(ddpm, weights_only=True)), tmp_path / "wrong.pt")
    assert run(tmp_path / "wrong.pt", "--out", tmp_path / "out.png") == 1
    assert says in error_of(capsys)
    assert file_names(tmp_path) == ["wrong.pt"]


def test_a_truncated_checkpoint_is_one_line(ddpm, tmp_path, capsys):
    (tmp_path / "half.pt").write_bytes(ddpm.read_bytes()[:50_000])
    assert run(tmp_path / "half.pt", "--out", tmp_path / "out.png") == 1
    assert "half.pt cannot be read as a checkpoint" in error_of(capsys)


def test_no_picture_is_ever_written_for_nan(checkpoint, tmp_path, monkeypatch, capsys):
    """Weights can be finite and activations overflow all the same."""
    monkeypatch.setattr(sample, "mix", lambda mu_x0, *_: mu_x0 * float("nan"))
    assert run(checkpoint, "--n", 1, "--steps", 2, "--out", tmp_path / "out.png") == 1
    assert "not finite" in error_of(capsys) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, code, says",
    [
        ("--steps 100000", 1, "100000 sampling steps"),
        ("--spacing odd", 2, "trailing"),
        ("--spacing t=3,2", 1, "ascending"),
        ("--spacing sections=100000", 1, "--spacing sections"),
        ("--n 0", 2, "'0'"),
        ("--eta 2", 2, "'2'"),
        ("--sampler ddpm --eta 1", 2, "--eta is DDIM's"),
        ("--steps 2 --label 3", 1, "the model has no classes"),
        ("--out a.jpg", 2, "a.jpg"),
        ("--trace a.npz", 2, "a.npz"),
        ("--out a.png --trace t.png", 2, "--out means nothing to --trace"),
        ("--out samples.png --trace t.png", 2, "--out means nothing to --trace"),
        ("--n 2 --trace t.png", 2, "--n means nothing to --trace"),
        ("--out a.png --bits-per-dim --data shapes", 2, "--out means nothing to --bits-per-dim"),
        ("--out no/such/folder.png", 1, "no/such"),
        ("--out .", 1, ". has no name of its own"),
        ("--out taken", 1, "taken is a file"),
        ("--save-weights a.npz", 2, "--save-weights a.npz: expected FILE.pt"),
        ("--save-weights a.pt --steps 5", 2, "--steps means nothing to --save-weights"),
        ("--save-weights a.pt --out a.png", 2, "--out means nothing to --save-weights"),
        ("--save-weights a.pt --bits-per-dim --data shapes", 2, "means nothing to --save-weights"),
        ("--save-weights no/such/a.pt", 1, "no/such does not exist; expected the folder"),
    ],
)
def test_bad_flags_are_one_line(flags, code, says, ddpm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    assert run(ddpm, *flags.split()) == code
    assert says in error_of(capsys)
    assert file_names(tmp_path) == ["taken"]


@pytest.mark.slow
def test_the_script_runs_from_anywhere(checkpoint, tmp_path):
    """And without --out it writes samples.png there."""
    command = [sys.executable, ROOT / "sample.py", checkpoint, "--n", "1", "--steps", "2"]
    done = subprocess.run(
        [*command, "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "samples.png").exists()
    assert str(tmp_path / "samples.png") in done.stdout
