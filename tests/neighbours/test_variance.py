"""variance.py: the step back as a Gaussian, the bound and its parts, importance-sampled t.

IDDPM    arXiv:2102.09672v1     DDPM   arXiv:2006.11239v2     DDIM   arXiv:2010.02502v4
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from diffusion import (
    Estimates,
    Prediction,
    cosine_schedule,
    ddim_sigma,
    eps_from_x0,
    linear_schedule,
    posterior_variance,
    q_sample,
    respace,
    x0_from_eps,
)
from losses import Batch, training_losses
from models import small
from neighbours.variance import (
    Ancestral,
    ImportanceSampler,
    bits_per_dim,
    discretised_log_likelihood,
    log_variance,
    prior_bits,
    sigma_loss,
    vlb_loss,
)
from sample import Ddim, sample
from support.draws import Noise, stream

COSINE, LINEAR = cosine_schedule(), linear_schedule()
F64 = torch.float64
HYBRID = {"learn_sigma": True, "objective": "hybrid"}
VLB = {"learn_sigma": True, "objective": "vlb"}


def images(n=3, size=4, seed=0):
    """Images of 256 levels in [-1, 1], float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator).double() / 127.5 - 1


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Oracle(nn.Module):
    """Knows the clean images; answers with them, r_t = 1, at a schedule of its own."""

    def __init__(self, x0, schedule, v=None):
        super().__init__()
        self.x0, self.schedule, self.v = x0, schedule, v

    def forward(self, x_t, t, y=None):
        eps_hat = eps_from_x0(x_t, t, self.x0, self.schedule)
        return Prediction(eps_hat, self.x0, torch.ones_like(x_t[:, :1]), self.v)


def small_ddpm(**settings):
    """A DDPM with a learned variance, unless the settings say otherwise; no weight is zero."""
    return small(**{"model": "ddpm", "T": 100} | HYBRID | settings)


def batch_of(model, t=(3, 60)):
    """Two images of a training step."""
    x0, eps, t = images(2, 16).float(), normal(2, 3, 16, 16).float(), torch.tensor(t)
    return Batch(x0, t, eps, q_sample(x0, t, eps, model.schedule))


def ancestral_sample(model, shape, steps, kind, seed=0):
    noise = Noise(seed, "sample", range(shape[0]), shape[1:])
    return sample(model, noise(), respace(model.schedule, steps), Ancestral(kind, noise))


# ---- the variance ----


@pytest.mark.parametrize(
    "schedule", [COSINE, LINEAR, respace(COSINE, 100)], ids=["cosine", "linear", "respaced"]
)
def test_learned_variance_goes_from_posterior_to_forward_by_their_logarithms(schedule):
    """v = -1, 0, 1 are log beta~, the mean of the logarithms and log beta (IDDPM Eq. 15)."""
    t = torch.tensor([2, 50, len(schedule.beta) - 1])
    x = torch.zeros(3, 3, 2, 2, dtype=F64)
    small = posterior_variance(t, schedule).log().view(-1, 1, 1, 1)
    large = schedule.beta[t].log().view(-1, 1, 1, 1)
    for v, expected in ((-1, small), (0, (small + large) / 2), (1, large)):
        found = log_variance(t, schedule, "learned", x, torch.full_like(x, v))
        assert_close(found, expected.expand_as(x), rtol=1e-12, atol=0)
    assert_close(log_variance(t, schedule, "small", x), small, rtol=1e-12, atol=0)
    assert_close(log_variance(t, schedule, "large", x), large, rtol=1e-12, atol=0)


def test_the_last_steps_variance_is_finite_and_is_that_of_the_step_before():
    """beta~_1 = 0 has no logarithm; log beta~_2 of cosine/4000 is improved-diffusion's -12.2045."""
    one, x = torch.tensor([1]), torch.zeros(1, 3, 2, 2, dtype=F64)
    small = log_variance(one, COSINE, "small", x)
    assert small.item() == pytest.approx(-12.2045, abs=1e-4)
    assert torch.equal(log_variance(one, COSINE, "large", x), small)
    assert log_variance(one, respace(COSINE, 1), "small", x).isfinite().all()


# ---- the bound ----


