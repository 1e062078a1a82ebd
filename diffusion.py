r"""The diffusion process: schedules, and Cas-DM Eqs. 1-11, 16 and 17 as pure functions.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models
    DDPM     arXiv:2006.11239v2   IDDPM   arXiv:2102.09672v1   DDIM   arXiv:2010.02502v4

    Cas-DM Eqs. 1-3    beta, alpha and abar of a `Schedule`; `q_step`, `q_sample`
    Cas-DM Eqs. 4-7    `p_sample`, `gaussian_kl`, `mu_from_x0`, `posterior_variance`
    Cas-DM Eqs. 8-11   `x0_from_eps`, `mu_from_eps`, `mu_from_x0`, `mix`
    Cas-DM Eqs. 16-17  `ddim_mu_from_x0`, `ddim_mu_from_eps`

Symbols.  x0 is a clean image in [-1, 1], x_t a noisy one, eps the drawn noise.  `_hat` is a
network's output, the paper's prime; `_star` is a closed form of one.  In every function

    x_t, x0, eps : [B, C, H, W]   float
    t            : [B] int64      1..T, an index of the given schedule
    returns      : [B, C, H, W]   unless it says otherwise; clamped in `clean_estimates` alone

Index and precision, said once.  t runs 1..T as in the paper.  Tables are float64 of length T + 1;
their index 0 is the clean image, so abar[t - 1] is the paper's symbol and t = 1 is no special case.
Coefficients are computed in float64 and cast when they are gathered.
"""

import math
from typing import NamedTuple

import torch


class Schedule(NamedTuple):
    """The coefficients of Cas-DM Eq. 1 for t = 0..T."""

    beta: torch.Tensor  # [T+1] float64   beta[0] = 0
    alpha: torch.Tensor  # [T+1] float64   1 - beta
    alpha_bar: torch.Tensor  # [T+1] float64   alpha_1 ... alpha_t;  alpha_bar[0] = 1
    step: torch.Tensor  # [T+1] int64     the original t of each index: 0..T unless re-spaced

    def to(self, device):
        """The tables on `device`.  MPS has no float64: there they stay where they are."""
        if torch.device(device).type == "mps":
            return self
        return Schedule(*(table.to(device) for table in self))


class Prediction(NamedTuple):
    """What every model of figure 1 says about x_t."""

    eps_hat: torch.Tensor  # [B, C, H, W]   eps', the noise
    x0_hat: torch.Tensor  # [B, C, H, W]   x0', the clean image, not clamped
    r_t: torch.Tensor  # [B, 1, H, W]   weight of x0_hat in the mixed mean, 0..1
    v: torch.Tensor | None = None  # [B, C, H, W]   says Sigma_theta (Cas-DM Eq. 4), if learned


class Estimates(NamedTuple):
    """What a step back is formed from: two clean images in [-1, 1], and their weight.

    A classifier's guidance may move both images out of that range.
    """

    x0_star: torch.Tensor  # [B, C, H, W]   x0*, implied by eps'
    x0_hat: torch.Tensor  # [B, C, H, W]   x0'
    r_t: torch.Tensor  # [B, 1, H, W]
    v: torch.Tensor | None = None  # [B, C, H, W]   as in Prediction


# ---- schedules ----


def linear_schedule(T=1000):
    """beta from 1e-4 to 0.02, times 1000 / T, so that abar_T is the same for every T.

    DDPM Sec. 4; the factor is improved-diffusion's.
    """
    return _schedule(torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T))


def cosine_schedule(T=4000):
    """abar_t = f(t) / f(0),  f(t) = cos^2( (t/T + 0.008) / 1.008 * pi/2 ).       (IDDPM Eq. 17)

    beta is at most 0.999.
    """
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return _schedule((1 - f[1:] / f[:-1]).clamp(max=0.999))


def respace(schedule, steps):
    """The chain of some steps of `schedule`.

    steps : how many, evenly spread (`evenly`), or the t to keep, ascending, 1..T
    alpha_bar is kept and alpha recomputed as abar_i / abar_{i-1} of the new chain.
    CHOICE: only under that reading of alpha do Cas-DM Eqs. 16 and 17 agree.
    ValueError for anything that is not one or more different steps of 1..T.
    """
    T = len(schedule.beta) - 1
    if isinstance(steps, int):
        steps = evenly(T, steps)
    steps = list(steps)
    if not steps or steps != sorted(set(steps)) or steps[0] < 1 or steps[-1] > T:
        got = ", ".join(map(str, steps[:5])) or "none"
        if len(steps) > 5:
            got += ", ..."
        raise ValueError(
            f"sampling steps {got}; "
            f"expected different numbers from 1 to {T}, ascending; choose others"
        )
    kept = torch.tensor([0, *steps], device=schedule.step.device)
    alpha_bar = schedule.alpha_bar[kept]
    alpha = alpha_bar / _previous(alpha_bar)
    return Schedule(1 - alpha, alpha, alpha_bar, schedule.step[kept])


