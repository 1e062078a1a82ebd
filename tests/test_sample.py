r"""sample.py: the sampler's mathematics, Eqs. 16, 17 and their mix, on networks whose answers are known.

Cas-DM   arXiv:2401.02414v1     DDIM  arXiv:2010.02502v4
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from data import stream
from diffusion import (
    Prediction,
    cosine_schedule,
    ddim_mu_from_x0,
    eps_from_x0,
    linear_schedule,
    respace,
    x0_from_eps,
)
from refiner import build_model
from sample import p_sample, sample

SCHEDULE = cosine_schedule()
SHAPE = (2, 3, 8, 8)


class Oracle(nn.Module):
    """A model that answers with `answer(x_t, t) -> Prediction`, t an original step; its one parameter only tells the device."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.unused, self.asked = answer, nn.Parameter(torch.zeros(1)), []

    def forward(self, x_t, t, y=None):
        self.asked.append((self.training, t, y))
        return self.answer(x_t, t)


def wild(r):
    """Predictions far outside [-1, 1], which depend on x_t and t: eps' and x0' independent of each other, weighed by r."""

    def answer(x_t, t):
        return Prediction(
            torch.sin(3 * x_t) * 2,
            torch.cos(2 * x_t + t.view(-1, 1, 1, 1)) * 3,
            torch.full_like(x_t[:, :1], r),
        )

    return Oracle(answer)


def small_casdm(**settings):
    """A Cas-DM of random weights, none of them zero."""
    torch.manual_seed(0)
    model = build_model(dict(image_size=16, channels=32, res_blocks=1) | settings)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return model.eval()


def reference_ddim(model, schedule, steps, seed, eta, x0_of):
    """improved-diffusion's clipped DDIM: x0 clamped, eps re-derived from it, (DDIM Eq. 12) with the sigma of (DDIM Eq. 16)."""
    streams = [stream(seed, "sample", i) for i in range(SHAPE[0])]

    def draw():
        return torch.from_numpy(
            np.stack([s.standard_normal(SHAPE[1:], dtype=np.float32) for s in streams])
        ).double()

    T = len(schedule.beta) - 1
    kept = list(range(1, T + 1, T // steps))
    x = draw()
    for i in reversed(range(steps)):
        abar, abar_prev = (
            schedule.alpha_bar[kept[i]].item(),
            schedule.alpha_bar[kept[i - 1]].item() if i else 1.0,
        )
        x0 = x0_of(model.answer(x, torch.full((SHAPE[0],), kept[i])), x, abar).clamp(-1, 1)
        eps = (x - math.sqrt(abar) * x0) / math.sqrt(1 - abar)
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar)) * math.sqrt(1 - abar / abar_prev)
        z = draw() if eta else 0
        x = (
            math.sqrt(abar_prev) * x0
            + math.sqrt(max(0, 1 - abar_prev - sigma**2)) * eps
            + sigma * z
        )
    return x


# ---- p_sample ----


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [100, 10])
def test_eq16_17_step_is_one_ddim_step_at_the_mixed_clean_image(steps, eta):
    """r Eq. 16 + (1 - r) Eq. 17 + sigma z is Eq. 16 at r x0' + (1 - r) x0*, plus sigma z (Cas-DM Eqs. 16, 17 and the line after)."""
    chain, generator = respace(SCHEDULE, steps), torch.Generator().manual_seed(0)
    t = torch.arange(1, steps + 1)
    x_t, z, x0_star, x0_hat = torch.randn(
        4, steps, 3, 2, 2, generator=generator, dtype=torch.float64
    )
    r_t = torch.rand(steps, 1, 2, 2, generator=generator, dtype=torch.float64)
    abar, abar_prev = chain.alpha_bar[t].view(-1, 1, 1, 1), chain.alpha_bar[t - 1].view(-1, 1, 1, 1)
    sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
    expected = ddim_mu_from_x0(x_t, t, r_t * x0_hat + (1 - r_t) * x0_star, chain, eta) + sigma * z
    assert_close(
        p_sample(x_t, t, x0_star, x0_hat, r_t, chain, eta, z), expected, rtol=1e-9, atol=1e-9
    )


