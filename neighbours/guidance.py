r"""Classifier guidance: towards a label, by the gradient of a classifier of noisy images.

    ADM   arXiv:2105.05233v4   Diffusion Models Beat GANs

    python train.py --model classifier                                  on noisy shapes
    python sample.py CHECKPOINT --classifier CLF.pt --guidance 2 --label 1

In Cas-DM a classifier guides both estimates of the clean image, x0* and x0', alike: their mix then
moves by just what DDIM's would, whatever r_t is, and phi sees the x0* that it was trained on.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from diffusion import at_step
from neighbours.plug import Neighbour
from refiner import Model
from support import cli
from support.models import check_same_noise, load_model
from unet import LEVELS, UNet, group_norm


class Classifier(Model):
    """The label of a noisy image: half a U-Net's logits [B, K] at every t      (ADM Sec. 4)"""

    terms = ("label",)
    makes_images, needs_labels = False, True

    def __init__(self, settings):
        super().__init__(settings)
        size = settings["image_size"]
        classes = settings["num_classes"] or 1  # not known yet where flags are checked
        self.theta = Encoder(
            classes, size, settings["channels"], settings["res_blocks"], settings["dropout"]
        )

    def forward(self, x_t, t, y=None):
        return self.theta(x_t, self.time(t, x_t))

    def losses(self, logits, batch):
        return {"label": F.cross_entropy(logits, batch.y, reduction="none")}


def classifier_gradient(classifier, x_t, t, y, scale):
    """g = s grad_{x_t} log p(y | x_t), each image's own -> [B, C, H, W]        (ADM Algs. 1, 2)

    t : [B] int64, 1..T of the classifier's schedule
    ADM evaluates it at x_t rather than at the mean, and so do we.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        log_p = classifier(x, t.clone()).log_softmax(1)
        chosen = log_p.gather(1, y.clone()[:, None])
        return scale * torch.autograd.grad(chosen.sum(), x)[0]


def guided_x0(x0, t, g, schedule):
    """x0 + (1 - abar_t) / sqrt(abar_t) g, the clean image of eps - sqrt(1 - abar_t) g

    ADM Alg. 2 -> [B, C, H, W]
    """
    abar = schedule.alpha_bar
    return x0 + at_step((1 - abar) * abar.rsqrt(), t, x0) * g


class GuidedEstimates:
    """A step from estimates that the gradient has moved                        (ADM Alg. 2)

    step : any step of sample.py            gradient : (x_t, t) -> g, t of the original schedule
    """

    def __init__(self, step, gradient):
        self.step, self.gradient = step, gradient

    def gradient_at(self, x_t, t, chain):
        """The gradient g at step t of the chain."""
        return self.gradient(x_t, chain.step[t.to(chain.step.device)])

    def __call__(self, x_t, t, estimates, chain):
        g = self.gradient_at(x_t, t, chain)
        moved = estimates._replace(
            x0_star=guided_x0(estimates.x0_star, t, g, chain),
            x0_hat=guided_x0(estimates.x0_hat, t, g, chain),
        )
        return self.step(x_t, t, moved, chain)


class GuidedMean(GuidedEstimates):
    """A step of variance.Ancestral's kind, its mean moved by Sigma g           (ADM Alg. 1)"""

    def __call__(self, x_t, t, estimates, chain):
        g = self.gradient_at(x_t, t, chain)
        mu, log_var = self.step.gaussian(x_t, t, estimates, chain)
        return self.step.draw(t, mu + log_var.exp() * g, log_var)


# ---- the classifier's network ----


class Encoder(UNet):
    """The way down, the middle and an attention pooling: logits [B, classes]      (ADM Sec. 4)"""

    def __init__(self, classes, image_size, channels=128, res_blocks=3, dropout=0.0):
        super().__init__(3, 3, image_size, channels, res_blocks, dropout)
        del self.output_blocks, self.out
        levels = LEVELS[image_size]
        c = channels * levels[-1]
        pool = AttentionPool(c, classes, image_size >> (len(levels) - 1))
        self.out = nn.Sequential(group_norm(c), nn.SiLU(), pool)

    def decode(self, h, skips, emb):
        return self.out(h)


class AttentionPool(nn.Module):
    """[B, C, size, size] -> [B, out]: attention of the positions' mean over them and itself.

    ADM Sec. 4, after CLIP.
    """

    def __init__(self, c, out, size, heads=4):
        super().__init__()
        self.place = nn.Parameter(torch.randn(1 + size * size, c) * c**-0.5)
        self.attention = nn.MultiheadAttention(c, heads, batch_first=True)
        self.head = nn.Linear(c, out)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # [B, HW, C]
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.place.to(x.dtype)
        attended, _ = self.attention(x[:, :1], x, x, need_weights=False)
        return self.head(attended[:, 0])


# ---- the flags ----


class Guidance(Neighbour):
    models = {"classifier": Classifier}

    def implied(self, settings, typed):
        return {"sample_every": 0} if settings["model"] in self.models else {}

    def check(self, settings):
        """ValueError for settings that mean nothing to a classifier."""
        if settings["model"] not in self.models:
            return
        if settings["sample_every"] or settings["eval_every"] or settings["eval_at"]:
            raise ValueError(
                "--sample-every, --eval-every and --eval-at: a classifier makes no images; "
                "leave them out"
            )
        for key in ("class_cond", "label_dropout", "self_perceptual"):
            if settings.get(key):
                raise ValueError(
                    f"{cli.flag_of(key)} means nothing to --model classifier; leave it out"
                )

    def sampler_flags(self, parser):
        text = "guide by this classifier, which train.py --model classifier made"
        parser.add_argument("--classifier", type=Path, metavar="CLF.pt", help=text)
        text = "scale of the classifier's gradient (default: 1)"
        parser.add_argument("--guidance", type=cli.real(0), metavar="S", help=text)

    def check_sampler(self, parser, args):
        """parser.error for --guidance without --classifier."""
        if args.guidance is not None and not args.classifier:
            parser.error(
                "--guidance scales a classifier's gradient; "
                "expected --classifier too; name one, or use --cfg"
            )

    def steer(self, args, sampler, settings):
        """Has --classifier guide every step; ValueError where it does not fit the model."""
        if not args.classifier:
            return
        classifier, _, theirs = load_model(args.classifier, sampler.device, classifier=True)
        check_same_noise(args.classifier, theirs, settings)
        classes = theirs["num_classes"]
        if settings.get("num_classes") not in (None, classes):
            raise ValueError(
                f"{args.classifier} has {classes} classes and the model "
                f"{settings['num_classes']}; expected the same labels; train one again"
            )
        scale = 1.0 if args.guidance is None else args.guidance
        sampler.classes = classes
        sampler.make_step = guided(sampler.make_step, classifier, scale)


def guided(make_step, classifier, scale):
    """What makes a step, so that the steps it makes are guided."""

    def make(noise, y):
        """(noise, y) -> the sampler's step, with the classifier's gradient in it."""

        def gradient(x_t, t):
            return classifier_gradient(classifier, x_t, t, y, scale)

        step = make_step(noise, y)
        kind = GuidedMean if hasattr(step, "gaussian") else GuidedEstimates
        return kind(step, gradient)

    return make
