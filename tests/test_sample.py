r"""sample.py: figure 2 and the step of Eqs. 16, 17 and their mix, on models with known answers.

Cas-DM   arXiv:2401.02414v1     DDIM   arXiv:2010.02502v4
"""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffusion import (
    Estimates,
    Prediction,
    clean_estimates,
    cosine_schedule,
    ddim_mu_from_x0,
    linear_schedule,
    respace,
)
from models import small
from sample import Ddim, Sampler, sample
from support.draws import Noise
from support.models import set_precision

SCHEDULE = cosine_schedule()
TEN = respace(SCHEDULE, 10)
ORIGINALS = list(range(3601, 0, -400))  # the original t of TEN
SHAPE = (2, 3, 8, 8)


class Oracle(nn.Module):
    """A model that answers with `answer(x_t, t) -> Prediction`, t an original step."""

    num_classes = None

    def __init__(self, answer, schedule=SCHEDULE):
        super().__init__()
        self.answer, self.schedule, self.asked = answer, schedule, []
        self.unused = nn.Parameter(torch.zeros(1))  # tells the device

    def forward(self, x_t, t, y=None):
        self.asked.append((t, y))
        return self.answer(x_t, t)


def wild(x_t, t):
    """Predictions far outside [-1, 1]: eps' and x0' independent of each other, r_t = 0.4."""
    eps_hat = 2 * torch.sin(3 * x_t)
    x0_hat = 1.5 * torch.cos(2 * x_t + t.view(-1, 1, 1, 1))
    return Prediction(eps_hat, x0_hat, torch.full_like(x_t[:, :1], 0.4))


def small_model(model="casdm", **settings):
    """No weight is zero; 8 x 8 is enough for its convolutions."""
    return small(**{"model": model, "T": 100, "std": 0.05} | settings).eval()


def drawn(shape=SHAPE, seed=0, dtype=torch.float64):
    """A source of noise as `support.draws.Noise` is one: called, the next draw."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=dtype)


def recorded(model, x_T, chain, step):
    """[(t, x_t, estimates)] of every step, and the image at the end."""
    steps = []
    x0 = sample(model, x_T, chain, step, watch=lambda *seen: steps.append(seen))
    return steps, x0


# ---- one step ----


def any_estimates(n, seed=0):
    """Estimates of n images, float64."""
    generator = torch.Generator().manual_seed(seed)
    x0_star, x0_hat = torch.rand(2, n, 3, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1
    r_t = torch.rand(n, 1, 2, 2, generator=generator, dtype=torch.float64)
    return Estimates(x0_star, x0_hat, r_t)


def mixed(estimates):
    """The clean image r x0' + (1 - r) x0*."""
    x0_star, x0_hat, r_t, _ = estimates
    return r_t * x0_hat + (1 - r_t) * x0_star


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [100, 10])
def test_eq16_17_step_is_one_ddim_step_at_the_mixed_clean_image(steps, eta):
    """r Eq. 16 + (1 - r) Eq. 17 + sigma z is Eq. 16 at r x0' + (1 - r) x0*, plus sigma z.

    (the line after Cas-DM Eq. 17, DDIM Eq. 16)
    """
    chain, t = respace(SCHEDULE, steps), torch.arange(1, steps + 1)
    estimates = any_estimates(steps)
    x_t, z = drawn((2, steps, 3, 2, 2))()
    abar = chain.alpha_bar[t].view(-1, 1, 1, 1)
    abar_prev = chain.alpha_bar[t - 1].view(-1, 1, 1, 1)
    sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    expected = ddim_mu_from_x0(x_t, t, mixed(estimates), chain, eta) + sigma * z
    got = Ddim(eta, lambda: z)(x_t, t, estimates, chain)
    assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_last_step_is_the_mixed_clean_image_and_adds_no_noise(eta):
    """At t = 1, where abar_0 = 1, for any eta and z   (Cas-DM Eqs. 16, 17)."""
    estimates, x_t = any_estimates(4), drawn((4, 3, 2, 2))()
    step = Ddim(eta, lambda: torch.full_like(x_t, 1e6))
    end = step(x_t, torch.ones(4, dtype=torch.int64), estimates, TEN)
    assert_close(end, mixed(estimates), rtol=1e-9, atol=1e-9)


def test_eta_zero_needs_no_noise():
    """DDIM's own eta draws nothing but x_T."""
    x_t, t = drawn((4, 3, 2, 2))(), torch.arange(2, 6)

    def refuse():
        raise AssertionError("noise was drawn")

    Ddim(0.0, refuse)(x_t, t, any_estimates(4), TEN)
    with pytest.raises(AssertionError, match="noise was drawn"):
        Ddim(0.1, refuse)(x_t, t, any_estimates(4), TEN)


