r"""The losses: Cas-DM Eqs. 12-15.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models

    Cas-DM Eq. 12       `eps_loss`, `x0_loss`, `mu_loss`; a model says which of them it has
    Cas-DM Eq. 13       `training_losses` adds the metrics, which are metrics.py's
    Cas-DM Eqs. 14, 15  `objective` gives every term its lambda

A term is [B]: one number an image, the mean over C, H, W.
CHOICE: the paper's ||.||^2 is that mean, as in improved-diffusion and in Dual's official code;
lambda_lpips = 0.1 only makes sense against means.
"""

from typing import NamedTuple

import torch

from diffusion import mix, mu_from_eps, mu_from_x0

LAMBDAS = {"eps": 1.0, "x0": 1.0, "mu": 1.0}  # the paper's (Cas-DM Sec. 4.1)


class Batch(NamedTuple):
    """What one training step draws, and the noisy image that follows from it."""

    x0: torch.Tensor  # [B, C, H, W]   clean images, -1..1
    t: torch.Tensor  # [B] int64      1..T
    eps: torch.Tensor  # [B, C, H, W]   N(0, I)
    x_t: torch.Tensor  # [B, C, H, W]   q_sample of the three            (Cas-DM Eq. 3)
    y: torch.Tensor | None = None  # [B] int64      labels, for a model that has classes
    weight: torch.Tensor | float = 1  # [B]            of each image, where t is not uniform
    t_other: torch.Tensor | None = None  # [B] int64      a second t, for a metric that wants one


def training_losses(model, batch, metrics):
    """The terms of one training step -> {term: [B]}                     (Cas-DM Eqs. 12, 13)

    metrics : {name: (pred, batch) -> [B]}
    """
    pred = model(batch.x_t, batch.t, batch.y)  # figure 1
    losses = model.losses(pred, batch)  # Cas-DM Eq. 12
    for name, metric in metrics.items():
        losses[name] = metric(pred, batch)  # Cas-DM Eq. 13
    return losses


def objective(losses, lambdas, batch):
    """What the optimiser minimises, L_theta + L_phi.

    L_theta = lambda_eps L_eps                                                  (Cas-DM Eq. 14)
    L_phi   = lambda_x0 L_x0 + lambda_mu L_mu + lambda_lpips L_lpips            (Cas-DM Eq. 15)

    In Cas-DM the two share no parameter: their sum trains each network by its own loss alone.
    returns : {term: scalar}, the mean over the batch times its lambda, and their sum, "loss"
    """
    terms = {}
    for name, loss in losses.items():
        terms[name] = lambdas[name] * (loss * batch.weight).mean()
    return terms | {"loss": sum(terms.values())}


def eps_loss(pred, batch):
    """L_eps = || eps - eps' ||^2                                               (Cas-DM Eq. 12)"""
    return squared_norm(batch.eps - pred.eps_hat)


def x0_loss(pred, batch):
    """L_x0 = || x0 - x0' ||^2                                                  (Cas-DM Eq. 12)"""
    return squared_norm(batch.x0 - pred.x0_hat)


def mu_loss(pred, batch, schedule):
    """L_mu = || mu~_t - ( r_t [mu_x0']_sg + (1 - r_t) [mu_eps']_sg ) ||^2      (Cas-DM Eq. 12)

    [.]_sg is `detach`: both means are constants here, and L_mu trains r_t alone.
    It is Cas-DM Eq. 6 without its factor, which should read 1 / (2 beta_t) (docs/CHOICES.md,
    errata).
    """
    x_t, t = batch.x_t, batch.t
    mu_tilde = mu_from_x0(x_t, t, batch.x0, schedule)
    mu_x0 = mu_from_x0(x_t, t, pred.x0_hat.detach(), schedule)
    mu_eps = mu_from_eps(x_t, t, pred.eps_hat.detach(), schedule)
    return squared_norm(mu_tilde - mix(mu_x0, mu_eps, pred.r_t))


def squared_norm(x):
    """|| x ||^2 of each image, the mean over C, H, W.   [B, C, H, W] -> [B]"""
    return x.square().mean((1, 2, 3))
