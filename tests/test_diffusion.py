r"""diffusion.py: schedules, re-spacing, and Eqs. 1-11, 16 and 17 of the paper.

    Cas-DM   arXiv:2401.02414v1     DDPM  arXiv:2006.11239v2     DDIM  arXiv:2010.02502v4     IDDPM  arXiv:2102.09672v1

Every formula is tested at all t of both schedules and of re-spaced chains at once: image i of a batch stands at t = i + 1.
Tolerances: float64 rounds at 1e-16, and Eq. 8 multiplies that by up to 81,165 (t = T of the paper's schedule), hence 1e-9.
"""
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from diffusion import (at_step, cosine_schedule, ddim_mu_from_eps, ddim_mu_from_x0, ddim_sigma, eps_from_x0, linear_schedule, mix, mu_from_eps,
                       mu_from_x0, posterior_variance, q_sample, respace, x0_from_eps)

CHAINS = {"cosine4000": cosine_schedule(), "linear1000": linear_schedule(), "cosine4000-ddim100": respace(cosine_schedule(), 100),
          "cosine4000-ddim10": respace(cosine_schedule(), 10), "linear1000-ddim25": respace(linear_schedule(), 25)}
EXACT = dict(rtol=1e-9, atol=1e-9)
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


def some_t(chain):
    """1, 2, the middle, T - 1 and T."""
    T = len(chain.beta) - 1
    return 1, 2, T // 2, T - 1, T


def pixel(value):
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def column(table):
    """A table's entries 1..T as [T, 1, 1, 1]."""
    return table[1:].view(-1, 1, 1, 1)


# ---- Eqs. 1-3: the forward process ----

def test_eq01_chain_of_steps_has_the_moments_of_eq02(chain):
    """Steps of (Cas-DM Eq. 1), one after another, have mean sqrt(abar_t) x0 and variance 1 - abar_t (Cas-DM Eq. 2)."""
    mean, variance = 1.0, 0.0
    for t, beta in list(enumerate(chain.beta.tolist()))[1:]:
        mean, variance = mean * math.sqrt(1 - beta), (1 - beta) * variance + beta
        assert mean == pytest.approx(chain.alpha_bar[t].sqrt().item(), rel=1e-8)
        assert variance == pytest.approx(1 - chain.alpha_bar[t].item(), rel=1e-8)


def test_eq01_alpha_is_one_minus_beta_and_abar_its_product(chain):
    """alpha_t = 1 - beta_t and abar_t = alpha_t abar_{t-1}, from abar_0 = 1; beta in (0, 1) and abar strictly falling (Cas-DM Eq. 1)."""
    assert chain.beta[0] == 0 and chain.alpha[0] == 1 and chain.alpha_bar[0] == 1
    assert_close(chain.alpha, 1 - chain.beta, **EXACT)
    assert_close(chain.alpha_bar, torch.tensor(np.cumprod(1 - chain.beta.numpy())), rtol=1e-8, atol=0)
    assert ((chain.beta[1:] > 0) & (chain.beta[1:] < 1)).all() and (chain.alpha_bar.diff() < 0).all()
    assert all(table.dtype == torch.float64 for table in chain[:3])


def test_eq01_simulated_chain_agrees_with_draws_of_eq03():
    """20,000 chains of 25 Eq. 1 steps and as many draws of Eq. 3 have Eq. 2's mean and variance within 5 standard errors (Cas-DM Eqs. 1-3)."""
    chain, n, x0 = linear_schedule(25), 20_000, 0.7
    rng = np.random.default_rng(0)
    x = np.full(n, x0)
    for t in range(1, 26):
        x = math.sqrt(1 - chain.beta[t]) * x + math.sqrt(chain.beta[t]) * rng.standard_normal(n)
        if t in (1, 13, 25):
            eps = torch.from_numpy(rng.standard_normal((n, 1, 1, 1)))
            drawn = q_sample(torch.full_like(eps, x0), torch.full((n,), t), eps, chain).numpy().ravel()
            mean, variance = math.sqrt(chain.alpha_bar[t]) * x0, 1 - chain.alpha_bar[t].item()
            for sample in (x, drawn):
                assert abs(sample.mean() - mean) < 5 * math.sqrt(variance / n)
                assert abs(sample.var() - variance) < 5 * variance * math.sqrt(2 / n)


