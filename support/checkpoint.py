"""One file of plain tensors and values, with the settings inside: what train.py leaves.

A file of `sample.py --save-weights` is one that holds nothing to go on from.
"""

import torch

from support.files import atomic, read_tensors

KIND, VERSION = "cas-dm checkpoint", 2
PLACES = ("data", "data_dir", "init_eps", "self_perceptual")  # settings that name files

# What version 1 called the networks, and what they are called now.
RENAMED = {"eps_net.": "theta.", "refiner.": "phi.", "net.": "theta."}


def write_checkpoint(path, settings, **state):
    """Whole or not at all (`files.atomic`)."""
    with atomic(path) as f:
        torch.save({"kind": KIND, "version": VERSION, "settings": settings, **state}, f)


def write_weights(path, settings, part, weights):
    """One set of a checkpoint's weights in float16, and the settings but for PLACES.

    part : the set, "ema" or "model"         weights : its state dict, finite
    ValueError where float16 cannot hold one of them.
    """
    settings = {key: value for key, value in settings.items() if key not in PLACES}
    half = {name: tensor.half() for name, tensor in weights.items()}
    for name, tensor in half.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds {weights[name].abs().max().item():.6g}; expected at most 65504, "
                "float16's greatest; use the checkpoint itself"
            )
    write_checkpoint(path, settings, **{part: half})


def read_checkpoint(path):
    """The dict that `write_checkpoint` was given; ValueError, one line, for anything else."""
    state = read_tensors(path, "checkpoint")
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise ValueError(
            f"{path} is a torch file but not a checkpoint of ours; "
            "expected one that train.py wrote; check the path"
        )
    version = state.get("version")
    if version == 1:
        for part in ("model", "ema"):
            if isinstance(state.get(part), dict):
                state[part] = renamed(state[part])
    elif version != VERSION:
        raise ValueError(
            f"{path} has format version {version}; expected {VERSION} or 1; "
            "use the release that wrote it"
        )
    if not isinstance(state.get("settings"), dict):
        raise ValueError(
            f"{path} holds no settings; expected what train.py wrote; use another checkpoint"
        )
    return state


def renamed(tensors):
    """A version 1 state dict under today's names."""
    found = {}
    for name, tensor in tensors.items():
        network = next((old for old in RENAMED if str(name).startswith(old)), None)
        if network:
            name = RENAMED[network] + name.removeprefix(network)
        found[name] = tensor
    return found
