r"""The losses: Eqs. 12-15 of the paper, and the image metrics that serve as one.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models
    LPIPS    arXiv:1801.03924v2   The Unreasonable Effectiveness of Deep Features as a Perceptual Metric
    IDDPM    arXiv:2102.09672v1   Improved Denoising Diffusion Probabilistic Models
    SP       arXiv:2401.00110     Diffusion Model with Perceptual Loss

    Cas-DM Eq. 12       `eps_loss`, `x0_loss`, `mu_loss`         mean over C, H, W -> [B]
    Cas-DM Eq. 13       `FeatureDistance` with LPIPS's backbone   and beyond it the backbones of the paper's Table 3, SSIM and HaarPSI
    IDDPM Eqs. 4, 16    `vlb_loss`, `sigma_loss`                 the bound itself is variance.py's
    SP                  `SelfPerceptual`                         a frozen diffusion model as the metric
    Cas-DM Eqs. 14, 15  `training_losses`                        which network each term trains is decided in refiner.CasDM.forward

A metric is a callable (x0_hat, x0) -> [B], both [B, 3, H, W] in [-1, 1], 0 for equal images.  Only x0_hat receives a gradient.
CHOICE: ||.||^2 is a mean, as in improved-diffusion and Dual's official code; lambda_lpips = 0.1 only makes sense against means.
"""
import piq
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from support import edges
from diffusion import mix, mu_from_eps, mu_from_x0, q_sample
from neighbours.variance import bound, log_variance


def training_losses(model, x0, t, eps, schedule, metrics=None, y=None, bf16=False, t_weight=1, t_other=None, watch=None):
    """One training step's losses: L_theta + L_phi, in one sum because they share no parameter in Cas-DM  (Cas-DM Eqs. 14, 15).

    x0, eps : [B, C, H, W]   x0 in [-1, 1]          t : [B] int64, 1..T          y : [B] int64 or None
    metrics : {name: (lambda, callable)}            bf16 : the networks under autocast; losses and metrics stay in float32
    t_weight : [B], where t was not drawn uniformly (variance.py)       t_other : [B] int64, 1..T, t' of a self-perceptual metric
    watch   : called with the model's own terms, {term: [B]}
    returns : {term: scalar}, each times its lambda (1 for eps, x0 and mu), and their sum under "loss"
    """
    x_t = q_sample(x0, t, eps, schedule)
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=bf16):
        pred = model(x_t, t, y)
    terms = {"eps": lambda: eps_loss(pred, eps), "x0": lambda: x0_loss(pred, x0), "mu": lambda: mu_loss(pred, x0, x_t, t, schedule),
             "sigma": lambda: sigma_loss(pred, x0, x_t, t, schedule), "vlb": lambda: vlb_loss(pred, x0, x_t, t, schedule),
             "label": lambda: F.cross_entropy(pred, y, reduction="none")}
    each = {name: terms[name]() for name in model.loss_terms}
    losses = {name: (values * t_weight).mean() for name, values in each.items()}
    for name, (weight, metric) in (metrics or {}).items():
        # CHOICE: as the whole objective its eps^ is the model's own; beside other losses x0' carries the noise of x0, so that it is a metric on x0' alone.
        noised = (eps if model.loss_terms else pred.eps_hat, eps, t_other, y) if isinstance(metric, SelfPerceptual) else ()
        losses[name] = weight * metric(pred.x0_hat, x0, *noised).mean()
    if watch:
        watch(each)
    return losses | {"loss": sum(losses.values())}


def eps_loss(pred, eps):
    """L_eps = ||eps - eps'||^2                                                             (Cas-DM Eq. 12)   -> [B]"""
    return _square(eps - pred.eps_hat)


def x0_loss(pred, x0):
    """L_x0 = ||x0 - x0'||^2                                                                (Cas-DM Eq. 12)   -> [B]"""
    return _square(x0 - pred.x0_hat)


def mu_loss(pred, x0, x_t, t, schedule):
    """L_mu = || mu~_t - ( r_t [mu_x0']_sg + (1 - r_t) [mu_eps']_sg ) ||^2                  (Cas-DM Eq. 12)   -> [B]

    Both means are detached, so it trains r_t alone.  mu~_t is Cas-DM Eq. 7 at the true x0.  This is the KL of Cas-DM Eq. 5 in the form of
    Cas-DM Eq. 6 without its factor, which should read 1 / (2 beta_t) for Sigma = beta_t I, not 1 / (2 beta_t^2).
    """
    mu_x0 = mu_from_x0(x_t, t, pred.x0_hat.detach(), schedule)
    mu_eps = mu_from_eps(x_t, t, pred.eps_hat.detach(), schedule)
    return _square(mu_from_x0(x_t, t, x0, schedule) - mix(mu_x0, mu_eps, pred.r_t))


