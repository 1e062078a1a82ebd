"""One file of plain tensors and values, with the settings inside: what train.py leaves."""

import torch

from support.files import atomic, read_tensors

KIND, VERSION = "cas-dm checkpoint", 2

# What version 1 called the networks, and what they are called now.
RENAMED = {"eps_net.": "theta.", "refiner.": "phi.", "net.": "theta."}


def write_checkpoint(path, settings, **state):
    """Whole or not at all (`files.atomic`)."""
    with atomic(path) as f:
        torch.save({"kind": KIND, "version": VERSION, "settings": settings, **state}, f)


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
