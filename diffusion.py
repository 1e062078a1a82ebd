r"""The diffusion process: schedules and the paper's Eqs. 1-11, 16 and 17, as pure functions of tensors.

    python diffusion.py schedules.png      the two schedules side by side: abar_t, signal to noise, and an image over t

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models
    DDPM     arXiv:2006.11239v2   IDDPM   arXiv:2102.09672v1   DDIM   arXiv:2010.02502v4

    Eqs. 1-3   beta, alpha and abar of a `Schedule`; `q_sample`
    Eqs. 4-7   `mu_from_x0`, `posterior_variance`
    Eqs. 8-11  `x0_from_eps`, `mu_from_eps`, `mu_from_x0`, `mix`
    Eqs. 16-17 `ddim_mu_from_x0`, `ddim_mu_from_eps`

Symbols.  x0 is a clean image in [-1, 1], x_t a noisy one, eps the drawn noise; `_hat` is a network's output and `_star` a closed
form of one.  In every function

    x_t, x0, eps : [B, C, H, W]   float
    t            : [B] int64      1..T, an index of the given schedule
    returns      : [B, C, H, W]   unless it says otherwise; clamped in `clean_estimates` alone

Index and precision, said once: t runs 1..T as in the paper.  Tables are float64 of length T + 1 whose index 0 is the clean image, so
that abar[t - 1] is the paper's symbol and t = 1 is no special case.  Coefficients are computed in float64 and cast when gathered.
"""
import math
from typing import NamedTuple

import torch


class Schedule(NamedTuple):
    """q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)  (Cas-DM Eq. 1): its coefficients for t = 0..T."""
    beta: torch.Tensor          # [T+1] float64   beta[0] = 0
    alpha: torch.Tensor         # [T+1] float64   1 - beta
    alpha_bar: torch.Tensor     # [T+1] float64   alpha_1 ... alpha_t;  alpha_bar[0] = 1
    step: torch.Tensor          # [T+1] int64     the original t of each index: 0..T unless re-spaced

    def to(self, device):
        """The tables on `device`, so that a training step on a GPU never waits for the CPU. MPS has no float64: there they stay."""
        return self if torch.device(device).type == "mps" else Schedule(*(table.to(device) for table in self))


class Prediction(NamedTuple):
    """What every model of figure 1 says about x_t."""
    eps_hat: torch.Tensor       # [B, C, H, W]   noise
    x0_hat: torch.Tensor        # [B, C, H, W]   clean image, not clamped
    r_t: torch.Tensor           # [B, 1, H, W]   weight of x0_hat in the mixed mean, 0..1
    v: torch.Tensor | None = None       # [B, C, H, W]   -1..1, where log sigma_t^2 lies between log beta~_t and log beta_t; None: not learned


# ---- schedules ----

def linear_schedule(T=1000):
    """beta from 1e-4 to 0.02, times 1000 / T so that alpha_bar_T is the same for every T  (DDPM Sec. 4; the factor is improved-diffusion's)."""
    return _schedule(torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T))


def cosine_schedule(T=4000):
    """abar_t = f(t) / f(0),  f(t) = cos^2( (t/T + 0.008) / 1.008 * pi/2 ),  beta <= 0.999  (IDDPM Eq. 17)."""
    f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return _schedule((1 - f[1:] / f[:-1]).clamp(max=0.999))


def respace(schedule, steps):
    """The chain of `steps` steps at an exact stride through `schedule`: improved-diffusion's `ddimN`.

    The stride is the smallest whole number that leaves N of the 0-based steps 0, stride, 2 stride, ...; alpha_bar is kept and alpha
    recomputed as abar_i / abar_{i-1} of the new chain, the only reading under which Cas-DM Eqs. 16 and 17 agree.
    CHOICE: the paper says "re-space to 100"; improved-diffusion's `100` would start at abar = 1.5e-10.
    ValueError where no whole stride gives N steps.
    """
    T = len(schedule.beta) - 1
    stride = next((s for s in range(1, T + 1) if len(range(0, T, s)) == steps), None)
    if stride is None:
        possible = sorted({len(range(0, T, s)) for s in range(1, T + 1)}, key=lambda n: abs(n - steps))[:4]
        raise ValueError(f"{steps} sampling steps have no whole stride through T = {T}; expected a number that has; use {', '.join(map(str, sorted(possible)))}")
    kept = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(1, T + 1, stride)]).to(schedule.step.device)
    alpha_bar = schedule.alpha_bar[kept]
    alpha = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return Schedule(1 - alpha, alpha, alpha_bar, schedule.step[kept])


