r"""refiner.py: the three models of figure 1, and which loss reaches which network (figure 3).

    Cas-DM   arXiv:2401.02414v1     Dual   arXiv:2203.04304v2

Networks are the least that the group norms allow, and are fed 8 x 8 images: they are convolutional.
Before any statement about gradients every weight that starts at zero is made random: at
initialisation all gradients but the last convolution's are zero, and every such test would pass.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffusion import Prediction, eps_from_x0, q_sample, x0_from_eps
from losses import LAMBDAS, Batch, objective, training_losses
from models import SMALL, small
from refiner import build_model
from unet import Attention

CASDMS = {
    "casdm": {"model": "casdm"},
    "casdm-fixres": {"model": "casdm", "refiner": "fixres"},
    "casdm-concat": {"model": "casdm", "refiner_input": "x0+eps"},
}
DDPMS = {
    "ddpm-eps": {"model": "ddpm"},
    "ddpm-x0": {"model": "ddpm", "predict": "x0"},
}
KINDS = {**DDPMS, "dual": {"model": "dual"}, **CASDMS}


def build(kind, **settings):
    """A small model of this kind, none of its weights zero."""
    return small(**KINDS[kind], **settings)


def batch_of(model, t=(1, 700, 4000)):
    """Three images at these t."""
    x0 = torch.rand(len(t), 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor(t)
    return Batch(x0, t, eps, q_sample(x0, t, eps, model.schedule))


def metric(pred, batch):
    """Stands for LPIPS: a distance of local differences."""
    return (pred.x0_hat - batch.x0).diff(dim=-1).abs().mean((1, 2, 3))


def gradients(model, loss):
    """{parameter: its gradient of the summed loss, 0 where autograd has none}."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    how = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(loss.sum(), parameters, **how)
    return dict(zip(names, found, strict=True))


def each_loss(model):
    """The model's own terms (Cas-DM Eq. 12) and a metric's (Cas-DM Eq. 13), where L_mu is large."""
    return training_losses(model, batch_of(model, (1, 2, 40)), {"metric": metric})


def seen_by(network):
    """The arguments of each later call of `network`."""
    calls = []
    network.register_forward_hook(lambda module, args, out: calls.append(args))
    return calls


# ---- what each model says ----


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_gives_a_prediction_of_the_images_shape(kind):
    """eps', x0' [B, 3, S, S] and r_t [B, 1, S, S] in 0..1, in x_t's dtype."""
    model = build(kind)
    batch = batch_of(model)
    pred = model(batch.x_t, batch.t)
    assert isinstance(pred, Prediction) and pred.v is None
    assert pred.eps_hat.shape == pred.x0_hat.shape == (3, 3, 8, 8)
    assert pred.r_t.shape == (3, 1, 8, 8)
    assert {p.dtype for p in pred[:3]} == {torch.float32}
    assert (pred.r_t >= 0).all() and (pred.r_t <= 1).all()


def test_ddpms_eps_mode_derives_x0_hat_by_eq08_and_has_r_zero():
    """The network says eps'   (Cas-DM Eq. 8)."""
    model = build("ddpm-eps")
    _, t, _, x_t, *_ = batch_of(model)
    pred, out = model(x_t, t), model.theta(x_t, model.time(t, x_t))
    assert torch.equal(pred.eps_hat, out)
    assert torch.equal(pred.x0_hat, x0_from_eps(x_t, t, out, model.schedule))
    assert not pred.r_t.any()


def test_ddpms_x0_mode_derives_eps_hat_by_eq03_and_has_r_one():
    """The network says x0'   (Cas-DM Eq. 3, solved for eps)."""
    model = build("ddpm-x0")
    _, t, _, x_t, *_ = batch_of(model)
    pred, out = model(x_t, t), model.theta(x_t, model.time(t, x_t))
    assert torch.equal(pred.x0_hat, out)
    assert torch.equal(pred.eps_hat, eps_from_x0(x_t, t, out, model.schedule))
    assert (pred.r_t == 1).all()


def test_dual_outputs_x0_then_eps_then_the_gate():
    """Channels 0-2 are x0', 3-5 eps', 6 the logit of r_t   (Dual Sec. 3, its official code)."""
    model = build("dual")
    _, t, _, x_t, *_ = batch_of(model)
    pred, out = model(x_t, t), model.theta(x_t, model.time(t, x_t))
    assert torch.equal(pred.x0_hat, out[:, 0:3])
    assert torch.equal(pred.eps_hat, out[:, 3:6])
    assert_close(pred.r_t, 1 / (1 + torch.exp(-out[:, 6:7])))


