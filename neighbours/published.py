r"""OpenAI's improved-diffusion checkpoints, as the weights that a run starts from.

    python train.py --model casdm --init-eps FILE.pt ...     theta starts from them
    python train.py --model ddpm --init-eps FILE.pt ...      so does a DDPM that predicts eps

The flags must describe the network that the file holds: --image-size, --channels, --res-blocks.
"""

from pathlib import Path

import torch

from neighbours.plug import Neighbour
from support.files import read_tensors


def load_published(net, state, source):
    """Copies an improved-diffusion checkpoint into `net`.

    state : its state dict; the same tensors in the same order, whatever their names.  Of a
            learned-variance head (twice net's output channels) the first half, eps, is kept
    ValueError for anything else, naming the first tensor that does not fit.
    """
    if not isinstance(state, dict):
        raise ValueError(
            f"{source} holds a {type(state).__name__}; expected a dict of tensors, "
            "a network's state dict; give improved-diffusion's own file"
        )
    own = net.state_dict()
    theirs = [tensor for tensor in state.values() if isinstance(tensor, torch.Tensor)]
    advice = "give the size, channels and blocks it was trained with"
    if len(theirs) != len(own):
        raise ValueError(
            f"{source} holds {len(theirs)} tensors; expected the {len(own)} of this U-Net; {advice}"
        )
    for (name, p), q in zip(own.items(), theirs, strict=True):
        head = name.startswith("out.2.")
        if head and q.shape[1:] == p.shape[1:] and len(q) == 2 * len(p):
            q = q[: len(p)]
        if q.shape != p.shape:
            raise ValueError(
                f"{source} has {list(q.shape)} where this U-Net has {name} {list(p.shape)}; "
                f"{advice}"
            )
        own[name] = q
    net.load_state_dict(own)


# ---- the flags ----


class Published(Neighbour):
    settings = {"init_eps": None}

    def train_flags(self, flag):
        text = (
            "start Cas-DM's theta, or a DDPM that predicts eps, "
            "from an improved-diffusion checkpoint"
        )
        flag("init-eps", text, metavar="FILE", type=lambda path: str(Path(path).absolute()))

    def check(self, s):
        if not s["init_eps"]:
            return
        if s["model"] not in ("casdm", "ddpm"):
            raise ValueError(f"--init-eps means nothing to --model {s['model']}; leave it out")
        if s["predict"] != "eps" or (s["model"] == "ddpm" and s.get("self_perceptual")):
            raise ValueError(
                "--init-eps: published weights predict eps, where --predict x0 does not and "
                "--self-perceptual starts from its judge; leave one of them out"
            )

    def start(self, model, s, metrics):
        if s["init_eps"]:
            state = read_tensors(s["init_eps"], "improved-diffusion checkpoint")
            load_published(model.theta, state, s["init_eps"])
