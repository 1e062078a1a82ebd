r"""unet.py: improved-diffusion's U-Net, held against its published sizes, a golden output of the original, and formulas written out here.

    Cas-DM   arXiv:2401.02414v1     ADM   arXiv:2105.05233v4

Networks are 32 channels wide, the least that the group norms allow, and are fed 8 x 8 images where the size does not matter: they are
convolutional.  Full-size ones are built without storage.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from unet import Attention, ResBlock, UNet, load_published, timestep_embedding


def small(in_channels=3, out_channels=3, **how):
    torch.manual_seed(0)
    return UNet(in_channels, out_channels, image_size=16, channels=32, res_blocks=1, **how)


def randomised(net, seed=0):
    """Every weight that starts at zero made random: at initialisation no gradient and no signal passes the last convolutions."""
    torch.manual_seed(seed)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net.double().eval()


def inputs(n=2, size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64), torch.tensor(
        [0.25, 617.5, 3.0, 999.75]
    )[:n].double()


# ---- published numbers ----


@pytest.mark.parametrize(
    "in_channels, out_channels, size, how, count",
    [
        (3, 3, 32, {}, 52_542_979),
        (3, 3, 64, {}, 121_060_483),
        (3, 4, 32, {}, 52_544_132),
        (3, 4, 64, {}, 121_061_636),
        (6, 4, 32, {}, 52_547_588),
        (6, 4, 64, {}, 121_065_092),
        (3, 7, 32, {}, 52_547_591),
        (3, 7, 64, {}, 121_065_095),
        (3, 6, 32, {}, 52_546_438),
        (3, 6, 64, {}, 121_063_942),
        (3, 4, 32, dict(fixed_resolution=True), 45_754_628),
        (3, 4, 64, dict(fixed_resolution=True), 103_212_676),
        (3, 3, 64, dict(res_blocks=2), 92_025_731),
        (3, 6, 64, dict(channels=192, num_classes=1000), 273_049_350),
    ],
)
def test_parameter_counts_are_improved_diffusions(in_channels, out_channels, size, how, count):
    """theta, phi, phi with concat(x0*, eps'), Dual, learned variance, Fix-Res, two blocks, class-conditional (Cas-DM Sec. 4.1)."""
    with torch.device("meta"):
        assert (
            sum(p.numel() for p in UNet(in_channels, out_channels, size, **how).parameters())
            == count
        )


def test_output_is_the_originals_to_nine_digits():
    """The golden output of ../shared/data/README.md: the reference network in float64, its parameters filled by s(k, shape) = sin(j + k + 1)."""
    net = UNet(3, 4, image_size=32, channels=32, res_blocks=1).double().eval()
    assert (
        len(list(net.parameters())) == 222 and sum(p.numel() for p in net.parameters()) == 1_679_204
    )
    with torch.no_grad():
        for k, (name, p) in enumerate(net.named_parameters()):
            s = torch.sin(torch.arange(p.numel(), dtype=torch.float64) + k + 1).view(p.shape)
            is_norm_weight = name.endswith("weight") and p.ndim == 1
            p.copy_(
                s * math.sqrt(2 / p[0].numel())
                if p.ndim > 1
                else 1 + 0.1 * s
                if is_norm_weight
                else 0.1 * s
            )
        x = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).view(2, 3, 32, 32)
        y = net(x, torch.tensor([0.25, 617.5], dtype=torch.float64))
    assert y.mean().item() == pytest.approx(-0.018182769927385583, abs=1e-9)
    assert y.std().item() == pytest.approx(0.3760483855824422, abs=1e-9)
    assert y[0, 0, 0, :4].tolist() == pytest.approx(
        [-0.5587550178987515, -0.7073095819456865, 0.21872793571525065, 0.8296433379185908],
        abs=1e-9,
    )
    assert y[1, 3, 17, 5:8].tolist() == pytest.approx(
        [-0.16245719689754168, -0.17007932660392164, -0.06824510364514509], abs=1e-9
    )


# ---- the whole network ----


@pytest.mark.parametrize("how", [{}, dict(fixed_resolution=True), dict(num_classes=5)])
def test_output_is_exactly_zero_at_initialisation(how):
    """The last convolution starts at zero, and with it the output, in every variant."""
    x, t = inputs()
    y = torch.tensor([1, 4]) if "num_classes" in how else None
    assert not small(out_channels=7, **how).double()(x, t, y).any()


def test_every_block_starts_as_its_skip_path():
    """At initialisation a residual block is its skip connection and an attention the identity: both end in a convolution of zeros."""
    torch.manual_seed(0)
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    assert torch.equal(ResBlock(32, 32, emb=8, dropout=0.0)(x, emb), x) and torch.equal(
        Attention(32, heads=4)(x), x
    )
    wider = ResBlock(32, 64, emb=8, dropout=0.0)
    assert torch.equal(wider(x, emb), wider.skip(x))