@pytest.mark.parametrize("kind", CASDMS)
def test_casdm_is_theta_then_eq08_then_phi(kind):
    """eps' is theta's; phi sees x0* (and eps'), and says x0' and the logit of r_t   (figure 1)."""
    model = build(kind)
    _, t, _, x_t, *_ = batch_of(model)
    pred, time = model(x_t, t), model.time(t, x_t)
    eps_hat = model.theta(x_t, time)
    seen = x0_from_eps(x_t, t, eps_hat, model.schedule).clamp(-1, 1)  # Eq. 8
    if kind == "casdm-concat":
        seen = torch.cat([seen, eps_hat], 1)
    out = model.phi(seen, time)
    assert torch.equal(pred.eps_hat, eps_hat)
    assert torch.equal(pred.x0_hat, out[:, :3])
    assert_close(pred.r_t, 1 / (1 + torch.exp(-out[:, 3:])))


@pytest.mark.parametrize("kind", ["dual", *CASDMS])
def test_untrained_gate_is_one_half_and_x0_hat_grey(kind):
    """The zero-initialised head gives x0' = 0 and r_t = sigmoid(0) = 0.5."""
    model = build_model(SMALL | KINDS[kind])
    batch = batch_of(model)
    pred = model(batch.x_t, batch.t)
    assert (pred.r_t == 0.5).all() and not pred.x0_hat.any() and not pred.eps_hat.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["casdm", "casdm-concat"])