def test_eq02_q_sample_scales_signal_and_noise_by_the_roots(chain):
    """Without noise x_t is sqrt(abar_t) x0, without signal sqrt(1 - abar_t) eps: the mean and the deviation of (Cas-DM Eq. 2)."""
    x0, eps, _, _, t = every_t(chain)
    abar = column(torch.cumprod(1 - chain.beta, 0))
    assert_close(q_sample(x0, t, 0 * eps, chain), abar ** 0.5 * x0, rtol=1e-8, atol=1e-12)
    assert_close(q_sample(0 * x0, t, eps, chain), (1 - abar) ** 0.5 * eps, rtol=1e-8, atol=1e-12)


def test_eq03_x_t_is_the_closed_form_of_a_schedule_built_here():
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, abar from numpy's own product of linear betas (Cas-DM Eq. 3)."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for t in (1, 2, 500, 999, 1000):
        x_t = q_sample(pixel(0.3), torch.tensor([t]), pixel(-1.7), linear_schedule())
        assert x_t.item() == pytest.approx(math.sqrt(abar[t - 1]) * 0.3 - math.sqrt(1 - abar[t - 1]) * 1.7, rel=1e-12)


def test_eq03_first_step_is_nearly_clean_and_last_nearly_noise():
    """t runs from the image to the noise: x_1 is within 0.02 of x0 and x_T of eps (Cas-DM Eq. 3)."""
    for schedule in (linear_schedule(), cosine_schedule()):
        T = len(schedule.beta) - 1
        x0, eps = torch.ones(2, 1, 1, 1), -torch.ones(2, 1, 1, 1)
        near_x0, near_eps = q_sample(x0, torch.tensor([1, T]), eps, schedule).flatten()
        assert abs(near_x0 - 1) < 0.02 and abs(near_eps + 1) < 0.02


# ---- Eqs. 4-7: one step back ----

@pytest.mark.parametrize("name", ["cosine4000", "linear1000", "cosine4000-ddim10"])
def test_eq07_mean_and_variance_are_bayes_rule_on_a_grid(name):
    """q(x_{t-1} | x_t, x0), from Eqs. 1 and 2 on a grid, has the mean of (Cas-DM Eq. 7) and variance beta~_t; p of (Cas-DM Eq. 4) aims at it."""
    chain = CHAINS[name]
    for t in some_t(chain)[1:]:
        beta, abar, abar_prev, x0 = chain.beta[t].item(), chain.alpha_bar[t].item(), chain.alpha_bar[t - 1].item(), 0.4
        x_t = math.sqrt(abar) * x0 + 0.5 * math.sqrt(1 - abar)
        x_prev = math.sqrt(abar_prev) * x0 + math.sqrt(1 - abar_prev) * np.linspace(-12, 12, 200_001)
        log_p = -(x_t - math.sqrt(1 - beta) * x_prev) ** 2 / (2 * beta) - (x_prev - math.sqrt(abar_prev) * x0) ** 2 / (2 * (1 - abar_prev))
        p = np.exp(log_p - log_p.max())
        mean = (p * x_prev).sum() / p.sum()
        step = torch.tensor([t])
        mu = mu_from_x0(pixel(x_t), step, pixel(x0), chain)
        assert mu.item() == pytest.approx(mean, abs=1e-9)
        assert posterior_variance(step, chain).item() == pytest.approx((p * (x_prev - mean) ** 2).sum() / p.sum(), rel=1e-7)


def test_eq07_noise_free_image_steps_back_along_the_signal(chain):
    """mu~(sqrt(abar_t) x0, x0) = sqrt(abar_{t-1}) x0 (Cas-DM Eq. 7)."""
    x0, _, _, _, t = every_t(chain)
    x_t = column(chain.alpha_bar).sqrt() * x0
    assert_close(mu_from_x0(x_t, t, x0, chain), chain.alpha_bar[:-1].view(-1, 1, 1, 1).sqrt() * x0, **EXACT)


def test_eq07_variance_of_mean_plus_posterior_is_the_marginal(chain):
    """c2^2 (1 - abar_t) + beta~_t = 1 - abar_{t-1}: the law of total variance, c2 being x_t's coefficient in (Cas-DM Eq. 7)."""
    _, _, _, _, t = every_t(chain)
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    c2 = mu_from_x0(one, t, 0 * one, chain).flatten()
    assert_close(c2 ** 2 * (1 - chain.alpha_bar[1:]) + posterior_variance(t, chain), 1 - chain.alpha_bar[:-1], **EXACT)