@pytest.mark.parametrize("size, channels", [(16, 1), (32, 2)])
def test_output_has_the_inputs_size_and_dtype(size, channels):
    """[B, in, S, S] float32 or float64 -> [B, out, S, S] in the same, and in x's dtype under bfloat16 autocast too."""
    net = UNet(channels, 5, size, channels=32, res_blocks=1).eval()
    x = torch.randn(2, channels, size, size)
    with torch.no_grad():
        assert net(x, torch.tensor([0.0, 999.0])).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x, torch.tensor([0.0, 999.0])).dtype == torch.float32
        y = net.double()(x.double(), torch.tensor([0.0, 999.0]).double())
    assert y.dtype == torch.float64 and y.shape == (2, 5, size, size)


def test_images_of_a_batch_do_not_see_each_other():
    """Image i of a batch comes out as it does alone, and depends on its own time."""
    net, (x, t) = randomised(small()), inputs(4)
    with torch.no_grad():
        together, alone = net(x, t), torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(4)])
        moved = net(x, t + torch.tensor([0.0, 0.0, 5.0, 0.0]))
    assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert [not torch.equal(a, b) for a, b in zip(together, moved)] == [False, False, True, False]


def test_a_class_adds_its_embedding_to_the_times():
    """With num_classes, y matters: a zero embedding is no class, and two images that differ in y alone differ (ADM Sec. 3.1)."""
    net, plain = randomised(small(num_classes=5)), randomised(small())
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("label")})
    with torch.no_grad():
        net.label_embed.weight[2] = 0
        x, t = inputs(1)
        out = [net(x, t, torch.tensor([y])) for y in (2, 3)]
        assert_close(out[0], plain(x, t), rtol=0, atol=0)
        assert not torch.equal(out[0], out[1])


def test_dropout_acts_in_training_only():
    """Two passes differ in train mode and agree in eval mode."""
    net, (x, t) = randomised(small(dropout=0.5)), inputs()
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


def test_attention_stands_at_16_and_8_and_in_the_middle():
    """At 32 x 32 with 3 blocks: 15 attentions and 30 residual blocks, none at 32 x 32 and, but for the middle, none at 4 x 4."""
    with torch.device("meta"):
        net = UNet(3, 3, 32)
    count = {
        kind: sum(isinstance(m, kind) for m in net.modules()) for kind in (Attention, ResBlock)
    }
    assert count == {Attention: 15, ResBlock: 30}
    assert [any(isinstance(m, Attention) for m in b) for b in net.input_blocks] == [False] * 5 + [
        True
    ] * 3 + [False] + [True] * 3 + [False] * 4


def test_fix_res_network_never_resizes_and_attends_in_the_middle_only():
    """No strided convolution, no Upsample, one attention, every feature map of the image's size (Cas-DM Sec. 4.1, the Fix-Res CNN)."""
    net = small(fixed_resolution=True).double()
    assert not any(
        isinstance(m, nn.Upsample) or isinstance(m, nn.Conv2d) and m.stride != (1, 1)
        for m in net.modules()
    )
    assert [isinstance(m, Attention) for m in net.modules()].count(True) == 1 and isinstance(
        net.middle[1], Attention
    )
    sizes = []
    for block in [*net.input_blocks, net.middle, *net.output_blocks]:
        block.register_forward_hook(lambda module, args, out: sizes.append(out.shape[-2:]))
    net(*inputs(size=16))
    assert set(sizes) == {(16, 16)} and len(sizes) == len(net.input_blocks) + 1 + len(
        net.output_blocks
    )


def test_unet_halves_at_every_level_and_doubles_back():
    """At 16 x 16 the maps are 16, 8, 4 on the way down and 4, 8, 16 on the way up."""
    net, sizes = small().double(), []
    for block in [*net.input_blocks, net.middle, *net.output_blocks]:
        block.register_forward_hook(lambda module, args, out: sizes.append(out.shape[-1]))
    net(*inputs(size=16))
    assert sizes == [16, 16, 8, 8, 4, 4, 4, 4, 8, 8, 16, 16, 16]


@pytest.mark.parametrize(
    "how, message",
    [
        (
            dict(image_size=28, channels=32),
            "image size 28; expected one of .*32.*; change --image-size",
        ),
        (
            dict(image_size=16, channels=48),
            "48 channels; expected a multiple of 32.*; change --channels",
        ),
    ],
)
def test_impossible_sizes_raise_one_line(how, message):
    """A size that cannot be halved, and a width that 32 groups do not divide."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        UNet(3, 3, res_blocks=1, **how)


# ---- its parts, against formulas written here ----


def test_time_embedding_is_cosines_then_sines_divided_by_half():
    """[cos(t f_i) | sin(t f_i)], f_i = 10000^(-i / half): improved-diffusion's order and divisor, for fractional t too."""
    t = torch.tensor([0.0, 0.25, 999.75], dtype=torch.float64)
    angles = t.numpy()[:, None] * 10000.0 ** (-np.arange(64) / 64)
    assert_close(
        timestep_embedding(t, 128).numpy(),
        np.concatenate([np.cos(angles), np.sin(angles)], 1),
        rtol=0,
        atol=1e-10,
    )


