r"""losses.py: Eqs. 12-15 of the paper, and the metrics against piq and against torchvision's own networks.

    Cas-DM   arXiv:2401.02414v1     LPIPS   arXiv:1801.03924v2

VGG-16, ResNet, Inception and Swin get random weights of the right shapes, in a torch.hub folder of the test's own; SqueezeNet gets its
ImageNet weights where ../shared/data has them.  Nothing here can reach the network.
"""

import re
import urllib.error
from pathlib import Path

import numpy as np
import piq
import pytest
import torch
import torchvision.models as tv
from torch import nn
from torch.testing import assert_close

import losses
from diffusion import (
    Prediction,
    cosine_schedule,
    linear_schedule,
    mu_from_eps,
    mu_from_x0,
    q_sample,
    respace,
    x0_from_eps,
)
from losses import eps_loss, haarpsi, lpips, mu_loss, squeezenet, ssim, training_losses, x0_loss
from refiner import build_model

TORCH_HOME = Path(losses.__file__).parent / "../shared/data/torch_home"
SCHEDULES = {
    "cosine4000": cosine_schedule(),
    "linear1000": linear_schedule(),
    "cosine4000-ddim100": respace(cosine_schedule(), 100),
}


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def schedule(request):
    return request.param


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(url, *args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def step_of(schedule, seed=0):
    """x0, t = 1, 2, T/2, T - 1, T, eps, x_t and an arbitrary Prediction, float64."""
    T = len(schedule.beta) - 1
    generator = torch.Generator().manual_seed(seed)
    t = torch.tensor([1, 2, T // 2, T - 1, T])
    x0, x0_hat = torch.rand(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1
    eps, eps_hat = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    r_t = torch.rand(5, 1, 4, 4, generator=generator, dtype=torch.float64)
    return x0, t, eps, q_sample(x0, t, eps, schedule), Prediction(eps_hat, x0_hat, r_t)


def pictures(n=2, size=32, seed=0):
    return torch.rand(2, n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- Eq. 12 ----


def test_eq12_eps_and_x0_losses_are_means_of_squares_over_an_image(schedule):
    """L_eps = ||eps - eps'||^2, L_x0 = ||x0 - x0'||^2 as means over C, H, W, one number an image (Cas-DM Eq. 12)."""
    x0, _, eps, _, pred = step_of(schedule)
    for loss, truth, hat in (
        (eps_loss(pred, eps), eps, pred.eps_hat),
        (x0_loss(pred, x0), x0, pred.x0_hat),
    ):
        assert loss.shape == (5,)
        assert_close(loss.numpy(), ((truth - hat).numpy() ** 2).reshape(5, -1).mean(1))


def test_eq12_perfect_predictions_have_zero_losses(schedule):
    """eps' = eps and x0' = x0: all three terms vanish, for any r_t (Cas-DM Eq. 12)."""
    x0, t, eps, x_t, pred = step_of(schedule)
    perfect = Prediction(eps, x0, pred.r_t)
    assert not eps_loss(perfect, eps).any() and not x0_loss(perfect, x0).any()
    assert_close(
        mu_loss(perfect, x0, x_t, t, schedule),
        torch.zeros(5, dtype=torch.float64),
        rtol=0,
        atol=1e-18,
    )


def test_eq12_mu_loss_compares_the_true_posterior_mean_with_the_mix(schedule):
    """L_mu = || mu~_t(x_t, x0) - (r_t mu_x0' + (1 - r_t) mu_eps') ||^2 (Cas-DM Eq. 12)."""
    x0, t, _, x_t, pred = step_of(schedule)
    mixed = pred.r_t * mu_from_x0(x_t, t, pred.x0_hat, schedule) + (1 - pred.r_t) * mu_from_eps(
        x_t, t, pred.eps_hat, schedule
    )
    expected = (mu_from_x0(x_t, t, x0, schedule) - mixed).square().flatten(1).mean(1)
    assert_close(mu_loss(pred, x0, x_t, t, schedule), expected, rtol=1e-12, atol=0)


def test_eq12_mu_loss_is_an_error_in_x0_times_c1_squared(schedule):
    """L_mu = c1^2 mean((x0 - r x0' - (1 - r) x0*)^2), c1 = sqrt(abar_{t-1}) beta_t / (1 - abar_t): 1 at t = 1 (Cas-DM Eqs. 7, 11, 12)."""
    x0, t, _, x_t, pred = step_of(schedule)
    abar, abar_prev = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
    c1 = abar_prev.sqrt() * (1 - abar / abar_prev) / (1 - abar)
    x0_eff = pred.r_t * pred.x0_hat + (1 - pred.r_t) * x0_from_eps(x_t, t, pred.eps_hat, schedule)
    loss = mu_loss(pred, x0, x_t, t, schedule)
    assert_close(loss, c1**2 * (x0 - x0_eff).square().mean((1, 2, 3)), rtol=1e-8, atol=1e-18)
    assert c1[0].item() == pytest.approx(1, rel=1e-9)


def test_nine_tenths_of_l_mus_weight_lie_in_the_first_ten_steps():
    """L_mu of an x0' that is wrong by 1 at every t of the paper's 4,000 (Cas-DM Eqs. 7, 12)."""
    t = torch.arange(1, 4001)
    zero = torch.zeros(4000, 1, 1, 1, dtype=torch.float64)
    weight = mu_loss(Prediction(zero, zero + 1, zero + 1), zero, zero, t, SCHEDULES["cosine4000"])
    assert weight[:10].sum() / weight.sum() == pytest.approx(0.905, abs=0.001)


def test_eq12_mu_loss_is_least_at_the_closed_form_gate(schedule):
    """Its gradient in r_t is 0 at r* = <x0 - x0*, x0' - x0*> / ||x0' - x0*||^2, over a pixel's channels, and nowhere else (Cas-DM Eq. 12)."""
    x0, t, _, x_t, pred = step_of(schedule)
    x0_star = x0_from_eps(x_t, t, pred.eps_hat, schedule)
    away = pred.x0_hat - x0_star
    best = ((x0 - x0_star) * away).sum(1, keepdim=True) / away.square().sum(1, keepdim=True)
    for r_t, zero in ((best, True), (best + 0.1, False)):
        r_t = r_t.clone().requires_grad_()
        loss = mu_loss(pred._replace(r_t=r_t), x0, x_t, t, schedule)
        (gradient,) = torch.autograd.grad(
            (loss / loss.detach()).sum(), r_t
        )  # relative: c1 makes L_mu itself tiny
        assert (gradient.abs().max() < 1e-5) == zero


def test_eq12_gate_prefers_whichever_prediction_is_right(schedule):
    """x0' = x0 asks for r_t = 1, eps' = eps (x0* = x0) for r_t = 0; where x0' = x0* no r_t matters (Cas-DM Eq. 12)."""
    x0, t, eps, x_t, pred = step_of(schedule)
    right_x0, right_eps = (
        Prediction(pred.eps_hat, x0, pred.r_t),
        Prediction(eps, pred.x0_hat, pred.r_t),
    )
    for right, r in ((right_x0, 1.0), (right_eps, 0.0)):
        at_r, beside = (
            mu_loss(right._replace(r_t=torch.full_like(pred.r_t, value)), x0, x_t, t, schedule)
            for value in (r, 0.5)
        )
        assert (at_r < 1e-12 * beside).all()
    r_t = pred.r_t.clone().requires_grad_()
    same = Prediction(pred.eps_hat, x0_from_eps(x_t, t, pred.eps_hat, schedule), r_t)
    loss = mu_loss(same, x0, x_t, t, schedule)
    assert torch.autograd.grad((loss / loss.detach()).sum(), r_t)[0].abs().max() < 1e-5


def test_eq12_mu_loss_sends_gradient_to_the_gate_alone(schedule):
    """Both means are detached: x0' and eps' get none, r_t does (Cas-DM Eq. 12)."""
    x0, t, _, x_t, pred = step_of(schedule)
    leaves = Prediction(*(p.clone().requires_grad_() for p in pred[:3]))
    eps_grad, x0_grad, r_grad = torch.autograd.grad(
        mu_loss(leaves, x0, x_t, t, schedule).sum(), leaves[:3], allow_unused=True
    )
    assert eps_grad is None and x0_grad is None and r_grad.flatten(1).any(1).all()


# ---- Eqs. 14, 15: a training step ----


class Fixed(nn.Module):
    """A model that always says the same, and remembers what it was asked."""

    def __init__(self, pred, terms=("eps", "x0", "mu")):
        super().__init__()
        self.pred, self.loss_terms = pred, terms

    def forward(self, x_t, t, y=None):
        self.asked = x_t, t, y
        return self.pred


def test_eq14_eq15_loss_is_the_sum_of_the_models_terms_and_the_weighted_metrics(schedule):
    """L_theta + L_phi = L_eps + L_x0 + L_mu + lambda metric, batch means, from x_t of Eq. 3 (Cas-DM Eqs. 3, 14, 15)."""
    x0, t, eps, x_t, pred = step_of(schedule)
    model, y = Fixed(pred), torch.arange(5)
    metrics = {
        "far": (0.1, lambda a, b: (a - b).abs().amax((1, 2, 3))),
        "three": (2.0, lambda a, b: 3 + 0 * a[:, 0, 0, 0]),
    }
    got = training_losses(model, x0, t, eps, schedule, metrics, y)
    expected = {
        "eps": eps_loss(pred, eps).mean(),
        "x0": x0_loss(pred, x0).mean(),
        "mu": mu_loss(pred, x0, x_t, t, schedule).mean(),
        "far": 0.1 * (pred.x0_hat - x0).abs().amax((1, 2, 3)).mean(),
        "three": torch.tensor(6.0, dtype=torch.float64),
    }
    assert list(got) == ["eps", "x0", "mu", "far", "three", "loss"]
    for term, value in (expected | {"loss": sum(expected.values())}).items():
        assert_close(got[term], value)
    assert_close(model.asked[0], x_t, rtol=0, atol=0)
    assert model.asked[1] is t and model.asked[2] is y


@pytest.mark.parametrize("terms", [("eps",), ("x0",), ("eps", "x0", "mu")])
def test_only_the_terms_that_a_model_owns_are_computed(terms):
    """A DDPM has no L_mu; without a metric the loss is the sum of the model's own terms (Cas-DM Eqs. 12, 14)."""
    x0, t, eps, _, pred = step_of(SCHEDULES["linear1000"])
    got = training_losses(Fixed(pred, terms), x0, t, eps, SCHEDULES["linear1000"])
    assert tuple(got) == (*terms, "loss")
    assert_close(got["loss"], sum(got[term] for term in terms))


def test_eq15_loss_is_linear_in_lambda():
    """Doubling a metric's lambda doubles its term and nothing else (Cas-DM Eq. 15)."""
    schedule = SCHEDULES["linear1000"]
    x0, t, eps, _, pred = step_of(schedule)

    def at(weight):
        return training_losses(
            Fixed(pred),
            x0,
            t,
            eps,
            schedule,
            {"far": (weight, lambda a, b: (a - b).square().sum((1, 2, 3)))},
        )

    one, two, none = at(0.3), at(0.6), at(0.0)
    assert_close(two["far"], 2 * one["far"])
    assert_close(two["loss"] - one["loss"], one["loss"] - none["loss"])
    assert_close(one["loss"] - none["loss"], one["far"])


def test_a_metric_sees_the_unclamped_prediction_first_and_the_image_second():
    """A metric is called with (x0', x0), x0' as the model says it, and reaches the model through it (Cas-DM Eq. 13)."""
    schedule, calls = SCHEDULES["linear1000"], []
    x0, t, eps, _, pred = step_of(schedule)
    leaf = (3 * pred.x0_hat).requires_grad_()

    def metric(*images):
        calls.append(images)
        return images[0].sum((1, 2, 3))

    training_losses(
        Fixed(pred._replace(x0_hat=leaf)), x0, t, eps, schedule, {"own": (1.0, metric)}
    )["own"].backward()
    assert len(calls) == 1 and calls[0][0] is leaf and calls[0][1] is x0
    assert_close(leaf.grad, torch.full_like(leaf, 1 / 5))


def test_bf16_is_for_the_networks_and_not_for_losses_and_metrics():
    """Under bf16 the convolutions run in bfloat16, while the prediction, the losses and the metric's arguments are float32."""
    torch.manual_seed(0)
    model, dtypes = (
        build_model(dict(model="ddpm", predict="x0", image_size=16, channels=32, res_blocks=1)),
        [],
    )
    model.net.input_blocks[0].register_forward_hook(
        lambda module, args, out: dtypes.append(out.dtype)
    )

    def metric(x0_hat, x0):
        dtypes.append(x0_hat.dtype)
        assert not torch.is_autocast_enabled("cpu")
        return x0_hat.mean((1, 2, 3))

    x0, eps = torch.randn(2, 2, 3, 16, 16)
    got = training_losses(
        model, x0, torch.tensor([1, 4000]), eps, model.schedule, {"own": (1.0, metric)}, bf16=True
    )
    assert dtypes == [torch.bfloat16, torch.float32] and {v.dtype for v in got.values()} == {
        torch.float32
    }


# ---- Eq. 13: LPIPS ----


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A TORCH_HOME with random VGG-16 features and LPIPS weights; positive weights, as the published ones are."""
    home = tmp_path_factory.mktemp("torch_home")
    folder = home / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    features = tv.vgg.make_layers(tv.vgg.cfgs["D"])
    for m in features:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
    torch.save(
        {f"features.{k}": v for k, v in features.state_dict().items()},
        folder / "vgg16-397923af.pth",
    )
    torch.save(
        [torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)], folder / "lpips_weights.pt"
    )
    return home


@pytest.fixture(scope="session")
def vgg_metric(hub):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(hub))
        return lpips()


def features_seen_by(metric, *images):
    """What the extractor is fed when the metric compares the images."""
    seen = []
    hook = metric.extractor.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    metric(*images)
    hook.remove()
    return seen


def bilinear(row, size):
    """Half-pixel bilinear resampling with edge clamp along the last axis, in numpy."""
    n = row.shape[-1]
    position = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    return np.apply_along_axis(lambda values: np.interp(position, np.arange(n), values), -1, row)


def test_eq13_T_resizes_to_224_and_to_the_unit_range(vgg_metric):
    """VGG sees ((T(x) - mean) / std), T = bilinear to 224 x 224, then [-1, 1] to [0, 1], ImageNet's mean and deviation (Cas-DM Eq. 13)."""
    x0_hat, x0 = pictures(1, 8)
    for got, x in zip(features_seen_by(vgg_metric, x0_hat, x0), (x0, x0_hat)):
        assert got.shape == (1, 3, 224, 224) and got.dtype == torch.float32
        large = bilinear(bilinear(x.double().numpy(), 224).swapaxes(2, 3), 224).swapaxes(2, 3)
        mean, std = (
            np.array(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        assert_close(got.double().numpy(), ((large + 1) / 2 - mean) / std, rtol=0, atol=1e-5)


def test_eq13_lpips_is_piqs_on_T_of_the_images(vgg_metric, hub, monkeypatch):
    """Our LPIPS is piq.LPIPS(replace_pooling=True) on images resized to 224 and rescaled to [0, 1] (Cas-DM Eq. 13)."""
    monkeypatch.setenv("TORCH_HOME", str(hub))
    folder = hub / "hub/checkpoints"
    vgg = tv.vgg16(weights=None, init_weights=False)
    vgg.load_state_dict(torch.load(folder / "vgg16-397923af.pth"), strict=False)
    monkeypatch.setattr(piq.perceptual, "vgg16", lambda **how: vgg)
    monkeypatch.setattr(
        torch.hub,
        "load_state_dict_from_url",
        lambda url, **how: torch.load(folder / "lpips_weights.pt"),
    )
    reference = piq.LPIPS(replace_pooling=True, reduction="none")
    x0_hat, x0 = pictures(1)
    T = [(nn.functional.interpolate(x, size=224, mode="bilinear") + 1) / 2 for x in (x0_hat, x0)]
    with torch.no_grad():
        expected = reference(*T)
    assert expected.min() > 1e-3
    assert_close(vgg_metric(x0_hat, x0), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_metric(vgg_metric, monkeypatch):
    """LPIPS on 32 x 32, where what is claimed does not depend on the size."""
    monkeypatch.setattr(vgg_metric, "size", 32)
    return vgg_metric


def test_lpips_is_zero_for_equal_images_and_symmetric_and_positive(small_metric):
    """LPIPS(x, x) = 0, LPIPS(x, y) = LPIPS(y, x) > 0, one number an image (Cas-DM Eq. 13)."""
    x, y = pictures(3)
    assert (
        not small_metric(x, x).any()
        and (small_metric(x, y) > 0).all()
        and small_metric(x, y).shape == (3,)
    )
    assert_close(small_metric(x, y), small_metric(y, x))
    assert_close(small_metric(x, y)[1:2], small_metric(x[1:2], y[1:2]), rtol=1e-5, atol=1e-6)


def test_lpips_layer_weighs_unit_length_features_per_channel():
    """sum_c w_c mean_hw (f/|f| - g/|g|)^2, which does not see the features' length (LPIPS Eq. 1)."""
    f, g = torch.randn(
        2, 2, 5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    w = torch.arange(5, dtype=torch.float64).view(1, 5, 1, 1)
    unit_f, unit_g = (v / (v**2).sum(1, keepdim=True).sqrt() for v in (f, g))
    expected = sum(c * (unit_f - unit_g)[:, c].square().mean((1, 2)) for c in range(5))
    assert_close(losses._lpips_layer(f, g, w), expected)
    assert_close(losses._lpips_layer(7 * f, g, w), expected)


def test_lpips_of_flat_images_has_finite_gradients(small_metric):
    """A grey prediction, as every untrained network makes, and all-zero features, where piq's own form has NaN."""
    for grey in (-1.0, 0.0, 1.0):
        x0_hat = torch.full((1, 3, 32, 32), grey, requires_grad=True)
        for x0 in (x0_hat.detach(), pictures(1)[0]):
            assert torch.autograd.grad(small_metric(x0_hat, x0).sum(), x0_hat)[0].isfinite().all()
    f = torch.zeros(1, 4, 2, 2, requires_grad=True)
    losses._lpips_layer(f, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 1, 1)).sum().backward()
    assert f.grad.isfinite().all()


def test_metric_gradient_reaches_the_prediction_alone(small_metric):
    """Neither the target nor VGG's weights nor LPIPS's get a gradient; the target's features carry no graph."""
    x0_hat, x0 = (x.requires_grad_() for x in pictures(1))
    small_metric(x0_hat, x0).sum().backward()
    assert x0_hat.grad.any() and x0.grad is None
    assert all(p.grad is None and not p.requires_grad for p in small_metric.parameters())
    assert len(list(small_metric.weights)) == 5 and not small_metric.training


def test_metric_is_float32_whatever_the_autocast_or_the_images_dtype(small_metric):
    """Under bfloat16 autocast, and for bfloat16's or float64's images, features are float32; 1e-10 is 0 in half precision."""
    x0_hat, x0 = pictures(1)
    expected = small_metric(x0_hat, x0)
    with torch.autocast("cpu", torch.bfloat16):
        got = small_metric(x0_hat, x0)
    assert got.dtype == torch.float32
    assert_close(got, expected, rtol=0, atol=0)
    assert small_metric(x0_hat.double(), x0.double()).dtype == torch.float32


def test_bf16_metric_runs_its_network_alone_in_bfloat16(small_metric, monkeypatch):
    """With `bf16` the features are bfloat16 and their distance float32: 0 for equal images, within 1 % of the exact one for others."""
    x0_hat, x0 = pictures(2)
    exact, features = small_metric(x0_hat, x0), []
    monkeypatch.setattr(small_metric, "bf16", True)
    hook = small_metric.extractor.register_forward_hook(
        lambda module, args, out: features.append(list(out.values()))
    )
    rounded = small_metric(x0_hat, x0)
    hook.remove()
    assert {f.dtype for image in features for f in image} == {torch.bfloat16}
    layers = zip(*([f.float() for f in image] for image in features), small_metric.weights)
    assert_close(
        rounded, sum(losses._lpips_layer(f, g, w) for f, g, w in layers), rtol=1e-6, atol=0
    )
    assert_close(rounded, exact, rtol=0.01, atol=0)
    assert not small_metric(x0, x0).any() and not torch.equal(rounded, exact)


def test_lpips_has_average_pools_alone(vgg_metric):
    """All five max-pools of VGG-16 are replaced (Cas-DM Sec. 4.1); the last, after relu5_3, is not needed for any feature."""
    kinds = [type(m) for m in vgg_metric.modules()]
    assert kinds.count(nn.MaxPool2d) == 0 and kinds.count(nn.AvgPool2d) == 4
    shapes = [tuple(f.shape) for f in vgg_metric.features(pictures(1)[0])]
    assert shapes == [
        (1, 64, 224, 224),
        (1, 128, 112, 112),
        (1, 256, 56, 56),
        (1, 512, 28, 28),
        (1, 512, 14, 14),
    ]


@pytest.mark.parametrize(
    "content", [{"lin0": torch.ones(1)}, [torch.ones(1, 64, 1, 1)] * 5, torch.ones(5)]
)
def test_wrong_lpips_weights_raise_one_line(hub, tmp_path, monkeypatch, content):
    """A file that does not hold the five weights [1, C, 1, 1] is named, and what to do with it."""
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    (folder / "vgg16-397923af.pth").symlink_to(hub / "hub/checkpoints/vgg16-397923af.pth")
    torch.save(content, folder / "lpips_weights.pt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError,
        match=r"^[^\n]*lpips_weights.pt does not hold LPIPS's five weights[^\n]*; expected [^\n]*; remove it[^\n]*$",
    ):
        lpips()


@pytest.mark.parametrize(
    "metric, file, megabytes",
    [
        ("lpips", "vgg16-397923af.pth", 528),
        ("resnet", "resnet50-0676ba61.pth", 97.8),
        ("inception", "inception_v3_google-0cc3c7bd.pth", 104),
        ("swin", "swin_t-704ceda3.pth", 108),
        ("squeezenet", "squeezenet1_1-b8a52dc0.pth", 4.7),
    ],
)
def test_missing_weights_raise_one_line_with_everything_one_needs(
    tmp_path, monkeypatch, metric, file, megabytes
):
    """What is missing, how large, from where, where to put it by hand, and what needs no download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError) as error:
        losses.METRICS[metric]()
    message = str(error.value)
    assert "\n" not in message
    assert float(re.search(rf"^{file} \(([\d.]+) MB\)", message)[1]) == pytest.approx(
        megabytes, rel=0.01
    )
    for part in (
        f"https://download.pytorch.org/models/{file}",
        metric,
        str(tmp_path / "hub/checkpoints" / file),
        "--metric ssim",
    ):
        assert part in message, message
    assert not any((tmp_path / "hub").rglob("*.pth"))


def test_missing_lpips_weights_beside_a_vgg_are_named_too(hub, tmp_path, monkeypatch):
    """The second file of LPIPS has an address of its own."""
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    (folder / "vgg16-397923af.pth").symlink_to(hub / "hub/checkpoints/vgg16-397923af.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError, match=r"^lpips_weights.pt [^\n]*photosynthesis-team[^\n]*$"):
        lpips()


@pytest.mark.parametrize(
    "state",
    [
        {"features.0.weight": torch.ones(64, 3, 3, 3)},
        {"features.0.weight": torch.ones(2, 2)},
        [1, 2],
    ],
)
def test_weights_of_another_network_raise_one_line(tmp_path, monkeypatch, state):
    """A file without the needed tensors, with one of another shape, or without a state dict at all."""
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError,
        match=r"^[^\n]*squeezenet1_1-b8a52dc0.pth does not fit [^\n]*; expected torchvision's [^\n]*; remove [^\n]*$",
    ):
        squeezenet()


# ---- the other networks (Cas-DM Table 3) ----


def mean_square(f, g):
    return (f - g).square().flatten(1).mean(1)


def distance(net, stages, x0_hat, x0, size, mean, std, layer=mean_square):
    """Mean over the stages of a layer's distance, by hooks on torchvision's own network."""
    features = {}
    for name in stages:
        net.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: features.setdefault(name, []).append(out)
        )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    for x in (x0_hat, x0):
        net(
            ((nn.functional.interpolate(x, size=(size, size), mode="bilinear") + 1) / 2 - mean)
            / std
        )
    return torch.stack([layer(f, g) for f, g in features.values()]).mean(0)


IMAGENET = dict(size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
STAGES = {
    "resnet": (
        tv.resnet50,
        {},
        "resnet50-0676ba61.pth",
        ["layer1", "layer2", "layer3", "layer4"],
        IMAGENET,
    ),
    "inception": (
        tv.inception_v3,
        dict(init_weights=False),
        "inception_v3_google-0cc3c7bd.pth",
        ["maxpool2", "Mixed_5d", "Mixed_6e", "Mixed_7c"],
        dict(size=299, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    ),
    "swin": (
        tv.swin_t,
        {},
        "swin_t-704ceda3.pth",
        ["features.1", "features.3", "features.5", "features.7"],
        IMAGENET,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_table3_metric_is_the_mean_squared_difference_of_four_stages(name, tmp_path, monkeypatch):
    """ResNet-50, Inception v3 and Swin-T with random weights agree with hooks on torchvision's own network (Cas-DM Table 3)."""
    builder, how, file, stages, images = STAGES[name]
    torch.manual_seed(0)
    net = builder(weights=None, **how).eval()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), tmp_path / "hub/checkpoints" / file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metric, (x0_hat, x0) = losses.METRICS[name](), pictures(2)
    with torch.no_grad():
        expected = distance(net, stages, x0_hat, x0, **images)
    assert_close(metric(x0_hat, x0), expected, rtol=1e-3, atol=1e-7)
    assert not metric(x0, x0).any() and (expected > 0).all()
    leaf = x0_hat.requires_grad_()
    (gradient,) = torch.autograd.grad(metric(leaf, x0).sum(), leaf)
    assert gradient.isfinite().all() and gradient.any()
    assert not any(p.requires_grad for p in metric.parameters())


@pytest.mark.skipif(
    not TORCH_HOME.is_dir(),
    reason="../shared/data/torch_home, with SqueezeNet's weights, is not here",
)
def test_squeezenet_is_lpips_of_four_stages_without_its_weights(monkeypatch):
    """2 - 2 cos of the channels' angle, mean over positions and stages, by hooks on torchvision's own network with its ImageNet weights; it is
    0 for equal images, at most 2, and trains the prediction (LPIPS Eq. 1)."""
    monkeypatch.setenv("TORCH_HOME", str(TORCH_HOME))
    metric, (x0_hat, x0) = squeezenet(), pictures(2)
    net = tv.squeezenet1_1(weights=None).eval()
    net.load_state_dict(torch.load(TORCH_HOME / "hub/checkpoints/squeezenet1_1-b8a52dc0.pth"))
    with torch.no_grad():
        expected = distance(
            net,
            ["features.1", "features.4", "features.7", "features.12"],
            x0_hat,
            x0,
            **IMAGENET,
            layer=lambda f, g: (2 - 2 * nn.functional.cosine_similarity(f, g, eps=1e-10)).mean(
                (1, 2)
            ),
        )
    assert_close(metric(x0_hat, x0), expected, rtol=1e-3, atol=1e-4)
    assert not metric(x0, x0).any() and (expected > 0.1).all() and (expected < 2).all()
    leaf = x0_hat.requires_grad_()
    assert torch.autograd.grad(metric(leaf, x0).sum(), leaf)[0].any()
    assert {p.dtype for p in metric.parameters()} == {torch.float32}


# ---- SSIM, HaarPSI ----


@pytest.mark.parametrize(
    "ours, theirs", [(ssim, piq.ssim), (haarpsi, piq.haarpsi)], ids=["ssim", "haarpsi"]
)
def test_metrics_without_weights_are_one_minus_piqs(ours, theirs):
    """0 for equal images, 1 - piq's value of images in [0, 1] otherwise, one number an image."""
    x0_hat, x0 = pictures(3, 32)
    assert_close(ours()(x0, x0), torch.zeros(3), rtol=0, atol=1e-5)
    expected = torch.stack(
        [1 - theirs((a[None] + 1) / 2, (b[None] + 1) / 2) for a, b in zip(x0_hat, x0)]
    )
    assert_close(ours()(x0_hat, x0), expected, rtol=1e-5, atol=1e-6)
    assert expected.min() > 0.05


@pytest.mark.parametrize("metric", [ssim, haarpsi])
@pytest.mark.parametrize("size", [16, 32])
def test_metrics_without_weights_clamp_the_prediction_and_keep_gradients_finite(metric, size):
    """Pixels outside [-1, 1] are no error and count as their clamp; grey and wild predictions have finite gradients."""
    _, x0 = pictures(2, size)
    wild = 5 * pictures(2, size, seed=3)[0]
    assert_close(metric()(wild, x0), metric()(wild.clamp(-1, 1), x0))
    for x0_hat in (wild, torch.zeros_like(x0), x0, torch.ones_like(x0)):
        leaf = x0_hat.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(metric()(leaf, x0).sum(), leaf)
        assert gradient.isfinite().all()


def test_every_metric_of_the_command_line_is_here():
    """LPIPS, Table 3's three, and three that need little or no download."""
    assert list(losses.METRICS) == [
        "lpips",
        "resnet",
        "inception",
        "swin",
        "squeezenet",
        "ssim",
        "haarpsi",
    ]
