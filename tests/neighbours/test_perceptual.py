"""perceptual.py: a frozen diffusion model as the metric.

SP   arXiv:2401.00110   Diffusion Model with Perceptual Loss
"""

import pytest
import torch
from torch.testing import assert_close

from diffusion import Prediction, ddim_mu_from_x0, eps_from_x0, q_sample
from losses import Batch, training_losses
from models import small
from neighbours.perceptual import SelfPerceptual

T_OTHER = torch.tensor([50, 3, 20])
ALONE = {"model": "ddpm", "self_perceptual": {"frozen.pt": 1.0}}  # a DDPM's whole objective


def batch_of(model, y=None):
    """Three images of a training step, and their other t."""
    x0 = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([2, 30, 45])
    return Batch(x0, t, eps, q_sample(x0, t, eps, model.schedule), y, t_other=T_OTHER)


def says(x0_hat, eps_hat):
    """A prediction of which the metric looks at two parts."""
    return Prediction(eps_hat, x0_hat, torch.full((3, 1, 16, 16), 0.5))


def any_x0_hat():
    """A prediction far from the images of the batch."""
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def frozen():
    return small(5, model="ddpm", T=50)


def shown(frozen, pred, batch):
    """The noisy images that the metric shows the frozen model: x_t', x^_t'."""
    seen = []
    first = frozen.theta.input_blocks[0]
    hook = first.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0]))
    SelfPerceptual(frozen, own_noise=True)(pred, batch)
    hook.remove()
    return seen


def test_it_is_the_distance_of_the_middles_features_of_both_images_noised_to_the_other_t(frozen):
    """By a hook on the middle, which sees x_t' of (x0, eps) and x^_t' of (x0', eps^)."""
    batch = batch_of(frozen)
    pred = says((batch.x0 * 0.8).clamp(-1, 1), batch.eps * 0.9)
    found = SelfPerceptual(frozen, own_noise=True)(pred, batch)
    features = []
    frozen.theta.middle.register_forward_hook(lambda net, inputs, out: features.append(out))
    with torch.no_grad():
        for x0, eps in ((batch.x0, batch.eps), (pred.x0_hat, pred.eps_hat)):
            frozen(q_sample(x0, T_OTHER, eps, frozen.schedule), T_OTHER)
    f, g = features
    assert found.shape == (3,)
    assert found.min() > 0
    assert_close(found, (f - g).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-6)


def test_it_is_zero_at_a_perfect_prediction(frozen):
    batch = batch_of(frozen)
    assert not SelfPerceptual(frozen)(says(batch.x0, batch.eps), batch).any()
    assert not SelfPerceptual(frozen, own_noise=True)(says(batch.x0, batch.eps), batch).any()


def test_it_is_zero_of_one_models_pair_at_the_same_t(frozen):
    """A model's own x0' and eps' are both x_t at t' = t, up to rounding."""
    batch, metric = batch_of(frozen), SelfPerceptual(frozen, own_noise=True)
    x0_hat = batch.x0 * 0.5
    pred = says(x0_hat, eps_from_x0(batch.x_t, batch.t, x0_hat, frozen.schedule))
    same = metric(pred, batch._replace(t_other=batch.t))
    assert same.max() < 1e-8
    assert metric(pred, batch).min() > 1e-5


def test_beside_other_losses_it_is_a_metric_on_x0_hat_alone(frozen):
    """A perfect x0' beside a wrong eps' costs nothing, unless eps^ is the model's own."""
    batch = batch_of(frozen)
    pred = says(batch.x0, batch.eps * 0.5)
    assert not SelfPerceptual(frozen)(pred, batch).any()
    assert SelfPerceptual(frozen, own_noise=True)(pred, batch).all()