def affine(eta, i, chain, x0_of):
    """What the step makes of x_t and z, where x0 is affine in x_t: offset + slope x_t + spread z.

    Found by three images: x_t = 0, x_t = 1, and x_t = 0 with z = 1.
    """
    x_t = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).view(3, 1, 1, 1)
    z = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1)
    x0 = x0_of(x_t, chain.alpha_bar[i])
    estimates = Estimates(x0, x0, torch.full_like(x0, 0.3))
    x_prev = Ddim(eta, lambda: z)(x_t, torch.full((3,), i), estimates, chain)
    at_0, at_1, with_z = x_prev.flatten().tolist()
    return at_0, at_1 - at_0, with_z - at_0


@pytest.mark.parametrize("schedule", [cosine_schedule(1000), linear_schedule(1000)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gaussian_data_with_the_exact_predictor_is_sampled_in_the_limit(schedule, eta):
    """For x0 ~ N(m, s^2) the best x0' is affine in x_t, and so is every step.

    The chain's exact mean and deviation near (m, s) as steps grow.
    """
    m, s = 0.2, 0.3

    def x0_of(x_t, abar):
        return m + abar.sqrt() * s**2 / (abar * s**2 + 1 - abar) * (x_t - abar.sqrt() * m)

    errors = []
    for steps in (10, 100, 500):
        chain, mean, variance = respace(schedule, steps), 0.0, 1.0
        for i in range(steps, 0, -1):
            offset, slope, spread = affine(eta, i, chain, x0_of)
            mean = offset + slope * mean
            variance = slope**2 * variance + spread**2
        errors.append(max(abs(mean - m), abs(math.sqrt(variance) - s)))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


def test_encoding_by_reversed_ddim_and_sampling_again_returns_the_image_as_steps_grow():
    """x_{t+1} = sqrt(abar_{t+1}) x0 + sqrt(1 - abar_{t+1}) eps', then DDIM back.

    The error of a linear predictor, the best of x0 ~ N(m, s^2), falls as 1 / steps.
    """
    m, s = 0.2, 0.5
    image = torch.linspace(-1, 1, 48, dtype=torch.float64).view(1, 3, 4, 4)
    r_t = torch.zeros(1, 1, 4, 4, dtype=torch.float64)

    def estimate(x, abar):
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * m) / (abar * s**2 + 1 - abar)
        return (x - (1 - abar).sqrt() * eps) / abar.sqrt(), eps

    errors = []
    for steps in (50, 100, 200):
        chain = respace(linear_schedule(1000), steps)
        x = image
        for i in range(1, steps):
            x0, eps = estimate(x, chain.alpha_bar[i])
            abar_next = chain.alpha_bar[i + 1]
            x = abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * eps
        for i in range(steps, 1, -1):
            x0, _ = estimate(x, chain.alpha_bar[i])
            x = Ddim()(x, torch.tensor([i]), Estimates(x0, x0, r_t), chain)
        errors.append((x - image).abs().max().item())
    assert errors[1] < 0.55 * errors[0] and errors[2] < 0.55 * errors[1] and errors[2] < 0.05


# ---- figure 2 ----


def test_each_step_is_ddims_of_the_clamped_estimates():
    """From x_t, Eq. 8's x0* and x0' are clamped, mixed, and taken to t - 1   (Cas-DM figure 2).

    Written out here for eta = 0: x_{t-1} = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1}) eps.
    """
    model, x_T = Oracle(wild), drawn()()
    steps, last = recorded(model, x_T, TEN, Ddim())
    assert torch.equal(steps[0][1], x_T)
    after = [x_t for _, x_t, _ in steps[1:]] + [last]
    abar = TEN.alpha_bar.tolist()
    for i, (original, x_t, estimates), x_prev in zip(range(10, 0, -1), steps, after, strict=True):
        pred = wild(x_t, torch.full((2,), original))
        signal, noise = math.sqrt(abar[i]), math.sqrt(1 - abar[i])
        x0_star = ((x_t - noise * pred.eps_hat) / signal).clamp(-1, 1)
        x0_hat = pred.x0_hat.clamp(-1, 1)
        assert_close(estimates.x0_star, x0_star)
        assert_close(estimates.x0_hat, x0_hat)
        x0 = 0.4 * x0_hat + 0.6 * x0_star
        eps = (x_t - signal * x0) / noise
        expected = math.sqrt(abar[i - 1]) * x0 + math.sqrt(1 - abar[i - 1]) * eps
        assert_close(x_prev, expected, rtol=1e-9, atol=1e-9)


def reference_ddim(x0_of, x_T, eta, noise):
    """improved-diffusion's clipped DDIM over ten steps: x0 clamped, eps re-derived from it.

    (DDIM Eqs. 12, 16)      x0_of : (x_t, t, abar_t) -> x0
    """
    x = x_T
    for t in ORIGINALS:
        abar = SCHEDULE.alpha_bar[t].item()
        abar_prev = SCHEDULE.alpha_bar[t - 400].item() if t > 1 else 1.0
        x0 = x0_of(x, t, abar).clamp(-1, 1)
        eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar)) * math.sqrt(1 - abar / abar_prev)
        direction = math.sqrt(max(0, 1 - abar_prev - sigma**2))
        x = math.sqrt(abar_prev) * x0 + direction * eps
        if eta:
            x = x + sigma * noise()
    return x


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("r", [0.0, 1.0])
def test_r_zero_and_r_one_are_improved_diffusions_clipped_ddim(r, eta):
    """r_t = 0 is the sampler of a DDPM in eps mode, r_t = 1 that of one in x0 mode.

    (Cas-DM Eqs. 17, 16)
    """
    x_T = drawn()()

    def answer(x_t, t):
        return wild(x_t, t)._replace(r_t=torch.full_like(x_t[:, :1], r))

    def x0_of(x_t, t, abar):
        pred = wild(x_t, torch.full((2,), t))
        if r:
            return pred.x0_hat
        return (x_t - math.sqrt(1 - abar) * pred.eps_hat) / math.sqrt(abar)

    expected = reference_ddim(x0_of, x_T, eta, drawn(seed=5))
    got = sample(Oracle(answer), x_T, TEN, Ddim(eta, drawn(seed=5)))
    assert_close(got, expected, rtol=0, atol=1e-6)
    assert (expected.abs() == 1).any() and (expected.abs() < 0.99).any()


