r"""losses.py: Eqs. 6 and 12-15 of the paper.

Cas-DM   arXiv:2401.02414v1
"""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from diffusion import (
    Prediction,
    at_step,
    cosine_schedule,
    linear_schedule,
    mix,
    mu_from_eps,
    mu_from_x0,
    q_sample,
    respace,
    x0_from_eps,
)
from losses import Batch, eps_loss, mu_loss, objective, training_losses, x0_loss
from metrics import OnX0
from models import SMALL
from refiner import build_model
from support.models import set_precision

SCHEDULES = {
    "cosine4000": cosine_schedule(),
    "linear1000": linear_schedule(),
    "cosine4000-ddim100": respace(cosine_schedule(), 100),
}


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def schedule(request):
    return request.param


def step_of(schedule, seed=0):
    """A Batch at t = 1, 2, T/2, T - 1, T and an arbitrary Prediction, both float64."""
    T = len(schedule.beta) - 1
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor([1, 2, T // 2, T - 1, T])
    x0, x0_hat = torch.rand(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    eps, eps_hat = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    r_t = torch.rand(5, 1, 4, 4, generator=generator, dtype=torch.float64)
    batch = Batch(x0, t, eps, q_sample(x0, t, eps, schedule))
    return batch, Prediction(eps_hat, x0_hat, r_t)


def gradient_of_gate(pred, batch, schedule):
    """d log L_mu / d r_t of each pixel: relative, since L_mu itself is tiny at a late t."""
    r_t = pred.r_t.clone().requires_grad_()
    loss = mu_loss(pred._replace(r_t=r_t), batch, schedule)
    return torch.autograd.grad((loss / loss.detach()).sum(), r_t)[0]


# ---- Eq. 12 ----


def test_eq12_eps_and_x0_losses_are_means_of_squares_over_an_image(schedule):
    """||eps - eps'||^2 and ||x0 - x0'||^2 as means over C, H, W, one an image   (Cas-DM Eq. 12)."""
    batch, pred = step_of(schedule)
    L_eps = ((batch.eps - pred.eps_hat).numpy() ** 2).reshape(5, -1).mean(1)
    L_x0 = ((batch.x0 - pred.x0_hat).numpy() ** 2).reshape(5, -1).mean(1)
    assert_close(eps_loss(pred, batch).numpy(), L_eps)
    assert_close(x0_loss(pred, batch).numpy(), L_x0)


def test_eq12_perfect_predictions_have_zero_losses(schedule):
    """eps' = eps and x0' = x0: all three terms vanish, for any r_t   (Cas-DM Eq. 12)."""
    batch, pred = step_of(schedule)
    perfect = Prediction(batch.eps, batch.x0, pred.r_t)
    assert not eps_loss(perfect, batch).any() and not x0_loss(perfect, batch).any()
    zero = torch.zeros(5, dtype=torch.float64)
    assert_close(mu_loss(perfect, batch, schedule), zero, rtol=0, atol=1e-18)


def test_eq06_l_mu_is_the_divergence_of_eq05_times_two_beta(schedule):
    """KL(N(mu~, beta_t I) || N(mu_mixed, beta_t I)) by torch, times 2 beta_t   (Cas-DM Eqs. 5, 6).

    The printed factor 2 beta_t^2 is an erratum: it would be off by beta_t.
    """
    batch, pred = step_of(schedule)
    x_t, t = batch.x_t, batch.t
    beta = at_step(schedule.beta, t, x_t)
    mu_x0 = mu_from_x0(x_t, t, pred.x0_hat, schedule)
    mu_eps = mu_from_eps(x_t, t, pred.eps_hat, schedule)
    q = Normal(mu_from_x0(x_t, t, batch.x0, schedule), beta.sqrt())
    p = Normal(mix(mu_x0, mu_eps, pred.r_t), beta.sqrt())
    L_t = kl_divergence(q, p).mean((1, 2, 3))
    assert (L_t > 0).all()
    two_beta = 2 * schedule.beta[t]
    assert_close(mu_loss(pred, batch, schedule), two_beta * L_t, rtol=1e-9, atol=0)


def test_eq12_mu_loss_is_an_error_in_x0_times_c1_squared(schedule):
    """L_mu = c1^2 ||x0 - r x0' - (1 - r) x0*||^2, c1 being x0's coefficient in Eq. 7: 1 at t = 1.

    (Cas-DM Eqs. 7, 11, 12)
    """
    batch, pred = step_of(schedule)
    abar, abar_prev = schedule.alpha_bar[batch.t], schedule.alpha_bar[batch.t - 1]
    c1 = abar_prev.sqrt() * (1 - abar / abar_prev) / (1 - abar)
    assert c1[0].item() == pytest.approx(1, rel=1e-9)
    x0_star = x0_from_eps(batch.x_t, batch.t, pred.eps_hat, schedule)
    x0_mixed = pred.r_t * pred.x0_hat + (1 - pred.r_t) * x0_star
    expected = c1**2 * (batch.x0 - x0_mixed).square().mean((1, 2, 3))
    assert_close(mu_loss(pred, batch, schedule), expected, rtol=1e-8, atol=1e-18)


def test_nine_tenths_of_l_mus_weight_lie_in_the_first_ten_steps():
    """L_mu of an x0' that is wrong by 1 at every t of the paper's 4,000   (Cas-DM Eqs. 7, 12)."""
    zero = torch.zeros(4000, 1, 1, 1, dtype=torch.float64)
    batch = Batch(zero, torch.arange(1, 4001), zero, zero)
    wrong = Prediction(zero, zero + 1, zero + 1)
    weight = mu_loss(wrong, batch, SCHEDULES["cosine4000"])
    assert weight[:10].sum() / weight.sum() == pytest.approx(0.905, abs=0.001)


def test_eq12_mu_loss_is_least_at_the_closed_form_gate(schedule):
    """r* = <x0 - x0*, x0' - x0*> / ||x0' - x0*||^2 over a pixel's channels   (Cas-DM Eq. 12).

    Its gradient in r_t is 0 there, and nowhere else.
    """
    batch, pred = step_of(schedule)
    x0_star = x0_from_eps(batch.x_t, batch.t, pred.eps_hat, schedule)
    away = pred.x0_hat - x0_star
    along = ((batch.x0 - x0_star) * away).sum(1, keepdim=True)
    best = along / away.square().sum(1, keepdim=True)
    at_best = gradient_of_gate(pred._replace(r_t=best), batch, schedule)
    beside = gradient_of_gate(pred._replace(r_t=best + 0.1), batch, schedule)
    assert at_best.abs().max() < 1e-5 < beside.abs().min()


def test_eq12_gate_prefers_whichever_prediction_is_right(schedule):
    """x0' = x0 asks for r_t = 1, eps' = eps for r_t = 0   (Cas-DM Eq. 12)."""
    batch, pred = step_of(schedule)
    half = torch.full_like(pred.r_t, 0.5)
    right_x0 = Prediction(pred.eps_hat, batch.x0, half)
    right_eps = Prediction(batch.eps, pred.x0_hat, half)
    for right, r_t in ((right_x0, half + 0.5), (right_eps, half - 0.5)):
        at_r = mu_loss(right._replace(r_t=r_t), batch, schedule)
        assert (at_r < 1e-12 * mu_loss(right, batch, schedule)).all()


def test_eq12_gate_is_free_where_both_predictions_agree(schedule):
    """Where x0' = x0* no r_t is better than another   (Cas-DM Eq. 12)."""
    batch, pred = step_of(schedule)
    x0_star = x0_from_eps(batch.x_t, batch.t, pred.eps_hat, schedule)
    same = pred._replace(x0_hat=x0_star)
    assert gradient_of_gate(same, batch, schedule).abs().max() < 1e-5


def test_eq12_mu_loss_sends_gradient_to_the_gate_alone(schedule):
    """Both means are detached: x0' and eps' get none, r_t does   (Cas-DM Eq. 12)."""
    batch, pred = step_of(schedule)
    leaves = [tensor.clone().requires_grad_() for tensor in pred[:3]]
    mu_loss(Prediction(*leaves), batch, schedule).sum().backward()
    eps_hat, x0_hat, r_t = leaves
    assert eps_hat.grad is None and x0_hat.grad is None
    assert r_t.grad.flatten(1).any(1).all()


# ---- Eqs. 13-15: a training step ----


class Fixed:
    """A model that always says the same, and remembers what it was asked."""

    def __init__(self, pred, schedule):
        self.pred, self.schedule = pred, schedule

    def __call__(self, x_t, t, y):
        self.asked = x_t, t, y
        return self.pred

    def losses(self, pred, batch):
        return {"eps": eps_loss(pred, batch), "mu": mu_loss(pred, batch, self.schedule)}


def test_a_step_has_the_models_own_terms_and_each_metrics(schedule):
    """The model is asked for x_t, t and y, and its terms come first   (Cas-DM Eqs. 12, 13)."""
    batch, pred = step_of(schedule)
    batch = batch._replace(y=torch.arange(5))
    model = Fixed(pred, schedule)
    far = (pred.x0_hat - batch.x0).abs().amax((1, 2, 3))
    losses = training_losses(model, batch, {"far": lambda pred, batch: far})
    assert list(losses) == ["eps", "mu", "far"]
    assert torch.equal(losses["eps"], eps_loss(pred, batch))
    assert losses["far"] is far
    x_t, t, y = model.asked
    assert x_t is batch.x_t and t is batch.t and y is batch.y


def test_eq14_eq15_each_term_has_its_lambda():
    """L_theta + L_phi: each term is its batch mean times its own lambda   (Cas-DM Eqs. 14, 15)."""
    batch, _ = step_of(SCHEDULES["linear1000"])
    losses = {
        "eps": torch.tensor([1.0, 3.0]),
        "x0": torch.tensor([10.0, 30.0]),
        "mu": torch.tensor([100.0, 300.0]),
        "lpips": torch.tensor([1000.0, 3000.0]),
    }
    lambdas = {"eps": 1.0, "x0": 0.5, "mu": 0.25, "lpips": 0.125}
    terms = {name: value.item() for name, value in objective(losses, lambdas, batch).items()}
    assert terms == {"eps": 2, "x0": 10, "mu": 50, "lpips": 250, "loss": 312}


def test_a_weight_of_each_image_stands_inside_the_mean():
    """Images of a t that is drawn too often count less; their losses stay what they are."""
    batch, _ = step_of(SCHEDULES["linear1000"])
    batch = batch._replace(weight=torch.tensor([2.0, 0.5]))
    terms = objective({"eps": torch.tensor([1.0, 8.0])}, {"eps": 10.0}, batch)
    assert terms["eps"].item() == terms["loss"].item() == 30


def test_a_metric_sees_the_unclamped_prediction_first_and_the_image_second():
    """An image metric is called with (x0', x0) and trains the model by x0'   (Cas-DM Eq. 13)."""
    batch, pred = step_of(SCHEDULES["linear1000"])
    x0_hat = (3 * pred.x0_hat).requires_grad_()
    calls = []

    def image_metric(*images):
        calls.append(images)
        return images[0].sum((1, 2, 3))

    OnX0(image_metric)(pred._replace(x0_hat=x0_hat), batch).sum().backward()
    ((first, second),) = calls
    assert first is x0_hat and second is batch.x0
    assert torch.equal(x0_hat.grad, torch.ones_like(x0_hat))


def test_bf16_is_for_the_networks_and_not_for_losses_and_metrics():
    """The convolutions run in bfloat16; the prediction and the losses are float32."""
    torch.manual_seed(0)
    model = build_model(SMALL | {"model": "ddpm", "predict": "x0"})
    set_precision(model, "bf16")
    dtypes = []
    stem = model.theta.input_blocks[0]
    stem.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))

    def metric(pred, batch):
        dtypes.append(pred.x0_hat.dtype)
        assert not torch.is_autocast_enabled("cpu")
        return pred.x0_hat.mean((1, 2, 3))

    x0, eps = torch.randn(2, 2, 3, 16, 16)
    t = torch.tensor([1, 4000])
    batch = Batch(x0, t, eps, q_sample(x0, t, eps, model.schedule))
    losses = training_losses(model, batch, {"own": metric})
    assert dtypes == [torch.bfloat16, torch.float32]
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