def test_attention_is_softmax_over_positions_with_heads_split_first():
    """Per head (q k^T / sqrt(C/heads)) softmax v, the 3C channels being heads x (q, k, v) x C/heads, plus the input."""
    torch.manual_seed(0)
    attention, C, heads = Attention(64, heads=4).double(), 64, 4
    nn.init.normal_(attention.proj.weight)
    x = torch.randn(2, C, 3, 5, dtype=torch.float64)
    h = F.conv1d(
        F.group_norm(x, 32, attention.norm.weight, attention.norm.bias).flatten(2),
        attention.qkv.weight,
        attention.qkv.bias,
    )
    out = []
    for head in h.split(3 * C // heads, 1):  # [2, 48, 15]
        q, k, v = head.split(C // heads, 1)  # [2, 16, 15] each
        weight = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(C // heads), -1)
        out.append(torch.einsum("bqk,bck->bcq", weight, v))
    expected = x + F.conv1d(torch.cat(out, 1), attention.proj.weight, attention.proj.bias).view_as(
        x
    )
    assert_close(attention(x), expected, rtol=1e-10, atol=1e-10)


def test_residual_block_scales_and_shifts_its_second_norm():
    """skip(x) + conv(silu(GN(h) (1 + scale) + shift)), (scale, shift) = linear(emb); a zero embedding leaves a plain norm (ADM Sec. 3.1)."""
    torch.manual_seed(0)
    block = ResBlock(32, 64, emb=8, dropout=0.0).double()
    nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2, 32, 4, 4, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    scale, shift = F.linear(emb, block.emb.weight, block.emb.bias).view(2, 2, 64, 1, 1).unbind(1)
    h = F.group_norm(block.conv1(F.silu(F.group_norm(x, 32))), 32)
    assert_close(
        block(x, emb),
        block.skip(x) + block.conv2(F.silu(h * (1 + scale) + shift)),
        rtol=1e-10,
        atol=1e-10,
    )
    nn.init.zeros_(block.emb.bias)
    assert_close(block(x, 0 * emb), block.skip(x) + block.conv2(F.silu(h)), rtol=1e-10, atol=1e-10)


def test_time_passes_two_linears_and_a_silu_before_every_block():
    """Every residual block is fed silu(linear(silu(linear(embedding))))."""
    net, (x, t), seen = randomised(small()), inputs(), []
    for m in net.modules():
        if isinstance(m, ResBlock):
            m.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    net(x, t)
    expected = F.silu(net.time_embed[2](F.silu(net.time_embed[0](timestep_embedding(t, 32)))))
    assert len(seen) == 11 and all(torch.equal(emb, expected) for emb in seen)


# ---- published weights ----


def foreign(net):
    """The network's tensors under other names, in the same order."""
    return {f"blocks.{i}.tensor": v.clone() for i, v in enumerate(net.state_dict().values())}


def test_published_weights_load_by_order_whatever_their_names():
    """A checkpoint of the same tensors under foreign names reproduces the network."""
    theirs, ours = randomised(small()), small().double().eval()
    load_published(ours, foreign(theirs), "theirs.pt")
    x, t = inputs()
    assert_close(ours(x, t), theirs(x, t), rtol=0, atol=0)
    assert theirs(x, t).abs().mean() > 0.01


def test_learned_variance_head_keeps_its_noise_half():
    """Of a 3 -> 6 checkpoint the first three output channels, eps, are kept."""
    theirs, ours = randomised(small(out_channels=6)), small().double().eval()
    load_published(ours, foreign(theirs), "theirs.pt")
    x, t = inputs()
    assert_close(ours(x, t), theirs(x, t)[:, :3], rtol=1e-12, atol=1e-12)


def test_weights_of_another_size_raise_one_line_and_change_nothing():
    """Another number of tensors, another width, or a head that is not twice as wide: a ValueError that names what does not fit."""
    ours = small()
    before = foreign(ours)
    deeper = foreign(UNet(3, 3, 16, channels=32, res_blocks=2))
    with pytest.raises(
        ValueError,
        match=rf"^theirs.pt holds {len(deeper)} tensors; expected the {len(before)} of this U-Net; give [^\n]*$",
    ):
        load_published(ours, deeper, "theirs.pt")
    with pytest.raises(
        ValueError,
        match=r"^theirs.pt has \[256, 64\] where this U-Net has time_embed.0.weight \[128, 32\]; give [^\n]*$",
    ):
        load_published(ours, foreign(UNet(3, 3, 16, channels=64, res_blocks=1)), "theirs.pt")
    with pytest.raises(
        ValueError,
        match=r"^theirs.pt has \[9, 32, 3, 3\] where this U-Net has out.2.weight \[3, 32, 3, 3\]; give [^\n]*$",
    ):
        load_published(ours, foreign(small(out_channels=9)), "theirs.pt")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), ours.state_dict().values()))


@pytest.mark.parametrize("held", [[torch.zeros(1)], torch.zeros(1), 3, None])
def test_a_torch_file_that_holds_no_dict_raises_one_line(held):
    with pytest.raises(
        ValueError, match=r"^theirs.pt holds a \w+; expected a dict of tensors[^\n]*$"
    ):
        load_published(small(), held, "theirs.pt")