def test_sampler_and_phi_clamp_the_same_x0_star():
    """What `watch` sees as x0* is bitwise what phi was fed, at every step   (Cas-DM Eq. 8)."""
    model, fed = small_model(T=4000), []
    model.phi.register_forward_hook(lambda module, args, out: fed.append(args[0]))
    x_T = drawn((2, 3, 8, 8), dtype=torch.float32)()
    steps, _ = recorded(model, x_T, respace(model.schedule, 10), Ddim())
    assert [t for t, *_ in steps] == ORIGINALS
    for (_, _, estimates), seen in zip(steps, fed, strict=True):
        assert torch.equal(estimates.x0_star, seen)
        assert estimates.x0_star.abs().max() <= 1 and estimates.x0_hat.abs().max() <= 1
        assert estimates.r_t.shape == (2, 1, 8, 8)


def test_networks_are_asked_at_the_original_steps_with_their_labels():
    """Ten steps of T = 4000 ask at 3601, 3201, ..., 1, with y as given."""
    model, y = Oracle(wild), torch.tensor([3, 1])
    sample(model, drawn()(), TEN, Ddim(), y)
    assert [t.tolist() for t, _ in model.asked] == [[t, t] for t in ORIGINALS]
    assert all(labels is y for _, labels in model.asked)
    assert {t.dtype for t, _ in model.asked} == {torch.int64}


def test_watching_changes_no_image():
    """What is watched is what the step is given."""
    x_T = drawn()()
    steps, watched = recorded(Oracle(wild), x_T, TEN, Ddim())
    assert torch.equal(sample(Oracle(wild), x_T, TEN, Ddim()), watched)
    _, x_t, estimates = steps[0]
    t = torch.full((2,), 10)
    expected = clean_estimates(x_t, t, wild(x_t, torch.full((2,), 3601)), TEN)
    assert all(torch.equal(a, b) for a, b in zip(estimates[:3], expected[:3], strict=True))


EVERY_MODEL = [
    {"model": "ddpm"},
    {"model": "ddpm", "predict": "x0"},
    {"model": "dual"},
    {"model": "casdm"},
    {"model": "casdm", "refiner": "fixres", "refiner_input": "x0+eps"},
]


