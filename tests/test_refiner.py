r"""refiner.py: the three models of figure 1, and which loss reaches which network.

    Cas-DM   arXiv:2401.02414v1     Dual   arXiv:2203.04304v2

Networks are the least that the group norms allow, and are fed 8 x 8 images: they are convolutional.  Before any statement about
gradients every weight that starts at zero is made random: at initialisation all gradients but the last convolution's are zero, and every
such test would pass.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffusion import Prediction, eps_from_x0, q_sample, x0_from_eps
from losses import eps_loss, mu_loss, training_losses, x0_loss
from refiner import DEFAULTS, build_model
from unet import Attention

SMALL = dict(image_size=16, channels=32, res_blocks=1)
CASDMS = {"unet": {}, "fixres": dict(refiner="fixres"), "concat": dict(refiner_input="x0+eps")}
KINDS = {
    "ddpm-eps": dict(model="ddpm"),
    "ddpm-x0": dict(model="ddpm", predict="x0"),
    "dual": dict(model="dual"),
    **{f"casdm-{name}": dict(model="casdm", **how) for name, how in CASDMS.items()},
}


def build(**settings):
    torch.manual_seed(0)
    model = build_model(SMALL | settings)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model


def batch(model, t=(1, 700, 4000)):
    """x0, t, eps and x_t of three images."""
    x0 = torch.rand(len(t), 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor(t)
    return x0, t, eps, q_sample(x0, t, eps, model.schedule)


def metric(x0_hat, x0):
    """Stands for LPIPS: a distance of local differences, which only x0_hat can lower."""
    return (x0_hat - x0.detach()).diff(dim=-1).abs().mean((1, 2, 3))


def gradients(model, loss):
    """{parameter: its gradient of the summed loss, 0 where autograd has none}."""
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss.sum(), parameters, allow_unused=True, retain_graph=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found)}


def each_loss(model):
    """The terms of one prediction: L_eps, L_x0, L_mu (Cas-DM Eq. 12) and a metric's (Cas-DM Eq. 13)."""
    x0, t, eps, x_t = batch(model, (1, 2, 40))  # where L_mu is not tiny
    pred = model(x_t, t)
    return {
        "eps": eps_loss(pred, eps),
        "x0": x0_loss(pred, x0),
        "mu": mu_loss(pred, x0, x_t, t, model.schedule),
        "metric": metric(pred.x0_hat, x0),
    }


def seen_by(net):
    """The arguments of each later call of `net`."""
    calls = []
    net.register_forward_hook(lambda module, args, out: calls.append(args))
    return calls


# ---- what each model says ----


@pytest.mark.parametrize("kind", KINDS)
def test_every_model_gives_a_prediction_of_the_images_shape(kind):
    """eps', x0' [B, 3, S, S] and r_t [B, 1, S, S] in 0..1, in x_t's dtype."""
    model = build(**KINDS[kind])
    _, t, _, x_t = batch(model)
    pred = model(x_t, t)
    assert (
        isinstance(pred, Prediction)
        and pred.eps_hat.shape == pred.x0_hat.shape == (3, 3, 8, 8)
        and pred.r_t.shape == (3, 1, 8, 8)
    )
    assert (
        {p.dtype for p in pred[:3]} == {torch.float32}
        and pred.v is None
        and (pred.r_t >= 0).all()
        and (pred.r_t <= 1).all()
    )


def test_ddpm_derives_the_other_prediction_and_r_is_exactly_0_or_1():
    """eps mode: x0' is Eq. 8 of the network's output and r_t = 0; x0 mode: eps' is Eq. 3 solved for it and r_t = 1 (Cas-DM Eqs. 3, 8)."""
    for predict, r in (("eps", 0), ("x0", 1)):
        model = build(model="ddpm", predict=predict)
        _, t, _, x_t = batch(model)
        pred, out = model(x_t, t), model.net(x_t, model.time(t, x_t))
        assert (pred.r_t == r).all()
        assert_close(
            pred.x0_hat,
            out if predict == "x0" else x0_from_eps(x_t, t, out, model.schedule),
            rtol=0,
            atol=0,
        )
        assert_close(
            pred.eps_hat,
            out if predict == "eps" else eps_from_x0(x_t, t, out, model.schedule),
            rtol=0,
            atol=0,
        )


