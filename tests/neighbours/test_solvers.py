r"""neighbours/solvers.py: other steps and other ways to step, on data whose ideal network is known.

    DPM++   arXiv:2211.01095v2

The data: Gaussian images of 32 x 32 with mean 0.05, deviation 0.5 and a spectrum that falls as
1/f^2.  In the Fourier basis every coefficient is a Gaussian of its own, the ideal network is a
line, and so is the whole sampler: its Frechet distance to the data, a pixel and times 1e4, is
exact.
"""

import argparse

import pytest
import torch
from torch.testing import assert_close

from diffusion import (
    Estimates,
    cosine_schedule,
    linear_schedule,
    mix,
    respace,
)
from neighbours.solvers import (
    DpmSolver2M,
    even_in_log_snr,
    linspace,
    quadratic,
    sections,
    spacing,
    trailing,
)
from runs import ROOT
from sample import Ddim

SCHEDULES = {"cosine": cosine_schedule(), "linear": linear_schedule()}
SPACINGS = {
    "even": lambda schedule, n: n,
    "trailing": trailing,
    "linspace": linspace,
    "quad": quadratic,
    "logsnr": even_in_log_snr,
}


def spectrum():
    """Mean and variance of each Fourier coefficient, [1024] each."""
    f = torch.fft.fftfreq(32, 1 / 32, dtype=torch.float64)
    power = (f[:, None] ** 2 + f**2).clamp(min=0.25).reciprocal().flatten()
    mean = torch.zeros(1024, dtype=torch.float64)
    mean[0] = 0.05 * 32
    return mean, power / power.mean() * 0.25


def run(schedule, steps, step):
    """(offset, slope) [1024] of the line that the whole sampler is, with the ideal network."""
    mean, variance = spectrum()
    chain = respace(schedule, steps)
    x = torch.stack([torch.zeros_like(mean), torch.ones_like(mean)]).view(2, 1, 1, 1024)
    for i in range(len(chain.beta) - 1, 0, -1):
        t, abar = torch.full((2,), i), chain.alpha_bar[i]
        towards = variance / (abar * variance + 1 - abar)
        x0 = mean + abar.sqrt() * towards * (x - abar.sqrt() * mean)
        x = step(x, t, Estimates(x0, x0, torch.full_like(x, 0.3)), chain)
    at_0, at_1 = x.flatten(1)
    return at_0, at_1 - at_0


def distance(schedule, steps, step):
    mean, variance = spectrum()
    offset, slope = run(schedule, steps, step)
    apart = (offset - mean) ** 2 + (variance.sqrt() - slope.abs()) ** 2
    return apart.mean().item() * 1e4


@pytest.mark.parametrize(
    "schedule, spaced, n, step, expected",
    [
        ("cosine", "even", 10, Ddim, "116"),
        ("cosine", "even", 100, Ddim, "1.63"),
        ("cosine", "trailing", 20, Ddim, "32.4"),
        ("cosine", "linspace", 10, Ddim, "138"),
        ("linear", "even", 20, Ddim, "42.1"),
        ("linear", "trailing", 10, Ddim, "155"),
        ("cosine", "even", 10, DpmSolver2M, "216"),
        ("cosine", "trailing", 20, DpmSolver2M, "11.1"),
        ("linear", "even", 20, DpmSolver2M, "61.1"),
        ("linear", "logsnr", 10, DpmSolver2M, "3.1"),
        ("linear", "logsnr", 20, DpmSolver2M, "0.55"),
    ],
)
def test_the_exact_model_has_these_distances(schedule, spaced, n, step, expected):
    """Computed apart from this project, and given to these digits."""
    schedule = SCHEDULES[schedule]
    found = distance(schedule, SPACINGS[spaced](schedule, n), step())
    digits = len(expected.partition(".")[2])
    assert f"{found:.{digits}f}" == expected


def rows_of_the_page():
    """The exact table of docs/NEIGHBOURS.md: (schedule, sampler, steps, {spacing: cell})."""
    page = (ROOT / "docs/NEIGHBOURS.md").read_text()
    head, table = page.split("| schedule | sampler | steps | ")[1].split("\n|---|", 1)
    spacings = [name.strip() for name in head.strip(" |").split("|")]
    for line in table.split("\n\n")[0].splitlines()[1:]:
        schedule, sampler, n, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        yield schedule, sampler, int(n), dict(zip(spacings, cells, strict=True))


@pytest.mark.parametrize("name, sampler, n, cells", list(rows_of_the_page()))
def test_the_table_of_the_page_is_what_is_computed(name, sampler, n, cells):
    schedule, step = SCHEDULES[name], {"ddim": Ddim, "dpm++": DpmSolver2M}[sampler]
    for spaced, cell in cells.items():
        found = distance(schedule, SPACINGS[spaced](schedule, n), step())
        assert f"{found:.{len(cell.partition('.')[2])}f}" == cell, spaced


def test_uneven_steps_pay_with_the_linear_schedule_and_not_with_the_cosine_one():
    """10 and 20 steps of DDIM, dense near x0: below 0.7 of linear's error, above twice cosine's."""
    for n in (10, 20):
        even, dense = (
            {name: distance(s, spaced(s, n), Ddim()) for name, s in SCHEDULES.items()}
            for spaced in (SPACINGS["even"], quadratic)
        )
        assert dense["linear"] < 0.7 * even["linear"] and dense["cosine"] > 2 * even["cosine"]


