"""Small models of random weights."""

import torch
from torch import nn

from refiner import DEFAULTS, build_model
from support.checkpoint import write_checkpoint
from support.models import build

SMALL = {"image_size": 16, "channels": 32, "res_blocks": 1}  # the least that a U-Net can have


def small(seed=0, std=0.1, **settings):
    """A small model of these settings; the same weights for each seed, and none of them zero."""
    torch.manual_seed(seed)
    return without_zeros(build(SMALL | settings), std)


def without_zeros(net, std=0.1):
    """The network, what starts at zero made random: it would pass no signal and no gradient."""
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=std)
    return net


def write_ddpm(path):
    """A checkpoint of a small untrained DDPM of 20 steps."""
    settings = DEFAULTS | SMALL | {"model": "ddpm", "T": 20}
    weights = build_model(settings).state_dict()
    write_checkpoint(path, settings, step=1, model=weights, ema=weights)
