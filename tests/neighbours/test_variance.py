r"""variance.py: the step back as a Gaussian, the bound and its parts, ancestral sampling, importance-sampled t.

    IDDPM    arXiv:2102.09672v1     DDPM   arXiv:2006.11239v2     DDIM   arXiv:2010.02502v4
"""
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from data import stream
from diffusion import Prediction, cosine_schedule, ddim_sigma, eps_from_x0, linear_schedule, mu_from_x0, posterior_variance, q_sample, respace, x0_from_eps
from losses import sigma_loss, training_losses, vlb_loss
from refiner import build_model
from sample import p_sample, sample
from neighbours.variance import (ImportanceSampler, bits_per_dim, bound, discretised_log_likelihood, gaussian_kl, log_variance, p_mean_variance, prior_bits)

COSINE, LINEAR = cosine_schedule(), linear_schedule()
F64 = torch.float64


def images(n=3, size=4, seed=0):
    """Images of 256 levels in [-1, 1], float64."""
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed)).double() / 127.5 - 1


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Oracle(nn.Module):
    """Knows the clean images; answers with them, r_t = 1, at a schedule of its own."""
    num_classes = None

    def __init__(self, x0, schedule, v=None):
        super().__init__()
        self.x0, self.schedule, self.v, self.unused = x0, schedule, v, nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, y=None):
        return Prediction(eps_from_x0(x_t, t, self.x0, self.schedule), self.x0, torch.ones_like(x_t[:, :1]), self.v)


def small_ddpm(**settings):
    torch.manual_seed(0)
    model = build_model(dict(model="ddpm", image_size=16, channels=32, res_blocks=1, T=100, learn_sigma=True, objective="hybrid") | settings)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return model


# ---- the variance ----

@pytest.mark.parametrize("schedule", [COSINE, LINEAR, respace(COSINE, 100)], ids=["cosine", "linear", "respaced"])
def test_learned_variance_goes_from_posterior_to_forward_by_their_logarithms(schedule):
    """v = -1, 0, 1 are log beta~, the mean of the logarithms and log beta (IDDPM Eq. 15)."""
    t = torch.tensor([2, 50, len(schedule.beta) - 1])
    x = torch.zeros(3, 3, 2, 2, dtype=F64)
    small, large = posterior_variance(t, schedule).log().view(-1, 1, 1, 1), schedule.beta[t].log().view(-1, 1, 1, 1)
    for v, expected in ((-1, small), (0, (small + large) / 2), (1, large)):
        assert_close(log_variance(t, schedule, "learned", x, torch.full_like(x, v)), expected.expand_as(x), rtol=1e-12, atol=0)
    assert_close(log_variance(t, schedule, "small", x), small, rtol=1e-12, atol=0)
    assert_close(log_variance(t, schedule, "large", x), large, rtol=1e-12, atol=0)


def test_the_last_steps_variance_is_finite_and_is_that_of_the_step_before():
    """beta~_1 = 0 has no logarithm; log beta~_2 of cosine/4000 is improved-diffusion's -12.2045."""
    one, x = torch.tensor([1]), torch.zeros(1, 3, 2, 2, dtype=F64)
    assert log_variance(one, COSINE, "small", x).item() == pytest.approx(-12.2045, abs=1e-4)
    assert log_variance(one, COSINE, "large", x).item() == log_variance(one, COSINE, "small", x).item()
    assert log_variance(one, respace(COSINE, 1), "small", x).isfinite().all()


# ---- the bound ----

def test_kl_of_equal_gaussians_is_zero_and_of_equal_variances_the_squared_distance():
    """KL = (mu1 - mu2)^2 / (2 sigma^2): Cas-DM Eq. 6's factor for sigma^2 = beta is 1 / (2 beta)."""
    mu1, mu2, log_var = normal(5), normal(5, seed=2), normal(5, seed=3)
    assert_close(gaussian_kl(mu1, log_var, mu1, log_var), torch.zeros(5, dtype=F64))
    assert_close(gaussian_kl(mu1, log_var, mu2, log_var), (mu1 - mu2) ** 2 / (2 * log_var.exp()))


def test_kl_is_torchs():
    mu1, mu2, a, b = (normal(7, seed=s) for s in range(4))
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mu1, (a / 2).exp()), torch.distributions.Normal(mu2, (b / 2).exp()))
    assert_close(gaussian_kl(mu1, a, mu2, b), expected)