def test_phi_sees_x0_star_clamped_in_training_and_in_sampling(kind, training):
    """At t = T x0* is noise times 81,165; phi's input is within [-1, 1]   (Cas-DM Eq. 8)."""
    model = build(kind).train(training)
    calls = seen_by(model.phi)
    _, t, _, x_t, *_ = batch_of(model)
    pred = model(x_t, t)
    seen = calls[0][0][:, :3]
    x0_star = x0_from_eps(x_t, t, pred.eps_hat, model.schedule)
    assert x0_star[2].abs().max() > 1000 and seen.abs().max() == 1
    assert torch.equal(seen, x0_star.clamp(-1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [4000, 1000])
def test_networks_see_improved_diffusions_time(kind, T):
    """(t - 1) * 1000 / T as a float, for every network of every model."""
    model = build(kind, T=T)
    calls = [seen_by(network) for network in model.children()]
    batch = batch_of(model, (1, 2, T))
    model(batch.x_t, batch.t)
    for ((_, time, *_),) in calls:
        assert time.dtype == torch.float32
        assert time.tolist() == pytest.approx([0, 1000 / T, 1000 - 1000 / T])


# ---- which loss reaches which network: figure 3 ----


@pytest.mark.parametrize("kind", CASDMS)
def test_x0_mu_and_metric_losses_leave_theta_without_gradient(kind):
    """L_theta trains theta alone, L_phi phi alone   (Cas-DM Eqs. 14, 15)."""
    model = build(kind)
    losses = each_loss(model)
    assert list(losses) == ["eps", "x0", "mu", "metric"]
    for term, loss in losses.items():
        found = gradients(model, loss)
        of_theta = [g for name, g in found.items() if name.startswith("theta.")]
        of_phi = [g for name, g in found.items() if name.startswith("phi.")]
        trained, untouched = (of_theta, of_phi) if term == "eps" else (of_phi, of_theta)
        assert not any(g.any() for g in untouched), term
        assert sum(bool(g.any()) for g in trained) > 0.9 * len(trained), term


@pytest.mark.parametrize("term", ["x0", "mu", "metric"])
def test_backward_of_phis_losses_never_even_allocates_a_gradient_of_theta(term):
    """After backward every p.grad of theta is None: the graph itself is cut   (Cas-DM Eq. 15)."""
    model = build("casdm-concat")
    each_loss(model)[term].sum().backward()
    assert all(p.grad is None for p in model.theta.parameters())


@pytest.mark.parametrize("term", ["eps", "x0", "mu", "metric"])
def test_in_dual_every_loss_disturbs_the_shared_trunk(term):
    """What Cas-DM cures: each moves the first convolution that eps' is computed with."""
    model = build("dual")
    found = gradients(model, each_loss(model)[term])
    assert found["theta.input_blocks.0.0.weight"].any()


def rows_trained(model, head, term):
    """Which output channels of the last convolution a loss trains."""
    weight = gradients(model, each_loss(model)[term])[head]
    return weight.flatten(1).any(1).nonzero().flatten().tolist()


def test_eq12_mu_loss_trains_the_gate_row_of_phi_alone():
    """Its means are detached; the other losses leave the gate   (Cas-DM Eq. 12)."""
    model, head = build("casdm"), "phi.out.2.weight"
    assert rows_trained(model, head, "mu") == [3]
    assert rows_trained(model, head, "x0") == [0, 1, 2]
    assert rows_trained(model, head, "metric") == [0, 1, 2]
    assert rows_trained(model, head, "eps") == []


def test_eq12_mu_loss_trains_the_gate_row_of_dual_alone():
    """The same of Dual's seven channels   (Cas-DM Eq. 12)."""
    model, head = build("dual"), "theta.out.2.weight"
    assert rows_trained(model, head, "mu") == [6]
    assert rows_trained(model, head, "x0") == [0, 1, 2]
    assert rows_trained(model, head, "metric") == [0, 1, 2]
    assert rows_trained(model, head, "eps") == [3, 4, 5]


@pytest.mark.parametrize("kind", ["casdm", "dual"])
def test_a_metric_changes_no_gradient_of_theta_but_one_of_dual(kind):
    """Adding a metric leaves Cas-DM's theta bitwise as it was: the paper's one idea (Sec. 3.2)."""
    model = build(kind)
    batch, lambdas = batch_of(model), LAMBDAS | {"metric": 0.1}
    without = objective(training_losses(model, batch, {}), lambdas, batch)
    with_it = objective(training_losses(model, batch, {"metric": metric}), lambdas, batch)
    before, after = gradients(model, without["loss"]), gradients(model, with_it["loss"])
    names = [name for name in before if name.startswith("theta.")]
    unchanged = all(torch.equal(before[name], after[name]) for name in names)
    assert unchanged == (kind == "casdm")


def test_one_backward_of_the_sum_trains_each_network_by_its_own_loss():
    """It gives theta the gradient of L_theta alone, phi that of L_phi   (Cas-DM Eqs. 14, 15)."""
    model = build("casdm")
    batch, lambdas = batch_of(model), {"eps": 1.0, "x0": 2.0, "mu": 3.0, "metric": 0.1}
    terms = objective(training_losses(model, batch, {"metric": metric}), lambdas, batch)
    of_theta = gradients(model, terms["eps"])
    of_phi = gradients(model, terms["x0"] + terms["mu"] + terms["metric"])
    for name, together in gradients(model, terms["loss"]).items():
        alone = of_theta[name] if name.startswith("theta.") else of_phi[name]
        assert_close(together, alone, rtol=1e-3, atol=1e-4)  # float32


@pytest.mark.parametrize("kind", DDPMS)
def test_ddpms_loss_and_a_metric_both_reach_its_network(kind):
    """Whichever of the two predictions it says."""
    model = build(kind)
    for loss in each_loss(model).values():
        assert gradients(model, loss)["theta.input_blocks.0.0.weight"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_models_own_their_terms_of_eq12(kind):
    """A DDPM has one loss, the others three; `terms` names them in their order (Cas-DM Eq. 12)."""
    model = build(kind)
    batch = batch_of(model)
    found = training_losses(model, batch, {})
    assert tuple(found) == model.terms
    assert {loss.shape for loss in found.values()} == {(3,)}
    own = {"ddpm-eps": ("eps",), "ddpm-x0": ("x0",)}
    assert model.terms == own.get(kind, ("eps", "x0", "mu"))


# ---- building ----

COUNTS = {
    "the default": ({}, [52_542_979, 52_544_132]),
    "fixres": ({"refiner": "fixres"}, [52_542_979, 45_754_628]),
    "concat": ({"refiner_input": "x0+eps"}, [52_542_979, 52_547_588]),
    "dual": ({"model": "dual"}, [52_547_591]),
    "ddpm": ({"model": "ddpm"}, [52_542_979]),
    "ddpm-x0": ({"model": "ddpm", "predict": "x0"}, [52_542_979]),
    "64 x 64": ({"image_size": 64}, [121_060_483, 121_061_636]),
}


@pytest.mark.parametrize("name", COUNTS)
def test_absent_settings_give_the_published_parameter_counts(name):
    """theta and phi, or the one network, in the paper's size and over its 4,000 steps."""
    settings, counts = COUNTS[name]
    with torch.device("meta"):
        model = build_model(settings)
    assert [sum(p.numel() for p in net.parameters()) for net in model.children()] == counts
    assert len(model.schedule.beta) == 4001


def test_settings_reach_schedule_dropout_and_network():
    """T, schedule, dropout and refiner are what was asked for, and dropout reaches both."""
    model = build("casdm-fixres", schedule="linear", T=50, dropout=0.3)
    assert len(model.schedule.beta) == 51
    assert model.schedule.beta[1].item() == pytest.approx(1e-4 * 1000 / 50)
    for network in model.children():
        assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.3}
    attentions = [m for m in model.phi.modules() if isinstance(m, Attention)]
    assert len(attentions) == 1  # the Fix-Res CNN's


def test_schedule_follows_the_model_to_a_device_and_keeps_float64():
    """model.to moves the schedule's tables, and a cast of the weights does not touch them."""
    model = build_model(SMALL | {"model": "ddpm"})
    model.to(torch.bfloat16)
    assert model.schedule.beta.dtype == torch.float64
    assert model.schedule.beta.device.type == "cpu"
    model.to("meta")
    assert {table.device.type for table in model.schedule} == {"meta"}


def test_schedule_is_no_part_of_the_state():
    """Checkpoints hold the networks' weights alone; the schedule follows from the settings."""
    assert {name.split(".")[0] for name in build("casdm").state_dict()} == {"theta", "phi"}


def test_impossible_size_raises_the_unets_one_line():
    """A size that the U-Net cannot halve is refused when the model is built."""
    with pytest.raises(ValueError, match=r"^image size 20; expected one of"):
        build_model({"image_size": 20})