@pytest.mark.parametrize("mu, log_sigma", [(0.0, -1.0), (0.3, -4.0), (-1.2, -6.0), (0.999, 0.5)])
def test_the_decoders_256_bins_sum_to_one(mu, log_sigma):
    """The outer two reach to infinity (DDPM Eq. 13)."""
    levels = torch.arange(256, dtype=F64) / 127.5 - 1
    mu, log_sigma = torch.tensor(mu, dtype=F64), torch.tensor(log_sigma, dtype=F64)
    total = discretised_log_likelihood(levels, mu, log_sigma).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("level, mu", [(153, 0.21), (153, 0.5), (76, -0.1)])
def test_the_decoder_is_scipys_normal_distribution_also_six_sigma_from_the_mean(level, mu):
    """The mass of a bin, taken from the tail on its own side, where it is not lost to rounding."""
    x, sigma = level / 127.5 - 1, 0.05
    low, high = x - 1 / 255, x + 1 / 255
    mass = stats.norm.cdf(high, mu, sigma) - stats.norm.cdf(low, mu, sigma)
    if low > mu:
        mass = stats.norm.sf(low, mu, sigma) - stats.norm.sf(high, mu, sigma)
    arguments = (torch.tensor(value, dtype=F64) for value in (x, mu, math.log(sigma)))
    found = discretised_log_likelihood(*arguments)
    assert found.item() == pytest.approx(math.log(mass), rel=1e-9)


def test_a_sharp_decoder_at_the_image_has_no_cost_and_one_far_off_a_finite_one():
    x = images().clamp(min=-0.9)  # the bin of -1 has the whole left tail
    sharp, blunt = torch.full_like(x, -9), torch.full_like(x, -3)
    assert discretised_log_likelihood(x, x, sharp).abs().max() < 1e-12
    least = torch.full_like(x, math.log(1e-12))
    assert_close(discretised_log_likelihood(x, x - 3, sharp), least)
    in_float32 = discretised_log_likelihood(x.float(), x.float(), blunt.float())
    in_float64 = discretised_log_likelihood(x, x, blunt)
    assert_close(in_float32.double(), in_float64, rtol=1e-4, atol=1e-5)


def test_the_true_image_and_the_posteriors_variance_leave_nothing_but_decoder_and_prior():
    """L_{t-1} = 0 for t > 1   (IDDPM Eqs. 5, 6)."""
    x0 = images()
    terms = bits_per_dim(Oracle(x0, COSINE), x0, 100, "small", lambda: normal(*x0.shape))
    assert terms.shape == (3, 101)
    assert terms[:, 0].min() > 0
    assert terms[:, 1:100].abs().max() < 1e-9
    assert_close(terms[:, 100], prior_bits(x0, respace(COSINE, 100)))


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_the_prior_is_half_the_signal_that_is_left(schedule):
    """abar_T mean(x0^2) / 2 nats, to first order in abar_T   (IDDPM Eq. 7)."""
    x0 = images()
    nats = schedule.alpha_bar[-1] * x0.square().mean((1, 2, 3)) / 2
    assert_close(prior_bits(x0, schedule), nats / math.log(2), rtol=1e-3, atol=0)


def test_the_bound_of_the_oracle_is_least_with_the_small_variance():
    """With the true x0 the posterior's own variance is right and beta_t too wide at every t > 1."""
    x0 = images()
    bits = {}
    for kind in ("small", "large"):
        terms = bits_per_dim(Oracle(x0, LINEAR), x0, 100, kind, lambda: normal(*x0.shape))
        bits[kind] = terms[:, 1:100]
    assert (bits["large"] > bits["small"]).all()
    assert bits["large"][:, 0].min() > 0.1


def test_the_terms_of_the_full_chain_are_those_that_training_averages():
    """vlb_loss is T L_t: its mean over t is the bound less its prior (IDDPM Eq. 4)."""
    T, x0, eps = 40, images(1), normal(1, 3, 4, 4)
    schedule = linear_schedule(T)
    oracle = Oracle((x0 * 0.9).clamp(-1, 1), schedule, torch.full_like(x0, 0.3))
    total = bits_per_dim(oracle, x0, T, "learned", lambda: eps)[:, :T].sum()
    losses = []
    for i in range(1, T + 1):
        t = torch.tensor([i])
        x_t = q_sample(x0, t, eps, schedule)
        losses.append(vlb_loss(oracle(x_t, t), Batch(x0, t, eps, x_t), schedule))
    assert_close(torch.cat(losses).mean(), total, rtol=1e-6, atol=0)