@pytest.mark.parametrize("settings", EVERY_MODEL, ids=lambda settings: " ".join(settings.values()))
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_model_samples_within_the_image_range(settings, eta):
    """With random weights: float32 images in [-1, 1]."""
    model = small_model(**settings, schedule="linear")
    noise = drawn((2, 3, 8, 8), dtype=torch.float32)
    images = sample(model, noise(), respace(model.schedule, 4), Ddim(eta, noise))
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32
    assert images.abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gaussian_data_is_sampled_by_the_whole_sampler(eta):
    """The exact predictor of N(0.2, 0.3^2) gives its mean and deviation in 100 steps.

    Within 5 standard errors and the steps' own 0.01 (mean) and 0.02 (deviation).
    """
    m, s = 0.2, 0.3

    def answer(x_t, t):
        abar = SCHEDULE.alpha_bar[t].view(-1, 1, 1, 1).float()
        away = (x_t - abar.sqrt() * m) / (abar * s**2 + 1 - abar)
        x0_hat = m + abar.sqrt() * s**2 * away
        return Prediction((1 - abar).sqrt() * away, x0_hat, torch.full_like(x_t[:, :1], 0.5))

    sampler = Sampler(Oracle(answer), 16, 100, make_step=lambda noise, y: Ddim(eta, noise))
    images = sampler(0, 32)
    n = images.numel()
    assert abs(images.mean() - m) < 5 * s / math.sqrt(n) + 0.01
    assert abs(images.std() - s) < 5 * s / math.sqrt(2 * n) + 0.02


@pytest.mark.slow
def test_bf16_is_the_networks_alone_and_changes_the_images_little():
    """The convolutions run in bfloat16, x_t stays in float32; images move by 5 % at most."""
    model, dtypes = small_model(), []
    for network in (model.theta, model.phi):
        network.out[2].register_forward_hook(lambda _, args, out: dtypes.append(out.dtype))
    chain, x_T = respace(model.schedule, 5), drawn((2, 3, 8, 8), dtype=torch.float32)()
    exact = sample(model, x_T, chain, Ddim())
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    set_precision(model, "bf16")
    steps, fast = recorded(model, x_T, chain, Ddim())
    assert set(dtypes) == {torch.bfloat16}
    assert {tensor.dtype for _, x_t, e in steps for tensor in (x_t, *e[:3])} == {torch.float32}
    assert 0 < (fast - exact).square().mean().sqrt() < 0.05 * exact.std()


# ---- the images of a seed ----


def eta_one(noise, y):
    return Ddim(1.0, noise)


def test_equal_seeds_give_equal_images_and_others_give_others():
    """With and without noise in between."""
    model = Oracle(wild)

    def images(seed, make_step=None):
        return Sampler(model, 8, 10, seed, make_step)(0, 2)

    assert torch.equal(images(0), images(0))
    assert torch.equal(images(0, eta_one), images(0, eta_one))
    assert not torch.equal(images(0), images(1))
    assert not torch.equal(images(0), images(0, eta_one))


@pytest.mark.parametrize("make_step", [None, eta_one], ids=["eta 0", "eta 1"])
def test_image_i_is_the_same_for_any_number_and_any_batch(make_step):
    """Image i follows from (seed, i): its noise bitwise, its pixels within a level of 1/127.5."""
    sampler, x_T = Sampler(small_model("dual"), 8, 5, 7, make_step), []

    def images(first, n):
        seen = []
        found = sampler(first, n, lambda t, x_t, estimates: seen.append(x_t))
        x_T.append(seen[0])
        return found

    five, two, last = images(0, 5), images(0, 2), images(3, 2)
    assert torch.equal(x_T[0], Noise(7, "sample", range(5), (3, 8, 8))())
    assert torch.equal(x_T[0][:2], x_T[1]) and torch.equal(x_T[0][3:], x_T[2])
    assert_close(five[:2], two, rtol=0, atol=1 / 127.5)
    assert_close(five[3:], last, rtol=0, atol=1 / 127.5)
    assert not torch.allclose(five[0], five[1], atol=0.1)


def test_labels_take_turns_unless_one_is_asked_for():
    """Image i has the label i mod K, whatever the batch; a model without classes has none."""
    sampler = Sampler(Oracle(wild), 8, 10)
    assert sampler.labels(0, 3) is None
    sampler.classes = 3
    assert sampler.labels(2, 5).tolist() == [2, 0, 1, 2, 0]
    sampler.label = 1
    assert sampler.labels(2, 3).tolist() == [1, 1, 1]


def test_weights_that_are_not_finite_raise():
    """A NaN never becomes a picture."""
    model = small_model()
    with torch.no_grad():
        next(model.phi.parameters())[0] = math.nan
    message = r"^a sampled image is not finite; expected .*; use "
    with pytest.raises(ArithmeticError, match=message):
        Sampler(model, 8, 4)(0, 1)


def test_impossible_step_count_raises_before_any_work():
    """The one line of `respace`, and no network call."""
    model = Oracle(wild)
    with pytest.raises(ValueError, match=r"^4001 sampling steps; expected 1 to .* 4000; "):
        Sampler(model, 8, 4001)
    assert not model.asked