def test_eq07_respaced_posterior_is_two_steps_composed():
    """On a chain of stride 2, Eq. 7 is the original chain's two posteriors one after the other, in mean and in variance (Cas-DM Eq. 7)."""
    full = linear_schedule(100)
    half = respace(full, 50)
    x0, _, _, _, i = every_t(half)
    x0, i, x_t = x0[1:], i[1:], torch.linspace(-1, 1, 49 * 6, dtype=torch.float64).view(49, 3, 1, 2)
    t = half.step[i]
    x_prev = mu_from_x0(x_t, t, x0, full)
    assert_close(mu_from_x0(x_prev, t - 1, x0, full), mu_from_x0(x_t, i, x0, half), **EXACT)
    one = torch.ones_like(x_t[:, :1, :1, :1])
    c2 = mu_from_x0(one, t - 1, 0 * one, full).flatten()
    assert_close(c2 ** 2 * posterior_variance(t, full) + posterior_variance(t - 1, full), posterior_variance(i, half), **EXACT)


def test_posterior_variance_lies_between_zero_and_beta(chain):
    """beta~_t is 0 at t = 1, else in (0, beta_t), and nears beta_t at t = T, where abar is small (DDPM Eq. 7)."""
    _, _, _, _, t = every_t(chain)
    variance = posterior_variance(t, chain)
    assert variance[0] == 0 and variance.dtype == torch.float64
    assert (variance[1:] > 0).all() and (variance <= chain.beta[1:]).all()
    assert variance[-1] / chain.beta[-1] > 0.9


def test_t1_posterior_is_the_clean_image(chain):
    """At t = 1 the mean of (Cas-DM Eq. 7) is x0, whatever x_t, and nothing is left to draw."""
    x0, _, x_t, _, _ = every_t(chain)
    t = torch.ones(len(x0), dtype=torch.int64)
    assert_close(mu_from_x0(x_t, t, x0, chain), x0, rtol=0, atol=1e-11)         # 1 - (1 - beta_1) keeps 12 digits of beta_1
    assert (posterior_variance(t, chain) == 0).all()


def kl_on_a_grid(mean1, variance1, mean2, variance2):
    """KL(N(mean1, variance1) || N(mean2, variance2)) in 1-D by numerical integration."""
    z, step = np.linspace(-12, 12, 100_001, retstep=True)
    x = mean1 + math.sqrt(variance1) * z
    log_ratio = -z ** 2 / 2 - math.log(variance1) / 2 + (x - mean2) ** 2 / (2 * variance2) + math.log(variance2) / 2
    return float((np.exp(-z ** 2 / 2) / math.sqrt(2 * math.pi) * log_ratio).sum() * step)


@pytest.mark.parametrize("name", ["cosine4000", "linear1000", "cosine4000-ddim100"])
def test_eq05_is_least_at_the_true_noise_and_grows_with_the_mean_error(name):
    """L_t = KL(q(x_{t-1} | x_t, x0) || p_theta) (Cas-DM Eq. 5), p_theta = N(mu_theta, beta_t I) (Cas-DM Eq. 4), integrated numerically.

    It exceeds its value at the true eps by ||mu~ - mu_theta||^2 / (2 beta_t) (Cas-DM Eq. 6, its erratum corrected).
    """
    chain = CHAINS[name]
    x0, eps, error = pixel(0.3), pixel(-1.1), pixel(0.4)
    for t in some_t(chain)[1:]:
        step = torch.tensor([t])
        x_t = q_sample(x0, step, eps, chain)
        mu, variance, beta = mu_from_x0(x_t, step, x0, chain).item(), posterior_variance(step, chain).item(), chain.beta[t].item()
        kl = [kl_on_a_grid(mu, variance, mu_from_eps(x_t, step, eps + e, chain).item(), beta) for e in (0 * error, error)]
        squared = (mu - mu_from_eps(x_t, step, eps + error, chain).item()) ** 2
        assert kl[1] - kl[0] == pytest.approx(squared / (2 * beta), rel=1e-6)
        assert kl[0] == pytest.approx((variance / beta - 1 - math.log(variance / beta)) / 2, abs=1e-9)


