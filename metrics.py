r"""The metrics: LPIPS (Cas-DM Eq. 13), the networks of the paper's Table 3, and three beyond it.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models
    LPIPS    arXiv:1801.03924v2   The Unreasonable Effectiveness of Deep Features

An image metric is a callable (x0_hat, x0) -> [B]: both [B, 3, H, W] in [-1, 1], 0 for equal images,
and only x0_hat receives a gradient.  `OnX0` makes of it what losses.py takes.

To add one: a function that returns such a callable, and its row in METRICS.
CHOICE: a network's metric sees x0' as phi says it, not clamped; SSIM and HaarPSI clamp it.
"""

import piq
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from losses import squared_norm
from support.files import download, read_tensors


class OnX0(nn.Module):
    """An image metric as a loss of x0': (pred, batch) -> [B]."""

    def __init__(self, metric):
        super().__init__()
        self.metric = metric

    def forward(self, pred, batch):
        return self.metric(pred.x0_hat, batch.x0)


def T(x, size=224):
    """Bilinear to size x size, then linearly from [-1, 1] to [0, 1]            (Cas-DM Eq. 13)"""
    x = F.interpolate(x.float(), size=(size, size), mode="bilinear", align_corners=False)
    return (x + 1) / 2


class FeatureDistance(nn.Module):
    """Mean squared distance of an ImageNet network's features, averaged over its layers.

    The images go through T, at the network's own size, then its own mean and deviation
    (Cas-DM Table 3).  Frozen, in float32, and never part of a model, optimiser or checkpoint.
    """

    smallest = 32  # the least side that the network can take

    def __init__(self, extractor, size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        super().__init__()
        self.extractor, self.size = extractor, size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x0_hat, x0):
        with torch.no_grad():
            target = self.features(x0)
        return self.distance(self.features(x0_hat), target)

    def distance(self, features, target):
        layers = [squared_norm(f - g) for f, g in zip(features, target, strict=True)]
        return torch.stack(layers).mean(0)

    def features(self, x):
        """x [B, 3, H, W] in [-1, 1] -> the layers' features, [B, C, h, w] (Swin's [B, h, w, C])."""
        x = (T(x, self.size) - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        return list(self.extractor(x).values())


class LPIPS(FeatureDistance):
    """sum_l mean_hw sum_c w_lc (f_lc - g_lc)^2 of features of unit length          (LPIPS Eq. 1)

    LPIPS(T(x0), T(x0')) is the paper's metric                                  (Cas-DM Eq. 13).
    weights : w_l of each layer, [1, C, 1, 1]
    """

    def __init__(self, extractor, weights):
        super().__init__(extractor)
        self.weights = nn.ParameterList(w.float() for w in weights).requires_grad_(False)

    def distance(self, features, target):
        layers = zip(features, target, self.weights, strict=True)
        return sum(_lpips_layer(f, g, w) for f, g, w in layers)


def _lpips_layer(f, g, w):
    # normalize keeps the gradient of an all-zero feature finite, where x / (|x| + 1e-10) gives NaN
    f, g = F.normalize(f, dim=1, eps=1e-10), F.normalize(g, dim=1, eps=1e-10)
    # the weighted sum over the channels, in half the time of a product and a sum
    return F.conv2d((f - g).square(), w).mean((1, 2, 3))


# ---- the networks ----


def lpips():
    """LPIPS with VGG-16 as piq computes it; every max-pool an average pool (Cas-DM Sec. 4.1)."""
    vgg = _skeleton(tv.vgg16)
    layers = [nn.AvgPool2d(2) if isinstance(m, nn.MaxPool2d) else m for m in vgg.features]
    vgg.features = nn.Sequential(*layers)
    relus = [f"features.{i}" for i in (3, 8, 15, 22, 29)]  # relu1_2, 2_2, 3_3, 4_3, 5_3
    needed_for = f"--lpips (and {LPIPS_WEIGHTS}, 0.01 MB, beside it)"
    extractor = _pretrained(vgg, relus, tv.VGG16_Weights.IMAGENET1K_V1, needed_for)
    path = download(LPIPS_WEIGHTS, 0.01, "--lpips", OFFLINE)
    weights = read_tensors(path, "LPIPS weight file")
    shapes = [(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    fits = isinstance(weights, (list, tuple))
    if not fits or [getattr(w, "shape", None) for w in weights] != shapes:
        raise ValueError(
            f"{path} does not hold LPIPS's five weights [1, C, 1, 1]; "
            "expected piq's file; remove it and fetch it again"
        )
    return LPIPS(extractor, weights)


# CHOICE: the paper says "features at different layers"; we take the ends of the four stages,
# torchvision's first weights, and 224 x 224 (299 x 299 and mean 0.5 for Inception, as trained).


def resnet():
    """ResNet-50's four stages (Cas-DM Table 3)."""
    stages = [f"layer{i}" for i in (1, 2, 3, 4)]
    weights = tv.ResNet50_Weights.IMAGENET1K_V1
    return FeatureDistance(_pretrained(_skeleton(tv.resnet50), stages, weights, "--metric resnet"))


def inception():
    """Inception v3 at four depths (Cas-DM Table 3)."""
    net = _skeleton(tv.inception_v3, init_weights=False)
    stages = ["maxpool2", "Mixed_5d", "Mixed_6e", "Mixed_7c"]
    weights = tv.Inception_V3_Weights.IMAGENET1K_V1
    extractor = _pretrained(net, stages, weights, "--metric inception")
    found = FeatureDistance(extractor, size=299, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    found.smallest = 75
    return found


def swin():
    """Swin-T's four stages (Cas-DM Table 3)."""
    stages = [f"features.{i}" for i in (1, 3, 5, 7)]
    weights = tv.Swin_T_Weights.IMAGENET1K_V1
    return FeatureDistance(_pretrained(_skeleton(tv.swin_t), stages, weights, "--metric swin"))


def squeezenet():
    """Beyond the paper, LPIPS's stand-in with 5 MB of weights: LPIPS Eq. 1 with equal weights.

    Every channel counts 1 and the layers are averaged.  Features of unit length keep it below 2,
    at LPIPS's scale, so that a lambda means the same.
    """
    stages = {"features.1": 64, "features.4": 128, "features.7": 256, "features.12": 512}
    net, weights = _skeleton(tv.squeezenet1_1), tv.SqueezeNet1_1_Weights.IMAGENET1K_V1
    extractor = _pretrained(net, list(stages), weights, "--metric squeezenet")
    equal = [torch.full((1, c, 1, 1), 1 / len(stages)) for c in stages.values()]
    return LPIPS(extractor, equal)


def ssim():
    """1 - SSIM, no weights; x0' is clamped: a pixel outside its range learns from L_x0 alone."""
    return lambda x0_hat, x0: 1 - piq.ssim(_unit(x0_hat), _unit(x0), reduction="none")


def haarpsi():
    """1 - HaarPSI, no weights, images of 16 x 16 and more; clamped as for SSIM."""
    return lambda x0_hat, x0: 1 - piq.haarpsi(_unit(x0_hat), _unit(x0), reduction="none")


METRICS = {
    "lpips": lpips,
    "resnet": resnet,
    "inception": inception,
    "swin": swin,
    "squeezenet": squeezenet,
    "ssim": ssim,
    "haarpsi": haarpsi,
}
LPIPS_WEIGHTS = (
    "https://github.com/photosynthesis-team/photosynthesis.metrics"
    "/releases/download/v0.4.0/lpips_weights.pt"
)
OFFLINE = (
    "use a metric that needs no download: "
    "python train.py --model casdm --metric ssim=0.1 --data shapes"
)


def _unit(x):
    return ((x.float() + 1) / 2).clamp(0, 1)


def _skeleton(builder, **how):
    # the network without storage: its weights come from a file
    with torch.device("meta"):
        return builder(weights=None, **how)


def _pretrained(net, layers, weights, needed_for):
    # the part of `net` up to `layers`, with torchvision's weights from torch.hub's cache or the net
    sha256 = torch.hub.HASH_REGEX.search(weights.url).group(1)
    path = download(weights.url, weights.meta["_file_size"], needed_for, OFFLINE, sha256=sha256)
    extractor = create_feature_extractor(net.eval(), layers)
    state = read_tensors(path, "weight file")
    try:
        missing = extractor.load_state_dict(state, strict=False, assign=True).missing_keys
    except (RuntimeError, TypeError, AttributeError) as e:
        missing = [str(e).splitlines()[0]]
    if missing:
        raise ValueError(
            f"{path} does not fit {type(net).__name__} ({missing[0]}); "
            f"expected torchvision's {weights}; remove the file and fetch it again"
        )
    return extractor.float()
