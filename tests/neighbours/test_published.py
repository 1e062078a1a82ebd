r"""neighbours/published.py: OpenAI's checkpoints fit by the order of their tensors."""

import numpy as np
import pytest
import torch

import sample
from models import without_zeros
from neighbours.published import load_published, open_published
from neighbours.variance import LearnedVariance
from runs import exit_code, one_error
from support.checkpoint import write_checkpoint
from unet import UNet


def small(out_channels=3, channels=32, res_blocks=1):
    """A U-Net of random weights, none of them zero, in eval mode."""
    torch.manual_seed(0)
    net = UNet(3, out_channels, image_size=16, channels=channels, res_blocks=res_blocks)
    return without_zeros(net).eval()


def untrained():
    torch.manual_seed(1)
    return UNet(3, 3, image_size=16, channels=32, res_blocks=1).eval()


def foreign(net):
    """The network's tensors under other names, in the same order."""
    return {f"blocks.{i}.tensor": v.clone() for i, v in enumerate(net.state_dict().values())}


def outputs(*nets):
    """What each says of the same two images."""
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.25, 617.5])
    with torch.no_grad():
        return [net(x, t) for net in nets]


def test_published_weights_load_by_order_whatever_their_names():
    """A checkpoint of the same tensors under foreign names reproduces the network."""
    theirs, ours = small(), untrained()
    load_published(ours, foreign(theirs), "theirs.pt")
    expected, got = outputs(theirs, ours)
    assert torch.equal(got, expected)
    assert expected.abs().mean() > 0.01


def test_learned_variance_head_keeps_its_noise_half():
    """Of a 3 -> 6 checkpoint the first three output channels, eps, are kept."""
    theirs, ours = small(out_channels=6), untrained()
    load_published(ours, foreign(theirs), "theirs.pt")
    expected, got = outputs(theirs, ours)
    torch.testing.assert_close(got, expected[:, :3], rtol=1e-5, atol=1e-5)


ADVICE = "give the size, channels and blocks it was trained with"
MISFITS = {
    "deeper": (
        {"res_blocks": 2},
        rf"theirs.pt holds \d+ tensors; expected the \d+ of this U-Net; {ADVICE}",
    ),
    "wider": (
        {"channels": 64},
        r"theirs.pt has \[256, 64\] where this U-Net has time_embed.0.weight \[128, 32\]; "
        + ADVICE,
    ),
    "another head": (
        {"out_channels": 9},
        r"theirs.pt has \[9, 32, 3, 3\] where this U-Net has out.2.weight \[3, 32, 3, 3\]; "
        + ADVICE,
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_of_another_size_raise_one_line_and_change_nothing(name):
    """The first tensor that does not fit is named."""
    how, message = MISFITS[name]
    ours = untrained()
    before = foreign(ours)
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_published(ours, foreign(small(**how)), "theirs.pt")
    after = foreign(ours)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("held", [[torch.zeros(1)], torch.zeros(1), 3, None])
def test_a_torch_file_that_holds_no_dict_raises_one_line(held):
    """Whatever else torch.load may give."""
    with pytest.raises(ValueError, match=r"^theirs.pt holds a \w+; expected a dict of tensors.*$"):
        load_published(untrained(), held, "theirs.pt")


# ---- sampled as they are ----


@pytest.fixture
def run(capsys):
    """Calls a script's main -> (exit code, what it printed)."""

    def call(main, *argv):
        code = exit_code(main, *argv)
        out, err = capsys.readouterr()
        return code, out + err

    return call


def saved(net, path):
    torch.save(foreign(net), path)
    return path


def test_a_file_is_sampled_from_one_line_and_its_size_is_read_off_its_tensors(run, tmp_path):
    """The same images as of a checkpoint of ours that holds the same weights."""
    net = small(res_blocks=2)
    file = saved(net, tmp_path / "theirs.pt")
    model, settings = open_published(file, "cosine", 20)
    assert (settings["image_size"], settings["channels"], settings["res_blocks"]) == (16, 32, 2)
    weights = {"theta." + name: tensor for name, tensor in net.state_dict().items()}
    assert model.state_dict().keys() == weights.keys()
    state = {"step": 0, "data": "", "model": weights, "ema": weights}
    write_checkpoint(tmp_path / "ours.pt", settings, **state)
    for name, flags in (("theirs", ["--published", "cosine:20"]), ("ours", [])):
        out = ["--n", 2, "--steps", 3, "--device", "cpu", "--out", tmp_path / f"{name}.npz"]
        code, text = run(sample.main, tmp_path / f"{name}.pt", *flags, *out)
        assert code == 0, text
    theirs, ours = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("theirs", "ours"))
    assert (theirs == ours).all()


def test_a_learned_variance_is_kept_for_ancestral_steps_and_the_bound(run, tmp_path):
    file = saved(small(out_channels=6), tmp_path / "theirs.pt")
    model, settings = open_published(file, "linear", 40)
    assert isinstance(model, LearnedVariance) and settings["learn_sigma"]
    how = [file, "--published", "linear:40", "--n", 2, "--steps", 3, "--device", "cpu"]
    steps = ["--sampler", "ddpm", "--variance", "learned", "--out", tmp_path / "a.png"]
    assert run(sample.main, *how, *steps)[0] == 0
    code, text = run(sample.main, *how, "--bits-per-dim", "--data", "shapes")
    assert code == 0 and "learned variance" in text


@pytest.mark.parametrize(
    "held, says",
    [
        ({"a": torch.zeros(3)}, "1 tensors that fit no U-Net of ours"),
        ({}, "0 tensors that fit no U-Net of ours"),
        ([torch.zeros(1)], "holds a list"),
        ({"a": torch.zeros(4, 3), "b": torch.zeros(())}, "2 tensors that fit no"),
    ],
)
def test_a_file_that_fits_no_u_net_is_one_line(held, says, run, tmp_path):
    torch.save(held, tmp_path / "odd.pt")
    out = ["--out", tmp_path / "a.png"]
    code, text = run(sample.main, tmp_path / "odd.pt", "--published", "cosine:20", *out)
    assert code == 1 and says in one_error(text)


def test_a_published_file_has_no_other_weights(run):
    code, said = run(sample.main, "theirs.pt", "--published", "cosine:20", "--raw")
    assert code == 2 and "--raw" in one_error(said)


@pytest.mark.parametrize("text", ["cosine", "cosine:", "cosine:0", "sine:10", "linear:x"])
def test_what_is_no_schedule_is_a_usage_error(text, run):
    code, said = run(sample.main, "theirs.pt", "--published", text)
    assert code == 2 and one_error(said)
