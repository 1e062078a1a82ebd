r"""Our choices where the paper is silent, each turned round, so that table1.py can measure what it is worth.

    python -m experiments.variants NAME train.py --model casdm ...
    python -m experiments.variants NAME sample.py CHECKPOINT ...

A variant replaces one function of the project while the script runs; none of them is an option of the project, because none is meant to stay.
"""
import argparse
import sys
from pathlib import Path

import torch


import diffusion
from support import edges
import losses
import refiner
from support import run
import sample
import train


def cascade(see=lambda x0_star: x0_star.clamp(-1, 1), squash=torch.sigmoid):
    """CasDM.forward with phi's view of x0* and the range of r_t as arguments."""
    def forward(self, x_t, t, y=None):
        eps_hat = self.eps_net(x_t, self.time(t, x_t), y)
        seen = see(diffusion.x0_from_eps(x_t, t, eps_hat.detach(), self.schedule))
        x0_hat, r_t = self.refiner(seen, self.time(t, x_t), y).split([3, 1], 1)
        return diffusion.Prediction(eps_hat, x0_hat, squash(r_t))
    return forward


def unclamped(x_t, t, pred, schedule):
    """`diffusion.clean_estimates` without its clamp."""
    return diffusion.x0_from_eps(x_t, t, pred.eps_hat, schedule), pred.x0_hat


def clamp_mixed(x_t, t, x0_star, x0_hat, r_t, chain, eta=0.0, z=0, g=None):
    """`sample.p_sample` of the mixed clean image, clamped once; means are affine in x0, so that it is their mix but for the clamp."""
    mixed = diffusion.mix(x0_hat, x0_star, r_t).clamp(-1, 1)
    return diffusion.ddim_mu_from_x0(x_t, t, mixed, chain, eta)


def scaled_mu_loss(pred, x0, x_t, t, schedule):
    """L_mu over the square of x0's coefficient in Cas-DM Eq. 7, of the clamped estimates: || x0 - (r_t x0' + (1 - r_t) x0*) ||^2, alike at every t.

    Without the clamp x0* is the error of eps' times 81,165 at t = T, and this loss drowns phi's others.
    """
    x0_star, x0_hat = (estimate.detach() for estimate in diffusion.clean_estimates(x_t, t, pred, schedule))     # [B, C, H, W], -1..1
    return (x0 - diffusion.mix(x0_hat, x0_star, pred.r_t)).square().mean((1, 2, 3))


@torch.no_grad()
def constant_decay(self):
    """`Run.update_ema` without the ramp."""
    torch._foreach_lerp_(self.averages, self.weights, 1 - self.settings["ema"])


def derived_noise(model, x0, t, eps, schedule, metrics, y=None, t_other=None, **how):
    """`training_losses` with self-perceptual metrics alone, whose eps^ is the noise that x_t holds if x0' is right, as it is in DDPM.

    At low noise that is the error of x0' many times over, up to 1 / sqrt(1 - abar_1).
    """
    x_t = diffusion.q_sample(x0, t, eps, schedule)

    def derived(metric):
        return lambda x0_hat, x0: metric(x0_hat, x0, diffusion.eps_from_x0(x_t, t, x0_hat, schedule), eps, t_other, y)
    return losses.training_losses(model, x0, t, eps, schedule, {name: (weight, derived(metric)) for name, (weight, metric) in metrics.items()}, y, **how)


VARIANTS = {
    "phi-unclamped": [(refiner.CasDM, "forward", cascade(see=lambda x0_star: x0_star))],
    "r-free": [(refiner.CasDM, "forward", cascade(squash=lambda r_t: r_t))],
    "r-one": [(refiner.CasDM, "forward", cascade(squash=torch.ones_like))],
    "clamp-mixed": [(sample, "clean_estimates", unclamped), (sample, "p_sample", clamp_mixed)],
    "no-ramp": [(run.Run, "update_ema", constant_decay)],
    "mu-scaled": [(losses, "mu_loss", scaled_mu_loss)],
    "noise-derived": [(train, "training_losses", derived_noise)],
}


def main(argv=None):
    """Runs a script of the project under a variant."""
    p = edges.Parser(__doc__)
    p.add_argument("variant", choices=VARIANTS)
    p.add_argument("script", type=lambda path: Path(path).name, choices=("train.py", "sample.py"))
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    a = p.parse_args(argv)
    for place, function, replacement in VARIANTS[a.variant]:
        setattr(place, function, replacement)
    return {"train.py": train, "sample.py": sample}[a.script].main(a.arguments)


if __name__ == "__main__":
    sys.exit(edges.run(main))
