r"""The one network: improved-diffusion's U-Net, with which the paper builds theta, phi and the baselines (Cas-DM Sec. 4.1).

    UNet(3, 3, image_size=32)                          theta, or a DDPM        52,542,979 parameters
    UNet(3, 4, image_size=32, fixed_resolution=True)   the Fix-Res CNN as phi  45,754,628 parameters
    Encoder(10, image_size=32)                         its first half, which classifies noisy images

    stem 3x3 conv -> levels of residual blocks, halving the image between levels -> middle -> the same levels back up, each block
    fed the concatenation of its input with the matching output of the way down -> GroupNorm, SiLU, 3x3 conv

Self-attention stands at 16 x 16 and 8 x 8, below the image's own size, and in the middle.  Every residual block and attention ends in a convolution that starts
at zero, as does the network: at initialisation its output is exactly 0.  Module order is improved-diffusion's
(github.com/openai/improved-diffusion, commit 1bc7bbb), so that its checkpoints open here tensor by tensor (`load_published`).

    ADM   arXiv:2105.05233v4   Diffusion Models Beat GANs
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

# Channel multipliers of the levels by image size; improved-diffusion's, and one size below and one between them for small runs and 128 x 128.
LEVELS = {16: (1, 2, 2), 32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}
ATTENTION_SIZES = (16, 8)


class UNet(nn.Module):
    """x [B, in_channels, S, S], t [B] float, y [B] int64 or None -> [B, out_channels, S, S] in x's dtype.

    t is improved-diffusion's time, 0..1000 (see refiner.py).  channels and every level's width must be divisible by 32 (the groups
    of the group norm).  num_classes adds a class embedding to the time's (ADM Sec. 3.1), and then y is needed.
    fixed_resolution: the paper's Fix-Res CNN, every down- and up-sampling removed.
    CHOICE: the paper removes "a few" of its attention layers; we keep the middle's, the only reading with the paper's fewer
    parameters and more operations.
    """

    def __init__(self, in_channels, out_channels, image_size, channels=128, res_blocks=3, dropout=0.0, num_classes=None,
                 heads=4, fixed_resolution=False):
        super().__init__()
        if image_size not in LEVELS:
            raise ValueError(f"image size {image_size}; expected one of {', '.join(map(str, LEVELS))}, which the U-Net can halve; change --image-size")
        widths = [channels * m for m in LEVELS[image_size]]
        emb = 4 * channels
        self.channels = channels
        self.time_embed = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.label_embed = nn.Embedding(num_classes, emb) if num_classes else None

        def block(c_in, c_out, size):
            layers = [ResBlock(c_in, c_out, emb, dropout)]
            if size in ATTENTION_SIZES and size < image_size and not fixed_resolution:
                layers.append(Attention(c_out, heads))
            return layers

        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, channels, 3, padding=1))])
        c, skips = channels, [channels]
        for level, width in enumerate(widths):
            for _ in range(res_blocks):
                self.input_blocks.append(Block(*block(c, width, image_size >> level)))
                c = width
                skips.append(c)
            if level < len(widths) - 1:
                self.input_blocks.append(Block(nn.Identity() if fixed_resolution else nn.Conv2d(c, c, 3, stride=2, padding=1)))
                skips.append(c)

        self.middle = Block(ResBlock(c, c, emb, dropout), Attention(c, heads), ResBlock(c, c, emb, dropout))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(res_blocks + 1):
                layers = block(c + skips.pop(), width, image_size >> level)
                c = width
                if level and i == res_blocks and not fixed_resolution:
                    layers.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)))
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(group_norm(c), nn.SiLU(), zero(nn.Conv2d(c, out_channels, 3, padding=1)))

    def forward(self, x, t, y=None):
        h, skips, emb = self.encode(x, t, y)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], 1), emb)
        return self.out(h).to(x.dtype)

    def encode(self, x, t, y=None):
        """The way down and the middle: (the middle's features [B, C, s, s], the outputs on the way, the embedding)."""
        emb = self.time_embed(timestep_embedding(t, self.channels).to(x.dtype))         # [B, 4 channels]
        if self.label_embed is not None:
            emb = emb + self.label_embed(y)
        emb = F.silu(emb)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        return self.middle(h, emb), skips, emb


class Encoder(UNet):
    """The way down, the middle and an attention pooling: logits [B, classes] of a noisy image, for guidance (ADM Sec. 4)."""

    def __init__(self, classes, image_size, channels=128, res_blocks=3, dropout=0.0):
        super().__init__(3, 3, image_size, channels, res_blocks, dropout)
        del self.output_blocks, self.out
        levels = LEVELS[image_size]
        c = channels * levels[-1]
        self.out = nn.Sequential(group_norm(c), nn.SiLU(), AttentionPool(c, classes, image_size >> (len(levels) - 1)))

    def forward(self, x, t, y=None):
        return self.out(self.encode(x, t)[0]).to(x.dtype)


class Block(nn.Sequential):
    """Layers in a row, of which the residual blocks also see the embedding."""

    def forward(self, h, emb):
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv; AdaGN GroupNorm(h) (1 + scale) + shift of the embedding (ADM Sec. 3.1), SiLU, dropout, conv; plus the input."""

    def __init__(self, c_in, c_out, emb, dropout):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb, 2 * c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)                  # [B, c_out, 1, 1] each
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
        qkv = self.qkv(self.norm(x).flatten(2)).view(B, self.heads, 3, C // self.heads, H * W)     # improved-diffusion's: heads first, then q, k, v
        q, k, v = qkv.transpose(3, 4).contiguous().unbind(2)        # [B, heads, HW, C/heads] each; flash attention takes no other layout
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H * W)
        return x + self.proj(h).view(B, C, H, W)


class AttentionPool(nn.Module):
    """[B, C, size, size] -> [B, out]: attention of the positions' mean over the positions and itself (ADM Sec. 4, after CLIP)."""

    def __init__(self, c, out, size, heads=4):
        super().__init__()
        self.place = nn.Parameter(torch.randn(1 + size * size, c) * c ** -0.5)
        self.attention = nn.MultiheadAttention(c, heads, batch_first=True)
        self.head = nn.Linear(c, out)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)                                                # [B, HW, C]
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.place.to(x.dtype)
        return self.head(self.attention(x[:, :1], x, x, need_weights=False)[0][:, 0])


