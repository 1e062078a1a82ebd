"""Checkpoints opened, pictures written: what sample.py promises about files."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from support import edges
import sample
from refiner import DEFAULTS, build_model

SETTINGS = DEFAULTS | dict(image_size=16, channels=32, res_blocks=1, T=20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random Cas-DM whose zero-initialised weights are random too; its raw weights differ from the EMA's."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    model = build_model(SETTINGS)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    ema["eps_net.out.2.bias"] += 0.3
    sample.write_checkpoint(path, SETTINGS, step=1, model=model.state_dict(), ema=ema)
    return path


def run(*argv):
    return edges.run(sample.main, [*map(str, argv), "--device", "cpu"])


def test_grid_npz_and_folder_hold_the_same_images_and_exactly_n(checkpoint, tmp_path):
    for out in ("a.png", "a.npz", "a"):
        assert run(checkpoint, "--n", 5, "--steps", 2, "--out", tmp_path / out) == 0
    pixels = np.load(tmp_path / "a.npz")["arr_0"]
    assert pixels.shape == (5, 16, 16, 3) and pixels.dtype == np.uint8
    files = sorted((tmp_path / "a").iterdir())
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(5)]
    assert all((np.asarray(Image.open(f)) == p).all() for f, p in zip(files, pixels))
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape == (2 * 18 + 2, 3 * 18 + 2, 3) and (grid[20:36, 2:18] == pixels[3]).all()


def test_image_i_is_the_same_for_any_n_and_any_batch_size(checkpoint, tmp_path):
    """Within one level: a convolution's rounding may depend on the batch."""
    for name, n, batch in (("a", 5, 5), ("b", 3, 1), ("c", 5, 2)):
        assert run(checkpoint, "--n", n, "--steps", 4, "--eta", 1, "--batch-size", batch, "--out", tmp_path / f"{name}.npz") == 0
    a, b, c = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in "abc")
    assert abs(a[:3] - b).max() <= 1 and abs(a - c).max() <= 1 and abs(a[0] - a[1]).max() > 8


def test_the_seed_changes_the_images_raw_takes_the_other_weights_and_bf16_hardly_moves_them(checkpoint, tmp_path):
    for name, flags in (("a", []), ("b", ["--seed", 1]), ("c", ["--raw"]), ("d", ["--precision", "bf16"])):
        assert run(checkpoint, "--n", 2, "--steps", 2, *flags, "--out", tmp_path / f"{name}.npz") == 0
    a, b, c, d = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in "abcd")
    assert abs(a - b).max() > 8 and abs(a - c).max() > 8 and 0 < abs(a - d).mean() < 2


@pytest.mark.parametrize("n, classes, rows, columns", [
    (64, None, 8, 8), (64, 3, 3, 22), (64, 10, 10, 7), (10, 10, 10, 1), (64, 1000, 8, 8),
    (1000, 1000, 32, 32)])
def test_a_grid_has_a_row_a_class_where_that_is_no_ribbon(n, classes, rows, columns, tmp_path):
    sample.save_grid(np.zeros((n, 2, 2, 3), np.uint8), tmp_path / "grid.png", classes)
    assert Image.open(tmp_path / "grid.png").size == (columns * 4 + 2, rows * 4 + 2)


def test_the_trace_is_a_picture(checkpoint, tmp_path):
    """Figure 2: rows x_t, x0*, x0', r_t and ten columns are wider than high."""
    assert run(checkpoint, "--steps", 20, "--trace", tmp_path / "trace.png") == 0
    picture = np.asarray(Image.open(tmp_path / "trace.png").convert("RGB"))
    assert picture.shape[1] > 2 * picture.shape[0] > 400 and picture.std() > 30


def test_load_model_gives_the_model_its_schedule_and_its_settings(checkpoint):
    model, schedule, settings = sample.load_model(checkpoint)
    assert len(schedule.beta) == 21 and settings == SETTINGS and not model.training


# ---- refusals ----

def state_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)


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
    return {k: v for k, v in state.items() if k != "settings"}


def nonsense_settings(state):
    return state | {"settings": {"T": "many", "channels": None}}


def nan_weights(state):
    state["ema"]["eps_net.out.2.bias"][0] = float("nan")
    return state


@pytest.mark.parametrize("change, says", [(foreign, "not a checkpoint of ours"), (a_list, "not a checkpoint of ours"), (newer, "version 99"), (other_width, "do not fit"),
                                          (other_model, "do not fit"), (no_settings, "do not fit"), (nonsense_settings, "do not fit"), (nan_weights, "not finite")])
def test_a_wrong_checkpoint_is_one_line_and_nothing_is_written(change, says, checkpoint, tmp_path, capsys):
    torch.save(change(state_of(checkpoint)), tmp_path / "wrong.pt")
    assert run(tmp_path / "wrong.pt", "--out", tmp_path / "out.png") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert [p.name for p in tmp_path.iterdir()] == ["wrong.pt"]


def test_a_truncated_checkpoint_is_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "half.pt").write_bytes(checkpoint.read_bytes()[:50_000])
    assert run(tmp_path / "half.pt", "--out", tmp_path / "out.png") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_no_picture_is_ever_written_for_nan(checkpoint, tmp_path, monkeypatch, capsys):
    """Weights can be finite and activations overflow all the same."""
    monkeypatch.setattr(sample, "p_sample", lambda x_t, *_: x_t * float("nan"))
    assert run(checkpoint, "--n", 1, "--steps", 2, "--out", tmp_path / "out.png") == 1
    assert "not finite" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, code, says", [(["--steps", 11], 1, "11 sampling steps"), (["--n", 0], 2, "'0'"), (["--eta", 2], 2, "'2'"), (["--out", "a.jpg"], 2, "a.jpg"),
                                               (["--trace", "a.npz"], 2, "a.npz"), (["--out", "no/such/folder.png"], 1, "no/such"), (["--out", "."], 1, "empty folder")])
def test_bad_flags_are_one_line(flags, code, says, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    try:
        got = run(checkpoint, *flags)
    except SystemExit as end:
        got = end.code
    error = capsys.readouterr().err
    assert got == code and error.startswith("error: ") and error.count("\n") == 1 and says in error, error
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.slow
def test_the_script_runs_from_anywhere(checkpoint, tmp_path):
    script = Path(sample.__file__).resolve()
    done = subprocess.run([sys.executable, script, checkpoint, "--n", "1", "--steps", "2", "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "samples.png").exists() and str(tmp_path / "samples.png") in done.stdout