def test_dual_outputs_x0_then_eps_then_the_gate():
    """Channels 0-2 are x0', 3-5 eps', 6 the logit of r_t (Dual Sec. 3; its official code's order)."""
    model = build(model="dual")
    _, t, _, x_t = batch(model)
    out, pred = model.net(x_t, model.time(t, x_t)), model(x_t, t)
    assert_close(pred.x0_hat, out[:, 0:3], rtol=0, atol=0)
    assert_close(pred.eps_hat, out[:, 3:6], rtol=0, atol=0)
    assert_close(pred.r_t, 1 / (1 + torch.exp(-out[:, 6:7])))


@pytest.mark.parametrize("kind", ["casdm-unet", "casdm-concat"])
def test_casdm_is_theta_then_eq08_then_phi(kind):
    """eps' is theta's; phi sees clamp(x0*) (and eps'), and says x0' and the logit of r_t (Cas-DM Eq. 8, figure 1)."""
    model = build(**KINDS[kind])
    _, t, _, x_t = batch(model)
    pred, time = model(x_t, t), model.time(t, x_t)
    eps_hat = model.eps_net(x_t, time)
    seen = x0_from_eps(x_t, t, eps_hat, model.schedule).clamp(-1, 1)
    out = model.refiner(torch.cat([seen, eps_hat], 1) if kind == "casdm-concat" else seen, time)
    assert_close(pred.eps_hat, eps_hat, rtol=0, atol=0)
    assert_close(pred.x0_hat, out[:, :3], rtol=0, atol=0)
    assert_close(pred.r_t, 1 / (1 + torch.exp(-out[:, 3:])))


@pytest.mark.parametrize("kind", ["dual", "casdm-unet", "casdm-fixres", "casdm-concat"])
def test_untrained_gate_is_one_half_and_x0_hat_grey(kind):
    """The zero-initialised head gives x0' = 0 and r_t = sigmoid(0) = 0.5."""
    model = build_model(SMALL | KINDS[kind])
    _, t, _, x_t = batch(model)
    pred = model(x_t, t)
    assert (pred.r_t == 0.5).all() and not pred.x0_hat.any() and not pred.eps_hat.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["casdm-unet", "casdm-concat"])
def test_phi_sees_x0_star_clamped_in_training_and_in_sampling(kind, training):
    """At t = T of the paper's schedule x0* is noise times 81,165; phi's input is within [-1, 1], in train and in eval mode (Cas-DM Eq. 8)."""
    model = build(**KINDS[kind]).train(training)
    calls = seen_by(model.refiner)
    _, t, _, x_t = batch(model)
    pred = model(x_t, t)
    ((seen, *_),) = calls
    x0_star = x0_from_eps(x_t, t, pred.eps_hat, model.schedule)
    assert x0_star[2].abs().max() > 1000 and seen[:, :3].abs().max() == 1
    assert_close(seen[:, :3], x0_star.clamp(-1, 1), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [4000, 1000])
def test_networks_see_improved_diffusions_time(kind, T):
    """(t - 1) * 1000 / T as a float, for every network of every model: 0 at t = 1, 999.75 at t = T = 4000."""
    model = build(**KINDS[kind], T=T)
    calls = [seen_by(net) for net in model.children()]
    _, t, _, x_t = batch(model, (1, 2, T))
    model(x_t, t)
    for ((_, time, *_),) in calls:
        assert time.dtype == torch.float32 and time.tolist() == pytest.approx(
            [0, 1000 / T, 1000 - 1000 / T]
        )


