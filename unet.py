r"""The one network: improved-diffusion's U-Net, of which theta, phi and the baselines are made.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models, Sec. 4.1
    ADM      arXiv:2105.05233v4   Diffusion Models Beat GANs

    UNet(3, 3, image_size=32)                          theta, or a DDPM        52,542,979 parameters
    UNet(3, 4, image_size=32, fixed_resolution=True)   the Fix-Res CNN as phi  45,754,628 parameters

    stem 3x3 conv -> levels of residual blocks, halving the image between them -> middle -> the
    same levels back up, each block fed its input beside the matching output of the way down ->
    GroupNorm, SiLU, 3x3 conv

Self-attention stands at 16 x 16 and 8 x 8, below the image's own size, and in the middle.  Every
residual block and attention ends in a convolution that starts at zero, and so does the network: at
initialisation its output is exactly 0.  The order of the modules is improved-diffusion's
(github.com/openai/improved-diffusion, commit 1bc7bbb), so that its checkpoints fit.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# Image size -> channels of the levels, as multiples: improved-diffusion's, ADM's 128, and our 16
LEVELS = {
    16: (1, 2, 2),
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}
ATTENTION_SIZES = (16, 8)


class UNet(nn.Module):
    """x [B, in_channels, S, S], t [B] float, y [B] int64 or None -> [B, out_channels, S, S]

    t is improved-diffusion's time, 0..1000 (refiner.Model.time).  Every level's width must be
    divisible by 32, the groups of the group norm.  num_classes adds a class embedding to the
    time's (ADM Sec. 3.1), and then y is needed.
    fixed_resolution : the paper's Fix-Res CNN, every down- and up-sampling removed.
    CHOICE: the paper removes "a few" of its attention layers; we keep the middle's, the only
    reading with the paper's fewer parameters and more operations.
    ValueError for a size that is not in LEVELS, or a width that the norms cannot group.
    """

    bf16 = False  # whether it computes in bfloat16; its weights and its output stay as they are

    def __init__(
        self,
        in_channels,
        out_channels,
        image_size,
        channels=128,
        res_blocks=3,
        dropout=0.0,
        num_classes=None,
        heads=4,
        fixed_resolution=False,
    ):
        super().__init__()
        if image_size not in LEVELS:
            raise ValueError(
                f"image size {image_size}; expected one of {', '.join(map(str, LEVELS))}, "
                "which the U-Net can halve; change --image-size"
            )
        widths = [channels * m for m in LEVELS[image_size]]
        self.channels = channels
        emb_channels = 4 * channels
        first, second = nn.Linear(channels, emb_channels), nn.Linear(emb_channels, emb_channels)
        self.time_embed = nn.Sequential(first, nn.SiLU(), second)
        self.label_embed = nn.Embedding(num_classes, emb_channels) if num_classes else None

        def block(c_in, c_out, size):
            """The layers of one block of a level whose images are size x size."""
            layers = [ResBlock(c_in, c_out, emb_channels, dropout)]
            attends = size in ATTENTION_SIZES and size < image_size
            if attends and not fixed_resolution:
                layers.append(Attention(c_out, heads))
            return layers

        def halve(c):
            if fixed_resolution:
                return nn.Identity()
            return nn.Conv2d(c, c, 3, stride=2, padding=1)

        def double(c):
            return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1))

        stem = Block(nn.Conv2d(in_channels, channels, 3, padding=1))
        self.input_blocks = nn.ModuleList([stem])
        c, skips = channels, [channels]
        for level, width in enumerate(widths):
            for _ in range(res_blocks):
                self.input_blocks.append(Block(*block(c, width, image_size >> level)))
                c = width
                skips.append(c)
            if level < len(widths) - 1:
                self.input_blocks.append(Block(halve(c)))
                skips.append(c)

        self.middle = Block(
            ResBlock(c, c, emb_channels, dropout),
            Attention(c, heads),
            ResBlock(c, c, emb_channels, dropout),
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(res_blocks + 1):
                layers = block(c + skips.pop(), width, image_size >> level)
                c = width
                if level and i == res_blocks and not fixed_resolution:
                    layers.append(double(c))
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(
            group_norm(c), nn.SiLU(), zero(nn.Conv2d(c, out_channels, 3, padding=1))
        )

    def forward(self, x, t, y=None):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.decode(*self.encode(x, t, y))
        return out.to(x.dtype)

    def encode(self, x, t, y=None):
        """The way down and the middle.

        returns : the middle's features [B, C, s, s], the outputs on the way, the embedding
        """
        emb = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))  # [B, 4 channels]
        if self.label_embed is not None:
            emb = emb + self.label_embed(y)
        emb = F.silu(emb)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        return self.middle(h, emb), skips, emb

    def decode(self, h, skips, emb):
        """The way back up -> [B, out_channels, S, S]"""
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], 1), emb)
        return self.out(h)


class Block(nn.Sequential):
    """Layers in a row, of which the residual blocks also see the embedding."""

    def forward(self, h, emb):
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


class ResBlock(nn.Module):
    """Norm, SiLU, conv, norm, SiLU, dropout, conv; plus the input.

    The second norm is AdaGN, GroupNorm(h) (1 + scale) + shift of the embedding    (ADM Sec. 3.1)
    """

    def __init__(self, c_in, c_out, emb_channels, dropout):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_channels, 2 * c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)  # [B, c_out, 1, 1] each
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over the H W positions, plus the input."""

    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(c)
        self.qkv = nn.Conv1d(c, 3 * c, 1)
        self.proj = zero(nn.Conv1d(c, c, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x).flatten(2))  # [B, 3 C, HW]
        # improved-diffusion's order: heads first, then q, k, v
        qkv = qkv.view(B, self.heads, 3, C // self.heads, H * W)
        # flash attention takes no other layout than this
        q, k, v = qkv.transpose(3, 4).contiguous().unbind(2)  # [B, heads, HW, C/heads] each
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(2, 3).reshape(B, C, H * W)
        return x + self.proj(h).view(B, C, H, W)


def timestep_embedding(t, dim):
    """[cos(t f_i) | sin(t f_i)],  f_i = 10000^(-i / (dim/2)).     t [B] float -> [B, dim]

    The order and the divisor are improved-diffusion's.
    """
    half = dim // 2
    i = torch.arange(half, dtype=t.dtype, device=t.device)
    frequencies = torch.exp(-math.log(10000) / half * i)
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def group_norm(c):
    """A norm of 32 groups; ValueError where they do not divide c channels."""
    if c % 32:
        raise ValueError(
            f"{c} channels; expected a multiple of 32, the groups of the U-Net's norms; "
            "change --channels"
        )
    return nn.GroupNorm(32, c)


def zero(module):
    """The module, its parameters set to 0."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module
