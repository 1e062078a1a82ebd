r"""diffusion.py: schedules, re-spacing, and Eqs. 1-11, 16 and 17 of the paper.

    Cas-DM   arXiv:2401.02414v1     DDPM    arXiv:2006.11239v2
    DDIM     arXiv:2010.02502v4     IDDPM   arXiv:2102.09672v1

Every formula is tested at all t of both schedules and of re-spaced chains at once: image i of a
batch stands at t = i + 1.
Tolerances: float64 rounds at 1e-16, and Eq. 8 multiplies that by up to 81,165 (t = T of the paper's
schedule), hence 1e-9.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from diffusion import (
    Prediction,
    at_step,
    clean_estimates,
    cosine_schedule,
    ddim_mu_from_eps,
    ddim_mu_from_x0,
    ddim_sigma,
    eps_from_x0,
    gaussian_kl,
    linear_schedule,
    mix,
    mu_from_eps,
    mu_from_x0,
    p_sample,
    per_image,
    posterior_variance,
    q_sample,
    q_step,
    respace,
    x0_from_eps,
)

COSINE, LINEAR = cosine_schedule(), linear_schedule()
CHAINS = {
    "cosine4000": COSINE,
    "linear1000": LINEAR,
    "cosine4000-ddim100": respace(COSINE, 100),
    "cosine4000-ddim10": respace(COSINE, 10),
    "linear1000-ddim25": respace(LINEAR, 25),
}
EXACT = {"rtol": 1e-9, "atol": 1e-9}
ETAS = (0.0, 0.3, 1.0)


@pytest.fixture(params=CHAINS.values(), ids=CHAINS.keys())
def chain(request):
    return request.param


def every_t(chain, seed=0):
    """x0, eps and a second pair of the same kind, [T, 3, 1, 2] each, and t = 1..T."""
    t = torch.arange(1, len(chain.beta))
    generator = torch.Generator().manual_seed(seed)
    x0, x0_hat = torch.rand(2, len(t), 3, 1, 2, generator=generator, dtype=torch.float64) * 2 - 1
    eps, eps_hat = torch.randn(2, len(t), 3, 1, 2, generator=generator, dtype=torch.float64)
    return x0, eps, x0_hat, eps_hat, t


def any_x_t(t, seed=1):
    """Noisy images of no known origin, [T, 3, 1, 2]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(t), 3, 1, 2, generator=generator, dtype=torch.float64)


def gates(t):
    """A weight r_t of each image, from 0 to 1, [T, 1, 1, 1]."""
    return torch.linspace(0, 1, len(t), dtype=torch.float64).view(-1, 1, 1, 1)


def later_t(chain):
    """2, the middle, T - 1 and T: where the step back is a Gaussian."""
    T = len(chain.beta) - 1
    return 2, T // 2, T - 1, T


def pixel(value):
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def at_t(table):
    """A table's entries 1..T as [T, 1, 1, 1]."""
    return table[1:].view(-1, 1, 1, 1)


def before_t(table):
    """Its entries 0..T-1, those of t - 1."""
    return table[:-1].view(-1, 1, 1, 1)


# ---- Eqs. 1-3: the forward process ----


def test_eq01_chain_of_steps_has_the_moments_of_eq02(chain):
    """Steps of Eq. 1 have mean sqrt(abar_t) x0 and variance 1 - abar_t   (Cas-DM Eqs. 1, 2)."""
    t = torch.arange(1, len(chain.beta))
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    signal = q_step(one, t, 0 * one, chain).flatten().tolist()
    noise = q_step(0 * one, t, one, chain).flatten().tolist()
    mean, variance = 1.0, 0.0
    for of_x, of_eps, abar in zip(signal, noise, chain.alpha_bar[1:].tolist(), strict=True):
        mean = of_x * mean
        variance = of_x**2 * variance + of_eps**2
        assert mean == pytest.approx(math.sqrt(abar), rel=1e-8)
        assert variance == pytest.approx(1 - abar, rel=1e-8)


def test_eq01_alpha_is_one_minus_beta_and_abar_its_product(chain):
    """alpha_t = 1 - beta_t, abar_t = alpha_t abar_{t-1} from abar_0 = 1   (Cas-DM Eq. 1).

    beta lies in (0, 1), and abar falls.
    """
    assert chain.beta[0] == 0 and chain.alpha[0] == 1 and chain.alpha_bar[0] == 1
    assert_close(chain.alpha, 1 - chain.beta, **EXACT)
    product = torch.from_numpy(np.cumprod(1 - chain.beta.numpy()))
    assert_close(chain.alpha_bar, product, rtol=1e-8, atol=0)
    assert (chain.beta[1:] > 0).all() and (chain.beta < 1).all()
    assert (chain.alpha_bar.diff() < 0).all()
    assert {table.dtype for table in chain[:3]} == {torch.float64}


