r"""unet.py: improved-diffusion's U-Net, by its published sizes, a golden output, and formulas here.

    Cas-DM   arXiv:2401.02414v1     ADM   arXiv:2105.05233v4

Networks are 32 channels wide, the least that the group norms allow, and are fed 8 x 8 images where
the size does not matter: they are convolutional.  Full-size ones are built without storage.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from models import without_zeros
from unet import Attention, ResBlock, UNet, timestep_embedding


def small(in_channels=3, out_channels=3, **how):
    torch.manual_seed(0)
    return UNet(in_channels, out_channels, image_size=16, channels=32, res_blocks=1, **how)


def randomised(net, seed=0):
    """Every weight that starts at zero made random, in float64 and eval mode.

    At initialisation no gradient and no signal passes the last convolutions.
    """
    torch.manual_seed(seed)
    return without_zeros(net).double().eval()


def inputs(n=2, size=8):
    """n images and their times."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0.25, 617.5, 3.0, 999.75])[:n].double()


def blocks(net):
    """What the features pass, in their order."""
    return [*net.input_blocks, net.middle, *net.output_blocks]


def sides(net):
    """The side of the features after each block, for an image of 16 x 16."""
    found = []
    for block in blocks(net):
        block.register_forward_hook(lambda module, args, out: found.append(out.shape[-1]))
    net(*inputs(size=16))
    return found


def has(kind, module):
    return any(isinstance(m, kind) for m in module.modules())


# ---- published numbers ----

COUNTS = {
    "theta": (3, 3, {}, 52_542_979, 121_060_483),
    "phi": (3, 4, {}, 52_544_132, 121_061_636),
    "phi of x0* and eps'": (6, 4, {}, 52_547_588, 121_065_092),
    "Dual": (3, 7, {}, 52_547_591, 121_065_095),
    "learned variance": (3, 6, {}, 52_546_438, 121_063_942),
    "Fix-Res": (3, 4, {"fixed_resolution": True}, 45_754_628, 103_212_676),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_improved_diffusions(name):
    """At 32 x 32 and at 64 x 64   (Cas-DM Sec. 4.1)."""
    in_channels, out_channels, how, at_32, at_64 = COUNTS[name]
    for size, count in ((32, at_32), (64, at_64)):
        with torch.device("meta"):
            net = UNet(in_channels, out_channels, size, **how)
        assert sum(p.numel() for p in net.parameters()) == count


def test_parameter_counts_of_published_checkpoints():
    """OpenAI's at 64 x 64: two blocks a level; and 192 channels with ImageNet's 1,000 classes."""
    with torch.device("meta"):
        two_blocks = UNet(3, 3, 64, res_blocks=2)
        of_classes = UNet(3, 6, 64, channels=192, num_classes=1000)
    assert sum(p.numel() for p in two_blocks.parameters()) == 92_025_731
    assert sum(p.numel() for p in of_classes.parameters()) == 273_049_350


def test_output_is_the_originals_to_nine_digits():
    """The reference network's golden output in float64, of ../shared/data/README.md.

    Its parameters are filled by s(k, shape) = sin(j + k + 1).
    """
    net = UNet(3, 4, image_size=32, channels=32, res_blocks=1).double().eval()
    assert len(list(net.parameters())) == 222
    assert sum(p.numel() for p in net.parameters()) == 1_679_204
    with torch.no_grad():
        for k, (name, p) in enumerate(net.named_parameters()):
            s = torch.sin(torch.arange(p.numel(), dtype=torch.float64) + k + 1).view(p.shape)
            if p.ndim > 1:
                value = s * math.sqrt(2 / p[0].numel())
            elif name.endswith("weight"):  # of a norm
                value = 1 + 0.1 * s
            else:
                value = 0.1 * s
            p.copy_(value)
        x = torch.sin(0.37 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).view(2, 3, 32, 32)
        out = net(x, torch.tensor([0.25, 617.5], dtype=torch.float64))
    first = [-0.5587550178987515, -0.7073095819456865, 0.21872793571525065, 0.8296433379185908]
    later = [-0.16245719689754168, -0.17007932660392164, -0.06824510364514509]
    assert out.mean().item() == pytest.approx(-0.018182769927385583, abs=1e-9)
    assert out.std().item() == pytest.approx(0.3760483855824422, abs=1e-9)
    assert out[0, 0, 0, :4].tolist() == pytest.approx(first, abs=1e-9)
    assert out[1, 3, 17, 5:8].tolist() == pytest.approx(later, abs=1e-9)


# ---- the whole network ----


@pytest.mark.parametrize("how", [{}, {"fixed_resolution": True}, {"num_classes": 5}])
def test_output_is_exactly_zero_at_initialisation(how):
    """The last convolution starts at zero, and with it the output, in every variant."""
    x, t = inputs()
    y = torch.tensor([1, 4]) if "num_classes" in how else None
    assert not small(out_channels=7, **how).double()(x, t, y).any()


def test_every_block_starts_as_its_skip_path():
    """A residual block is its skip connection, an attention the identity: both end in zeros."""
    torch.manual_seed(0)
    x, emb = torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    assert torch.equal(ResBlock(32, 32, emb_channels=8, dropout=0.0)(x, emb), x)
    assert torch.equal(Attention(32, heads=4)(x), x)
    wider = ResBlock(32, 64, emb_channels=8, dropout=0.0)
    assert torch.equal(wider(x, emb), wider.skip(x))


@pytest.mark.parametrize("size, channels", [(16, 1), (32, 2)])
def test_output_has_the_inputs_size_and_dtype(size, channels):
    """[B, in, S, S] -> [B, out, S, S] in the dtype of x, also where it computes in bf16."""
    net = UNet(channels, 5, size, channels=32, res_blocks=1).eval()
    x, t = torch.randn(2, channels, size, size), torch.tensor([0.0, 999.0])
    with torch.no_grad():
        assert net(x, t).dtype == torch.float32
        net.bf16 = True
        assert net(x, t).dtype == torch.float32
        net.bf16 = False
        out = net.double()(x.double(), t.double())
    assert out.dtype == torch.float64 and out.shape == (2, 5, size, size)


def test_bf16_is_one_networks_own_choice():
    """Its convolutions compute in bfloat16 where `bf16` is set, and another network's do not."""
    dtypes = []
    for bf16 in (False, True):
        net = small()
        net.bf16 = bf16
        net.input_blocks[0].register_forward_hook(lambda _, args, out: dtypes.append(out.dtype))
        x, t = inputs()
        net(x.float(), t.float())
    assert dtypes == [torch.float32, torch.bfloat16]


def test_images_of_a_batch_do_not_see_each_other():
    """Image i of a batch comes out as it does alone, and depends on its own time."""
    net, (x, t) = randomised(small()), inputs(4)
    later = t.clone()
    later[2] += 5
    with torch.no_grad():
        together, moved = net(x, t), net(x, later)
        alone = [net(x[i : i + 1], t[i : i + 1]) for i in range(4)]
    assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)
    assert (together != moved).flatten(1).any(1).tolist() == [False, False, True, False]