def test_eq06_factor_is_one_over_two_beta_not_two_beta_squared():
    """With Sigma = beta_t I on both sides the KL is ||dmu||^2 / (2 beta_t); the printed 1 / (2 beta_t^2) is an erratum (Cas-DM Eq. 6)."""
    schedule, t = cosine_schedule(), 2001
    beta, dmu = schedule.beta[t].item(), 0.01
    assert kl_on_a_grid(0.0, beta, 0.0, beta) == pytest.approx(0, abs=1e-12)
    assert kl_on_a_grid(0.2, beta, 0.2 + dmu, beta) == pytest.approx(dmu ** 2 / (2 * beta), rel=1e-9)
    assert (1 / (2 * beta), 1 / (2 * beta ** 2)) == (pytest.approx(634, rel=1e-3), pytest.approx(803_317, rel=1e-3))


# ---- Eqs. 8-11: what a network's output implies ----

def test_eq08_x0_star_inverts_forward(chain):
    """x0* of x_t and the noise that made it is x0 (Cas-DM Eq. 8 after Eq. 3)."""
    x0, eps, _, _, t = every_t(chain)
    assert_close(x0_from_eps(q_sample(x0, t, eps, chain), t, eps, chain), x0, **EXACT)


def test_eq08_is_its_printed_form(chain):
    """x0* = (x_t - sqrt(1 - abar_t) eps') / sqrt(abar_t) for an eps' that is wrong (Cas-DM Eq. 8)."""
    x_t, eps_hat, _, _, t = every_t(chain)
    abar = column(chain.alpha_bar)
    assert_close(x0_from_eps(x_t, t, eps_hat, chain), (x_t - (1 - abar).sqrt() * eps_hat) / abar.sqrt(), rtol=1e-9, atol=1e-7)


def test_eq08_amplifies_an_error_by_81165_at_the_last_step_of_the_paper():
    """d x0* / d eps' = -sqrt(1 / abar_T - 1) = -81,165 at cosine, T = 4000: why phi's input is clamped (Cas-DM Eq. 8)."""
    assert x0_from_eps(pixel(0.0), torch.tensor([4000]), pixel(1.0), cosine_schedule()).item() == pytest.approx(-81_165, rel=1e-5)


def test_eps_and_x0_are_each_others_inverse(chain):
    """eps of the x0* of any eps' is eps', and x0* of the eps of any x0' is x0' (Cas-DM Eqs. 3, 8)."""
    x_t, eps_hat, x0_hat, _, t = every_t(chain)
    assert_close(eps_from_x0(x_t, t, x0_from_eps(x_t, t, eps_hat, chain), chain), eps_hat, **EXACT)
    assert_close(x0_from_eps(x_t, t, eps_from_x0(x_t, t, x0_hat, chain), chain), x0_hat, **EXACT)


def test_eq09_is_eq07_at_x0_star(chain):
    """mu_eps'(x_t, t) = mu~(x_t, x0*) for any eps' (Cas-DM Eq. 9 from Eqs. 7, 8); at the true noise it is the true posterior mean."""
    x0, eps, _, eps_hat, t = every_t(chain)
    x_t = q_sample(x0, t, eps, chain)
    assert_close(mu_from_eps(x_t, t, eps_hat, chain), mu_from_x0(x_t, t, x0_from_eps(x_t, t, eps_hat, chain), chain), **EXACT)
    assert_close(mu_from_eps(x_t, t, eps, chain), mu_from_x0(x_t, t, x0, chain), **EXACT)


def test_eq10_moves_with_x0_hat_by_the_posterior_coefficient(chain):
    """mu_x0' is Eq. 7 with x0' in x0's place: x0' - x0 moves it by sqrt(abar_{t-1}) beta_t / (1 - abar_t) (Cas-DM Eq. 10)."""
    x0, eps, x0_hat, _, t = every_t(chain)
    x_t, abar = q_sample(x0, t, eps, chain), chain.alpha_bar
    c1 = (abar[:-1].sqrt() * (1 - abar[1:] / abar[:-1]) / (1 - abar[1:])).view(-1, 1, 1, 1)
    assert_close(mu_from_x0(x_t, t, x0_hat, chain) - mu_from_x0(x_t, t, x0, chain), c1 * (x0_hat - x0), **EXACT)