# ---- which loss reaches which network ----


@pytest.mark.parametrize("kind", ["casdm-unet", "casdm-fixres", "casdm-concat"])
def test_x0_mu_and_metric_losses_leave_theta_without_gradient(kind):
    """L_phi = L_x0 + L_mu + metric gives theta no gradient, L_theta = L_eps gives phi none, and each trains its own (Cas-DM Eqs. 14, 15)."""
    model = build(**KINDS[kind])
    for term, loss in each_loss(model).items():
        found = gradients(model, loss)
        theta, phi = (
            [g for n, g in found.items() if n.startswith(net)] for net in ("eps_net.", "refiner.")
        )
        trained, untouched = (theta, phi) if term == "eps" else (phi, theta)
        assert not any(g.any() for g in untouched), term
        assert sum(bool(g.any()) for g in trained) > 0.9 * len(trained), term


@pytest.mark.parametrize("term", ["x0", "mu", "metric"])
def test_backward_of_phis_losses_never_even_allocates_a_gradient_of_theta(term):
    """After backward every p.grad of theta is None: the graph itself is cut (Cas-DM Eq. 15)."""
    model = build(model="casdm", refiner_input="x0+eps")
    each_loss(model)[term].sum().backward()
    assert all(p.grad is None for p in model.eps_net.parameters())


def test_in_dual_every_loss_disturbs_the_shared_trunk():
    """What Cas-DM cures: in Dual L_x0, L_mu and the metric all move the first convolution that eps' is computed with."""
    model = build(model="dual")
    for term, loss in each_loss(model).items():
        assert gradients(model, loss)["net.input_blocks.0.0.weight"].any(), term


@pytest.mark.parametrize(
    "model, head, r_row", [("casdm", "refiner.out.2.weight", 3), ("dual", "net.out.2.weight", 6)]
)
def test_eq12_mu_loss_trains_the_gate_row_alone(model, head, r_row):
    """L_mu's means are detached: of the last convolution it trains r_t's row alone, which L_x0 and the metric leave (Cas-DM Eq. 12)."""
    model = build(model=model)
    rows = {
        term: gradients(model, loss)[head].flatten(1).any(1).tolist()
        for term, loss in each_loss(model).items()
    }
    n = r_row + 1
    assert rows["mu"] == [i == r_row for i in range(n)]
    assert rows["x0"] == rows["metric"] == [i < 3 for i in range(n)]
    assert rows["eps"] == [3 <= i < 6 and n == 7 for i in range(n)]


def test_a_metric_changes_no_gradient_of_theta_but_one_of_dual():
    """Adding a metric leaves theta's gradient bitwise as it was in Cas-DM, and changes it in Dual: the paper's one idea (Cas-DM Sec. 3.2)."""
    for name, own in (("casdm", "eps_net."), ("dual", "net.input")):
        model = build(model=name)
        x0, t, eps, _ = batch(model)
        with_metric, without = (
            gradients(model, training_losses(model, x0, t, eps, model.schedule, metrics)["loss"])
            for metrics in ({"metric": (0.1, metric)}, None)
        )
        assert all(
            torch.equal(g, without[n]) for n, g in with_metric.items() if n.startswith(own)
        ) == (name == "casdm")


def test_one_backward_of_the_sum_is_two_separate_ones():
    """The gradient of L_theta + L_phi is the sum of theirs (Cas-DM Eqs. 14, 15)."""
    model = build(model="casdm")
    x0, t, eps, _ = batch(model)
    losses = training_losses(model, x0, t, eps, model.schedule, {"metric": (0.1, metric)})
    apart = [gradients(model, losses[term]) for term in ("eps", "x0", "mu", "metric")]
    for name, g in gradients(model, losses["loss"]).items():
        assert_close(g, sum(part[name] for part in apart), rtol=1e-3, atol=1e-4)  # float32