def test_a_class_adds_its_embedding_to_the_times():
    """A zero embedding is no class, and images that differ in y alone differ   (ADM Sec. 3.1)."""
    net, plain = randomised(small(num_classes=5)), randomised(small())
    shared = {k: v for k, v in net.state_dict().items() if not k.startswith("label")}
    plain.load_state_dict(shared)
    x, t = inputs(1)
    with torch.no_grad():
        net.label_embed.weight[2] = 0
        of_none, of_three = net(x, t, torch.tensor([2])), net(x, t, torch.tensor([3]))
        assert torch.equal(of_none, plain(x, t))
    assert not torch.equal(of_none, of_three)


def test_dropout_acts_in_training_only():
    """Two passes differ in train mode and agree in eval mode."""
    net, (x, t) = randomised(small(dropout=0.5)), inputs()
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


def test_attention_stands_at_16_and_8_and_in_the_middle():
    """At 32 x 32 with 3 blocks: none at 32 x 32 and, but for the middle, none at 4 x 4."""
    with torch.device("meta"):
        net = UNet(3, 3, 32)
    assert sum(isinstance(m, Attention) for m in net.modules()) == 15
    assert sum(isinstance(m, ResBlock) for m in net.modules()) == 30
    attends = [has(Attention, block) for block in net.input_blocks]
    at_32, at_16, at_8, at_4 = attends[:5], attends[5:9], attends[9:13], attends[13:]
    assert at_32 == [False] * 5  # the stem, three blocks, the halving
    assert at_16 == at_8 == [True, True, True, False]
    assert at_4 == [False] * 3


