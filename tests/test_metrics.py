r"""metrics.py: LPIPS against piq, the others against torchvision's own networks.

    Cas-DM   arXiv:2401.02414v1     LPIPS   arXiv:1801.03924v2

VGG-16, ResNet, Inception and Swin get random weights of the right shapes, in a torch.hub folder of
the test's own; SqueezeNet gets its ImageNet weights where ../shared/data has them.  Nothing here
can reach the network.
"""

import re
import urllib.error

import numpy as np
import piq
import pytest
import torch
import torchvision.models as tv
from torch import nn
from torch.testing import assert_close

import metrics
from metrics import METRICS, T, haarpsi, lpips, squeezenet, ssim
from runs import ROOT

TORCH_HOME = ROOT / "../shared/data/torch_home"
VGG, LPIPS_WEIGHTS = "vgg16-397923af.pth", "lpips_weights.pt"
SQUEEZENET = "squeezenet1_1-b8a52dc0.pth"
LPIPS_CHANNELS = (64, 128, 256, 512, 512)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(url, *args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def pictures(n=2, size=32, seed=0):
    """Two batches of n images in [-1, 1]."""
    return torch.rand(2, n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def checkpoints(home):
    """torch.hub's folder of weights below a TORCH_HOME, made if it is not there."""
    folder = home / "hub/checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- Eq. 13: LPIPS ----


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A TORCH_HOME with random VGG-16 features and LPIPS weights, positive as the published are."""
    home = tmp_path_factory.mktemp("torch_home")
    torch.manual_seed(0)
    features = tv.vgg.make_layers(tv.vgg.cfgs["D"])
    for m in features:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(state, checkpoints(home) / VGG)
    weights = [torch.rand(1, c, 1, 1) for c in LPIPS_CHANNELS]
    torch.save(weights, checkpoints(home) / LPIPS_WEIGHTS)
    return home


@pytest.fixture(scope="session")
def vgg_metric(hub):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(hub))
        return lpips()


@pytest.fixture
def vgg_alone(hub, tmp_path, monkeypatch):
    """The weights' folder of a TORCH_HOME that has VGG-16, but not LPIPS's own weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = checkpoints(tmp_path)
    (folder / VGG).symlink_to(checkpoints(hub) / VGG)
    return folder


def bilinear(x, size):
    """Half-pixel bilinear resampling with edge clamp along the last two axes, in numpy."""
    n = x.shape[-1]
    position = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)

    def resampled(values):
        return np.interp(position, np.arange(n), values)

    return np.apply_along_axis(resampled, -2, np.apply_along_axis(resampled, -1, x))


def test_eq13_T_resizes_to_224_and_to_the_unit_range():
    """Bilinear to 224 x 224 as numpy does it, then [-1, 1] to [0, 1]   (Cas-DM Eq. 13)."""
    x, _ = pictures(1, 8)
    expected = (bilinear(x.double().numpy(), 224) + 1) / 2
    got = T(x.double())
    assert got.shape == (1, 3, 224, 224) and got.dtype == torch.float32
    assert_close(got.double().numpy(), expected, rtol=0, atol=1e-6)


def test_vgg_sees_T_of_both_images_by_imagenets_mean_and_deviation(vgg_metric):
    """(T(x) - mean) / std of x0, then of x0'   (Cas-DM Eq. 13, torchvision's VGG-16)."""
    x0_hat, x0 = pictures(1, 8)
    seen = []
    hook = vgg_metric.extractor.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vgg_metric(x0_hat, x0)
    hook.remove()
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for got, x in zip(seen, (x0, x0_hat), strict=True):
        assert got.shape[2:] == (224, 224)
        assert_close(got * std + mean, T(x), rtol=0, atol=1e-5)


def test_eq13_lpips_is_piqs_on_T_of_the_images(vgg_metric, hub, monkeypatch):
    """It is piq.LPIPS(replace_pooling=True) of enlarged images in [0, 1]   (Cas-DM Eq. 13).

    Here enlarged to 64 x 64; that VGG sees 224 x 224 is the claim of the test before.
    """
    monkeypatch.setattr(vgg_metric, "size", 64)
    folder = checkpoints(hub)
    vgg = tv.vgg16(weights=None, init_weights=False)
    vgg.load_state_dict(torch.load(folder / VGG), strict=False)
    weights = torch.load(folder / LPIPS_WEIGHTS)
    monkeypatch.setattr(piq.perceptual, "vgg16", lambda **how: vgg)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **how: weights)
    reference = piq.LPIPS(replace_pooling=True, reduction="none")
    x0_hat, x0 = pictures(1)
    large = [(nn.functional.interpolate(x, size=64, mode="bilinear") + 1) / 2 for x in (x0_hat, x0)]
    with torch.no_grad():
        expected = reference(*large)
    assert expected.min() > 1e-3
    assert_close(vgg_metric(x0_hat, x0), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def small_metric(vgg_metric, monkeypatch):
    """LPIPS on 32 x 32, where what is claimed does not depend on the size."""
    monkeypatch.setattr(vgg_metric, "size", 32)
    return vgg_metric


def test_lpips_is_zero_for_equal_images_and_symmetric_and_positive(small_metric):
    """LPIPS(x, x) = 0, LPIPS(x, y) = LPIPS(y, x) > 0, one number an image   (Cas-DM Eq. 13)."""
    x, y = pictures(3)
    distance = small_metric(x, y)
    assert distance.shape == (3,) and (distance > 0).all()
    assert not small_metric(x, x).any()
    assert_close(small_metric(y, x), distance)
    assert_close(small_metric(x[1:2], y[1:2]), distance[1:2], rtol=1e-5, atol=1e-6)


def test_lpips_layer_weighs_unit_length_features_per_channel():
    """sum_c w_c mean_hw (f/|f| - g/|g|)^2, which does not see the length   (LPIPS Eq. 1)."""
    generator = torch.Generator().manual_seed(0)
    f, g = torch.randn(2, 2, 5, 3, 3, generator=generator, dtype=torch.float64)
    w = torch.arange(5, dtype=torch.float64).view(1, 5, 1, 1)
    unit_f, unit_g = f / f.norm(dim=1, keepdim=True), g / g.norm(dim=1, keepdim=True)
    apart = (unit_f - unit_g).square().mean((2, 3))  # [B, 5]
    expected = apart @ w.flatten()
    assert_close(metrics._lpips_layer(f, g, w), expected)
    assert_close(metrics._lpips_layer(7 * f, g, w), expected)


@pytest.mark.parametrize("grey", [-1.0, 0.0, 1.0])
def test_lpips_of_flat_images_has_finite_gradients(small_metric, grey):
    """As of a grey prediction, which every untrained network makes."""
    for x0 in (torch.full((1, 3, 32, 32), grey), pictures(1)[0]):
        x0_hat = torch.full((1, 3, 32, 32), grey, requires_grad=True)
        small_metric(x0_hat, x0).sum().backward()
        assert x0_hat.grad.isfinite().all()


def test_lpips_of_features_that_are_all_zero_has_finite_gradients():
    """Where piq's own form, x / (|x| + 1e-10), has NaN."""
    f = torch.zeros(1, 4, 2, 2, requires_grad=True)
    metrics._lpips_layer(f, torch.ones(1, 4, 2, 2), torch.ones(1, 4, 1, 1)).sum().backward()
    assert f.grad.isfinite().all()


def test_metric_gradient_reaches_the_prediction_alone(small_metric):
    """Neither the target nor VGG's weights nor LPIPS's get a gradient."""
    x0_hat, x0 = (x.requires_grad_() for x in pictures(1))
    small_metric(x0_hat, x0).sum().backward()
    assert x0_hat.grad.any() and x0.grad is None
    assert len(list(small_metric.weights)) == 5 and not small_metric.training
    for p in small_metric.parameters():
        assert p.grad is None and not p.requires_grad


def test_metric_is_float32_whatever_the_images_dtype(small_metric):
    """It casts them at once, since the 1e-10 of LPIPS is 0 in half precision."""
    for dtype in (torch.float64, torch.bfloat16):
        x0_hat, x0 = (x.to(dtype) for x in pictures(1))
        got = small_metric(x0_hat, x0)
        assert got.dtype == torch.float32
        assert torch.equal(got, small_metric(x0_hat.float(), x0.float()))


def test_lpips_has_average_pools_alone(vgg_metric):
    """All max-pools of VGG-16 are replaced; the last, after relu5_3, is not needed (Sec. 4.1)."""
    kinds = [type(m) for m in vgg_metric.modules()]
    assert kinds.count(nn.MaxPool2d) == 0 and kinds.count(nn.AvgPool2d) == 4
    features = vgg_metric.features(pictures(1)[0])
    assert [f.shape[1] for f in features] == list(LPIPS_CHANNELS)
    assert [f.shape[2] for f in features] == [224, 112, 56, 28, 14]


WRONG_WEIGHTS = [{"lin0": torch.ones(1)}, [torch.ones(1, 64, 1, 1)] * 5, torch.ones(5)]


@pytest.mark.parametrize("content", WRONG_WEIGHTS, ids=["dict", "shapes", "tensor"])
def test_wrong_lpips_weights_raise_one_line(vgg_alone, content):
    """A file that does not hold the five weights [1, C, 1, 1] is named, and what to do with it."""
    torch.save(content, vgg_alone / LPIPS_WEIGHTS)
    message = (
        r"^[^\n]*lpips_weights.pt does not hold LPIPS's five weights[^\n]*; "
        r"expected [^\n]*; remove it[^\n]*$"
    )
    with pytest.raises(ValueError, match=message):
        lpips()


FILES = [
    ("lpips", VGG, 528),
    ("resnet", "resnet50-0676ba61.pth", 97.8),
    ("inception", "inception_v3_google-0cc3c7bd.pth", 104),
    ("swin", "swin_t-704ceda3.pth", 108),
    ("squeezenet", SQUEEZENET, 4.7),
]


@pytest.mark.parametrize("metric, file, megabytes", FILES, ids=[row[0] for row in FILES])
def test_missing_weights_raise_one_line_with_everything_one_needs(
    tmp_path, monkeypatch, metric, file, megabytes
):
    """What is missing, how large, from where, where to put it by hand, and what needs none."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(OSError) as error:
        METRICS[metric]()
    message = str(error.value)
    assert "\n" not in message
    size = re.search(rf"^{file} \(([\d.]+) MB\)", message)[1]
    assert float(size) == pytest.approx(megabytes, rel=0.01)
    assert f"https://download.pytorch.org/models/{file}" in message
    assert metric in message
    assert str(tmp_path / "hub/checkpoints" / file) in message
    assert "--metric ssim" in message
    assert not any(tmp_path.rglob("*.pth"))


def test_missing_lpips_weights_beside_a_vgg_are_named_too(vgg_alone):
    """The second file of LPIPS has an address of its own."""
    with pytest.raises(OSError, match=r"^lpips_weights.pt [^\n]*photosynthesis-team[^\n]*$"):
        lpips()


WRONG_STATES = [
    {"features.0.weight": torch.ones(64, 3, 3, 3)},
    {"features.0.weight": torch.ones(2, 2)},
    [1, 2],
]


@pytest.mark.parametrize("state", WRONG_STATES, ids=["incomplete", "shapes", "list"])
def test_weights_of_another_network_raise_one_line(tmp_path, monkeypatch, state):
    """A file without the needed tensors, with one of another shape, or without any at all."""
    torch.save(state, checkpoints(tmp_path) / SQUEEZENET)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = (
        r"^[^\n]*squeezenet1_1-b8a52dc0.pth does not fit [^\n]*; "
        r"expected torchvision's [^\n]*; remove [^\n]*$"
    )
    with pytest.raises(ValueError, match=message):
        squeezenet()


# ---- the other networks (Cas-DM Table 3) ----


def mean_square(f, g):
    return (f - g).square().flatten(1).mean(1)


def two_minus_two_cosines(f, g):
    return (2 - 2 * nn.functional.cosine_similarity(f, g, eps=1e-10)).mean((1, 2))


@torch.no_grad()
def distance(net, stages, layer, x0_hat, x0, size, mean, std):
    """Mean over the stages of a layer's distance, by hooks on torchvision's own network."""
    features = {name: [] for name in stages}
    for name in stages:

        def keep(module, args, out, name=name):
            features[name].append(out)

        net.get_submodule(name).register_forward_hook(keep)
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    for x in (x0_hat, x0):
        large = nn.functional.interpolate(x, size=(size, size), mode="bilinear")
        net(((large + 1) / 2 - mean) / std)
    return torch.stack([layer(f, g) for f, g in features.values()]).mean(0)


IMAGENET = {"size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"size": 299, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
STAGES = {
    "resnet": ["layer1", "layer2", "layer3", "layer4"],
    "inception": ["maxpool2", "Mixed_5d", "Mixed_6e", "Mixed_7c"],
    "swin": ["features.1", "features.3", "features.5", "features.7"],
    "squeezenet": ["features.1", "features.4", "features.7", "features.12"],
}


def network(name):
    """torchvision's network with random weights."""
    torch.manual_seed(0)
    if name == "inception":
        return tv.inception_v3(weights=None, init_weights=False).eval()
    builders = {"resnet": tv.resnet50, "swin": tv.swin_t}
    return builders[name](weights=None).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "inception", "swin"])
