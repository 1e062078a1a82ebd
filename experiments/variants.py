"""Changes to the method that the experiments measure, most of them a choice of ours turned round.

    python -m experiments.variants NAME train.py --model casdm ...
    python -m experiments.variants NAME sample.py CHECKPOINT ...
    python -m experiments.variants NAME steps.py CHECKPOINT --data shapes --results NAME.jsonl

A variant puts something else in a place of the project while the script runs.  None of them is an
option of the project, because none is meant to stay.
"""

import argparse
import sys
from pathlib import Path

import torch

import refiner
import sample
import train
from diffusion import (
    Estimates,
    Prediction,
    clean_estimates,
    ddim_mu_from_x0,
    eps_from_x0,
    mix,
    x0_from_eps,
)
from experiments import steps
from losses import squared_norm
from neighbours import perceptual
from refiner import CasDM
from support import cli
from support.run import Run

# ---- figure 1 ----


class CasDMInParts(CasDM):
    """CasDM with phi's view of x0*, which is all that phi sees, and the range of r_t as methods."""

    def forward(self, x_t, t, y=None):
        time = self.time(t, x_t)
        eps_hat = self.theta(x_t, time, y)
        x0_star = x0_from_eps(x_t, t, eps_hat.detach(), self.schedule)
        x0_hat, logit = self.phi(self.see(x0_star), time, y).split([3, 1], 1)
        return Prediction(eps_hat, x0_hat, self.gate(logit))

    def see(self, x0_star):
        return x0_star.clamp(-1, 1)

    def gate(self, logit):
        return logit.sigmoid()


class PhiUnclamped(CasDMInParts):
    """phi sees x0* as it is."""

    def see(self, x0_star):
        return x0_star


class FreeGate(CasDMInParts):
    """r_t is any number."""

    def gate(self, logit):
        return logit


class GateOfOne(CasDM):
    """r_t = 1: x0' alone."""

    def forward(self, x_t, t, y=None):
        pred = super().forward(x_t, t, y)
        return pred._replace(r_t=torch.ones_like(pred.r_t))


class LinearGate(CasDM):
    """r_t = t / T: from x0* alone where there is little noise to x0' alone where all is noise."""

    def forward(self, x_t, t, y=None):
        pred = super().forward(x_t, t, y)
        r_t = t / (len(self.schedule.beta) - 1)
        return pred._replace(r_t=r_t[:, None, None, None].expand_as(pred.r_t))


# ---- sampling ----


def unclamped(x_t, t, pred, schedule):
    """`diffusion.clean_estimates` without its clamp."""
    x0_star = x0_from_eps(x_t, t, pred.eps_hat, schedule)
    return Estimates(x0_star, pred.x0_hat, pred.r_t, pred.v)


def clamp_mixed(self, x_t, t, estimates, chain):
    """`Ddim`, eta = 0, from the mixed clean image, clamped once.

    Means are affine in x0: without the clamp this is the mix of both means.
    """
    mixed = mix(estimates.x0_hat, estimates.x0_star, estimates.r_t)
    return ddim_mu_from_x0(x_t, t, mixed.clamp(-1, 1), chain)


# ---- training ----


def scaled_mu_loss(pred, batch, schedule):
    """|| x0 - (r_t x0' + (1 - r_t) x0*) ||^2 of the clamped estimates, alike at every t.

    That is L_mu over the square of x0's coefficient in Cas-DM Eq. 7.  Without the clamp x0* is the
    error of eps' times 81,165 at t = T, and this loss drowns phi's others.
    """
    estimates = clean_estimates(batch.x_t, batch.t, pred, schedule)
    mixed = mix(estimates.x0_hat.detach(), estimates.x0_star.detach(), pred.r_t)
    return squared_norm(batch.x0 - mixed)


@torch.no_grad()
def constant_decay(self):
    """`Run.average` without the ramp."""
    torch._foreach_lerp_(self.averages, self.weights, 1 - self.settings["ema"])


class DerivedNoise(perceptual.SelfPerceptual):
    """The metric with the noise that x_t holds if x0' is right, as it is in DDPM.

    At low noise that is the error of x0' many times over, up to 1 / sqrt(1 - abar_1).
    """

    def __init__(self, frozen, own_noise=False):
        super().__init__(frozen, own_noise=True)

    def forward(self, pred, batch):
        eps_hat = eps_from_x0(batch.x_t, batch.t, pred.x0_hat, self.frozen.schedule)
        return super().forward(pred._replace(eps_hat=eps_hat), batch)


# ---- the script ----


def models(casdm):
    """`refiner.MODELS` with another Cas-DM."""
    return refiner.MODELS | {"casdm": casdm}


# name -> [(where, the name there, what stands there instead)]
VARIANTS = {
    "phi-unclamped": [(refiner, "MODELS", models(PhiUnclamped))],
    "r-free": [(refiner, "MODELS", models(FreeGate))],
    "r-one": [(refiner, "MODELS", models(GateOfOne))],
    "r-linear": [(refiner, "MODELS", models(LinearGate))],
    "unclamped": [(sample, "clean_estimates", unclamped)],
    "clamp-mixed": [
        (sample, "clean_estimates", unclamped),
        (sample.Ddim, "__call__", clamp_mixed),
    ],
    "no-ramp": [(Run, "average", constant_decay)],
    "mu-scaled": [(refiner, "mu_loss", scaled_mu_loss)],
    "noise-derived": [(perceptual, "SelfPerceptual", DerivedNoise)],
}
SCRIPTS = {"train.py": train, "sample.py": sample, "steps.py": steps}


def main(argv=None):
    """Runs a script of the project under a variant."""
    args = parse_args(argv)
    for where, name, instead in VARIANTS[args.variant]:
        setattr(where, name, instead)
    return SCRIPTS[args.script].main(args.arguments)


def parse_args(argv):
    """The variant, the script, and the script's own arguments."""
    parser = cli.Parser(__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("script", type=lambda path: Path(path).name, choices=SCRIPTS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
