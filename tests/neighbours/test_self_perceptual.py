r"""losses.SelfPerceptual: a frozen diffusion model as the metric.

    SP   arXiv:2401.00110   Diffusion Model with Perceptual Loss
"""
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffusion import Prediction, ddim_mu_from_x0, eps_from_x0, q_sample
from losses import SelfPerceptual, training_losses
from refiner import build_model

SMALL = dict(image_size=16, channels=32, res_blocks=1, T=50)
T_OTHER = torch.tensor([50, 3, 20])


def build(seed=0, **settings):
    torch.manual_seed(seed)
    model = build_model(SMALL | settings)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def step(model):
    """x0, t, eps, x_t of three images."""
    x0 = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    eps, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2)), torch.tensor([2, 30, 45])
    return x0, t, eps, q_sample(x0, t, eps, model.schedule)


@pytest.fixture
def judge():
    return SelfPerceptual(build(5, model="ddpm"))


def test_it_is_the_distance_of_the_middles_features_of_both_images_noised_to_the_other_t(judge):
    """By a hook on the middle, x_t' from (x0, eps) and x^_t' from (x0', eps^): the mean squared difference."""
    x0, _, eps, _ = step(judge.frozen)
    x0_hat, eps_hat, seen = (x0 * 0.8).clamp(-1, 1), eps * 0.9, []
    handle = judge.frozen.net.middle.register_forward_hook(lambda net, args, out: seen.append(out))
    found = judge(x0_hat, x0, eps_hat, eps, T_OTHER)
    del seen[:]
    with torch.no_grad():
        for clean, noise in ((x0, eps), (x0_hat, eps_hat)):
            judge.frozen(q_sample(clean, T_OTHER, noise, judge.frozen.schedule), T_OTHER)
    handle.remove()
    assert found.shape == (3,) and found.min() > 0
    assert_close(found, (seen[0] - seen[1]).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-6)


def test_it_is_zero_at_a_perfect_prediction_and_of_one_models_pair_at_the_same_t(judge):
    """x0' = x0 exactly; a model's own x0' and eps' are both x_t at t' = t, up to rounding."""
    x0, t, eps, x_t = step(judge.frozen)
    assert not judge(x0, x0, eps, eps, T_OTHER).any()
    own = x0 * 0.5, x0, eps_from_x0(x_t, t, x0 * 0.5, judge.frozen.schedule), eps
    assert judge(*own, t).max() < 1e-8 < 1e-3 * judge(*own, T_OTHER).min()


def test_its_eps_hat_is_ddpms_own_and_the_true_one_where_it_is_a_metric_on_x0_hat(judge):
    """What the frozen model sees of a perfect x0' beside a wrong eps': of DDPM something else than of x0, of Cas-DM and Dual the same."""
    x0, t, eps, _ = step(judge.frozen)
    perfect = Prediction(eps * 0.5, x0, torch.full((3, 1, 16, 16), 0.5))
    for model, same in (("ddpm", False), ("casdm", True), ("dual", True)):
        net = build(model=model, **({"self_perceptual": {"judge.pt": 1.0}} if model == "ddpm" else {}))
        net.forward = lambda *how: perfect
        losses = training_losses(net, x0, t, eps, net.schedule, {"self-perceptual": (1.0, judge)}, t_other=T_OTHER)
        assert (losses["self-perceptual"] == 0) == same


def test_a_models_own_pair_makes_a_deterministic_ddim_jump(judge):
    """x^_t' is Cas-DM Eq. 16 with sigma = 0 for t' = t - 1, and x^_t' - x_t' a known multiple of x0' - x0."""
    schedule = judge.frozen.schedule
    x0, t, eps, x_t = (v.double() if v.is_floating_point() else v for v in step(judge.frozen))
    x0_hat = x0 * 0.7
    jump = q_sample(x0_hat, t - 1, eps_from_x0(x_t, t, x0_hat, schedule), schedule)
    assert_close(jump, ddim_mu_from_x0(x_t, t, x0_hat, schedule), rtol=1e-6, atol=1e-6)
    a, b = (schedule.alpha_bar[i].view(-1, 1, 1, 1) for i in (t, T_OTHER))
    x_t = q_sample(x0, t, eps, schedule)
    apart = q_sample(x0_hat, T_OTHER, eps_from_x0(x_t, t, x0_hat, schedule), schedule) - q_sample(x0, T_OTHER, eps, schedule)
    assert_close(apart, (b.sqrt() - (1 - b).sqrt() * (a / (1 - a)).sqrt()) * (x0_hat - x0), rtol=1e-9, atol=1e-9)


def test_the_frozen_model_never_changes_and_has_no_gradient(judge):
    before = {name: p.clone() for name, p in judge.frozen.state_dict().items()}
    model = build(model="casdm", dropout=0.5)
    x0, t, eps, _ = step(model)
    losses = training_losses(model, x0, t, eps, model.schedule, {"self-perceptual": (2.0, judge)}, t_other=T_OTHER)
    losses["loss"].backward()
    assert all(torch.equal(p, before[name]) for name, p in judge.frozen.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in judge.frozen.parameters()) and not judge.frozen.training
    assert set(losses) == {"eps", "x0", "mu", "self-perceptual", "loss"}


def test_in_casdm_it_trains_phi_and_leaves_theta_alone(judge):
    model = build(model="casdm")
    x0, t, eps, _ = step(model)
    losses = training_losses(model, x0, t, eps, model.schedule, {"self-perceptual": (1.0, judge)}, t_other=T_OTHER)
    losses["self-perceptual"].backward()
    assert all(p.grad is None for p in model.eps_net.parameters())
    assert model.refiner.input_blocks[0][0].weight.grad.any()


def test_in_ddpm_it_is_the_whole_objective_and_trains_the_network(judge):
    model = build(model="ddpm", self_perceptual={"judge.pt": 1.0})
    x0, t, eps, _ = step(model)
    losses = training_losses(model, x0, t, eps, model.schedule, {"self-perceptual": (1.0, judge)}, t_other=T_OTHER)
    assert set(losses) == {"self-perceptual", "loss"}
    losses["loss"].backward()
    assert model.net.input_blocks[0][0].weight.grad.any()


def test_theta_of_a_casdm_can_be_the_judge_and_labels_reach_it():
    judge = SelfPerceptual(build(5, model="casdm", num_classes=3))
    x0, _, eps, _ = step(judge.frozen)
    one, other = (judge(x0 * 0.5, x0, eps, eps, T_OTHER, torch.full((3,), y)) for y in (0, 1))
    assert not torch.equal(one, other)