def test_ddpms_gradient_reaches_its_network_through_either_prediction():
    """In x0 mode a metric on x0' trains the network; in eps mode L_eps does."""
    for predict, term in (("eps", "eps"), ("x0", "metric")):
        model = build(model="ddpm", predict=predict)
        assert gradients(model, each_loss(model)[term])["net.input_blocks.0.0.weight"].any()


# ---- building ----


def test_defaults_are_the_papers_settings():
    """Cas-DM with a U-Net phi fed x0*, 32 x 32, 128 channels, 3 blocks, no dropout, cosine, T = 4000 (Cas-DM Sec. 4.1)."""
    assert DEFAULTS == dict(
        model="casdm",
        predict="eps",
        refiner="unet",
        refiner_input="x0",
        image_size=32,
        channels=128,
        res_blocks=3,
        dropout=0.0,
        schedule="cosine",
        T=4000,
        num_classes=None,
        label_dropout=0.0,
        learn_sigma=False,
        objective="simple",
        self_perceptual={},
    )


@pytest.mark.parametrize(
    "settings, counts",
    [
        ({}, [52_542_979, 52_544_132]),
        (dict(refiner="fixres"), [52_542_979, 45_754_628]),
        (dict(refiner_input="x0+eps"), [52_542_979, 52_547_588]),
        (dict(model="dual"), [52_547_591]),
        (dict(model="ddpm"), [52_542_979]),
        (dict(model="ddpm", predict="x0"), [52_542_979]),
        (dict(model="ddpm", learn_sigma=True), [52_546_438]),
        (dict(image_size=64), [121_060_483, 121_061_636]),
    ],
)
def test_absent_settings_give_the_published_parameter_counts(settings, counts):
    """theta and phi, or the one network, in the paper's size."""
    with torch.device("meta"):
        model = build_model(settings)
    assert [sum(p.numel() for p in net.parameters()) for net in model.children()] == counts
    assert len(model.schedule.beta) == 4001


def test_settings_reach_schedule_dropout_and_network():
    """T, schedule, dropout and refiner are what was asked for, and dropout reaches both networks."""
    model = build(schedule="linear", T=50, dropout=0.3, refiner="fixres")
    assert len(model.schedule.beta) == 51 and model.schedule.beta[1].item() == pytest.approx(
        1e-4 * 1000 / 50
    )
    for net in model.children():
        assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert [sum(isinstance(m, Attention) for m in net.modules()) for net in model.children()] == [
        4,
        1,
    ]


@pytest.mark.parametrize(
    "kind, terms",
    [
        ("ddpm-eps", ("eps",)),
        ("ddpm-x0", ("x0",)),
        ("dual", ("eps", "x0", "mu")),
        ("casdm-unet", ("eps", "x0", "mu")),
    ],
)
def test_models_own_their_terms_of_eq12(kind, terms):
    """A DDPM has one loss, the others three (Cas-DM Eq. 12)."""
    assert build(**KINDS[kind]).loss_terms == terms


def test_schedule_follows_the_model_to_a_device_and_keeps_float64():
    """model.to moves the schedule's tables with the weights, and a cast of the weights does not touch them."""
    model = build_model(SMALL | dict(model="ddpm"))
    assert (
        model.to(torch.float32).schedule.beta.dtype == torch.float64
        and model.schedule.beta.device.type == "cpu"
    )
    assert {table.device.type for table in model.to("meta").schedule} == {"meta"}


def test_schedule_is_no_part_of_the_state():
    """Checkpoints hold the networks' weights alone; the schedule follows from the settings."""
    assert {k.split(".")[0] for k in build(model="casdm").state_dict()} == {"eps_net", "refiner"}


def test_impossible_size_raises_the_unets_one_line():
    """A size that the U-Net cannot halve is refused when the model is built."""
    with pytest.raises(ValueError, match="^image size 20; expected one of"):
        build_model(dict(image_size=20))