def test_eq11_r_zero_is_mu_eps_and_r_one_is_mu_x0():
    """r_t weighs mu_x0', one weight a pixel for all three channels (Cas-DM Eq. 11)."""
    mu_x0, mu_eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r_t = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    r_t[:, :, 0], r_t[:, :, 1] = 1, 0.25
    mu = mix(mu_x0, mu_eps, r_t)
    assert_close(mu[:, :, 0], mu_x0[:, :, 0], rtol=0, atol=0)
    assert_close(mu[:, :, 1], 0.25 * mu_x0[:, :, 1] + 0.75 * mu_eps[:, :, 1])
    assert_close(mu[:, :, 2:], mu_eps[:, :, 2:], rtol=0, atol=0)


def test_eq11_mixing_means_is_mixing_clean_images(chain):
    """r mu_x0' + (1 - r) mu_eps' = mu~(x_t, r x0' + (1 - r) x0*) (Cas-DM Eq. 11)."""
    x0, eps, x0_hat, eps_hat, t = every_t(chain)
    x_t, r_t = q_sample(x0, t, eps, chain), torch.linspace(0, 1, len(t), dtype=torch.float64).flip(0).view(-1, 1, 1, 1)
    x0_eff = r_t * x0_hat + (1 - r_t) * x0_from_eps(x_t, t, eps_hat, chain)
    mixed = mix(mu_from_x0(x_t, t, x0_hat, chain), mu_from_eps(x_t, t, eps_hat, chain), r_t)
    assert_close(mixed, mu_from_x0(x_t, t, x0_eff, chain), **EXACT)


# ---- Eqs. 16, 17: DDIM ----

def test_ddim_sigma_is_its_printed_form(chain):
    """sigma_t = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1}) (DDIM Eq. 16)."""
    _, _, _, _, t = every_t(chain)
    abar, abar_prev = chain.alpha_bar[1:], chain.alpha_bar[:-1]
    for eta in ETAS:
        assert_close(ddim_sigma(t, chain, eta), eta * ((1 - abar_prev) / (1 - abar)).sqrt() * (1 - abar / abar_prev).sqrt(), **EXACT)
        assert ddim_sigma(t, chain, eta)[0] == 0
    assert_close(ddim_sigma(t, chain, 1.0) ** 2, posterior_variance(t, chain), **EXACT)


@pytest.mark.parametrize("eta", ETAS)
def test_eq16_keeps_the_marginal_of_eq02(chain, eta):
    """At the true x0 the mean's share of eps, squared, plus sigma^2 is 1 - abar_{t-1}, x_{t-1}'s variance under Eq. 2 (Cas-DM Eq. 16)."""
    x0, eps, _, _, t = every_t(chain)
    abar_prev = chain.alpha_bar[:-1].view(-1, 1, 1, 1)
    mean = ddim_mu_from_x0(q_sample(x0, t, eps, chain), t, x0, chain, eta)
    direction = (mean - abar_prev.sqrt() * x0) / eps
    assert (direction >= -1e-9).all()
    assert_close(direction ** 2 + ddim_sigma(t, chain, eta).view(-1, 1, 1, 1) ** 2, (1 - abar_prev).expand_as(eps), **EXACT)


def test_eq16_at_eta_zero_steps_exactly_to_the_same_noise_at_t_minus_one(chain):
    """With the true x0 and eta = 0, x_{t-1} is Eq. 3 at t - 1 with the same eps (Cas-DM Eq. 16)."""
    x0, eps, _, _, t = every_t(chain)
    assert_close(ddim_mu_from_x0(q_sample(x0, t, eps, chain), t, x0, chain), q_sample(x0, t - 1, eps, chain), **EXACT)


def test_eq16_at_eta_one_is_the_ancestral_mean_of_eq07(chain):
    """With sigma^2 = beta~ the DDIM mean is the posterior mean, for any x0' (Cas-DM Eqs. 7, 16)."""
    x0, eps, x0_hat, _, t = every_t(chain)
    x_t = q_sample(x0, t, eps, chain)
    assert_close(ddim_mu_from_x0(x_t, t, x0_hat, chain, eta=1.0), mu_from_x0(x_t, t, x0_hat, chain), **EXACT)