# ---- what trains what ----


def test_hybrid_trains_the_mean_by_l_simple_alone():
    """The mean is detached in 0.001 L_vlb, which trains v alone (IDDPM Eq. 16)."""
    model = small_ddpm()
    batch, head = batch_of(model), model.theta.out[2].weight  # channels: 3 of eps', 3 of v
    pred = model(batch.x_t, batch.t)
    sigma = sigma_loss(pred, batch, model.schedule)
    vlb = vlb_loss(pred, batch, model.schedule)
    assert_close(sigma, 0.001 * vlb)
    of_sigma = torch.autograd.grad(sigma.sum(), head, retain_graph=True)[0]
    of_vlb = torch.autograd.grad(vlb.sum(), head)[0]
    assert not of_sigma[:3].any()
    assert of_sigma[3:].any()
    assert of_vlb[:3].any()
    assert of_vlb[3:].any()


@pytest.mark.parametrize(
    "settings, terms",
    [(HYBRID, ["eps", "sigma"]), (VLB, ["vlb"]), ({"learn_sigma": False}, ["eps"])],
    ids=["hybrid", "vlb", "simple"],
)
def test_each_objective_owns_its_terms(settings, terms):
    model = small_ddpm(**settings)
    losses = training_losses(model, batch_of(model), {})
    assert list(losses) == list(model.terms) == terms
    assert all(loss.isfinite().all() for loss in losses.values())