def test_last_step_is_the_mixed_clean_image_and_adds_no_noise():
    """At t = 1 the step ends at r x0' + (1 - r) x0*, for any eta and z (Cas-DM Eqs. 16, 17 at abar_0 = 1)."""
    chain, generator = respace(SCHEDULE, 100), torch.Generator().manual_seed(0)
    x_t, x0_star, x0_hat = torch.rand(3, 4, 3, 2, 2, generator=generator, dtype=torch.float64)
    r_t, t = (
        torch.rand(4, 1, 2, 2, generator=generator, dtype=torch.float64),
        torch.ones(4, dtype=torch.int64),
    )
    for eta in (0.0, 0.5, 1.0):
        end = p_sample(x_t, t, x0_star, x0_hat, r_t, chain, eta, z=torch.full_like(x_t, 1e6))
        assert_close(end, r_t * x0_hat + (1 - r_t) * x0_star, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "schedule", [cosine_schedule(1000), linear_schedule(1000)], ids=["cosine", "linear"]
)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gaussian_data_with_the_exact_predictor_is_sampled_in_the_limit(schedule, eta):
    """For x0 ~ N(m, s^2) the best x0 is affine in x_t, so every step is: the chain's exact mean and deviation near (m, s) as steps grow."""
    m, s = 0.2, 0.3
    x_t, z = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).view(
        2, 3, 1, 1, 1
    )  # offset, slope, noise
    errors = []
    for steps in (10, 100, 1000):
        chain, mean, variance = respace(schedule, steps), 0.0, 1.0
        for i in range(steps, 0, -1):
            abar = chain.alpha_bar[i].item()
            x0 = m + math.sqrt(abar) * s**2 / (abar * s**2 + 1 - abar) * (x_t - math.sqrt(abar) * m)
            offset, at_1, with_z = (
                p_sample(x_t, torch.full((3,), i), x0, x0, torch.full_like(x_t, 0.3), chain, eta, z)
                .flatten()
                .tolist()
            )
            mean, variance = (
                offset + (at_1 - offset) * mean,
                (at_1 - offset) ** 2 * variance + (with_z - offset) ** 2,
            )
        errors.append(max(abs(mean - m), abs(math.sqrt(variance) - s)))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


# ---- sample ----


def test_bf16_is_the_networks_alone_and_changes_the_images_little():
    """The networks' convolutions run in bfloat16, x_t stays in float32; images move by far less than their own spread."""
    model, dtypes = small_casdm(T=100), []
    for net in (model.eps_net, model.refiner):
        net.out[2].register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    seen = []
    exact = sample(model, model.schedule, (4, 3, 16, 16), seed=0, steps=10)
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    fast = sample(
        model,
        model.schedule,
        (4, 3, 16, 16),
        seed=0,
        steps=10,
        bf16=True,
        watch=lambda t, *tensors: seen.extend(tensors),
    )
    assert set(dtypes) == {torch.bfloat16} and {tensor.dtype for tensor in seen} == {torch.float32}
    assert 0 < (fast - exact).square().mean().sqrt() < 0.05 * exact.std()


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("r", [0.0, 1.0])
def test_r_zero_and_r_one_are_improved_diffusions_clipped_ddim(r, eta):
    """r_t = 0 is the sampler of a DDPM in eps mode, r_t = 1 that of one in x0 mode, clipping included (Cas-DM Eqs. 17, 16)."""

    def x0_of(pred, x, abar):
        return pred.x0_hat if r else (x - math.sqrt(1 - abar) * pred.eps_hat) / math.sqrt(abar)

    def answer(x_t, t):  # smooth, so that float32's rounding is not amplified from step to step
        return Prediction(
            x_t * 0.8 - 0.3,
            torch.cos(t.view(-1, 1, 1, 1) + torch.arange(8) + 0.3 * x_t) * 1.5,
            torch.full_like(x_t[:, :1], r),
        )

    model = Oracle(answer)
    expected = reference_ddim(model, SCHEDULE, 10, seed=5, eta=eta, x0_of=x0_of)
    got = sample(model, SCHEDULE, SHAPE, seed=5, steps=10, eta=eta)
    assert_close(got.double(), expected, rtol=0, atol=1e-4)
    assert (expected.abs() == 1).any() and (expected.abs() < 0.99).any()


