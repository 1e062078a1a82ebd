r"""The step back as a Gaussian of its own: fixed and learned variances, the bound that trains them, and its value in bits a dimension.

    IDDPM    arXiv:2102.09672v1   Improved Denoising Diffusion Probabilistic Models
    DDPM     arXiv:2006.11239v2   Cas-DM   arXiv:2401.02414v1

    DDPM Sec. 3.2   beta~_t or beta_t        `log_variance`            IDDPM Eq. 15   v between their logarithms
    Cas-DM Eq. 4    p(x_{t-1} | x_t)         `p_mean_variance`, `ancestral_sample`
    IDDPM Eqs. 4-7  L_T, L_{t-1}, L_0        `prior_bits`, `bound`     IDDPM Eq. 16   L_hybrid, in losses.py
    IDDPM Eq. 18    importance-sampled t     `ImportanceSampler`

    python train.py --model ddpm --learn-sigma                         trains eps' and v by L_hybrid
    python train.py --model ddpm --learn-sigma --objective vlb         by the bound alone, t drawn where its terms vary
    python sample.py CHECKPOINT --sampler ddpm --steps 250
    python sample.py CHECKPOINT --bits-per-dim --data cifar10

Symbols and shapes are those of diffusion.py; log variances are [B, 1, 1, 1], or [B, C, H, W] where they are learned.
"""
import math

import numpy as np
import torch

from diffusion import at_step, clean_estimates, eps_from_x0, mix, mu_from_eps, mu_from_x0, posterior_variance, q_sample, respace

VARIANCES = ("small", "large", "learned")


def log_variance(t, schedule, kind, like, v=None):
    """log sigma_t^2 of p(x_{t-1} | x_t), in the dtype of `like`.

    small   : log beta~_t, the variance of the posterior            large : log beta_t, that of the forward step    (DDPM Sec. 3.2)
    learned : (1 + v)/2 log beta_t + (1 - v)/2 log beta~_t          v [B, C, H, W], -1..1 but not held there         (IDDPM Eq. 15)

    CHOICE: beta~_1 is 0, and beta~_2 stands in its place, for `large` too, as in improved-diffusion; beta_1 in a chain of one step.
    """
    steps = torch.arange(len(schedule.beta), device=schedule.beta.device)
    large = schedule.beta.log()
    small = posterior_variance(steps.clamp(min=2), schedule).log() if len(steps) > 2 else large
    if kind == "learned":
        return (1 + v) / 2 * at_step(large, t, like) + (1 - v) / 2 * at_step(small, t, like)
    return at_step({"small": small, "large": torch.where(steps == 1, small, large)}[kind], t, like)


def p_mean_variance(x_t, t, x0_star, x0_hat, r_t, v, chain, kind):
    """Mean and log variance of p(x_{t-1} | x_t) = N(r_t mu_x0' + (1 - r_t) mu_eps', sigma_t^2 I)                   (Cas-DM Eqs. 4, 11)

    x0*, x0' : [B, C, H, W], clamped to [-1, 1] as in sample.p_sample, with eps' re-derived from the clamped x0*      r_t : [B, 1, H, W]
    """
    eps_hat = eps_from_x0(x_t, t, x0_star, chain)
    mu = mix(mu_from_x0(x_t, t, x0_hat, chain), mu_from_eps(x_t, t, eps_hat, chain), r_t)
    return mu, log_variance(t, chain, kind, x_t, v)


def ancestral_sample(x_t, t, x0_star, x0_hat, r_t, chain, kind, v=None, z=0, g=None):
    """x_{t-1} = mu + Sigma g + sigma_t z: a draw of Cas-DM Eq. 4, its mean moved by a classifier's gradient      (DDPM Algorithm 2, ADM Algorithm 1)

    z, g : [B, C, H, W], N(0, I) noise, 0 in the last step, and the gradient s g of guidance.py or None
    """
    mu, log_var = p_mean_variance(x_t, t, x0_star, x0_hat, r_t, v, chain, kind)
    if g is not None:
        mu = mu + log_var.exp() * g
    return mu + (log_var / 2).exp() * z


# ---- the bound ----

def bound(x0, x_t, t, mu, log_var, schedule):
    """One term of the variational bound, in bits a dimension: L_{t-1} for t > 1, L_0 for t = 1                     (IDDPM Eqs. 5, 6)

    L_{t-1} = KL( q(x_{t-1} | x_t, x0) || N(mu, exp(log_var)) )       L_0 = -log p(x0 | x_1), the decoder on 256 levels
    returns : [B], the mean over C, H, W
    """
    kl = gaussian_kl(mu_from_x0(x_t, t, x0, schedule), log_variance(t, schedule, "small", x_t), mu, log_var)
    decoder = -discretised_log_likelihood(x0, mu, log_var / 2)
    return torch.where((t == 1).view(-1, 1, 1, 1).to(x0.device), decoder, kl).mean((1, 2, 3)) / math.log(2)