@pytest.mark.parametrize("eta", ETAS)
def test_eq17_is_eq16_at_x0_star(chain, eta):
    """mu_eps'^ddim = mu_x0'^ddim with x0* for x0', for any eps' (Cas-DM Eqs. 16, 17)."""
    x0, eps, _, eps_hat, t = every_t(chain)
    x_t = q_sample(x0, t, eps, chain)
    assert_close(ddim_mu_from_eps(x_t, t, eps_hat, chain, eta), ddim_mu_from_x0(x_t, t, x0_from_eps(x_t, t, eps_hat, chain), chain, eta), **EXACT)


def test_eq17_needs_the_alpha_of_the_respaced_chain():
    """1/sqrt(alpha_t) at ddim100's t = T is 2.025 where the original is 1.026; with the original, 17 misses 16 (Cas-DM Eqs. 16, 17)."""
    full = cosine_schedule()
    short = respace(full, 100)
    original = short._replace(alpha=full.alpha[short.step])
    assert [chain.alpha[-1].rsqrt().item() for chain in (short, original)] == pytest.approx([2.025, 1.026], abs=1e-3)
    x0, eps, _, _, t = every_t(short)
    x_t = q_sample(x0, t, eps, short)
    expected = ddim_mu_from_x0(x_t, t, x0, short)
    assert_close(ddim_mu_from_eps(x_t, t, eps, short), expected, **EXACT)
    assert (ddim_mu_from_eps(x_t, t, eps, original) - expected).abs().max() > 0.01


def test_eq17_is_dual_diffusions_form_at_sigma_zero(chain):
    """(x_t + (sqrt(alpha - abar) - sqrt(1 - abar)) eps') / sqrt(alpha), as Dual's official code has it (Cas-DM Eq. 17)."""
    x_t, _, _, eps_hat, t = every_t(chain)
    alpha, abar = column(chain.alpha), column(chain.alpha_bar)
    expected = (x_t + ((alpha - abar).clamp(min=0).sqrt() - (1 - abar).sqrt()) * eps_hat) / alpha.sqrt()
    assert_close(ddim_mu_from_eps(x_t, t, eps_hat, chain), expected, rtol=1e-7, atol=1e-7)       # alpha_1 - abar_1 is a difference of equals


@pytest.mark.parametrize("eta", ETAS)
def test_eq16_17_mixing_means_is_mixing_clean_images(chain, eta):
    """r mu_x0'^ddim + (1 - r) mu_eps'^ddim is Eq. 16 at r x0' + (1 - r) x0* (the line after Cas-DM Eq. 17)."""
    x0, eps, x0_hat, eps_hat, t = every_t(chain)
    x_t, r_t = q_sample(x0, t, eps, chain), torch.linspace(0, 1, len(t), dtype=torch.float64).view(-1, 1, 1, 1)
    x0_eff = r_t * x0_hat + (1 - r_t) * x0_from_eps(x_t, t, eps_hat, chain)
    mixed = mix(ddim_mu_from_x0(x_t, t, x0_hat, chain, eta), ddim_mu_from_eps(x_t, t, eps_hat, chain, eta), r_t)
    assert_close(mixed, ddim_mu_from_x0(x_t, t, x0_eff, chain, eta), **EXACT)


@pytest.mark.parametrize("eta", ETAS)
def test_eq16_17_last_step_is_the_clean_image_itself(chain, eta):
    """At t = 1, abar_0 = 1: Eq. 16 is x0' and Eq. 17 is x0*, for any eta (Cas-DM Eqs. 16, 17)."""
    x_t, eps_hat, x0_hat, _, _ = every_t(chain)
    t = torch.ones(len(x_t), dtype=torch.int64)
    assert_close(ddim_mu_from_x0(x_t, t, x0_hat, chain, eta), x0_hat, **EXACT)
    assert_close(ddim_mu_from_eps(x_t, t, eps_hat, chain, eta), x0_from_eps(x_t, t, eps_hat, chain), **EXACT)


