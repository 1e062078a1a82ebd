r"""neighbours/published.py: OpenAI's checkpoints fit by the order of their tensors."""

import pytest
import torch
from torch import nn

from neighbours.published import load_published
from unet import UNet


def small(out_channels=3, channels=32, res_blocks=1):
    """A U-Net of random weights, none of them zero, in eval mode."""
    torch.manual_seed(0)
    net = UNet(3, out_channels, image_size=16, channels=channels, res_blocks=res_blocks)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net.eval()


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