def gaussian_kl(mu1, log_var1, mu2, log_var2):
    """KL( N(mu1, exp(log_var1)) || N(mu2, exp(log_var2)) ), in nats, one a dimension."""
    return (log_var2 - log_var1 + (log_var1 - log_var2).exp() + (mu1 - mu2).square() * (-log_var2).exp() - 1) / 2


def discretised_log_likelihood(x, mu, log_sigma):
    """log of the mass that N(mu, sigma^2) puts on the bin [x - 1/255, x + 1/255] of an 8-bit level; the bins of 0 and 255 reach to infinity.

    DDPM Eq. 13.  Mass and tails come from erfc on the side away from the mean, so that a far bin is not lost to rounding; below 1e-12 it counts as that.
    """
    low, high = (((x - mu + edge) / log_sigma.exp()).clamp(-1e4, 1e4) / math.sqrt(2) for edge in (-1 / 255, 1 / 255))
    low = torch.where(x < -0.999, torch.full_like(low, -math.inf), low)
    high = torch.where(x > 0.999, torch.full_like(high, math.inf), high)
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)        # the tail on the left is the exact one
    return ((torch.erfc(-high) - torch.erfc(-low)) / 2).clamp(min=1e-12).log()


def prior_bits(x0, schedule):
    """L_T = KL( q(x_T | x0) || N(0, I) ), in bits a dimension                                                     (IDDPM Eq. 7)   -> [B]"""
    abar = schedule.alpha_bar[-1].to(x0.device, x0.dtype)
    zero = torch.zeros_like(x0)
    return gaussian_kl(abar.sqrt() * x0, (1 - abar).log() + zero, zero, zero).mean((1, 2, 3)) / math.log(2)


@torch.inference_mode()
def bits_per_dim(model, x0, steps, kind, noise, y=None, watch=None):
    """The bound L_0 + ... + L_T of images, in bits a dimension, over the re-spaced chain of `steps` steps          (IDDPM Eq. 4)

    x0 : [B, C, H, W] in [-1, 1], of 256 levels         noise : called for each step's eps, [B, C, H, W]
    returns : [B, steps + 1]: the terms of t = 1 .. steps, then the prior's
    """
    chain = respace(model.schedule, steps)
    terms = []
    for i, original in list(enumerate(chain.step.tolist()))[1:]:
        t = torch.full((len(x0),), i, device=x0.device)
        x_t = q_sample(x0, t, noise(), chain)
        pred = model(x_t, torch.full_like(t, original), y)
        mu, log_var = p_mean_variance(x_t, t, *clean_estimates(x_t, t, pred, chain), pred.r_t, pred.v, chain, kind)
        terms.append(bound(x0, x_t, t, mu, log_var, chain))
        if watch:
            watch()
    return torch.stack([*terms, prior_bits(x0, chain)], 1)


# ---- t where the bound varies ----

class ImportanceSampler:
    """t with p_t ~ sqrt(E[L_t^2]) over the last ten L_t of each t, uniform until each has ten                     (IDDPM Eq. 18)

    A thousandth of p is kept uniform, as in improved-diffusion, so that a t once thought easy is seen again.
    """
    history = 10

    def __init__(self, T):
        self.seen, self.counts = np.zeros((T, self.history)), np.zeros(T, np.int64)

    def p(self):
        """p_t of t = 1..T   [T] float64"""
        T = len(self.counts)
        if (self.counts < self.history).any():
            return np.full(T, 1 / T)
        p = np.sqrt((self.seen ** 2).mean(1))
        return 0.999 * p / p.sum() + 0.001 / T

    def draw(self, rng, n):
        """t [n] int64, 1..T, and the weights 1 / (T p_t) [n] float32 under which a mean over them is that over uniform t."""
        p = self.p()
        t = rng.choice(len(p), n, p=p)
        return t + 1, (1 / (len(p) * p[t])).astype(np.float32)

    def note(self, t, losses):
        """L_t [n] of the drawn t [n], unweighted; what is not finite is left out."""
        for i, loss in zip(t - 1, losses):
            if np.isfinite(loss):
                self.seen[i, self.counts[i] % self.history] = loss
                self.counts[i] += 1

    def state_dict(self):
        return {"seen": torch.from_numpy(self.seen.copy()), "counts": torch.from_numpy(self.counts.copy())}

    def load_state_dict(self, state):
        self.seen[:], self.counts[:] = state["seen"].numpy(), state["counts"].numpy()