@pytest.mark.parametrize("mu, log_sigma", [(0.0, -1.0), (0.3, -4.0), (-1.2, -6.0), (0.999, 0.5)])
def test_the_decoders_256_bins_sum_to_one(mu, log_sigma):
    """The outer two reach to infinity (DDPM Eq. 13)."""
    levels = torch.arange(256, dtype=F64) / 127.5 - 1
    p = discretised_log_likelihood(levels, torch.tensor(mu, dtype=F64), torch.tensor(log_sigma, dtype=F64)).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-9)


def test_the_decoder_is_the_difference_of_normal_distribution_functions_also_far_from_the_mean():
    x, mu, sigma = torch.tensor([0.2, 0.2, -0.4], dtype=F64).div(1 / 127.5).round().div(127.5), torch.tensor([0.21, 0.5, -0.1], dtype=F64), 0.05
    expected = [stats.norm.logsf((lo - m) / sigma) + math.log1p(-math.exp(stats.norm.logsf((hi - m) / sigma) - stats.norm.logsf((lo - m) / sigma)))
                if lo > m else stats.norm.logcdf((hi - m) / sigma) + math.log1p(-math.exp(stats.norm.logcdf((lo - m) / sigma) - stats.norm.logcdf((hi - m) / sigma)))
                for lo, hi, m in zip((x - 1 / 255).tolist(), (x + 1 / 255).tolist(), mu.tolist())]
    assert_close(discretised_log_likelihood(x, mu, torch.tensor(sigma, dtype=F64).log()), torch.tensor(expected, dtype=F64), rtol=1e-9, atol=0)


def test_a_sharp_decoder_at_the_image_has_no_cost_and_one_far_off_a_finite_one():
    x = images().clamp(min=-0.9)        # the bin of -1 has the whole left tail
    assert discretised_log_likelihood(x, x, torch.full_like(x, -9)).abs().max() < 1e-12
    assert_close(discretised_log_likelihood(x, x - 3, torch.full_like(x, -9)), torch.full_like(x, math.log(1e-12)))
    assert_close(discretised_log_likelihood(x.float(), x.float(), torch.full_like(x, -3.0).float()).double(),
                 discretised_log_likelihood(x, x, torch.full_like(x, -3.0)), rtol=1e-4, atol=1e-5)


def test_the_true_image_and_the_posteriors_variance_leave_nothing_but_decoder_and_prior():
    """L_{t-1} = 0 for t > 1; the prior is 9.7e-6 and 3.7e-11 bits for data of variance 1 at most (IDDPM Eqs. 5-7)."""
    x0 = images()
    terms = bits_per_dim(Oracle(x0, COSINE), x0, 100, "small", lambda: normal(*x0.shape))
    assert terms.shape == (3, 101) and terms[:, 1:100].abs().max() < 1e-9
    assert terms[:, 0].min() > 0
    assert prior_bits(x0, LINEAR).max() < 1e-4 and prior_bits(x0, COSINE).max() < 1e-9 and prior_bits(x0, LINEAR).min() > 0


def test_the_bound_of_the_oracle_is_least_with_the_small_variance():
    """With the true x0 the posterior's own variance is right and beta_t too wide at every t > 1."""
    x0 = images()
    small, large = (bits_per_dim(Oracle(x0, LINEAR), x0, 100, kind, lambda: normal(*x0.shape))[:, 1:100] for kind in ("small", "large"))
    assert (large > small).all() and large[:, 0].min() > 0.1


def test_the_terms_of_the_full_chain_are_those_that_training_averages():
    """T E_t[L_t] is the sum over t: vlb_loss at each t, averaged, is the bound without its prior (IDDPM Eq. 4)."""
    T = 40
    schedule, x0, v = linear_schedule(T), images(1), 0.3
    x0_hat = (x0 * 0.9).clamp(-1, 1)
    eps = normal(1, 3, 4, 4)
    oracle = Oracle(x0_hat, schedule, torch.full_like(x0, v))
    total = bits_per_dim(oracle, x0, T, "learned", lambda: eps)[:, :T].sum()
    losses = []
    for t in (torch.tensor([i]) for i in range(1, T + 1)):
        x_t = q_sample(x0, t, eps, schedule)
        losses.append(vlb_loss(oracle(x_t, t), x0, x_t, t, schedule))
    assert_close(torch.cat(losses).mean(), total, rtol=1e-6, atol=0)


# ---- what trains what ----

