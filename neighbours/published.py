r"""OpenAI's improved-diffusion checkpoints: sampled as they are, or as what a run starts from.

    python sample.py FILE.pt --published cosine:4000         sampled; so does fid.py
    python train.py --model casdm --init-eps FILE.pt ...     theta starts from them
    python train.py --model ddpm --init-eps FILE.pt ...      so does a DDPM that predicts eps

A file holds the network alone.  Its size, channels and blocks are read off its tensors; the
schedule that it was trained with must be said.  Where it learned its variance, `--sampler ddpm`
and `--bits-per-dim` use it.
"""

import argparse
import itertools
from pathlib import Path

import torch

from diffusion import SCHEDULES
from neighbours.plug import Neighbour
from refiner import DEFAULTS
from support import cli
from support.files import read_tensors
from support.models import build
from unet import LEVELS

SPACE = list(itertools.product(LEVELS, range(1, 5)))  # image sizes and blocks that are tried


def open_published(path, schedule, T):
    """(model, settings) of an improved-diffusion file; ValueError where no U-Net of ours fits it.

    schedule : its name in SCHEDULES          T : the steps that it was trained with
    """
    state = read_tensors(path, "improved-diffusion checkpoint")
    shapes = [tensor.shape for tensor in tensors_of(state, path)]
    settings = {"model": "ddpm", "schedule": schedule, "T": T}
    # the first tensor is the time embedding's, [4 channels, channels]
    channels = shapes[0][-1] if shapes and len(shapes[0]) == 2 else 0
    settings["channels"] = channels
    sizes = SPACE if channels else []
    learned = bool(shapes) and shapes[-1][:1] == (6,)  # eps and v
    settings |= {"learn_sigma": learned, "objective": "hybrid" if learned else "simple"}
    for image_size, res_blocks in sizes:
        settings |= {"image_size": image_size, "res_blocks": res_blocks}
        if own_shapes(settings) == shapes:
            model = build(settings)
            load_published(model.theta, state, path)
            if model.schedule.beta.max() >= 1:
                raise ValueError(
                    f"--published {schedule}:{T} reaches beta = 1; expected the schedule that "
                    "the file was trained with; use more steps or cosine"
                )
            if not all(p.isfinite().all() for p in model.parameters()):
                raise ValueError(
                    f"{path} holds weights that are not finite; expected numbers; get it again"
                )
            return model, DEFAULTS | settings
    raise ValueError(
        f"{path} holds {len(shapes)} tensors that fit no U-Net of ours; expected "
        "improved-diffusion's, with scale-shift norms, 4 heads and no classes; check the file"
    )


def own_shapes(settings):
    """The shapes of our U-Net's tensors, or None where it cannot have the size."""
    try:
        with torch.device("meta"):
            return [tensor.shape for tensor in build(settings).theta.state_dict().values()]
    except ValueError:
        return None


def tensors_of(state, source):
    """The tensors of a state dict, in their order; ValueError for anything else."""
    if not isinstance(state, dict):
        raise ValueError(
            f"{source} holds a {type(state).__name__}; expected a dict of tensors, "
            "a network's state dict; give improved-diffusion's own file"
        )
    return [tensor for tensor in state.values() if isinstance(tensor, torch.Tensor)]


def load_published(net, state, source):
    """Copies an improved-diffusion checkpoint into `net`.

    state : its state dict; the same tensors in the same order, whatever their names.  Of a
            learned-variance head (twice net's output channels) the first half, eps, is kept
    ValueError for anything else, naming the first tensor that does not fit.
    """
    theirs = tensors_of(state, source)
    own = net.state_dict()
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


def schedule_and_T(text):
    """An argparse type: SCHEDULE:T -> (name, T)"""
    name, _, steps = text.partition(":")
    if name not in SCHEDULES:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected SCHEDULE:T, like cosine:4000 or linear:1000"
        )
    return name, cli.whole(1, 100_000)(steps)


class Published(Neighbour):
    settings = {"init_eps": None}

    def train_flags(self, flag):
        """--init-eps."""
        text = (
            "start Cas-DM's theta, or a DDPM that predicts eps, "
            "from an improved-diffusion checkpoint"
        )
        flag("init-eps", text, metavar="FILE", type=lambda path: str(Path(path).absolute()))

    def check(self, settings):
        """ValueError for --init-eps where no network predicts eps."""
        if not settings["init_eps"]:
            return
        if settings["model"] not in ("casdm", "ddpm"):
            raise ValueError(
                f"--init-eps means nothing to --model {settings['model']}; leave it out"
            )
        frozen = settings["model"] == "ddpm" and settings.get("self_perceptual")
        if settings["predict"] != "eps" or frozen:
            raise ValueError(
                "--init-eps: published weights predict eps, where --predict x0 does not and "
                "--self-perceptual starts from its frozen model; leave one of them out"
            )

    def start(self, model, settings, metrics):
        if settings["init_eps"]:
            state = read_tensors(settings["init_eps"], "improved-diffusion checkpoint")
            load_published(model.theta, state, settings["init_eps"])

    def sampler_flags(self, parser):
        text = "the file is improved-diffusion's, trained with this schedule and so many steps"
        parser.add_argument("--published", type=schedule_and_T, metavar="SCHEDULE:T", help=text)

    def check_sampler(self, parser, args):
        if args.published and args.raw:
            parser.error("--raw: a published file holds one set of weights; leave it out")

    def open(self, args, path):
        if args.published:
            return open_published(path, *args.published)