def test_halving_the_step_quarters_the_error():
    """The distance is the square of an error, so that it falls sixteenfold; DDIM's fourfold."""
    schedule = SCHEDULES["cosine"]
    for step, order in ((DpmSolver2M, 2), (Ddim, 1)):
        steps = [even_in_log_snr(schedule, n) for n in (40, 80, 160)]
        first, second, third = (distance(schedule, s, step()) for s in steps)
        assert first / second == pytest.approx(4**order, rel=0.2)
        assert second / third == pytest.approx(4**order, rel=0.2)


def estimates(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    x_t, x0_star, x0_hat = torch.randn(3, n, 3, 2, 2, generator=draw, dtype=torch.float64)
    r_t = torch.rand(n, 1, 2, 2, generator=draw, dtype=torch.float64)
    return x_t, Estimates(x0_star, x0_hat, r_t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_its_first_step_is_ddims_on_the_mix(name):
    """First order is DDIM with eta = 0, at every t, for any x0*, x0' and r_t (DPM++ Sec. 4)."""
    chain = respace(SCHEDULES[name], 50)
    x_t, found = estimates(50)
    t = torch.arange(1, 51)
    step = DpmSolver2M()(x_t, t, found, chain)
    assert_close(step, Ddim()(x_t, t, found, chain), rtol=1e-9, atol=1e-9)


def test_where_the_estimate_does_not_change_every_step_is_ddims():
    chain = respace(SCHEDULES["cosine"], 7)
    x, found = estimates(2)
    solver = DpmSolver2M()
    for i in range(7, 0, -1):
        t = torch.full((2,), i)
        expected = Ddim()(x, t, found, chain)
        x = solver(x, t, found, chain)
        assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_its_last_step_is_the_mixed_clean_image():
    chain = respace(SCHEDULES["cosine"], 5)
    solver = DpmSolver2M()
    for i in (2, 1):
        x, found = estimates(3, seed=i)
        end = solver(x, torch.full((3,), i), found, chain)
    assert_close(end, mix(found.x0_hat, found.x0_star, found.r_t), rtol=1e-12, atol=1e-12)


def test_an_x0_that_is_linear_in_lambda_is_integrated_far_better_than_by_ddim():
    """From t = 3000 to 1000 in steps of 20, against steps of 4: a tenth of DDIM's error."""

    def end(step, kept):
        chain = respace(SCHEDULES["cosine"], kept)
        x, solver = torch.ones(1, 1, 1, 1, dtype=torch.float64), step()
        for i in range(len(kept), 1, -1):
            abar = chain.alpha_bar[i]
            x0 = (0.5 + 0.1 * (abar / (1 - abar)).log()).expand_as(x)
            x = solver(x, torch.tensor([i]), Estimates(x0, x0, torch.zeros_like(x)), chain)
        return x.item()

    fine, coarse = list(range(1000, 3001, 4)), list(range(1000, 3001, 20))
    error = {step: abs(end(step, fine) - end(step, coarse)) for step in (DpmSolver2M, Ddim)}
    assert error[DpmSolver2M] < 0.1 * error[Ddim]


# ---- which steps ----


@pytest.mark.parametrize("steps", [trailing, linspace, quadratic, even_in_log_snr])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_number_of_steps_makes_a_chain(steps, name):
    """n different steps, ascending, of 1..T, for small n, T / 2, T - 1 and T."""
    schedule = SCHEDULES[name]
    T = len(schedule.beta) - 1
    for n in (1, 2, 3, 7, 10, 99, T // 2, T - 1, T):
        kept = steps(schedule, n)
        assert len(kept) == n and len(respace(schedule, kept).step) == n + 1


def test_trailing_begins_at_T_and_linspace_holds_both_ends():
    schedule = SCHEDULES["cosine"]
    assert trailing(schedule, 10) == list(range(400, 4001, 400))
    assert linspace(schedule, 5) == [1, 1001, 2000, 3000, 4000]  # 1000.75, 2000.5, 3000.25


def test_sections_are_improved_diffusions():
    """`100` of 4000 is 0, 40, 81, 121, 162, 202, ..., 3918, 3959, 3999 counted from 0."""
    one = [t - 1 for t in sections(SCHEDULES["cosine"], [100])]
    assert one[:6] == [0, 40, 81, 121, 162, 202] and one[-3:] == [3918, 3959, 3999]
    two = sections(linear_schedule(10), [2, 3])
    assert two == [1, 5, 6, 8, 10]
    three = sections(linear_schedule(10), [1, 1, 1])  # 4, 3 and 3 steps long
    assert three == [1, 5, 8]


def test_log_snr_steps_are_even_where_whole_steps_are_dense():
    schedule = SCHEDULES["linear"]
    abar = schedule.alpha_bar[even_in_log_snr(schedule, 8)]
    gaps = (abar.log() - (1 - abar).log()).diff()
    assert gaps.std() < 0.1 * gaps.mean().abs()


@pytest.mark.parametrize("text", ["", "even", "sections=", "sections=1,x", "t=", "quad=3"])
def test_what_is_no_spacing_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected trailing, "):
        spacing(text)


@pytest.mark.parametrize("counts", [[0], [11], [6, 1], [1] * 11])
def test_sections_that_hold_fewer_steps_are_one_line(counts):
    with pytest.raises(ValueError, match=r"^--spacing sections: "):
        sections(linear_schedule(10), counts)