def test_sampler_and_phi_clamp_the_same_x0_star():
    """What `watch` sees as x0* is bitwise what phi was fed, at every step: phi's clamp and the sampler's agree (Cas-DM Eq. 8)."""
    model, fed, watched = small_casdm(), [], []
    model.refiner.register_forward_hook(lambda module, args, out: fed.append(args[0]))
    sample(
        model,
        model.schedule,
        (2, 3, 16, 16),
        seed=0,
        steps=10,
        watch=lambda *step: watched.append(step),
    )
    assert [t for t, *_ in watched] == list(range(3601, 0, -400)) and len(fed) == 10
    assert all(torch.equal(x0_star, seen) for (_, _, x0_star, _, _), seen in zip(watched, fed))
    assert all(
        x.abs().max() <= 1 for _, _, x0_star, x0_hat, _ in watched for x in (x0_star, x0_hat)
    )
    assert all(r_t.shape == (2, 1, 16, 16) for *_, r_t in watched)


def test_each_step_is_p_sample_of_the_clamped_predictions():
    """Step by step, what follows x_t is r Eq. 16(clamped x0') + (1 - r) Eq. 17(eps' of the clamped x0*) (Cas-DM Eqs. 8, 16, 17)."""
    model, seen, chain = wild(0.4), [], respace(SCHEDULE, 10)
    last = sample(
        model, SCHEDULE, SHAPE, seed=0, steps=10, watch=lambda t, *images: seen.append((t, *images))
    )
    after = [x_t for _, x_t, *_ in seen[1:]] + [last]
    for i, ((original, x_t, x0_star, x0_hat, r_t), x_prev) in enumerate(zip(seen, after)):
        t, pred = torch.full((2,), 10 - i), model.answer(x_t, torch.full((2,), original))
        assert_close(x0_star, x0_from_eps(x_t, t, pred.eps_hat, chain).clamp(-1, 1))
        assert_close(x0_hat, pred.x0_hat.clamp(-1, 1))
        assert_close(x_prev, p_sample(x_t, t, x0_star, x0_hat, r_t, chain), rtol=0, atol=0)
        mixed = r_t * x0_hat + (1 - r_t) * x0_star
        direction = (1 - chain.alpha_bar[9 - i]).sqrt().float() * eps_from_x0(x_t, t, mixed, chain)
        assert_close(
            x_prev, chain.alpha_bar[9 - i].sqrt().float() * mixed + direction, rtol=0, atol=1e-5
        )


def test_networks_are_asked_at_the_original_steps_with_their_labels_in_eval_mode():
    """Ten steps of T = 4000 ask at 3601, 3201, ..., 1, with y as given, and the model's mode is as it was afterwards."""
    model, y = wild(0.5).train(), torch.tensor([3, 1])
    sample(model, SCHEDULE, SHAPE, seed=0, steps=10, y=y)
    assert [t.tolist() for _, t, _ in model.asked] == [[s, s] for s in range(3601, 0, -400)]
    assert all(
        not training and labels is y and t.dtype == torch.int64
        for training, t, labels in model.asked
    )
    assert model.training


def test_eta_zero_is_deterministic_and_draws_nothing_but_x_T():
    """Twice the same seed gives the same images; another seed or eta > 0 gives others."""
    runs = [
        sample(wild(0.5), SCHEDULE, SHAPE, seed, 10, eta)
        for seed, eta in ((0, 0.0), (0, 0.0), (1, 0.0), (0, 1.0), (0, 1.0))
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[3], runs[4])
    assert not torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[3])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_image_i_is_the_same_for_any_number_and_any_batch(eta):
    """Image i follows from (seed, i): its noise bitwise, its pixels within a level of 1/127.5."""
    model, x_T = small_casdm(T=100, model="dual"), []

    def of(n, first=0):
        seen = []
        images = sample(
            model,
            model.schedule,
            (n, 3, 16, 16),
            7,
            5,
            eta,
            first,
            watch=lambda t, x_t, *rest: seen.append(x_t),
        )
        x_T.append(seen[0])
        return images

    five, two, last = of(5), of(2), of(2, first=3)
    assert torch.equal(x_T[0][:2], x_T[1]) and torch.equal(x_T[0][3:], x_T[2])
    assert_close(five[:2], two, rtol=0, atol=1 / 127.5)
    assert_close(five[3:], last, rtol=0, atol=1 / 127.5)
    assert not torch.allclose(five[0], five[1], atol=0.1)


