"""experiments/judge.py: what a judge learns, and how real images are spoiled for its check."""

import numpy as np
import pytest
import torch

from experiments import judge
from made import random_pixels
from neighbours.judge import load_judge


@pytest.fixture
def skies(tmp_path):
    """300 images whose upper half is bright, of two classes, dim and bright below."""
    pixels = random_pixels(300, 16, 16) // 4
    labels = np.arange(300) % 2
    pixels[:, :8] += 160
    pixels[labels == 1, 8:] += 80
    np.savez(tmp_path / "skies.npz", arr_0=pixels, arr_1=labels)
    return tmp_path / "skies.npz"


@pytest.mark.filterwarnings("ignore:.*images are few")
@pytest.mark.parametrize("task, chance", [("classes", 50), ("rotations", 25)])
def test_a_judge_learns_and_is_checked(task, chance, skies, tmp_path, monkeypatch, capsys):
    """Far better than chance after a few steps; its file is not made again, but checked."""
    monkeypatch.setattr(judge, "BATCH", 32)
    monkeypatch.setattr(judge, "SPOILED", {})
    path = tmp_path / "new" / "j.pt"
    argv = ["--data", str(skies), "--task", task, "--out", str(path)]
    judge.main([*argv, "--iterations", "30", "--channels", "8"])
    said = capsys.readouterr().out
    assert float(said.split(" %")[0]) > (100 + chance) / 2
    assert "held out, of half the classes" in said
    assert load_judge(path).settings["task"] == task
    judge.main(argv)
    again = capsys.readouterr().out
    assert again in said and "written" not in again
    with pytest.raises(ValueError, match=r"--seed 5: the judge at .* has 0; expected the same"):
        judge.main([*argv, "--seed", "5"])


def test_turned_images_are_turned_by_right_angles():
    """0 to 3 of them, each image by its own; four turns are none."""
    x = torch.arange(4 * 3 * 4 * 4).reshape(4, 3, 4, 4)
    got = judge.turned(x, torch.tensor([0, 1, 2, 3]))
    for k in range(4):
        torch.testing.assert_close(got[k], torch.rot90(x[k], k, (1, 2)))
    torch.testing.assert_close(judge.turned(got, torch.tensor([0, 3, 2, 1])), x)


def test_held_out_images_are_never_trained_on(tmp_path, monkeypatch):
    """Training sees nine tenths, and the accuracy is that of the rest."""
    seen = {}
    monkeypatch.setattr(judge, "train", lambda net, pixels, *_: seen.update(trained=pixels))
    monkeypatch.setattr(judge, "accuracy", lambda net, pixels, *_: seen.update(rest=pixels) or 0)
    monkeypatch.setattr(judge, "check", lambda *_: None)
    images = random_pixels(200, 16, 16)
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=np.arange(200) % 2)
    judge.main(["--data", str(tmp_path / "images.npz"), "--out", str(tmp_path / "j.pt")])
    assert (len(seen["trained"]), len(seen["rest"])) == (180, 20)
    both = np.concatenate([seen["trained"], seen["rest"]])
    assert {image.tobytes() for image in both} == {image.tobytes() for image in images}


@pytest.mark.parametrize("name", judge.SPOILED)
def test_images_are_spoiled_more_from_left_to_right(name):
    """The squared difference to the image grows with the amount."""
    pixels = random_pixels(20, 16, 16) // 2 + 64
    spoil, amounts = judge.SPOILED[name]
    differences = []
    for amount in amounts:
        changed = spoil(pixels, amount)
        assert changed.shape == pixels.shape and changed.dtype == np.uint8
        differences.append(np.square(changed.astype(float) - pixels).mean())
    assert differences[0] > 0 and differences == sorted(differences)


def test_a_judge_of_too_few_images_is_refused_before_it_is_trained(tmp_path):
    """The check's sides would be empty."""
    labels = np.arange(20) % 2
    np.savez(tmp_path / "images.npz", arr_0=random_pixels(20, 16, 16), arr_1=labels)
    with pytest.raises(ValueError, match="holds 20 images; expected at least 200"):
        judge.main(["--data", str(tmp_path / "images.npz"), "--out", str(tmp_path / "j.pt")])


def test_classes_cannot_be_learned_without_labels(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=random_pixels(20, 16, 16))
    with pytest.raises(ValueError, match=r"has no labels; .*; use --task rotations"):
        judge.main(["--data", str(tmp_path / "images.npz"), "--out", str(tmp_path / "j.pt")])