def test_hybrid_trains_the_mean_by_l_simple_alone():
    """The mean is detached in 0.001 L_vlb, which trains v alone (IDDPM Eq. 16)."""
    model = small_ddpm()
    x0, eps, t = images(2, 16).float(), normal(2, 3, 16, 16).float(), torch.tensor([3, 60])
    x_t = q_sample(x0, t, eps, model.schedule)
    pred = model(x_t, t)
    head = model.net.out[2].weight
    gradient = torch.autograd.grad(sigma_loss(pred, x0, x_t, t, model.schedule).sum(), head, retain_graph=True)[0]
    assert not gradient[:3].any() and gradient[3:].any()
    gradient = torch.autograd.grad(vlb_loss(pred, x0, x_t, t, model.schedule).sum(), head)[0]
    assert gradient[:3].any() and gradient[3:].any()
    assert_close(sigma_loss(pred, x0, x_t, t, model.schedule), 0.001 * vlb_loss(pred, x0, x_t, t, model.schedule))


def test_the_objectives_own_their_terms():
    x0, eps, t = images(2, 16).float(), normal(2, 3, 16, 16).float(), torch.tensor([3, 60])
    for objective, terms in (("hybrid", {"eps", "sigma", "loss"}), ("vlb", {"vlb", "loss"})):
        model = small_ddpm(objective=objective)
        losses = training_losses(model, x0, t, eps, model.schedule)
        assert set(losses) == terms and all(value.isfinite() for value in losses.values())
    assert set(training_losses(small_ddpm(learn_sigma=False, objective="simple"), x0, t, eps, model.schedule)) == {"eps", "loss"}


def test_the_bounds_gradient_is_finite_where_the_network_is_wild():
    """At t = 1 and t = T, with predictions far off."""
    model = small_ddpm(T=4000)
    for p in model.net.out[2].parameters():
        nn.init.normal_(p, std=3)
    x0, eps, t = images(2, 16).float(), normal(2, 3, 16, 16).float(), torch.tensor([1, 4000])
    training_losses(model, x0, t, eps, model.schedule)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- ancestral sampling ----

@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_eta_one_ddim_is_the_ancestral_step_with_the_small_variance(schedule):
    """DDIM Sec. 4.1: sigma^2 = beta~, and the means agree; whole samples do too, from the same noise."""
    chain = respace(schedule, 100)
    x_t, x0, t = normal(3, 3, 4, 4), images(), torch.tensor([1, 40, 100])
    mu, log_var = p_mean_variance(x_t, t, x0 * 0.5, x0, torch.full((3, 1, 4, 4), 0.3, dtype=F64), None, chain, "small")
    z = normal(3, 3, 4, 4, seed=5)
    expected = p_sample(x_t, t, x0 * 0.5, x0, torch.full((3, 1, 4, 4), 0.3, dtype=F64), chain, 1.0, z)
    assert_close((mu + (log_var / 2).exp() * z)[1:], expected[1:], rtol=1e-10, atol=1e-10)
    assert_close(mu[0], expected[0], rtol=1e-10, atol=1e-10)
    assert_close((log_var / 2).exp().flatten()[1:], ddim_sigma(t, chain, 1.0)[1:])


def test_an_ancestral_sample_of_the_oracle_is_its_image():
    """The last step adds no noise."""
    x0 = images().float()
    for variance in ("small", "large"):
        assert_close(sample(Oracle(x0, COSINE), COSINE, x0.shape, 0, 50, variance=variance), x0, rtol=0, atol=1e-5)


def test_an_ancestral_sample_is_ddpms_algorithm_2_written_out():
    """x_{t-1} = mu + sigma_t z with the re-spaced chain's own betas and the original step for the network (DDPM Algorithm 2)."""
    model, steps, shape = small_ddpm().eval(), 10, (2, 3, 16, 16)
    streams = [stream(3, "sample", i) for i in range(2)]

    def draw():
        return torch.from_numpy(np.stack([s.standard_normal(shape[1:], dtype=np.float32) for s in streams]))
    original = list(range(1, 101, 10))
    abar = model.schedule.alpha_bar[original].tolist()
    x = draw()
    with torch.inference_mode():
        for i in reversed(range(steps)):
            previous = abar[i - 1] if i else 1.0
            beta = 1 - abar[i] / previous
            tilde = [(1 - p) / (1 - a) * (1 - a / p) for a, p in ((abar[i], previous), (abar[1], abar[0]))][i == 0]
            pred = model(x, torch.full((2,), original[i]))
            x0 = ((x - math.sqrt(1 - abar[i]) * pred.eps_hat) / math.sqrt(abar[i])).clamp(-1, 1)
            mu = math.sqrt(previous) * beta / (1 - abar[i]) * x0 + math.sqrt(1 - beta) * (1 - previous) / (1 - abar[i]) * x
            log_var = (1 + pred.v) / 2 * math.log(beta) + (1 - pred.v) / 2 * math.log(tilde)
            x = mu + (log_var / 2).exp() * draw() if i else mu
    assert_close(sample(model, model.schedule, shape, 3, steps, variance="learned"), x, rtol=1e-3, atol=1e-3)