def test_eq01_simulated_chain_agrees_with_draws_of_eq03():
    """20,000 chains of 25 steps, and as many draws of Eq. 3, have the moments of Eq. 2.

    Within 5 standard errors   (Cas-DM Eqs. 1-3).
    """
    chain, n = linear_schedule(25), 20_000
    x0 = torch.full((n, 1, 1, 1), 0.7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(x0.shape, generator=generator, dtype=torch.float64)

    x_t = x0
    for step in range(1, 26):
        t = torch.full((n,), step)
        x_t = q_step(x_t, t, noise(), chain)
        abar = chain.alpha_bar[step].item()
        mean, variance = math.sqrt(abar) * 0.7, 1 - abar
        for drawn in (x_t, q_sample(x0, t, noise(), chain)):
            assert abs(drawn.mean() - mean) < 5 * math.sqrt(variance / n)
            assert abs(drawn.var() - variance) < 5 * variance * math.sqrt(2 / n)


def test_eq02_q_sample_scales_signal_and_noise_by_the_roots(chain):
    """Without noise x_t is sqrt(abar_t) x0, without signal sqrt(1 - abar_t) eps.

    The mean and the deviation of (Cas-DM Eq. 2).
    """
    x0, eps, _, _, t = every_t(chain)
    abar = at_t(torch.cumprod(1 - chain.beta, 0))
    assert_close(q_sample(x0, t, 0 * eps, chain), abar**0.5 * x0, rtol=1e-8, atol=1e-12)
    assert_close(q_sample(0 * x0, t, eps, chain), (1 - abar) ** 0.5 * eps, rtol=1e-8, atol=1e-12)


def test_eq03_x_t_is_the_closed_form_of_a_schedule_built_here():
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, abar by numpy   (Cas-DM Eq. 3)."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for t in (1, 2, 500, 999, 1000):
        x_t = q_sample(pixel(0.3), torch.tensor([t]), pixel(-1.7), LINEAR)
        expected = math.sqrt(abar[t - 1]) * 0.3 - math.sqrt(1 - abar[t - 1]) * 1.7
        assert x_t.item() == pytest.approx(expected, rel=1e-12)


def test_eq03_first_step_is_nearly_clean_and_last_nearly_noise():
    """t runs from the image to the noise: x_1 is within 0.02 of x0, x_T of eps   (Cas-DM Eq. 3)."""
    for schedule in (LINEAR, COSINE):
        T = len(schedule.beta) - 1
        x0, eps = torch.ones(2, 1, 1, 1), -torch.ones(2, 1, 1, 1)
        near_x0, near_eps = q_sample(x0, torch.tensor([1, T]), eps, schedule).flatten()
        assert abs(near_x0 - 1) < 0.02 and abs(near_eps + 1) < 0.02


# ---- Eqs. 4-7: one step back ----


def test_eq04_a_step_back_has_the_mean_and_the_variance_it_was_given():
    """Over noise of mean 0 and variance 1 it has mean mu and variance Sigma   (Cas-DM Eq. 4)."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1000, 3, 2, 2, generator=generator, dtype=torch.float64)
    z = (z - z.mean(0)) / z.std(0)  # so that both hold to rounding
    mu = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 2, 2)
    shared, own = pixel(0.7), torch.linspace(0.1, 3, 12, dtype=torch.float64).view(3, 2, 2)
    for sigma in (shared, own):
        x_prev = p_sample(mu, sigma, z)
        assert_close(x_prev.mean(0), mu, **EXACT)
        assert_close(x_prev.var(0), (sigma**2).expand(1, 3, 2, 2)[0], **EXACT)


def test_eq05_is_the_divergence_of_two_gaussians():
    """The KL that torch.distributions knows, dimension by dimension   (Cas-DM Eq. 5).

    It is 0 between equals, and half the squared distance of the means over the variance where the
    variances are equal.
    """
    generator = torch.Generator().manual_seed(0)
    mu1, mu2, log1, log2 = torch.randn(4, 5, 3, 2, 2, generator=generator, dtype=torch.float64)
    q, p = Normal(mu1, (log1 / 2).exp()), Normal(mu2, (log2 / 2).exp())
    assert_close(gaussian_kl(mu1, log1, mu2, log2), kl_divergence(q, p))
    assert not gaussian_kl(mu1, log1, mu1, log1).any()
    assert_close(gaussian_kl(mu1, log2, mu2, log2), (mu1 - mu2) ** 2 / (2 * log2.exp()))


@pytest.mark.parametrize("name", ["cosine4000", "linear1000", "cosine4000-ddim100"])
def test_eq05_is_least_at_the_true_noise_and_grows_with_the_mean_error(name):
    """KL(q(x_{t-1} | x_t, x0) || N(mu_theta, beta_t I)), as integrated numerically (Cas-DM Eq. 5).

    It exceeds its value at the true eps by ||mu~ - mu_theta||^2 / (2 beta_t)   (Cas-DM Eq. 6; its
    2 beta_t^2 is an erratum).
    """
    chain = CHAINS[name]
    x0, eps, wrong_eps = pixel(0.3), pixel(-1.1), pixel(-0.7)
    for t in later_t(chain):
        step = torch.tensor([t])
        x_t = q_sample(x0, step, eps, chain)
        mu, variance = mu_from_x0(x_t, step, x0, chain), posterior_variance(step, chain)
        beta = chain.beta[t]
        found = []
        for eps_hat in (eps, wrong_eps):
            mu_theta = mu_from_eps(x_t, step, eps_hat, chain)
            L_t = gaussian_kl(mu, variance.log(), mu_theta, beta.log()).item()
            on_a_grid = kl_on_a_grid(mu.item(), variance.item(), mu_theta.item(), beta.item())
            assert L_t == pytest.approx(on_a_grid, rel=1e-6, abs=1e-9)
            found.append(L_t)
        best, worse = found
        assert worse > best
        apart = (mu - mu_theta).item() ** 2 / (2 * beta.item())
        assert worse - best == pytest.approx(apart, rel=1e-6)


def kl_on_a_grid(mean1, variance1, mean2, variance2):
    """KL(N(mean1, variance1) || N(mean2, variance2)) in 1-D by numerical integration."""
    z, step = np.linspace(-12, 12, 100_001, retstep=True)
    x = mean1 + math.sqrt(variance1) * z
    log_p1 = -(z**2) / 2 - math.log(variance1) / 2
    log_p2 = -((x - mean2) ** 2) / (2 * variance2) - math.log(variance2) / 2
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return float((density * (log_p1 - log_p2)).sum() * step)


@pytest.mark.parametrize("name", ["cosine4000", "linear1000", "cosine4000-ddim10"])
def test_eq07_mean_and_variance_are_bayes_rule_on_a_grid(name):
    """q(x_{t-1} | x_t, x0) by Eqs. 1 and 2 on a grid has Eq. 7's mean and variance beta~_t."""
    chain, x0 = CHAINS[name], 0.4
    for t in later_t(chain):
        beta = chain.beta[t].item()
        abar, abar_prev = chain.alpha_bar[t].item(), chain.alpha_bar[t - 1].item()
        x_t = math.sqrt(abar) * x0 + 0.5 * math.sqrt(1 - abar)
        mean_prev, variance_prev = math.sqrt(abar_prev) * x0, 1 - abar_prev  # Eq. 2
        x_prev = mean_prev + math.sqrt(variance_prev) * np.linspace(-12, 12, 200_001)
        log_step = -((x_t - math.sqrt(1 - beta) * x_prev) ** 2) / (2 * beta)  # Eq. 1
        log_p = log_step - (x_prev - mean_prev) ** 2 / (2 * variance_prev)
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        mean = (p * x_prev).sum()
        variance = (p * (x_prev - mean) ** 2).sum()
        step = torch.tensor([t])
        mu = mu_from_x0(pixel(x_t), step, pixel(x0), chain)
        assert mu.item() == pytest.approx(mean, abs=1e-9)
        assert posterior_variance(step, chain).item() == pytest.approx(variance, rel=1e-7)


def test_eq07_noise_free_image_steps_back_along_the_signal(chain):
    """mu~(sqrt(abar_t) x0, x0) = sqrt(abar_{t-1}) x0   (Cas-DM Eq. 7)."""
    x0, _, _, _, t = every_t(chain)
    x_t = at_t(chain.alpha_bar).sqrt() * x0
    assert_close(mu_from_x0(x_t, t, x0, chain), before_t(chain.alpha_bar).sqrt() * x0, **EXACT)


def test_eq07_variance_of_mean_plus_posterior_is_the_marginal(chain):
    """c2^2 (1 - abar_t) + beta~_t = 1 - abar_{t-1}: the law of total variance.

    c2 is x_t's coefficient in (Cas-DM Eq. 7).
    """
    t = torch.arange(1, len(chain.beta))
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    c2 = mu_from_x0(one, t, 0 * one, chain).flatten()
    total = c2**2 * (1 - chain.alpha_bar[1:]) + posterior_variance(t, chain)
    assert_close(total, 1 - chain.alpha_bar[:-1], **EXACT)


def test_eq07_respaced_posterior_is_two_steps_composed():
    """On a chain of stride 2, Eq. 7 is the original chain's two posteriors one after the other.

    In mean and in variance   (Cas-DM Eq. 7).
    """
    full = linear_schedule(100)
    half = respace(full, 50)
    i = torch.arange(2, 51)
    t = half.step[i]
    x0, x_t = any_x_t(i, seed=2), any_x_t(i)
    x_prev = mu_from_x0(x_t, t, x0, full)
    twice = mu_from_x0(x_prev, t - 1, x0, full)
    assert_close(twice, mu_from_x0(x_t, i, x0, half), **EXACT)
    one = torch.ones(len(i), 1, 1, 1, dtype=torch.float64)
    c2 = mu_from_x0(one, t - 1, 0 * one, full).flatten()
    variance = c2**2 * posterior_variance(t, full) + posterior_variance(t - 1, full)
    assert_close(variance, posterior_variance(i, half), **EXACT)


def test_posterior_variance_lies_between_zero_and_beta(chain):
    """beta~_t is 0 at t = 1, else in (0, beta_t), and nears beta_t at t = T   (DDPM Eq. 7)."""
    t = torch.arange(1, len(chain.beta))
    variance = posterior_variance(t, chain)
    assert variance[0] == 0 and variance.dtype == torch.float64
    assert (variance[1:] > 0).all() and (variance <= chain.beta[1:]).all()
    assert variance[-1] / chain.beta[-1] > 0.9


def test_t1_posterior_is_the_clean_image(chain):
    """At t = 1 the mean of (Cas-DM Eq. 7) is x0, whatever x_t, and nothing is left to draw."""
    x0, _, _, _, t = every_t(chain)
    first = torch.ones_like(t)
    # 1 - (1 - beta_1) keeps 12 digits of beta_1
    assert_close(mu_from_x0(any_x_t(t), first, x0, chain), x0, rtol=0, atol=1e-11)
    assert not posterior_variance(first, chain).any()


# ---- Eqs. 8-11: what a network's output implies ----


def test_eq08_x0_star_inverts_forward(chain):
    """x0* of x_t and the noise that made it is x0   (Cas-DM Eq. 8 after Eq. 3)."""
    x0, eps, _, _, t = every_t(chain)
    assert_close(x0_from_eps(q_sample(x0, t, eps, chain), t, eps, chain), x0, **EXACT)


def test_eq08_is_its_printed_form(chain):
    """x0* = (x_t - sqrt(1 - abar_t) eps') / sqrt(abar_t), eps' being wrong   (Cas-DM Eq. 8)."""
    _, _, _, eps_hat, t = every_t(chain)
    x_t, abar = any_x_t(t), at_t(chain.alpha_bar)
    printed = (x_t - (1 - abar).sqrt() * eps_hat) / abar.sqrt()
    assert_close(x0_from_eps(x_t, t, eps_hat, chain), printed, rtol=1e-9, atol=1e-7)


def test_eq08_amplifies_an_error_by_81165_at_the_last_step_of_the_paper():
    """d x0* / d eps' = -sqrt(1 / abar_T - 1): why phi's input is clamped   (Cas-DM Eq. 8)."""
    moved = x0_from_eps(pixel(0.0), torch.tensor([4000]), pixel(1.0), COSINE)
    assert moved.item() == pytest.approx(-81_165, rel=1e-5)


def test_eps_and_x0_are_each_others_inverse(chain):
    """eps of the x0* of any eps' is eps'; x0* of the eps of any x0' is x0'   (Cas-DM Eqs. 3, 8)."""
    _, _, x0_hat, eps_hat, t = every_t(chain)
    x_t = any_x_t(t)
    x0_star = x0_from_eps(x_t, t, eps_hat, chain)
    assert_close(eps_from_x0(x_t, t, x0_star, chain), eps_hat, **EXACT)
    implied = eps_from_x0(x_t, t, x0_hat, chain)
    assert_close(x0_from_eps(x_t, t, implied, chain), x0_hat, **EXACT)


def test_estimates_are_x0_star_and_x0_hat_clamped(chain):
    """Both lie in [-1, 1]; the gate and a learned variance stay as they are   (Cas-DM Eq. 8)."""
    _, _, x0_hat, eps_hat, t = every_t(chain)
    x_t = any_x_t(t)
    pred = Prediction(eps_hat, 3 * x0_hat, gates(t), v=eps_hat)
    estimates = clean_estimates(x_t, t, pred, chain)
    x0_star = x0_from_eps(x_t, t, eps_hat, chain)
    for found, free in ((estimates.x0_star, x0_star), (estimates.x0_hat, 3 * x0_hat)):
        inside = free.abs() <= 1
        assert inside.any() and not inside.all()
        assert torch.equal(found[inside], free[inside])
        assert torch.equal(found[~inside], free[~inside].sign())
    assert estimates.r_t is pred.r_t and estimates.v is pred.v


def test_eq09_is_eq07_at_x0_star(chain):
    """mu_eps'(x_t, t) = mu~(x_t, x0*) for any eps'   (Cas-DM Eq. 9 from Eqs. 7, 8).

    At the true noise it is the true posterior mean.
    """
    x0, eps, _, eps_hat, t = every_t(chain)
    x_t = q_sample(x0, t, eps, chain)
    x0_star = x0_from_eps(x_t, t, eps_hat, chain)
    mu_eps = mu_from_eps(x_t, t, eps_hat, chain)
    assert_close(mu_eps, mu_from_x0(x_t, t, x0_star, chain), **EXACT)
    assert_close(mu_from_eps(x_t, t, eps, chain), mu_from_x0(x_t, t, x0, chain), **EXACT)


def test_eq10_is_its_printed_form(chain):
    """mu_x0' as the paper has it, at every t, x0' being wrong   (Cas-DM Eq. 10).

    sqrt(abar_{t-1}) beta_t / (1 - abar_t) x0' + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
    """
    _, _, x0_hat, _, t = every_t(chain)
    x_t, alpha, beta = any_x_t(t), at_t(chain.alpha), at_t(chain.beta)
    abar, abar_prev = at_t(chain.alpha_bar), before_t(chain.alpha_bar)
    of_x0 = abar_prev.sqrt() * beta / (1 - abar)
    of_x_t = alpha.sqrt() * (1 - abar_prev) / (1 - abar)
    printed = of_x0 * x0_hat + of_x_t * x_t
    assert_close(mu_from_x0(x_t, t, x0_hat, chain), printed, **EXACT)


def test_eq11_r_zero_is_mu_eps_and_r_one_is_mu_x0():
    """r_t weighs mu_x0', one weight a pixel for all three channels   (Cas-DM Eq. 11)."""
    generator = torch.Generator().manual_seed(0)
    mu_x0, mu_eps = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    r_t = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    r_t[:, :, 0] = 1
    r_t[:, :, 1] = 0.25
    mu = mix(mu_x0, mu_eps, r_t)
    assert torch.equal(mu[:, :, 0], mu_x0[:, :, 0])
    assert_close(mu[:, :, 1], 0.25 * mu_x0[:, :, 1] + 0.75 * mu_eps[:, :, 1])
    assert torch.equal(mu[:, :, 2:], mu_eps[:, :, 2:])


def test_eq11_mixing_means_is_mixing_clean_images(chain):
    """r mu_x0' + (1 - r) mu_eps' = mu~(x_t, r x0' + (1 - r) x0*)   (Cas-DM Eq. 11)."""
    x0, eps, x0_hat, eps_hat, t = every_t(chain)
    x_t, r_t = q_sample(x0, t, eps, chain), gates(t).flip(0)
    x0_mixed = r_t * x0_hat + (1 - r_t) * x0_from_eps(x_t, t, eps_hat, chain)
    mu_x0, mu_eps = mu_from_x0(x_t, t, x0_hat, chain), mu_from_eps(x_t, t, eps_hat, chain)
    assert_close(mix(mu_x0, mu_eps, r_t), mu_from_x0(x_t, t, x0_mixed, chain), **EXACT)


# ---- Eqs. 16, 17: DDIM ----


@pytest.mark.parametrize("eta", ETAS)
def test_ddim_sigma_is_its_printed_form(chain, eta):
    """eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1})   (DDIM Eq. 16).

    At eta = 1 it is the posterior's deviation.
    """
    t = torch.arange(1, len(chain.beta))
    abar, abar_prev = chain.alpha_bar[1:], chain.alpha_bar[:-1]
    printed = eta * ((1 - abar_prev) / (1 - abar)).sqrt() * (1 - abar / abar_prev).sqrt()
    sigma = ddim_sigma(t, chain, eta)
    assert_close(sigma, printed, **EXACT)
    assert sigma[0] == 0
    assert_close(ddim_sigma(t, chain, 1.0) ** 2, posterior_variance(t, chain), **EXACT)


@pytest.mark.parametrize("eta", ETAS)
def test_eq16_keeps_the_marginal_of_eq02(chain, eta):
    """The mean's share of eps, squared, plus sigma_t^2 is 1 - abar_{t-1}   (Cas-DM Eqs. 2, 16)."""
    x0, eps, _, _, t = every_t(chain)
    abar_prev = before_t(chain.alpha_bar)
    mean = ddim_mu_from_x0(q_sample(x0, t, eps, chain), t, x0, chain, eta)
    share = (mean - abar_prev.sqrt() * x0) / eps
    assert (share >= -1e-9).all()
    variance = share**2 + ddim_sigma(t, chain, eta).view(-1, 1, 1, 1) ** 2
    assert_close(variance, (1 - abar_prev).expand_as(eps), **EXACT)


def test_eq16_at_eta_zero_steps_exactly_to_the_same_noise_at_t_minus_one(chain):
    """With the true x0 and eta = 0, x_{t-1} is Eq. 3 at t - 1 with the same eps (Cas-DM Eq. 16)."""
    x0, eps, _, _, t = every_t(chain)
    mean = ddim_mu_from_x0(q_sample(x0, t, eps, chain), t, x0, chain)
    assert_close(mean, q_sample(x0, t - 1, eps, chain), **EXACT)


def test_eq16_at_eta_one_is_the_ancestral_mean_of_eq07(chain):
    """With sigma^2 = beta~ the DDIM mean is the posterior's, for any x0'   (Cas-DM Eqs. 7, 16)."""
    _, _, x0_hat, _, t = every_t(chain)
    x_t = any_x_t(t)
    mean = ddim_mu_from_x0(x_t, t, x0_hat, chain, eta=1.0)
    assert_close(mean, mu_from_x0(x_t, t, x0_hat, chain), **EXACT)


@pytest.mark.parametrize("eta", ETAS)
def test_eq17_is_eq16_at_x0_star(chain, eta):
    """mu_eps'^ddim = mu_x0'^ddim with x0* for x0', for any eps'   (Cas-DM Eqs. 16, 17)."""
    x0, eps, _, eps_hat, t = every_t(chain)
    x_t = q_sample(x0, t, eps, chain)
    x0_star = x0_from_eps(x_t, t, eps_hat, chain)
    mean = ddim_mu_from_eps(x_t, t, eps_hat, chain, eta)
    assert_close(mean, ddim_mu_from_x0(x_t, t, x0_star, chain, eta), **EXACT)


def test_eq17_needs_the_alpha_of_the_respaced_chain():
    """With the original schedule's alpha_t, Eq. 17 misses Eq. 16   (Cas-DM Eqs. 16, 17).

    1/sqrt(alpha_t) at ddim100's t = T is 2.025 where the original is 1.026.
    """
    short = respace(COSINE, 100)
    original = short._replace(alpha=COSINE.alpha[short.step])
    assert short.alpha[-1].rsqrt().item() == pytest.approx(2.025, abs=1e-3)
    assert original.alpha[-1].rsqrt().item() == pytest.approx(1.026, abs=1e-3)
    x0, eps, _, _, t = every_t(short)
    x_t = q_sample(x0, t, eps, short)
    expected = ddim_mu_from_x0(x_t, t, x0, short)
    assert_close(ddim_mu_from_eps(x_t, t, eps, short), expected, **EXACT)
    assert (ddim_mu_from_eps(x_t, t, eps, original) - expected).abs().max() > 0.01


def test_eq17_is_dual_diffusions_form_at_sigma_zero(chain):
    """(x_t + (sqrt(alpha - abar) - sqrt(1 - abar)) eps') / sqrt(alpha)   (Cas-DM Eq. 17).

    As Dual's official code has it.
    """
    _, _, _, eps_hat, t = every_t(chain)
    x_t, alpha, abar = any_x_t(t), at_t(chain.alpha), at_t(chain.alpha_bar)
    of_eps = (alpha - abar).clamp(min=0).sqrt() - (1 - abar).sqrt()
    theirs = (x_t + of_eps * eps_hat) / alpha.sqrt()
    # alpha_1 - abar_1 is a difference of equals
    assert_close(ddim_mu_from_eps(x_t, t, eps_hat, chain), theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("eta", ETAS)
def test_eq16_17_mixing_means_is_mixing_clean_images(chain, eta):
    """The mix of both means is Eq. 16 at r x0' + (1 - r) x0*   (the line after Cas-DM Eq. 17)."""
    x0, eps, x0_hat, eps_hat, t = every_t(chain)
    x_t, r_t = q_sample(x0, t, eps, chain), gates(t)
    x0_mixed = r_t * x0_hat + (1 - r_t) * x0_from_eps(x_t, t, eps_hat, chain)
    mu_x0 = ddim_mu_from_x0(x_t, t, x0_hat, chain, eta)
    mu_eps = ddim_mu_from_eps(x_t, t, eps_hat, chain, eta)
    assert_close(mix(mu_x0, mu_eps, r_t), ddim_mu_from_x0(x_t, t, x0_mixed, chain, eta), **EXACT)


@pytest.mark.parametrize("eta", ETAS)
def test_eq16_17_last_step_is_the_clean_image_itself(chain, eta):
    """At t = 1, abar_0 = 1: Eq. 16 is x0', Eq. 17 is x0*, for any eta   (Cas-DM Eqs. 16, 17)."""
    _, _, x0_hat, eps_hat, t = every_t(chain)
    x_t, first = any_x_t(t), torch.ones_like(t)
    assert_close(ddim_mu_from_x0(x_t, first, x0_hat, chain, eta), x0_hat, **EXACT)
    x0_star = x0_from_eps(x_t, first, eps_hat, chain)
    assert_close(ddim_mu_from_eps(x_t, first, eps_hat, chain, eta), x0_star, **EXACT)


@pytest.mark.parametrize("name", ["cosine4000-ddim100", "cosine4000-ddim10", "linear1000-ddim25"])
def test_eq16_17_whole_chain_with_the_truth_returns_x0(name):
    """From x_T down at eta = 0, fed the true x0 or the true eps, both arrive at x0.

    (Cas-DM Eqs. 16, 17)
    """
    chain = CHAINS[name]
    T = len(chain.beta) - 1
    x0, eps, _, _, _ = every_t(chain)
    x0, eps = x0[:2], eps[:2]
    by_x0 = by_eps = q_sample(x0, torch.full((2,), T), eps, chain)
    for i in range(T, 0, -1):
        t = torch.full((2,), i)
        by_x0 = ddim_mu_from_x0(by_x0, t, x0, chain)
        by_eps = ddim_mu_from_eps(by_eps, t, eps, chain)
    assert_close(by_x0, x0, **EXACT)
    assert_close(by_eps, x0, **EXACT)


# ---- schedules ----


def test_linear_schedule_has_ddpms_endpoints_and_scales_with_T():
    """beta_1 = 1e-4, beta_1000 = 0.02, abar_1000 = 4.0358e-5   (DDPM Sec. 4).

    Four times as many steps have a quarter of the betas.
    """
    schedule = linear_schedule(1000)
    assert schedule.beta[1].item() == pytest.approx(1e-4)
    assert schedule.beta[1000].item() == pytest.approx(0.02)
    assert schedule.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    rise = schedule.beta[1:].diff()
    assert_close(rise, torch.full_like(rise, 0.0199 / 999))
    longer = linear_schedule(4000)
    assert longer.beta[1].item() == pytest.approx(2.5e-5)
    assert longer.beta[4000].item() == pytest.approx(5e-3)
    assert longer.alpha_bar[-1].item() == pytest.approx(4.25e-5, rel=2e-3)


def test_cosine_schedule_has_improved_diffusions_numbers():
    """At T = 4000: the first beta, the last three, of which only 0.999 is clipped, and abar_T.

    (IDDPM Eq. 17)
    """
    schedule = cosine_schedule(4000)
    assert schedule.beta[1].item() == pytest.approx(9.866e-6, rel=1e-4)
    assert schedule.beta[-3:].tolist() == pytest.approx([0.5556, 0.75, 0.999], abs=1e-4)
    assert (schedule.beta >= 0.999).sum() == 1 and schedule.beta[-1] == 0.999
    assert schedule.alpha_bar[-2].item() == pytest.approx(1.518e-7, rel=1e-3)
    assert schedule.alpha_bar[-1].item() == pytest.approx(1.51798e-10, rel=1e-5)
    assert cosine_schedule(1000).alpha_bar[-1].item() == pytest.approx(2.43e-9, rel=2e-3)


def test_cosine_abar_is_the_closed_form_up_to_the_clipped_step():
    """abar_t = cos^2(((t/T + 0.008) / 1.008) pi/2) / f(0) for every t < T   (IDDPM Eq. 17)."""
    f = np.cos((np.arange(4000) / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert_close(COSINE.alpha_bar[:-1].numpy(), f / f[0], rtol=1e-8, atol=0)
    assert 1 / math.sqrt(COSINE.alpha_bar[-1]) == pytest.approx(81_165, rel=1e-5)


# ---- re-spacing ----


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_respacing_to_all_steps_changes_nothing(schedule):
    """T of T steps have the betas, alphas, abars and steps of the schedule itself."""
    same = respace(schedule, len(schedule.beta) - 1)
    for ours, theirs in zip(same, schedule, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-15)


STRIDES = [(10, 400), (30, 134), (64, 63), (100, 40), (250, 16), (4000, 1)]


@pytest.mark.parametrize("steps, stride", STRIDES)
def test_respacing_takes_improved_diffusions_stride(steps, stride):
    """ddimN of T = 4000 keeps the original steps 1, 1 + stride, ..., counted from 1."""
    chain = respace(COSINE, steps)
    assert chain.step.tolist() == [0, *range(1, 4001, stride)]
    assert len(chain.step) == steps + 1


def test_ddim100_ends_at_3961_where_some_signal_is_left():
    """abar is 2.3e-4 there, not 1.5e-10 as at T = 4000."""
    chain = respace(COSINE, 100)
    assert chain.step[-1] == 3961
    assert chain.alpha_bar[-1].item() == pytest.approx(2.3e-4, rel=0.02)
    assert chain.beta[-3:].tolist() == pytest.approx([0.440, 0.559, 0.756], abs=1e-3)


@pytest.mark.parametrize("full, steps", [(COSINE, 100), (COSINE, 10), (LINEAR, 25)])
def test_respacing_keeps_abar_and_recomputes_alpha(full, steps):
    """abar'_i = abar_{step_i} exactly, and alpha'_i = abar'_i / abar'_{i-1}."""
    chain = respace(full, steps)
    assert torch.equal(chain.alpha_bar, full.alpha_bar[chain.step])
    assert_close(chain.alpha[1:], chain.alpha_bar[1:] / chain.alpha_bar[:-1], **EXACT)


def test_respacing_twice_remembers_the_original_steps():
    """The step table of a re-spaced chain's re-spaced chain still counts in the first schedule."""
    twice, once = respace(respace(COSINE, 100), 10), respace(COSINE, 10)
    assert torch.equal(twice.step, once.step)


@pytest.mark.parametrize("T, n", [(4000, 99), (4000, 300), (1000, 64), (1000, 300), (7, 5)])
def test_steps_without_a_whole_stride_are_as_even_as_whole_numbers_allow(T, n):
    """ddimN has no stride for these: 1 + floor(i T / n), whose gaps differ by 1 (DDIM App. D.2)."""
    kept = respace(linear_schedule(T), n).step[1:]
    assert kept.tolist() == [1 + math.floor(i * T / n) for i in range(n)]
    assert set(kept.diff().tolist()) == {T // n, T // n + 1}


@given(T=st.integers(1, 300), n=st.integers(1, 300))
def test_any_number_of_steps_begins_at_1_and_is_a_whole_stride_where_one_fits(T, n):
    """More than T are a ValueError."""
    if n > T:
        with pytest.raises(ValueError, match=rf"^{n} sampling steps; expected 1 to .* {T}; "):
            respace(linear_schedule(T), n)
        return
    step = respace(linear_schedule(T), n).step.tolist()
    assert step[:2] == [0, 1] and len(step) == n + 1 and step[-1] <= T
    strides = [s for s in range(1, T + 1) if len(range(0, T, s)) == n]
    if strides:
        assert step == [0, *range(1, T + 1, strides[0])]


def test_respacing_keeps_the_very_steps_it_is_given():
    """Uneven ones too; Eqs. 16 and 17 agree on the chain that they make."""
    chain = respace(COSINE, [1, 10, 100, 4000])
    assert chain.step.tolist() == [0, 1, 10, 100, 4000]
    assert torch.equal(chain.alpha_bar, COSINE.alpha_bar[chain.step])
    x0, eps, _, _, t = every_t(chain)
    x_t = q_sample(x0, t, eps, chain)
    of_x0, of_eps = ddim_mu_from_x0(x_t, t, x0, chain), ddim_mu_from_eps(x_t, t, eps, chain)
    assert_close(of_x0, of_eps, **EXACT)


@pytest.mark.parametrize("steps", [0, -1, 1001, [], [0, 5], [5, 1001], [5, 5], [7, 5]])
def test_steps_that_are_no_chain_raise_one_line(steps):
    """None, outside 1..T, twice, or out of order."""
    message = r"^[^\n]*sampling steps[^\n]*; expected [^\n]*1 to [^\n]*1000[,;] [^\n]*$"
    with pytest.raises(ValueError, match=message):
        respace(LINEAR, steps)


# ---- tables ----


def test_coefficients_are_cast_after_the_formula_not_before():
    """In float32 sqrt(1 - abar_1) keeps 7 digits; of a float32 abar it would be off by 0.1 %."""
    one = torch.ones(1, 1, 1, 1)
    x_t = q_sample(0 * one, torch.tensor([1]), one, COSINE)
    abar = COSINE.alpha_bar[1]
    assert x_t.dtype == torch.float32
    assert x_t.item() == pytest.approx(math.sqrt(9.866e-6), rel=1e-4)
    assert x_t.item() == pytest.approx((1 - abar).sqrt().item(), rel=2e-7)
    assert (1 - abar.float()).sqrt().item() != pytest.approx(x_t.item(), rel=1e-4)


def test_at_step_gathers_one_number_an_image():
    """coef[t] as [B, 1, 1, 1] in the dtype of `like`, for t in any order."""
    coef, like = torch.arange(5.0, dtype=torch.float64), torch.zeros(3, 3, 1, 2)
    got = at_step(coef, torch.tensor([4, 0, 2]), like)
    assert got.dtype == torch.float32
    assert got.tolist() == [[[[4]]], [[[0]]], [[[2]]]]
    assert torch.equal(got, per_image(coef[[4, 0, 2]], like))


WRONG_T = [
    torch.tensor(3),
    torch.tensor([3.0]),
    torch.tensor([3], dtype=torch.int32),
    torch.tensor([[3]]),
]


@pytest.mark.parametrize("t", WRONG_T, ids=["scalar", "float", "int32", "column"])
def test_at_step_refuses_a_t_that_is_not_int64_of_one_dimension(t):
    """A t of another type or shape would gather or broadcast silently."""
    with pytest.raises(AssertionError, match=r"t: int64 \[B\], got"):
        at_step(LINEAR.beta, t, torch.zeros(1, 1, 1, 1))


def test_tables_move_together_but_stay_where_float64_is_missing():
    """Schedule.to moves all four tables; to MPS, which has no float64, none."""
    schedule = linear_schedule(10)
    assert {table.device.type for table in schedule.to("meta")} == {"meta"}
    assert schedule.to("mps") is schedule


def test_float32_recovers_x0_at_the_last_linear_step():
    """At T = 1000 linear, amplification 157: float32 loses 3.6e-5 at most   (Cas-DM Eq. 8)."""
    t = torch.full((64,), 1000)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.rand(2, 64, 3, 4, 4, generator=generator) * 2 - 1
    found = x0_from_eps(q_sample(x0, t, eps, LINEAR), t, eps, LINEAR)
    assert_close(found, x0, rtol=0, atol=1e-4)