@pytest.mark.parametrize("settings", [HYBRID, VLB], ids=["hybrid", "vlb"])
def test_the_bounds_gradient_is_finite_where_the_network_is_wild(settings):
    """At t = 1 and t = T, with predictions far off."""
    model = small_ddpm(T=4000, **settings)
    for p in model.theta.out[2].parameters():
        nn.init.normal_(p, std=3)
    losses = training_losses(model, batch_of(model, (1, 4000)), {})
    sum(loss.mean() for loss in losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- ancestral sampling ----


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_eta_one_ddim_is_the_ancestral_step_with_the_small_variance(schedule):
    """DDIM Sec. 4.1: sigma^2 = beta~, and the means agree; at t = 1 DDIM draws z times zero."""
    chain, t = respace(schedule, 100), torch.tensor([1, 40, 100])
    x_t, x0, z = normal(3, 3, 4, 4), images(), normal(3, 3, 4, 4, seed=5)
    estimates = Estimates(x0 * 0.5, x0, torch.full((3, 1, 4, 4), 0.3, dtype=F64))
    mu, log_var = Ancestral("small", None).gaussian(x_t, t, estimates, chain)
    ours = mu + (log_var / 2).exp() * z
    ddim = Ddim(1.0, lambda: z)(x_t, t, estimates, chain)
    assert_close(ours[1:], ddim[1:], rtol=1e-10, atol=1e-10)
    assert_close(mu[0], ddim[0], rtol=1e-10, atol=1e-10)
    assert_close((log_var / 2).exp().flatten()[1:], ddim_sigma(t, chain, 1.0)[1:])


@pytest.mark.parametrize("kind", ["small", "large"])
def test_an_ancestral_sample_of_the_oracle_is_its_image(kind):
    """The last step adds no noise."""
    x0 = images().float()
    found = ancestral_sample(Oracle(x0, COSINE), x0.shape, 50, kind)
    assert_close(found, x0, rtol=0, atol=1e-5)


def test_an_ancestral_sample_is_ddpms_algorithm_2_written_out():
    """With the re-spaced chain's own betas, and the original step for the network (DDPM Alg. 2)."""
    model, steps, shape = small_ddpm().eval(), 10, (2, 3, 16, 16)
    streams = [stream(3, "sample", i) for i in range(2)]

    def draw():
        drawn = [s.standard_normal(shape[1:], dtype=np.float32) for s in streams]
        return torch.from_numpy(np.stack(drawn))

    original = [1, 11, 21, 31, 41, 51, 61, 71, 81, 91]
    abar = [1.0, *model.schedule.alpha_bar[original].tolist()]
    beta = [0.0, *(1 - abar[i] / abar[i - 1] for i in range(1, steps + 1))]
    tilde = [0.0, *((1 - abar[i - 1]) / (1 - abar[i]) * beta[i] for i in range(1, steps + 1))]
    tilde[1] = tilde[2]  # beta~_1 is 0 and has no logarithm
    x = draw()
    with torch.inference_mode():
        for i in range(steps, 0, -1):
            pred = model(x, torch.full((2,), original[i - 1]))
            x0 = (x - math.sqrt(1 - abar[i]) * pred.eps_hat) / math.sqrt(abar[i])
            of_x0 = math.sqrt(abar[i - 1]) * beta[i] / (1 - abar[i])
            of_x = math.sqrt(1 - beta[i]) * (1 - abar[i - 1]) / (1 - abar[i])
            mu = of_x0 * x0.clamp(-1, 1) + of_x * x
            v = pred.v
            log_var = (1 + v) / 2 * math.log(beta[i]) + (1 - v) / 2 * math.log(tilde[i])
            x = mu
            if i > 1:
                x = mu + (log_var / 2).exp() * draw()
    assert_close(ancestral_sample(model, shape, steps, "learned", 3), x, rtol=1e-3, atol=1e-3)


class Exact(nn.Module):
    """The best eps' for pixels of N(m, s^2): sqrt(1 - abar) (x_t - sqrt(abar) m) / Var(x_t)."""

    def __init__(self, m, s, schedule):
        super().__init__()
        self.m, self.s, self.schedule = m, s, schedule

    def forward(self, x_t, t, y=None):
        abar = self.schedule.alpha_bar[t].view(-1, 1, 1, 1).float()
        variance = abar * self.s**2 + 1 - abar
        eps_hat = (1 - abar).sqrt() * (x_t - abar.sqrt() * self.m) / variance
        x0_hat = x0_from_eps(x_t, t, eps_hat, self.schedule)
        return Prediction(eps_hat, x0_hat, torch.zeros_like(x_t[:, :1]))


@pytest.mark.parametrize("kind", ["small", "large"])
def test_gaussian_data_with_the_exact_predictor_keep_their_moments(kind):
    """N(0.2, 0.1^2) a pixel; many steps converge to it."""
    x = ancestral_sample(Exact(0.2, 0.1, LINEAR), (4, 3, 16, 16), 500, kind)
    assert x.mean().item() == pytest.approx(0.2, abs=0.01)
    assert x.std().item() == pytest.approx(0.1, rel=0.08)


# ---- importance-sampled t ----


def noted(importance, t, losses, times=1):
    for _ in range(times):
        importance.note(np.array(t), {"vlb": np.array(losses)})


def test_t_is_uniform_until_every_t_was_seen_ten_times():
    importance = ImportanceSampler(4)
    noted(importance, [1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0], times=9)
    drawn = importance.draw(np.random.default_rng(0), 1000)
    assert set(drawn["t"]) == {1, 2, 3, 4}
    assert (drawn["weight"] == 1).all()
    noted(importance, [1, 2, 3], [1.0, 2.0, 3.0])
    assert (importance.p() == 0.25).all()
    noted(importance, [4], [4.0])
    assert_close(importance.p(), 0.999 * np.array([1, 2, 3, 4]) / 10 + 0.001 / 4)


def test_importance_weights_leave_the_mean_unbiased():
    """sum_t p_t / (T p_t) = 1, and the weighted mean of any f(t) is its uniform mean."""
    importance, losses = ImportanceSampler(50), np.geomspace(1, 1e-3, 50)
    noted(importance, range(1, 51), losses, times=10)
    p = importance.p()
    assert p.sum() == pytest.approx(1)
    assert p[0] > 10 * p[-1] > 0
    drawn = importance.draw(np.random.default_rng(0), 200_000)
    weighted = drawn["weight"] * losses[drawn["t"] - 1]
    assert drawn["weight"].mean() == pytest.approx(1, abs=0.01)
    assert weighted.mean() == pytest.approx(losses.mean(), rel=0.01)
    assert weighted.std() < 0.2 * losses.std()  # what it is for


def test_only_the_last_ten_finite_losses_count():
    importance = ImportanceSampler(2)
    for loss in [100.0] * 10 + [np.nan, np.inf] + [1.0] * 10:
        noted(importance, [1, 2], [loss, 3.0])
    assert_close(importance.p(), 0.999 * np.array([0.25, 0.75]) + 0.0005)