def _schedule(beta):
    beta = torch.cat([torch.zeros(1, dtype=torch.float64), beta])
    return Schedule(beta, 1 - beta, torch.cumprod(1 - beta, 0), torch.arange(len(beta)))


def at_step(coef, t, like):
    """coef[t] as [B, 1, 1, 1], in the dtype and on the device of `like`.   coef: [T+1] float64;  t: [B] int64."""
    assert t.ndim == 1 and t.dtype == torch.int64, f"t must be int64 [B], got {t.dtype} {tuple(t.shape)}"
    return coef[t.to(coef.device)].to(like.device, like.dtype).view(-1, 1, 1, 1)


# ---- forward process, and its inverses ----

def q_sample(x0, t, eps, schedule):
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps                       (Cas-DM Eq. 3: a draw of Cas-DM Eq. 2)"""
    abar = schedule.alpha_bar
    return at_step(abar.sqrt(), t, x0) * x0 + at_step((1 - abar).sqrt(), t, x0) * eps


def x0_from_eps(x_t, t, eps, schedule):
    """x0* = (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)                  (Cas-DM Eq. 8)

    Amplifies an error in eps by sqrt(1/abar_t - 1): 81,165 at t = T of the paper's schedule.
    """
    abar = schedule.alpha_bar
    return at_step(abar.rsqrt(), t, x_t) * x_t - at_step((1 / abar - 1).sqrt(), t, x_t) * eps


def clean_estimates(x_t, t, pred, schedule):
    """x0* of eps' (Cas-DM Eq. 8) and x0', both clamped to [-1, 1]: what every step back and the bound are formed from."""
    return x0_from_eps(x_t, t, pred.eps_hat, schedule).clamp(-1, 1), pred.x0_hat.clamp(-1, 1)


def eps_from_x0(x_t, t, x0, schedule):
    """eps = (x_t - sqrt(abar_t) x0) / sqrt(1 - abar_t)                   (Cas-DM Eq. 3, solved for eps)"""
    abar = schedule.alpha_bar
    return (x_t - at_step(abar.sqrt(), t, x_t) * x0) * at_step((1 - abar).rsqrt(), t, x_t)


# ---- the posterior of one step back ----

def mu_from_x0(x_t, t, x0, schedule):
    """mu~_t(x_t, x0) = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t

    Cas-DM Eq. 7, the mean of q(x_{t-1} | x_t, x0);  with x0' in the place of x0 it is mu_x0' (Cas-DM Eq. 10).
    """
    beta, alpha, abar, _ = schedule
    abar_prev = _previous(abar)
    return at_step(abar_prev.sqrt() * beta / (1 - abar), t, x_t) * x0 + at_step(alpha.sqrt() * (1 - abar_prev) / (1 - abar), t, x_t) * x_t


def mu_from_eps(x_t, t, eps, schedule):
    """mu_eps = x_t / sqrt(alpha_t) - (1 - alpha_t) / (sqrt(1 - abar_t) sqrt(alpha_t)) eps                        (Cas-DM Eq. 9)"""
    beta, alpha, abar, _ = schedule
    return at_step(alpha.rsqrt(), t, x_t) * x_t - at_step(beta / ((1 - abar) * alpha).sqrt(), t, x_t) * eps


def mix(mu_x0, mu_eps, r_t):
    """mu = r_t mu_x0 + (1 - r_t) mu_eps                                  (Cas-DM Eq. 11, and the line after Cas-DM Eq. 17)

    r_t : [B, 1, H, W]   0..1, shared by the channels
    Every mean here is affine in x0, so mixing means is mixing clean images: mu(r_t x0' + (1 - r_t) x0*).
    """
    return r_t * mu_x0 + (1 - r_t) * mu_eps


def posterior_variance(t, schedule):
    """beta~_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t, the variance of q(x_{t-1} | x_t, x0); 0 at t = 1          (DDPM Eq. 7)

    returns : [B] float64
    """
    return ((1 - _previous(schedule.alpha_bar)) / (1 - schedule.alpha_bar) * schedule.beta)[t.to(schedule.beta.device)]


# ---- DDIM ----

def ddim_sigma(t, schedule, eta):
    """sigma_t = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1})                          (DDIM Eq. 16)

    returns : [B] float64   0 at t = 1 for every eta;  eta = 1 is sigma^2 = beta~_t
    CHOICE: the paper does not give sigma_t; the default eta = 0 is DDIM's own.
    """
    return eta * posterior_variance(t, schedule).sqrt()


def ddim_mu_from_x0(x_t, t, x0, schedule, eta=0.0):
    """mu_x0'^ddim = sqrt(abar_{t-1}) x0' + sqrt(1 - abar_{t-1} - sigma_t^2) (x_t - sqrt(abar_t) x0') / sqrt(1 - abar_t)  (Cas-DM Eq. 16)"""
    abar_prev = _previous(schedule.alpha_bar)
    return at_step(abar_prev.sqrt(), t, x_t) * x0 + _ddim_direction(t, schedule, eta, x_t) * eps_from_x0(x_t, t, x0, schedule)


def ddim_mu_from_eps(x_t, t, eps, schedule, eta=0.0):
    """mu_eps'^ddim = (x_t - sqrt(1 - abar_t) eps') / sqrt(alpha_t) + sqrt(1 - abar_{t-1} - sigma_t^2) eps'               (Cas-DM Eq. 17)

    alpha_t is the given chain's own: under re-spacing abar_t / abar_{t-1}, never the original one (see `respace`).
    """
    _, alpha, abar, _ = schedule
    return (x_t - at_step((1 - abar).sqrt(), t, x_t) * eps) * at_step(alpha.rsqrt(), t, x_t) + _ddim_direction(t, schedule, eta, x_t) * eps


def _ddim_direction(t, schedule, eta, like):
    """sqrt(1 - abar_{t-1} - sigma_t^2); the clamp keeps rounding from making it a root of -1e-17."""
    sigma = ddim_sigma(torch.arange(len(schedule.beta)), schedule, eta)
    return at_step((1 - _previous(schedule.alpha_bar) - sigma ** 2).clamp(min=0).sqrt(), t, like)


def _previous(table):
    """table[t - 1] at index t. Index 0, the clean image, has no step before it: it keeps its own value and is never asked for."""
    return torch.cat([table[:1], table[:-1]])


SCHEDULES = {"cosine": cosine_schedule, "linear": linear_schedule}


# ---- the script ----

def draw_schedules(path, T=1000):
    """abar_t, the signal-to-noise ratio abar_t / (1 - abar_t), and one image noised alike by every schedule (IDDPM Figs. 3, 5)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    import data     # the picture alone needs an image, and a file written whole
    from support import edges
    figure, axes = plt.subplot_mosaic([["abar", "snr"], *[[name, name] for name in SCHEDULES]], figsize=(9, 5.5), height_ratios=[3, *[1] * len(SCHEDULES)])
    shown = torch.linspace(1, T, 12).long()
    x0 = data.from_pixels(data.shapes(32)[0][:1]).expand(len(shown), -1, -1, -1)
    eps = torch.from_numpy(data.stream(0, "schedules", 0).standard_normal((1, *x0.shape[1:]), dtype="float32"))
    for name, make in SCHEDULES.items():
        schedule = make(T)
        abar = schedule.alpha_bar[1:]
        axes["abar"].plot(schedule.step[1:], abar, label=name)
        axes["snr"].semilogy(schedule.step[1:], abar / (1 - abar), label=name)
        noised = data.to_pixels(q_sample(x0, shown, eps, schedule))
        axes[name].imshow(torch.cat([*noised], 1).numpy())
        axes[name].set(ylabel=name, yticks=[], xticks=[32 * i + 16 for i in range(len(shown))], xticklabels=[f"t = {t}" for t in shown])
    axes["abar"].set(title="abar_t", xlabel="t")
    axes["snr"].set(title="abar_t / (1 - abar_t)", xlabel="t")
    axes["abar"].legend()
    figure.tight_layout()
    with edges.atomic(path) as f:
        figure.savefig(f, format="png", dpi=80)
    plt.close(figure)


def main(argv=None):
    """The picture of the schedules."""
    from pathlib import Path

    from support import edges
    p = edges.Parser(__doc__)
    p.add_argument("out", type=Path, metavar="FILE.png")
    a = p.parse_args(argv)
    if a.out.suffix != ".png":
        p.error(f"{a.out}: expected FILE.png")
    edges.check_writable(a.out)
    draw_schedules(a.out)
    print(f"{', '.join(SCHEDULES)} schedules written to {a.out.absolute()}")


if __name__ == "__main__":
    import sys

    from support import edges
    sys.exit(edges.run(main))