def test_a_models_own_pair_makes_a_deterministic_ddim_jump(frozen):
    """x^_t' at t' = t - 1 is Cas-DM Eq. 16 with sigma = 0, whatever x0' is."""
    batch, x0_hat = batch_of(frozen), any_x0_hat()
    x_t, t = batch.x_t, batch.t
    pred = says(x0_hat, eps_from_x0(x_t, t, x0_hat, frozen.schedule))
    _, jump = shown(frozen, pred, batch._replace(t_other=t - 1))
    assert_close(jump, ddim_mu_from_x0(x_t, t, x0_hat, frozen.schedule), rtol=1e-4, atol=1e-5)


def test_a_models_own_pair_moves_by_a_known_multiple_of_the_error_of_x0_hat(frozen):
    """x^_t' - x_t' = (sqrt(b) - sqrt(1 - b) sqrt(a / (1 - a))) (x0' - x0), a and b abar_t, abar_t'.

    So that the metric measures x0' - x0, and not at all where t' = t.
    """
    batch, x0_hat = batch_of(frozen), any_x0_hat()
    abar = frozen.schedule.alpha_bar
    pred = says(x0_hat, eps_from_x0(batch.x_t, batch.t, x0_hat, frozen.schedule))
    ours, theirs = shown(frozen, pred, batch)
    a, b = (abar[t].view(-1, 1, 1, 1) for t in (batch.t, T_OTHER))
    factor = (b.sqrt() - (1 - b).sqrt() * (a / (1 - a)).sqrt()).float()
    assert_close(theirs - ours, factor * (x0_hat - batch.x0), rtol=1e-4, atol=1e-5)


# ---- what it trains ----


def trained_by_it(model, frozen, own_noise=False):
    """The model, with the gradient of the metric alone; and the names of all its losses."""
    metric = SelfPerceptual(frozen, own_noise)
    losses = training_losses(model, batch_of(model), {"self-perceptual": metric})
    losses["self-perceptual"].mean().backward()
    return list(losses)


def test_the_frozen_model_never_changes_and_has_no_gradient(frozen):
    before = {name: p.clone() for name, p in frozen.state_dict().items()}
    trained_by_it(small(model="casdm", T=50, dropout=0.5), frozen)
    assert all(torch.equal(p, before[name]) for name, p in frozen.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert not frozen.training


def test_in_casdm_it_trains_phi_and_leaves_theta_alone(frozen):
    model = small(model="casdm", T=50)
    assert trained_by_it(model, frozen) == ["eps", "x0", "mu", "self-perceptual"]
    assert all(p.grad is None for p in model.theta.parameters())
    assert model.phi.input_blocks[0][0].weight.grad.any()


@pytest.mark.parametrize("predict", ["eps", "x0"])
def test_in_ddpm_it_is_the_whole_objective_and_trains_the_network(predict, frozen):
    model = small(**ALONE, predict=predict, T=50)
    assert model.terms == ()
    assert trained_by_it(model, frozen, own_noise=True) == ["self-perceptual"]
    assert model.theta.input_blocks[0][0].weight.grad.any()


def test_a_ddpms_eps_hat_is_its_own_and_another_models_the_drawn_one(monkeypatch):
    """As the flags plug it in."""
    from neighbours import perceptual

    monkeypatch.setattr(perceptual, "frozen_model", lambda path, settings: small(model="ddpm"))
    plugged = perceptual.Perceptual()
    for model, own in (("ddpm", True), ("casdm", False), ("dual", False)):
        settings = {"model": model, "self_perceptual": {"frozen.pt": 0.5}}
        weight, metric = plugged.metrics(settings)["self-perceptual"]
        assert (weight, metric.own_noise) == (0.5, own)


def test_theta_of_a_casdm_can_be_the_frozen_model_and_labels_reach_it():
    frozen = small(5, model="casdm", num_classes=3, T=50)
    metric = SelfPerceptual(frozen)
    found = []
    for label in (0, 1):
        batch = batch_of(frozen, torch.full((3,), label))
        found.append(metric(says(batch.x0 * 0.5, batch.eps), batch))
    assert not torch.equal(*found)