def timestep_embedding(t, dim):
    """[cos(t f_i) | sin(t f_i)],  f_i = 10000^(-i / (dim/2)):  t [B] float -> [B, dim]  (improved-diffusion's order and divisor)"""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=t.dtype, device=t.device))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def group_norm(c):
    if c % 32:
        raise ValueError(f"{c} channels; expected a multiple of 32, the groups of the U-Net's norms; change --channels")
    return nn.GroupNorm(32, c)


def zero(module):
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def load_published(net, state, source):
    """Copies an improved-diffusion checkpoint into `net`: same tensors in the same order, whatever their names.

    state: its state dict.  Of a learned-variance head (twice net's output channels) the first
    half, eps, is kept.  ValueError for anything else, naming the first tensor that does not fit.
    """
    if not isinstance(state, dict):
        raise ValueError(f"{source} holds a {type(state).__name__}; expected a dict of tensors, "
                         "a network's state dict; give improved-diffusion's own file")
    own = net.state_dict()
    theirs = [v for v in state.values() if isinstance(v, torch.Tensor)]
    if len(theirs) != len(own):
        raise ValueError(f"{source} holds {len(theirs)} tensors; expected the {len(own)} of this U-Net; give the size, channels and blocks it was trained with")
    for (name, p), q in zip(own.items(), theirs):
        if name.startswith("out.2.") and q.shape[1:] == p.shape[1:] and len(q) == 2 * len(p):
            q = q[:len(p)]
        if q.shape != p.shape:
            raise ValueError(f"{source} has {list(q.shape)} where this U-Net has {name} {list(p.shape)}; give the size, channels and blocks it was trained with")
        own[name] = q
    net.load_state_dict(own)