def evenly(T, n):
    """n of the steps 1..T, from 1 up -> [t, ...]

    1, 1 + stride, 1 + 2 stride, ... where a whole stride leaves n of them: improved-diffusion's
    `ddimN`.  Elsewhere 1 + floor(i T / n), as even as whole numbers allow: DDIM's linear rule
    (DDIM App. D.2).  The last is below T: 10 of 4000 steps begin pure noise at t = 3601, where
    sqrt(abar_t) of the cosine schedule is 0.155.
    CHOICE: the paper says "re-space to 100"; improved-diffusion's `100` would start where abar is
    1.5e-10.
    """
    if not 1 <= n <= T:
        raise ValueError(
            f"{n} sampling steps; expected 1 to the schedule's {T}; choose another number"
        )
    stride = -(-T // n)  # the only whole one that can leave n
    if len(range(0, T, stride)) == n:
        return list(range(1, T + 1, stride))
    return [1 + i * T // n for i in range(n)]


def _schedule(beta):
    beta = torch.cat([torch.zeros(1, dtype=torch.float64), beta])
    return Schedule(beta, 1 - beta, torch.cumprod(1 - beta, 0), torch.arange(len(beta)))


SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}


def at_step(coef, t, like):
    """coef[t] as [B, 1, 1, 1] in the dtype and on the device of `like`.   coef: [T+1] float64"""
    assert t.ndim == 1 and t.dtype == torch.int64, f"t: int64 [B], got {t.dtype} {list(t.shape)}"
    return per_image(coef[t.to(coef.device)], like)


def per_image(values, like):
    """One number an image, [B], as [B, 1, 1, 1] in the dtype and on the device of `like`."""
    return values.to(like.device, like.dtype).view(-1, 1, 1, 1)


# ---- the way to noise, and its inverses ----


def q_step(x_prev, t, eps, schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps                        (Cas-DM Eq. 1)

    A draw of q(x_t | x_{t-1}).
    """
    beta = schedule.beta
    return at_step((1 - beta).sqrt(), t, x_prev) * x_prev + at_step(beta.sqrt(), t, x_prev) * eps


def q_sample(x0, t, eps, schedule):
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps                             (Cas-DM Eq. 3)

    A draw of q(x_t | x0) = N(sqrt(abar_t) x0, (1 - abar_t) I)                  (Cas-DM Eq. 2).
    """
    abar = schedule.alpha_bar
    return at_step(abar.sqrt(), t, x0) * x0 + at_step((1 - abar).sqrt(), t, x0) * eps


def x0_from_eps(x_t, t, eps, schedule):
    """x0* = (x_t - sqrt(1 - abar_t) eps') / sqrt(abar_t)                       (Cas-DM Eq. 8)

    Amplifies an error in eps' by sqrt(1/abar_t - 1): 81,165 at t = T of the paper's schedule.
    """
    abar = schedule.alpha_bar
    return at_step(abar.rsqrt(), t, x_t) * x_t - at_step((1 / abar - 1).sqrt(), t, x_t) * eps


def eps_from_x0(x_t, t, x0, schedule):
    """eps = (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t)         (Cas-DM Eq. 3, solved for eps)"""
    abar = schedule.alpha_bar
    return (x_t - at_step(abar.sqrt(), t, x_t) * x0) * at_step((1 - abar).rsqrt(), t, x_t)


def clean_estimates(x_t, t, pred, schedule):
    """x0* of eps' (Cas-DM Eq. 8) and x0', clamped to [-1, 1] -> Estimates

    CHOICE: they are clamped before the means are formed, and eps' is re-derived from the clamped
    x0*.  With r_t = 0 and r_t = 1 that is improved-diffusion's own clipping.
    """
    x0_star = x0_from_eps(x_t, t, pred.eps_hat, schedule)
    return Estimates(x0_star.clamp(-1, 1), pred.x0_hat.clamp(-1, 1), pred.r_t, pred.v)


# ---- one step back: the posterior, and the model's Gaussian ----


def mu_from_x0(x_t, t, x0, schedule):
    """mu~_t = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x0
             + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t                (Cas-DM Eq. 7)

    The mean of q(x_{t-1} | x_t, x0).  With x0' in the place of x0 it is mu_x0' (Cas-DM Eq. 10).
    """
    beta, alpha, abar, _ = schedule
    abar_prev = _previous(abar)
    of_x0 = abar_prev.sqrt() * beta / (1 - abar)
    of_x_t = alpha.sqrt() * (1 - abar_prev) / (1 - abar)
    return at_step(of_x0, t, x_t) * x0 + at_step(of_x_t, t, x_t) * x_t


def mu_from_eps(x_t, t, eps, schedule):
    """mu_eps' = x_t / sqrt(alpha_t) - (1 - alpha_t) / (sqrt(1 - abar_t) sqrt(alpha_t)) eps'

    Cas-DM Eq. 9.  Without a clamp it is mu_from_x0 at x0*.
    """
    beta, alpha, abar, _ = schedule
    of_eps = beta / ((1 - abar) * alpha).sqrt()  # beta = 1 - alpha
    return at_step(alpha.rsqrt(), t, x_t) * x_t - at_step(of_eps, t, x_t) * eps


def mix(mu_x0, mu_eps, r_t):
    """mu = r_t mu_x0' + (1 - r_t) mu_eps'                                      (Cas-DM Eq. 11)

    r_t : [B, 1, H, W]   0..1, shared by the channels
    The same holds of the DDIM means, in the line after Cas-DM Eq. 17.  Every mean here is affine
    in x0, so that mixing means is mixing clean images: mu(r_t x0' + (1 - r_t) x0*).
    """
    return r_t * mu_x0 + (1 - r_t) * mu_eps


def posterior_variance(t, schedule):
    """beta~_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t                         (DDPM Eq. 7)

    The variance of q(x_{t-1} | x_t, x0), 0 at t = 1.      returns : [B] float64
    """
    return _posterior_variances(schedule)[t.to(schedule.beta.device)]


def p_sample(mu, sigma, z):
    """x_{t-1} = mu + sigma z, a draw of p(x_{t-1} | x_t) = N(mu, Sigma)        (Cas-DM Eq. 4)

    sigma : [B, 1, 1, 1] or [B, C, H, W], the root of Sigma      z : [B, C, H, W] ~ N(0, I)
    """
    return mu + sigma * z


def gaussian_kl(mu1, log_var1, mu2, log_var2):
    """KL( N(mu1, exp(log_var1)) || N(mu2, exp(log_var2)) ), in nats, one a dimension.

    Between q(x_{t-1} | x_t, x0) and p(x_{t-1} | x_t) it is L_t (Cas-DM Eq. 5).  At equal variances
    it is (mu1 - mu2)^2 / (2 sigma^2) (Cas-DM Eq. 6, whose printed 2 beta_t^2 should be 2 beta_t).
    """
    log_ratio = log_var2 - log_var1
    inverse_ratio = (log_var1 - log_var2).exp()
    distance = (mu1 - mu2).square() * (-log_var2).exp()
    return (log_ratio + inverse_ratio + distance - 1) / 2


# ---- one step back: DDIM ----


def ddim_sigma(t, schedule, eta):
    """sigma_t = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1})

    DDIM Eq. 16.  0 at t = 1 for every eta; eta = 1 is sigma^2 = beta~_t.      returns : [B] float64
    CHOICE: the paper does not give sigma_t; the default eta = 0 is DDIM's own.
    """
    return eta * posterior_variance(t, schedule).sqrt()


def ddim_mu_from_x0(x_t, t, x0, schedule, eta=0.0):
    """mu_x0'^ddim = sqrt(abar_{t-1}) x0'
                   + sqrt(1 - abar_{t-1} - sigma_t^2) (x_t - sqrt(abar_t) x0') / sqrt(1 - abar_t)

    Cas-DM Eq. 16.
    """
    abar_prev = _previous(schedule.alpha_bar)
    eps = eps_from_x0(x_t, t, x0, schedule)
    return at_step(abar_prev.sqrt(), t, x_t) * x0 + _direction(t, schedule, eta, x_t) * eps


def ddim_mu_from_eps(x_t, t, eps, schedule, eta=0.0):
    """mu_eps'^ddim = (x_t - sqrt(1 - abar_t) eps') / sqrt(alpha_t)
                    + sqrt(1 - abar_{t-1} - sigma_t^2) eps'                     (Cas-DM Eq. 17)

    alpha_t is the given chain's own: abar_t / abar_{t-1} where it is re-spaced (see `respace`).
    """
    _, alpha, abar, _ = schedule
    towards_x0 = x_t - at_step((1 - abar).sqrt(), t, x_t) * eps
    return towards_x0 * at_step(alpha.rsqrt(), t, x_t) + _direction(t, schedule, eta, x_t) * eps


def _direction(t, schedule, eta, like):
    # sqrt(1 - abar_{t-1} - sigma_t^2); the clamp keeps rounding from making it a root of -1e-17
    sigma = eta * _posterior_variances(schedule).sqrt()
    squared = 1 - _previous(schedule.alpha_bar) - sigma**2
    return at_step(squared.clamp(min=0).sqrt(), t, like)


def _posterior_variances(schedule):
    # beta~ of every t: [T+1] float64; index 0 has no step back and is never asked for
    abar = schedule.alpha_bar
    return (1 - _previous(abar)) / (1 - abar) * schedule.beta


def _previous(table):
    # table[t - 1] at index t; index 0, the clean image, has no step before it and keeps its value
    return torch.cat([table[:1], table[:-1]])