def test_the_respaced_posterior_is_two_steps_of_the_full_one():
    """q(x_{t-2} | x_t, x0) by respacing is q(x_{t-2} | x_{t-1}, x0) of q(x_{t-1} | x_t, x0): its mean, and its variance."""
    schedule, x0 = cosine_schedule(100), images(1)
    chain, x_t = respace(schedule, 50), normal(1, 3, 4, 4)
    i, t = torch.tensor([20]), torch.tensor([39])           # original steps 1, 3, ..., 39: index 20 is step 39, index 19 is 37
    assert chain.step[20] == 39
    between = mu_from_x0(x_t, t, x0, schedule)
    assert_close(mu_from_x0(x_t, i, x0, chain), mu_from_x0(between, t - 1, x0, schedule), rtol=1e-12, atol=1e-12)
    abar, alpha = schedule.alpha_bar, schedule.alpha
    c2 = alpha[38].sqrt() * (1 - abar[37]) / (1 - abar[38])
    assert_close(posterior_variance(i, chain), c2 ** 2 * posterior_variance(t, schedule) + posterior_variance(t - 1, schedule), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_gaussian_data_with_the_exact_predictor_keep_their_moments(variance):
    """N(0.2, 0.1^2) a pixel; eps' = sqrt(1 - abar) (x_t - sqrt(abar) m) / (abar s^2 + 1 - abar); many steps converge to it."""
    m, s, schedule = 0.2, 0.1, linear_schedule(1000)

    class Exact(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x_t, t, y=None):
            abar = schedule.alpha_bar[t].view(-1, 1, 1, 1).float()
            eps = (1 - abar).sqrt() * (x_t - abar.sqrt() * m) / (abar * s * s + 1 - abar)
            return Prediction(eps, x0_from_eps(x_t, t, eps, schedule), torch.zeros_like(x_t[:, :1]))
    x = sample(Exact(), schedule, (4, 3, 16, 16), 0, 500, variance=variance)
    assert x.mean().item() == pytest.approx(m, abs=0.01) and x.std().item() == pytest.approx(s, rel=0.08)


# ---- importance-sampled t ----

def test_t_is_uniform_until_every_t_was_seen_ten_times():
    importance = ImportanceSampler(4)
    for _ in range(9):
        importance.note(np.array([1, 2, 3, 4]), np.array([1.0, 2.0, 3.0, 4.0]))
    t, weight = importance.draw(np.random.default_rng(0), 1000)
    assert set(t) == {1, 2, 3, 4} and (weight == 1).all()
    importance.note(np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0]))
    assert (importance.p() == 0.25).all()
    importance.note(np.array([4]), np.array([4.0]))
    assert_close(importance.p(), 0.999 * np.array([1, 2, 3, 4]) / 10 + 0.001 / 4)


def test_importance_weights_leave_the_mean_unbiased():
    """sum_t p_t / (T p_t) = 1, and the weighted mean of any f(t) is its uniform mean."""
    importance = ImportanceSampler(50)
    losses = np.geomspace(1, 1e-3, 50)
    for _ in range(10):
        importance.note(np.arange(1, 51), losses)
    p = importance.p()
    assert p.sum() == pytest.approx(1) and p[0] > 10 * p[-1] > 0
    t, weight = importance.draw(np.random.default_rng(0), 200_000)
    assert weight.mean() == pytest.approx(1, abs=0.01)
    assert (weight * losses[t - 1]).mean() == pytest.approx(losses.mean(), rel=0.01)
    assert (weight * losses[t - 1]).std() < 0.2 * losses.std()      # what it is for


def test_only_the_last_ten_finite_losses_count():
    importance = ImportanceSampler(2)
    for loss in [100.0] * 10 + [np.nan, np.inf] + [1.0] * 10:
        importance.note(np.array([1, 2]), np.array([loss, 3.0]))
    assert_close(importance.p(), 0.999 * np.array([0.25, 0.75]) + 0.0005)
