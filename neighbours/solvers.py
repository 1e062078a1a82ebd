r"""Other ways to take the steps, and other steps to take.

    DPM++   arXiv:2211.01095v2   DPM-Solver++            `DpmSolver2M`, Algorithm 2
    IDDPM   arXiv:2102.09672v1   Improved DDPM           `sections`, as its code takes them
    DDIM    arXiv:2010.02502v4   App. D.2                `quadratic`

    python sample.py CHECKPOINT --sampler dpm++ --steps 10
    python sample.py CHECKPOINT --steps 10 --spacing trailing
    python sample.py CHECKPOINT --spacing sections=90,60,60,20,20        counted from x0 up
    python sample.py CHECKPOINT --spacing t=1,10,100,1000

A spacing says which of the steps 1..T the chain keeps; `diffusion.respace` makes the chain.
"""

import argparse

import torch

from diffusion import at_step, mix, respace
from neighbours.plug import Neighbour


class DpmSolver2M:
    """The second-order step of DPM-Solver++(2M)                                (DPM++ Alg. 2)

    With lambda_t = log(sqrt(abar_t) / sqrt(1 - abar_t)), h = lambda_{t-1} - lambda_t and the
    clean estimates x0_t of this step and x0_{t+1} of the one before,

    D       = x0_t + h_t / (2 h_{t+1}) (x0_t - x0_{t+1})
    x_{t-1} = sqrt(1 - abar_{t-1}) / sqrt(1 - abar_t) x_t - sqrt(abar_{t-1}) (exp(-h_t) - 1) D

    The first step, and the last, where h is infinite, are of first order: D = x0_t, DDIM's step.
    Every mean of Cas-DM is affine in x0, so that x0_t is the mix r_t x0' + (1 - r_t) x0*.
    One object a batch: it remembers the step before.
    """

    def __init__(self):
        self.x0_before = None

    def __call__(self, x_t, t, estimates, chain):
        x0 = mix(estimates.x0_hat, estimates.x0_star, estimates.r_t)
        abar = chain.alpha_bar
        log_snr = (abar.log() - (1 - abar).log()) / 2  # infinite at 0
        h = log_snr.roll(1) - log_snr  # [T+1]; of index 0 never asked for
        D = x0
        if self.x0_before is not None:
            bend = h / (2 * h.roll(-1))
            bend = torch.where(h.isinf(), 0, bend)  # the last step
            D = x0 + at_step(bend, t, x_t) * (x0 - self.x0_before)
        self.x0_before = x0
        sigma = (1 - abar).sqrt()
        of_x_t = at_step(sigma.roll(1) / sigma, t, x_t)
        of_D = at_step(abar.roll(1).sqrt() * -torch.expm1(-h), t, x_t)
        return of_x_t * x_t + of_D * D


def dpm_solver(args, settings):
    """The sampler that --sampler dpm++ asks for."""
    return lambda noise, y: DpmSolver2M()


# ---- which steps: (schedule, n) -> n of 1..T, ascending ----


def trailing(schedule, n):
    """round(T - i T / n): like even steps, but from T down.  (diffusers' `trailing`)"""
    T = len(schedule.beta) - 1
    return sorted(round(T - i * T / n) for i in range(n))


def linspace(schedule, n):
    """From 1 to T, both included.  (diffusers' `linspace`)"""
    T = len(schedule.beta) - 1
    return _rounded(torch.linspace(1, T, n, dtype=torch.float64), T)


def quadratic(schedule, n):
    """1 + c i^2, dense near x0, to T                                           (DDIM App. D.2)

    DDIM's code ends at 0.8 T, where the cosine schedule is far from noise: abar is 0.094.
    """
    T = len(schedule.beta) - 1
    return _rounded(1 + torch.linspace(0, (T - 1) ** 0.5, n, dtype=torch.float64) ** 2, T)


def even_in_log_snr(schedule, n):
    """Even in log(abar_t / (1 - abar_t)), from 1 to T, as solvers of DPM-Solver's kind want it."""
    abar = schedule.alpha_bar[1:]
    log_snr = abar.log() - (1 - abar).log()  # falls with t
    wanted = torch.linspace(log_snr[0], log_snr[-1], n, dtype=torch.float64)
    nearest = (log_snr[:, None] - wanted).abs().argmin(0) + 1
    return _rounded(nearest, len(abar))


def sections(schedule, counts):
    """As many steps in each of the equal sections of 1..T, from x0 up          (improved-diffusion)

    The first T mod k of k sections are one longer; in each the stride is fractional, and rounded
    to the even of two neighbours.  `100` is one section, from 1 to T.
    """
    T, k = len(schedule.beta) - 1, len(counts)
    kept, start = [], 1
    for i, count in enumerate(counts):
        size = T // k + (i < T % k)
        if not 1 <= count <= size:
            raise ValueError(
                f"--spacing sections: {count} steps in a section of {size}; "
                f"expected 1 to {size} in each of {k} sections of T = {T}; choose others"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1
        kept += [start + round(j * stride) for j in range(count)]
        start += size
    return kept


def _rounded(steps, T):
    # to whole numbers, each above the one before and leaving room for those that follow
    kept = []
    for i, t in enumerate(steps.tolist()):
        lowest = kept[-1] + 1 if kept else 1
        highest = T - (len(steps) - 1 - i)
        kept.append(min(max(round(t), lowest), highest))
    return kept


SPACINGS = {
    "trailing": trailing,
    "linspace": linspace,
    "quad": quadratic,
    "logsnr": even_in_log_snr,
}


# ---- the flags ----


def spacing(text):
    """An argparse type: a name, sections=A,B,... or t=A,B,... -> (schedule, n) -> steps"""
    kind, equals, numbers = text.partition("=")
    if not equals and kind in SPACINGS:
        return SPACINGS[kind]
    try:
        numbers = [int(number) for number in numbers.split(",")]
    except ValueError:
        numbers = []
    if numbers and kind == "sections":
        return lambda schedule, n: sections(schedule, numbers)
    if numbers and kind == "t":
        return lambda schedule, n: numbers
    raise argparse.ArgumentTypeError(
        f"got {text!r}; expected {', '.join(SPACINGS)}, sections=A,B,... or t=A,B,..."
    )


class Solvers(Neighbour):
    samplers = {"dpm++": dpm_solver}

    def implied(self, settings, typed):
        """On `shapes` ten of its steps look like a hundred of DDIM's, in a tenth of the time."""
        if settings["data"] != "shapes" or "sampler" in typed:
            return {}
        return {"sampler": "dpm++", "sample_steps": 10}

    def sampler_flags(self, parser):
        """--spacing."""
        text = (
            f"which steps: {', '.join(SPACINGS)}; sections=A,B,...: so many of each part of 1..T, "
            "from x0 up; t=A,B,...: these (default: even ones)"
        )
        parser.add_argument("--spacing", type=spacing, metavar="NAME", help=text)

    def check_sampler(self, parser, args):
        if args.steps and args.spacing not in (None, *SPACINGS.values()):
            parser.error(
                "--steps and --spacing sections=... or t=... both say how many; leave one out"
            )

    def steer(self, args, sampler, settings):
        if args.spacing:
            schedule, n = sampler.model.schedule, len(sampler.chain.step) - 1
            sampler.chain = respace(schedule, args.spacing(schedule, n))