def test_fix_res_network_never_resizes_and_attends_in_the_middle_only():
    """No stride, no Upsample, one attention, every map of the image's size   (Cas-DM Sec. 4.1)."""
    net = small(fixed_resolution=True).double()
    assert not has(nn.Upsample, net)
    assert {m.stride for m in net.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}
    assert [has(Attention, block) for block in blocks(net)].count(True) == 1
    assert isinstance(net.middle[1], Attention)
    assert set(sides(net)) == {16}


def test_unet_halves_at_every_level_and_doubles_back():
    """At 16 x 16 the maps are 16, 8, 4 on the way down and 4, 8, 16 on the way up."""
    assert sides(small().double()) == [16, 16, 8, 8, 4, 4, 4, 4, 8, 8, 16, 16, 16]


IMPOSSIBLE = [
    (28, 32, "image size 28; expected one of .*32.*; change --image-size"),
    (16, 48, "48 channels; expected a multiple of 32.*; change --channels"),
]


@pytest.mark.parametrize("image_size, channels, message", IMPOSSIBLE, ids=["size", "channels"])
def test_impossible_sizes_raise_one_line(image_size, channels, message):
    """A size that cannot be halved, and a width that 32 groups do not divide."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        UNet(3, 3, image_size, channels, res_blocks=1)


# ---- its parts, against formulas written here ----


def test_time_embedding_is_cosines_then_sines_divided_by_half():
    """[cos(t f_i) | sin(t f_i)], f_i = 10000^(-i / half), for fractional t too.

    improved-diffusion's order and divisor.
    """
    t = torch.tensor([0.0, 0.25, 999.75], dtype=torch.float64)
    angles = t.numpy()[:, None] * 10000.0 ** (-np.arange(64) / 64)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    assert_close(timestep_embedding(t, 128).numpy(), expected, rtol=0, atol=1e-10)


def test_attention_is_softmax_over_positions_with_heads_split_first():
    """Per head softmax(q k^T / sqrt(C/heads)) v, plus the input.

    The 3 C channels are heads x (q, k, v) x C/heads.
    """
    torch.manual_seed(0)
    C, heads = 64, 4
    attention = Attention(C, heads).double()
    nn.init.normal_(attention.proj.weight)
    x = torch.randn(2, C, 3, 5, dtype=torch.float64)
    normed = F.group_norm(x, 32, attention.norm.weight, attention.norm.bias)
    h = F.conv1d(normed.flatten(2), attention.qkv.weight, attention.qkv.bias)
    out = []
    for head in h.split(3 * C // heads, 1):  # [2, 48, 15]
        q, k, v = head.split(C // heads, 1)  # [2, 16, 15] each
        likeness = torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(C // heads)
        out.append(torch.einsum("bqk,bck->bcq", torch.softmax(likeness, -1), v))
    projected = F.conv1d(torch.cat(out, 1), attention.proj.weight, attention.proj.bias)
    assert_close(attention(x), x + projected.view_as(x), rtol=1e-10, atol=1e-10)


def test_residual_block_scales_and_shifts_its_second_norm():
    """skip(x) + conv(silu(GN(h) (1 + scale) + shift)), (scale, shift) = linear(emb).

    A zero embedding leaves a plain norm   (ADM Sec. 3.1).
    """
    torch.manual_seed(0)
    block = ResBlock(32, 64, emb_channels=8, dropout=0.0).double()
    nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2, 32, 4, 4, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    of_emb = F.linear(emb, block.emb.weight, block.emb.bias)
    scale, shift = of_emb.view(2, 2, 64, 1, 1).unbind(1)
    h = F.group_norm(block.conv1(F.silu(F.group_norm(x, 32))), 32)
    expected = block.skip(x) + block.conv2(F.silu(h * (1 + scale) + shift))
    assert_close(block(x, emb), expected, rtol=1e-10, atol=1e-10)
    nn.init.zeros_(block.emb.bias)
    plain = block.skip(x) + block.conv2(F.silu(h))
    assert_close(block(x, 0 * emb), plain, rtol=1e-10, atol=1e-10)


def test_time_passes_two_linears_and_a_silu_before_every_block():
    """Every residual block is fed silu(linear(silu(linear(embedding))))."""
    net, (x, t) = randomised(small()), inputs()
    seen = []
    for m in net.modules():
        if isinstance(m, ResBlock):
            m.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    net(x, t)
    first, _, second = net.time_embed
    expected = F.silu(second(F.silu(first(timestep_embedding(t, 32)))))
    assert len(seen) == 11 and all(torch.equal(emb, expected) for emb in seen)