@pytest.mark.parametrize("name", ["cosine4000-ddim100", "cosine4000-ddim10", "linear1000-ddim25"])
@pytest.mark.parametrize("formula", ["Eq. 16", "Eq. 17"])
def test_eq16_17_whole_chain_with_the_truth_returns_x0(name, formula):
    """From x_T all the way down, fed the true x0 or the true eps at every step, eta = 0 arrives at x0 (Cas-DM Eqs. 16, 17)."""
    chain = CHAINS[name]
    x0, eps = torch.rand(2, 2, 3, 1, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    T = len(chain.beta) - 1
    x = q_sample(x0, torch.full((2,), T), eps, chain)
    for i in range(T, 0, -1):
        t = torch.full((2,), i)
        x = ddim_mu_from_x0(x, t, x0, chain) if formula == "Eq. 16" else ddim_mu_from_eps(x, t, eps, chain)
    assert_close(x, x0, **EXACT)


# ---- schedules ----

def test_linear_schedule_has_ddpms_endpoints_and_scales_with_T():
    """beta_1 = 1e-4, beta_1000 = 0.02, abar_1000 = 4.0358e-5; four times as many steps have a quarter of the betas (DDPM Sec. 4)."""
    thousand, four_thousand = linear_schedule(1000), linear_schedule(4000)
    assert (thousand.beta[1].item(), thousand.beta[1000].item()) == (pytest.approx(1e-4), pytest.approx(0.02))
    assert (four_thousand.beta[1].item(), four_thousand.beta[4000].item()) == (pytest.approx(2.5e-5), pytest.approx(5e-3))
    assert thousand.alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)
    assert four_thousand.alpha_bar[-1].item() == pytest.approx(4.25e-5, rel=2e-3)
    assert_close(thousand.beta[1:].diff(), torch.full((999,), 0.0199 / 999, dtype=torch.float64))


def test_cosine_schedule_has_improved_diffusions_numbers():
    """At T = 4000: beta_1 = 9.866e-6, the last three betas 0.5556, 0.75 and 0.999, the only one clipped; abar_T = 1.518e-10 (IDDPM Eq. 17)."""
    schedule = cosine_schedule(4000)
    assert schedule.beta[1].item() == pytest.approx(9.866e-6, rel=1e-4)
    assert schedule.beta[-3:].tolist() == pytest.approx([0.5556, 0.75, 0.999], abs=1e-4)
    assert (schedule.beta >= 0.999).sum() == 1 and schedule.beta[-1] == 0.999
    assert schedule.alpha_bar[-2].item() == pytest.approx(1.518e-7, rel=1e-3)
    assert schedule.alpha_bar[-1].item() == pytest.approx(1.51798e-10, rel=1e-5)
    assert cosine_schedule(1000).alpha_bar[-1].item() == pytest.approx(2.43e-9, rel=2e-3)