def vlb_loss(pred, x0, x_t, t, schedule):
    """L_vlb = L_0 + ... + L_{T-1}, T times the term of t, in bits a dimension                (IDDPM Eq. 4)             -> [B]"""
    mu = mu_from_eps(x_t, t, pred.eps_hat, schedule)
    return (len(schedule.beta) - 1) * bound(x0, x_t, t, mu, log_variance(t, schedule, "learned", x_t, pred.v), schedule)


def sigma_loss(pred, x0, x_t, t, schedule):
    """What L_hybrid = L_simple + 0.001 L_vlb adds to L_simple; the mean is detached, so it trains v alone    (IDDPM Eq. 16)    -> [B]"""
    return 0.001 * vlb_loss(pred._replace(eps_hat=pred.eps_hat.detach()), x0, x_t, t, schedule)


def _square(x):
    return x.square().mean((1, 2, 3))


# ---- metrics ----

class FeatureDistance(nn.Module):
    """Distance of an ImageNet network's features at several layers, of images resized and rescaled as Cas-DM Eq. 13's T says.

    T : bilinear to `size` x `size` (the paper's 224), linearly from [-1, 1] to [0, 1], then the network's own mean and deviation
    plain : mean over the layers of the mean squared difference                             (Cas-DM Table 3's backbones)
    LPIPS : features of unit length over the channels, squared differences weighted per channel by `weights`, mean over the
            positions, sum over layers                                                      (LPIPS Eq. 1)

    Computed in float32, whatever the caller's autocast, or with `bf16` the network alone under bfloat16's; frozen, and never part
    of a model, optimiser or checkpoint.
    """

    def __init__(self, extractor, size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), weights=(), bf16=False):
        super().__init__()
        self.extractor, self.size, self.bf16 = extractor, size, bf16
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.weights = nn.ParameterList(w.float() for w in weights)     # [1, C, 1, 1] a layer, or none
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x0_hat, x0):
        with torch.autocast(x0.device.type, enabled=False):
            with torch.no_grad():
                target = self.features(x0)
            pairs = list(zip(self.features(x0_hat), target))
            if self.weights:
                return sum(_lpips_layer(f, g, w) for (f, g), w in zip(pairs, self.weights))
            return torch.stack([_square(f - g) for f, g in pairs]).mean(0)

    def features(self, x):
        """x [B, 3, H, W] in [-1, 1] -> the layers' features, [B, C, H, W] each (Swin's are [B, H, W, C])."""
        x = F.interpolate(x.float(), size=(self.size, self.size), mode="bilinear", align_corners=False)
        x = (((x + 1) / 2 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return [f.float() for f in self.extractor(x).values()]


def _lpips_layer(f, g, w):
    # normalize keeps the gradient of an all-zero feature finite, where piq's x / (|x| + 1e-10) gives NaN.
    f, g = F.normalize(f, dim=1, eps=1e-10), F.normalize(g, dim=1, eps=1e-10)
    return F.conv2d((f - g).square(), w).mean((1, 2, 3))        # the weighted sum in half the time of a product and a sum


class SelfPerceptual(nn.Module):
    """Distance of the middle features that a frozen diffusion model has of the image, noised again to t'                 (SP)

    L_sp = || f(x^_t', t') - f(x_t', t') ||^2,  x_t' from (x0, eps) and x^_t' from (x0', eps^), mean over C, h, w     -> [B]

    x0_hat, x0 : x0' and x0, [B, C, H, W], x0 in -1..1                  eps_hat, eps : eps^ and eps, [B, C, H, W], what each is noised with
    t_other    : [B] int64, t' in 1..T                                  y : [B] int64 labels, if the frozen model has classes

    0 for x0' = x0 with eps^ = eps, and at t' = t where x_t holds both pairs.  The frozen model is ours, trained with mean squared error; its theta gives f.
    """

    def __init__(self, frozen):
        super().__init__()
        self.frozen = frozen.eval().requires_grad_(False)

    def forward(self, x0_hat, x0, eps_hat, eps, t_other, y=None):
        with torch.no_grad():
            target = self.features(x0, eps, t_other, y)
        return _square(self.features(x0_hat, eps_hat, t_other, y) - target)

    def features(self, x0, eps, t_other, y):
        x = q_sample(x0, t_other, eps, self.frozen.schedule)
        return getattr(self.frozen, self.frozen.theta).encode(x, self.frozen.time(t_other, x), y if self.frozen.num_classes else None)[0]


def lpips(bf16=False):
    """LPIPS with VGG-16, as piq computes it, every max-pool replaced by an average pool (Cas-DM Sec. 4.1)."""
    vgg = _skeleton(tv.vgg16)
    vgg.features = nn.Sequential(*(nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in vgg.features))
    relus = [f"features.{i}" for i in (3, 8, 15, 22, 29)]       # relu1_2, 2_2, 3_3, 4_3, 5_3
    extractor = _pretrained(vgg, relus, tv.VGG16_Weights.IMAGENET1K_V1, f"--lpips (and {LPIPS_WEIGHTS}, 0.01 MB, beside it)")
    path = edges.download(LPIPS_WEIGHTS, 0.01, "--lpips", OFFLINE)
    weights = edges.read_tensors(path, "LPIPS weight file")
    if not isinstance(weights, (list, tuple)) or [getattr(w, "shape", None) for w in weights] != [(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]:
        raise ValueError(f"{path} does not hold LPIPS's five weights [1, C, 1, 1]; expected piq's file; remove it and fetch it again")
    return FeatureDistance(extractor, weights=weights, bf16=bf16)


# CHOICE: the paper says "features at different layers"; we take the ends of the four stages, torchvision's first weights, and 224 x 224
# (299 x 299 and mean 0.5 for Inception, which was trained so).
def resnet():
    return FeatureDistance(_pretrained(_skeleton(tv.resnet50), [f"layer{i}" for i in (1, 2, 3, 4)], tv.ResNet50_Weights.IMAGENET1K_V1, "--metric resnet"))


def inception():
    net = _skeleton(tv.inception_v3, init_weights=False)
    stages = ["maxpool2", "Mixed_5d", "Mixed_6e", "Mixed_7c"]
    extractor = _pretrained(net, stages, tv.Inception_V3_Weights.IMAGENET1K_V1, "--metric inception")
    return FeatureDistance(extractor, size=299, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def swin():
    return FeatureDistance(_pretrained(_skeleton(tv.swin_t), [f"features.{i}" for i in (1, 3, 5, 7)], tv.Swin_T_Weights.IMAGENET1K_V1, "--metric swin"))


def squeezenet():
    """Beyond the paper, LPIPS's stand-in with 5 MB of weights: LPIPS Eq. 1 with every channel's weight 1 and the mean over the layers.

    Features of unit length keep it below 2, at LPIPS's scale, so that a lambda means the same; differences of the plain features have no such bound.
    """
    stages = {"features.1": 64, "features.4": 128, "features.7": 256, "features.12": 512}       # channels
    extractor = _pretrained(_skeleton(tv.squeezenet1_1), list(stages), tv.SqueezeNet1_1_Weights.IMAGENET1K_V1, "--metric squeezenet")
    return FeatureDistance(extractor, weights=[torch.full((1, c, 1, 1), 1 / len(stages)) for c in stages.values()])


def ssim():
    """1 - SSIM, no weights; x0_hat is clamped to its range, so a pixel outside it learns from L_x0 alone."""
    return lambda x0_hat, x0: 1 - piq.ssim(_unit(x0_hat), _unit(x0), reduction="none")


def haarpsi():
    """1 - HaarPSI, no weights, images of 16 x 16 and more; x0_hat is clamped as for SSIM."""
    return lambda x0_hat, x0: 1 - piq.haarpsi(_unit(x0_hat), _unit(x0), reduction="none")


LPIPS_WEIGHTS = "https://github.com/photosynthesis-team/photosynthesis.metrics/releases/download/v0.4.0/lpips_weights.pt"
METRICS = {"lpips": lpips, "resnet": resnet, "inception": inception, "swin": swin, "squeezenet": squeezenet, "ssim": ssim, "haarpsi": haarpsi}
OFFLINE = "use a metric that needs no download: python train.py --model casdm --metric ssim=0.1 --data shapes"


def _unit(x):
    return ((x.float() + 1) / 2).clamp(0, 1)


def _skeleton(builder, **how):
    """The network without storage: its weights come from a file, and initialising them would only cost seconds."""
    with torch.device("meta"):
        return builder(weights=None, **how)


def _pretrained(net, layers, weights, needed_for):
    """The part of `net` up to `layers`, with torchvision's published `weights` from torch.hub's cache or the network."""
    path = edges.download(weights.url, weights.meta["_file_size"], needed_for, OFFLINE, sha256=torch.hub.HASH_REGEX.search(weights.url).group(1))
    extractor = create_feature_extractor(net.eval(), layers)
    try:
        missing = extractor.load_state_dict(edges.read_tensors(path, "weight file"), strict=False, assign=True).missing_keys
    except (RuntimeError, TypeError, AttributeError) as e:
        missing = [str(e).splitlines()[0]]
    if missing:
        raise ValueError(f"{path} does not fit {type(net).__name__} ({missing[0]}); expected torchvision's {weights}; remove the file and fetch it again")
    return extractor.float()