def test_table3_metric_is_the_mean_squared_difference_of_four_stages(name, tmp_path, monkeypatch):
    """By hooks on torchvision's own network, with random weights   (Cas-DM Table 3)."""
    net = network(name)
    file = next(file for metric, file, _ in FILES if metric == name)
    torch.save(net.state_dict(), checkpoints(tmp_path) / file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metric, (x0_hat, x0) = METRICS[name](), pictures(2)
    images = HALVES if name == "inception" else IMAGENET
    expected = distance(net, STAGES[name], mean_square, x0_hat, x0, **images)
    assert_close(metric(x0_hat, x0), expected, rtol=1e-3, atol=1e-7)
    assert not metric(x0, x0).any() and (expected > 0).all()
    x0_hat.requires_grad_()
    metric(x0_hat, x0).sum().backward()
    assert x0_hat.grad.isfinite().all() and x0_hat.grad.any()
    assert not any(p.requires_grad for p in metric.parameters())
    metric.size = metric.smallest
    assert metric(x0_hat.detach(), x0).isfinite().all()


NOT_HERE = "../shared/data/torch_home, with SqueezeNet's weights, is not here"


@pytest.mark.skipif(not TORCH_HOME.is_dir(), reason=NOT_HERE)
def test_squeezenet_is_lpips_of_four_stages_without_its_weights(monkeypatch):
    """2 - 2 cos of the channels' angle, mean over positions and stages   (LPIPS Eq. 1).

    By hooks on torchvision's own network with its ImageNet weights; 0 for equal images, at most 2.
    """
    monkeypatch.setenv("TORCH_HOME", str(TORCH_HOME))
    metric, (x0_hat, x0) = squeezenet(), pictures(2)
    net = tv.squeezenet1_1(weights=None).eval()
    net.load_state_dict(torch.load(TORCH_HOME / "hub/checkpoints" / SQUEEZENET))
    stages = STAGES["squeezenet"]
    expected = distance(net, stages, two_minus_two_cosines, x0_hat, x0, **IMAGENET)
    assert_close(metric(x0_hat, x0), expected, rtol=1e-3, atol=1e-4)
    assert not metric(x0, x0).any() and (expected > 0.1).all() and (expected < 2).all()
    x0_hat.requires_grad_()
    metric(x0_hat, x0).sum().backward()
    assert x0_hat.grad.any()
    assert {p.dtype for p in metric.parameters()} == {torch.float32}


# ---- SSIM, HaarPSI ----


@pytest.mark.parametrize("name", ["ssim", "haarpsi"])
def test_metrics_without_weights_are_one_minus_piqs(name):
    """0 for equal images, 1 - piq's value of images in [0, 1] otherwise, one number an image."""
    metric, theirs = METRICS[name](), getattr(piq, name)
    x0_hat, x0 = pictures(3, 32)
    assert_close(metric(x0, x0), torch.zeros(3), rtol=0, atol=1e-5)
    pairs = zip((x0_hat + 1) / 2, (x0 + 1) / 2, strict=True)
    expected = torch.stack([1 - theirs(a[None], b[None]) for a, b in pairs])
    assert_close(metric(x0_hat, x0), expected, rtol=1e-5, atol=1e-6)
    assert expected.min() > 0.05


@pytest.mark.parametrize("metric", [ssim, haarpsi])
@pytest.mark.parametrize("size", [16, 32])
def test_metrics_without_weights_clamp_the_prediction_and_keep_gradients_finite(metric, size):
    """Pixels outside [-1, 1] count as their clamp; grey and wild predictions have gradients."""
    _, x0 = pictures(2, size)
    wild = 5 * pictures(2, size, seed=3)[0]
    assert_close(metric()(wild, x0), metric()(wild.clamp(-1, 1), x0))
    for image in (wild, torch.zeros_like(x0), x0, torch.ones_like(x0)):
        x0_hat = image.clone().requires_grad_()
        metric()(x0_hat, x0).sum().backward()
        assert x0_hat.grad.isfinite().all()