def test_cosine_abar_is_the_closed_form_up_to_the_clipped_step():
    """abar_t = cos^2(((t/T + 0.008) / 1.008) pi/2) / f(0) for every t < T (IDDPM Eq. 17)."""
    f = np.cos((np.arange(4000) / 4000 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert_close(cosine_schedule(4000).alpha_bar[:-1].numpy(), f / f[0], rtol=1e-8, atol=0)
    assert 1 / math.sqrt(cosine_schedule(4000).alpha_bar[-1]) == pytest.approx(81_165, rel=1e-5)


# ---- re-spacing ----

@pytest.mark.parametrize("schedule", [cosine_schedule(), linear_schedule()], ids=["cosine", "linear"])
def test_respacing_to_all_steps_changes_nothing(schedule):
    """T of T steps have the betas, alphas, abars and steps of the schedule itself."""
    same = respace(schedule, len(schedule.beta) - 1)
    for ours, theirs in zip(same, schedule):
        assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize("steps, stride", [(10, 400), (30, 134), (64, 63), (100, 40), (250, 16), (4000, 1)])
def test_respacing_takes_improved_diffusions_stride(steps, stride):
    """ddimN of T = 4000 keeps the original steps 1, 1 + stride, ... (1-based): ddim100 ends at 3961, where abar is 2.3e-4, not 1.5e-10."""
    chain = respace(cosine_schedule(), steps)
    assert chain.step.tolist() == [0, *range(1, 4001, stride)] and len(chain.step) == steps + 1
    if steps == 100:
        assert chain.step[-1] == 3961 and chain.alpha_bar[-1].item() == pytest.approx(2.3e-4, rel=0.02)
        assert chain.beta[-3:].tolist() == pytest.approx([0.440, 0.559, 0.756], abs=1e-3)


def test_respacing_keeps_abar_and_recomputes_alpha(chain):
    """abar'_i = abar_{step_i} exactly, and alpha'_i = abar'_i / abar'_{i-1}."""
    full = cosine_schedule() if len(chain.beta) == 4001 or chain.step[-1] > 1000 else linear_schedule()
    assert_close(chain.alpha_bar, full.alpha_bar[chain.step], rtol=0, atol=0)
    assert_close(chain.alpha[1:], chain.alpha_bar[1:] / chain.alpha_bar[:-1], **EXACT)


def test_respacing_twice_remembers_the_original_steps():
    """The step table of a re-spaced chain's re-spaced chain still counts in the first schedule."""
    assert respace(respace(cosine_schedule(), 100), 10).step.tolist() == respace(cosine_schedule(), 10).step.tolist()


@pytest.mark.parametrize("T, steps", [(4000, 99), (4000, 300), (1000, 64), (1000, 300), (1000, 0), (1000, 1001)])
def test_impossible_step_counts_raise_one_line_with_counts_that_work(T, steps):
    """improved-diffusion's ddimN has no whole stride for these; the message names numbers that have."""
    with pytest.raises(ValueError, match=rf"^{steps} sampling steps.*T = {T}; expected .*; use [\d, ]+$") as error:
        respace(linear_schedule(T), steps)
    for possible in str(error.value).rsplit("use ", 1)[1].split(", "):
        assert len(respace(linear_schedule(T), int(possible)).step) == int(possible) + 1


@given(T=st.integers(1, 300), steps=st.integers(1, 300))
def test_respacing_gives_exactly_the_asked_steps_or_raises(T, steps):
    """Whatever T and N: N steps from 1 at the smallest whole stride, or a ValueError because no stride has N."""
    counts = [len(range(0, T, s)) for s in range(1, T + 1)]
    if steps in counts:
        assert respace(linear_schedule(T), steps).step.tolist() == [0, *range(1, T + 1, counts.index(steps) + 1)]
    else:
        with pytest.raises(ValueError):
            respace(linear_schedule(T), steps)


# ---- tables ----

def test_coefficients_are_cast_after_the_formula_not_before():
    """In float32, sqrt(1 - abar_1) of cosine/4000 keeps 7 digits; from a float32 abar it would be off by 0.1 %."""
    schedule, x = cosine_schedule(), torch.ones(1, 1, 1, 1)
    x_t = q_sample(0 * x, torch.tensor([1]), x, schedule)
    assert x_t.dtype == torch.float32
    assert x_t.item() == pytest.approx(math.sqrt(9.866e-6), rel=1e-4)
    assert x_t.item() == pytest.approx((1 - schedule.alpha_bar[1]).sqrt().item(), rel=2e-7)
    assert abs((1 - schedule.alpha_bar[1].float()).sqrt().item() / x_t.item() - 1) > 1e-4


def test_at_step_gathers_one_number_an_image():
    """coef[t] as [B, 1, 1, 1] in the dtype of `like`, for t in any order."""
    got = at_step(torch.arange(5.0, dtype=torch.float64), torch.tensor([4, 0, 2]), torch.zeros(3, 3, 1, 2))
    assert got.shape == (3, 1, 1, 1) and got.dtype == torch.float32 and got.flatten().tolist() == [4, 0, 2]


@pytest.mark.parametrize("t", [torch.tensor(3), torch.tensor([3.0]), torch.tensor([3], dtype=torch.int32), torch.tensor([[3]])])
def test_at_step_refuses_a_t_that_is_not_int64_of_one_dimension(t):
    """A t of another type or shape would gather or broadcast silently."""
    with pytest.raises(AssertionError, match="t must be int64"):
        at_step(linear_schedule().beta, t, torch.zeros(1, 1, 1, 1))


def test_tables_move_together_but_stay_where_float64_is_missing():
    """Schedule.to moves all four tables; to MPS, which has no float64, none."""
    schedule = linear_schedule(10)
    assert {table.device.type for table in schedule.to("meta")} == {"meta"}
    assert schedule.to("mps") is schedule


def test_float32_recovers_x0_at_the_last_linear_step():
    """At T = 1000 linear, amplification 157: float32 loses 3.6e-5 at most (Cas-DM Eq. 8)."""
    schedule, t = linear_schedule(), torch.full((64,), 1000)
    x0, eps = torch.rand(2, 64, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert_close(x0_from_eps(q_sample(x0, t, eps, schedule), t, eps, schedule), x0, rtol=0, atol=1e-4)