@pytest.mark.parametrize(
    "kind",
    [
        dict(model="ddpm"),
        dict(model="ddpm", predict="x0"),
        dict(model="dual"),
        dict(model="casdm"),
        dict(model="casdm", refiner="fixres", refiner_input="x0+eps"),
    ],
)
def test_every_model_samples_within_the_image_range(kind):
    """Of any of the models with random weights: float images in [-1, 1], with and without noise in between."""
    model = small_casdm(**kind, schedule="linear", T=100)
    for eta in (0.0, 1.0):
        images = sample(model, model.schedule, (2, 3, 16, 16), seed=0, steps=4, eta=eta)
        assert (
            images.shape == (2, 3, 16, 16)
            and images.dtype == torch.float32
            and images.abs().max() <= 1 + 1e-5
        )


def test_gaussian_data_is_sampled_by_the_whole_sampler():
    """With the exact predictor of N(0.2, 0.3^2), 100 steps give its mean and deviation within 5 standard errors and the steps' 0.02."""
    m, s = 0.2, 0.3

    def answer(x_t, t):
        abar = SCHEDULE.alpha_bar[t].view(-1, 1, 1, 1).float()
        away = (x_t - abar.sqrt() * m) / (abar * s**2 + 1 - abar)
        return Prediction(
            (1 - abar).sqrt() * away,
            m + abar.sqrt() * s**2 * away,
            torch.full_like(x_t[:, :1], 0.5),
        )

    for eta in (0.0, 1.0):
        images = sample(Oracle(answer), SCHEDULE, (32, 3, 16, 16), seed=0, steps=100, eta=eta)
        n = images.numel()
        assert (
            abs(images.mean() - m) < 5 * s / math.sqrt(n) + 0.01
            and abs(images.std() - s) < 5 * s / math.sqrt(2 * n) + 0.02
        )


def test_encoding_by_reversed_ddim_and_sampling_again_returns_the_image_as_steps_grow():
    """x_{t+1} = sqrt(abar_{t+1}) x0 + sqrt(1 - abar_{t+1}) eps', then DDIM back: the error of a linear predictor falls as 1 / steps."""
    m, s, image = 0.2, 0.5, torch.linspace(-1, 1, 48, dtype=torch.float64).view(1, 3, 4, 4)
    r_t, errors = torch.zeros(1, 1, 4, 4, dtype=torch.float64), []

    def x0_of(x, abar):
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * m) / (abar * s * s + 1 - abar)
        return (x - (1 - abar).sqrt() * eps) / abar.sqrt(), eps

    for steps in (50, 100, 200):
        chain = respace(linear_schedule(1000), steps)
        x = image
        for i in range(1, steps):
            x0, eps = x0_of(x, chain.alpha_bar[i])
            x = chain.alpha_bar[i + 1].sqrt() * x0 + (1 - chain.alpha_bar[i + 1]).sqrt() * eps
        for i in range(steps, 1, -1):
            x0, _ = x0_of(x, chain.alpha_bar[i])
            x = p_sample(x, torch.tensor([i]), x0, x0, r_t, chain)
        errors.append((x - image).abs().max().item())
    assert errors[1] < 0.55 * errors[0] and errors[2] < 0.55 * errors[1] and errors[2] < 0.05, (
        errors
    )


def test_weights_that_are_not_finite_raise():
    """A NaN never becomes a picture."""
    model = small_casdm(T=100)
    with torch.no_grad():
        next(model.refiner.parameters())[0] = math.nan
    with pytest.raises(ArithmeticError, match="^a sampled image is not finite; expected .*; use "):
        sample(model, model.schedule, (1, 3, 16, 16), seed=0, steps=4)


def test_impossible_step_count_raises_before_any_work():
    """The one line of `respace`, and no network call."""
    model = wild(0.5)
    with pytest.raises(ValueError, match="^99 sampling steps have no whole stride"):
        sample(model, SCHEDULE, SHAPE, seed=0, steps=99)
    assert not model.asked
