r"""The self-perceptual objective: a frozen diffusion model as the metric.

SP       arXiv:2401.00110   Diffusion Model with Perceptual Loss
Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models

python train.py --self-perceptual CHECKPOINT=1                a metric on x0' of Cas-DM or Dual
python train.py --model ddpm --self-perceptual CHECKPOINT=1   a DDPM's whole objective
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from diffusion import q_sample
from losses import squared_norm
from neighbours.plug import Neighbour
from refiner import DDPM, DDPMx0
from support import cli
from support.models import check_same_noise, load_model


class SelfPerceptual(nn.Module):
    """Distance of the frozen model's middle features of both images, noised again to t'     (SP)

    L_sp = || f(x^_t', t') - f(x_t', t') ||^2,  mean over C, h, w -> [B]
    x_t' from (x0, eps), x^_t' from (x0', eps^), both by Cas-DM Eq. 3 at t', batch.t_other

    own_noise : whether eps^ is the model's own eps' or the batch's eps
    CHOICE: as a DDPM's whole objective eps^ is its own eps'; beside other losses x0' carries the
    noise of x0, so that it is a metric on x0' alone.

    It is 0 where x0' = x0 and eps^ = eps, and also at t' = t where both pairs give x_t.  The
    frozen model is ours, trained by mean squared error; its theta gives f.
    """

    def __init__(self, frozen, own_noise=False):
        super().__init__()
        self.frozen = frozen.eval().requires_grad_(False)
        self.own_noise = own_noise

    def forward(self, pred, batch):
        eps_hat = pred.eps_hat if self.own_noise else batch.eps
        with torch.no_grad():
            target = self.features(batch.x0, batch.eps, batch)
        return squared_norm(self.features(pred.x0_hat, eps_hat, batch) - target)

    def features(self, x0, eps, batch):
        """The middle's features [B, C, h, w] of the image x0, noised by eps to t'."""
        x = q_sample(x0, batch.t_other, eps, self.frozen.schedule)
        y = batch.y if self.frozen.num_classes else None
        time = self.frozen.time(batch.t_other, x)
        return self.frozen.theta.encode(x, time, y)[0]


class OnlyPerceptual(DDPM):
    """A DDPM whose only loss is the distance by the frozen model."""

    terms = ()

    def losses(self, pred, batch):
        return {}


class OnlyPerceptualX0(DDPMx0):
    """The same, where the network says x0'."""

    terms = ()

    def losses(self, pred, batch):
        return {}


class OtherT:
    """t' in 1..T, uniform, beside the step's own t."""

    def __init__(self, T):
        self.T = T

    def draw(self, rng, n):
        return {"t_other": rng.integers(1, self.T + 1, n)}


# ---- the flags ----


class Perceptual(Neighbour):
    settings = {"self_perceptual": {}}
    alone = {"eps": OnlyPerceptual, "x0": OnlyPerceptualX0}

    def train_flags(self, flag):
        text = "a frozen model of ours as a metric, or as DDPM's whole objective, and its lambda"
        flag("self-perceptual", text, type=checkpoint_and_lambda, metavar="CKPT=W")

    def check(self, settings):
        """ValueError for a metric beside a DDPM's self-perceptual objective."""
        if self.model(settings) and settings["metric"]:
            raise ValueError(
                f"--metric {', '.join(settings['metric'])}: --self-perceptual is a DDPM's whole "
                "objective; expected no metric beside it; leave one of them out"
            )

    def model(self, settings):
        if settings["self_perceptual"] and settings["model"] == "ddpm":
            return self.alone.get(settings["predict"])

    def metrics(self, settings):
        """{name: (lambda, metric)} of --self-perceptual."""
        found = {}
        for path, weight in settings["self_perceptual"].items():
            frozen = frozen_model(path, settings)
            found["self-perceptual"] = weight, SelfPerceptual(frozen, settings["model"] == "ddpm")
        return found

    def draws(self, settings):
        return [OtherT(settings["T"])] if settings["self_perceptual"] else []

    def start(self, model, settings, metrics):
        """DDPM's is the second stage of the very model that is frozen (SP)."""
        if self.model(settings):
            start_from(model, metrics["self-perceptual"].frozen)


def checkpoint_and_lambda(text):
    """An argparse type: CKPT=W -> {absolute path: W}"""
    path, _, weight = text.rpartition("=")
    if not path:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected CKPT=W, a checkpoint of ours and its lambda"
        )
    return {str(Path(path).absolute()): cli.real(0, above=True)(weight)}


def frozen_model(path, settings):
    """The frozen model; ValueError where it does not know this run's noisy images or labels."""
    frozen, _, theirs = load_model(path)
    check_same_noise(path, theirs, settings)
    foreign = frozen.num_classes not in (None, settings["num_classes"])
    knows_null = frozen.num_classes and frozen.theta.label_embed.num_embeddings > frozen.num_classes
    if foreign or (frozen.num_classes and settings["label_dropout"] and not knows_null):
        raise ValueError(
            f"{path} was trained with {frozen.num_classes} classes; expected the labels of this "
            "run; use the same --class-cond and --label-dropout"
        )
    return frozen


def start_from(model, other):
    """Copies another model's weights into a DDPM; ValueError where they mean something else."""
    reason = None
    predicts_x0 = isinstance(other, DDPMx0)
    if predicts_x0 != isinstance(model, DDPMx0):  # weights of one shape
        reason = f"it predicts {'x0' if predicts_x0 else 'eps'}"
    else:
        try:
            model.load_state_dict(other.state_dict())
        except RuntimeError as e:
            reason = cli.one_line(e)[:160]
    if reason:
        raise ValueError(
            f"--self-perceptual: its model differs from the one to be trained ({reason}); "
            "expected a DDPM trained with the same settings; give those settings"
        )
