"""neighbours/judge.py: a judge's features, its file, and fid.py's scores by it."""

import json

import numpy as np
import pytest
import torch

import fid
from made import random_pixels
from neighbours.judge import KIND, Judge, load_judge, name_of, save_judge
from runs import done, exit_code

SETTINGS = {"image_size": 16, "classes": 10, "channels": 8, "task": "classes"}


@pytest.fixture
def judge(tmp_path):
    """In a file, j.pt, and opened again."""
    torch.manual_seed(0)
    save_judge(tmp_path / "j.pt", Judge(SETTINGS).eval(), 0.5)
    return load_judge(tmp_path / "j.pt")


def batch(n=3, size=16):
    return torch.from_numpy(random_pixels(n, size, size)).permute(0, 3, 1, 2)


def score(*argv):
    """The exit code of `python fid.py argv`."""
    return exit_code(fid.main, *argv)


def test_a_judge_survives_its_file(tmp_path, judge):
    """The same features, and the same name, which another judge does not have."""
    again = load_judge(tmp_path / "j.pt")
    torch.testing.assert_close(again(batch()).pool, judge(batch()).pool, rtol=0, atol=0)
    assert again.name == judge.name and judge.name.startswith("judge-")
    assert name_of(Judge(SETTINGS)) != judge.name
    assert name_of(Judge(SETTINGS | {"task": "rotations"})).startswith("judge_rotations-")


@pytest.mark.parametrize("size", [16, 32, 64])
def test_features_are_four_times_the_channels_whatever_the_size(size):
    """[N, 32] of 8 channels; what the head answers from."""
    judge = Judge(SETTINGS | {"image_size": size}).eval()
    pool = judge(batch(size=size)).pool
    assert pool.shape == (3, 32) and pool.dtype == torch.float32
    x = batch(size=size) / 127.5 - 1
    torch.testing.assert_close(judge.logits(x), judge.head(pool), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_fid_scores_by_a_judge_under_names_of_its_own(tmp_path, judge, capsys):
    """fd_judge is the Frechet distance of its features; never fid, sfid or is."""
    np.savez(tmp_path / "a.npz", arr_0=random_pixels(40, 16, 16))
    np.savez(tmp_path / "b.npz", arr_0=random_pixels(30, 16, 16, seed=1) // 2)
    argv = [tmp_path / "a.npz", tmp_path / "b.npz", "--judge", tmp_path / "j.pt", "--json"]
    assert score(*argv) == 0
    got = json.loads(capsys.readouterr().out)
    names = {"fd_judge", "kid_judge", "kid_judge_std", "precision_judge", "recall_judge"}
    assert set(got) == names | {"n_a", "n_b", "weights"}
    assert got["weights"] == judge.name
    sides = []
    for pixels in (random_pixels(40, 16, 16), random_pixels(30, 16, 16, seed=1) // 2):
        pool = judge(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pool.detach().double().numpy()
        sides += [pool.mean(0), np.cov(pool, rowvar=False)]
    assert got["fd_judge"] == pytest.approx(fid.frechet_distance(*sides), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_a_judge_in_bf16_is_the_same_judge(tmp_path, judge, capsys):
    """Statistics of fp32 stand beside it, and its name is the file's."""
    for name, seed in (("a.npz", 0), ("b.npz", 1)):
        np.savez(tmp_path / name, arr_0=random_pixels(20, 16, 16, seed))
    flags = ["--judge", tmp_path / "j.pt"]
    assert score(tmp_path / "b.npz", "--save-stats", tmp_path / "s.npz", *flags) == 0
    capsys.readouterr()
    sides = [tmp_path / "a.npz", tmp_path / "s.npz"]
    assert score(*sides, *flags, "--precision", "bf16", "--json") == 0
    assert json.loads(capsys.readouterr().out)["weights"] == judge.name


def test_what_does_not_fit_is_refused_in_one_line(tmp_path, judge, capsys):
    """Images of another size, a file of another kind, and Inception's flags beside it."""
    torch.save({"kind": KIND + "?"}, tmp_path / "other.pt")
    held = torch.load(tmp_path / "j.pt", weights_only=True)
    torch.save(held | {"settings": SETTINGS | {"channels": 16}}, tmp_path / "larger.pt")
    held["weights"]["head.weight"][0] = torch.nan
    torch.save(held, tmp_path / "nan.pt")
    np.savez(tmp_path / "a.npz", arr_0=random_pixels(4, 8, 8))
    argv = [tmp_path / "a.npz", tmp_path / "a.npz", "--judge"]
    for file, code, words in (
        (["j.pt"], 1, "images of 8 x 8 for a judge of 16 x 16"),
        (["other.pt"], 1, "holds no judge"),
        (["larger.pt"], 1, "larger.pt does not fit its settings"),
        (["nan.pt"], 1, "weights that are not finite"),
        (["j.pt", "--dims", "768"], 2, "--weights and --dims are Inception's"),
    ):
        assert score(*argv, tmp_path / file[0], *file[1:]) == code
        assert words in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_two_processes_score_by_a_judge_as_one_does(tmp_path, judge):
    """Each makes the features of half the images; KID, precision and recall need all rows."""
    np.savez(tmp_path / "a.npz", arr_0=random_pixels(41, 16, 16))
    np.savez(tmp_path / "b.npz", arr_0=random_pixels(30, 16, 16, seed=1) // 2)
    sides = [tmp_path / "a.npz", tmp_path / "b.npz"]
    flags = ["--judge", tmp_path / "j.pt", "--batch-size", 4, "--json", "--device", "cpu"]
    one, two = (json.loads(done("fid.py", *sides, *flags, processes=n)) for n in (1, 2))
    assert {"kid_judge", "precision_judge", "recall_judge"} <= one.keys()
    assert two.pop("weights") == one.pop("weights") == judge.name
    assert two == pytest.approx(one, rel=1e-5, abs=1e-7)
