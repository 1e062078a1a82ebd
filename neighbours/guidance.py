r"""Guidance: towards a label by a classifier's gradient, or by the difference that a label makes to the model itself.

    ADM      arXiv:2105.05233v4   Diffusion Models Beat GANs          `classifier_gradient`, `guided_x0`
    CFG      arXiv:2207.12598v1   Classifier-Free Diffusion Guidance  `classifier_free`

    python train.py --model classifier                                              on noisy shapes
    python sample.py CHECKPOINT --classifier CLF.pt --guidance 2 --label 1
    python train.py --class-cond --label-dropout 0.1
    python sample.py CHECKPOINT --cfg 2 --label 1

In Cas-DM a classifier guides both estimates of the clean image, x0* and x0', alike: their mix then moves by just what DDIM's would, whatever
r_t is, and phi sees the x0* that it was trained on.  Classifier-free guidance is theta's: phi sees the x0* of the guided eps', with the label.
"""
import torch
from torch import nn

from diffusion import at_step


def classifier_gradient(classifier, x_t, t, y, scale):
    """g = s grad_{x_t} log p(y | x_t), each image's own                                              (ADM Algorithms 1, 2)   -> [B, C, H, W]

    ADM evaluates it at x_t rather than at the mean, and so do we.   t : [B] int64, 1..T of the classifier's schedule
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        chosen = classifier(x, t.clone()).log_softmax(1).gather(1, y.clone()[:, None])
        return scale * torch.autograd.grad(chosen.sum(), x)[0]


def guided_x0(x0, t, g, schedule):
    """x0 + (1 - abar_t) / sqrt(abar_t) g: the clean image of eps - sqrt(1 - abar_t) g                (ADM Algorithm 2)   -> [B, C, H, W]"""
    abar = schedule.alpha_bar
    return x0 + at_step((1 - abar) * abar.rsqrt(), t, x0) * g


class ClassifierFree(nn.Module):
    """The network's outputs at (1 + w) out(y) - w out(no label) in their first `guided` channels, at out(y) in the rest    (CFG Eq. 6)

    w = 0 is the conditional network, w = -1 the unconditional one.  x0 is affine in eps, so that either output may be guided.
    """

    def __init__(self, net, null_label, guided, w):
        super().__init__()
        self.net, self.null_label, self.guided, self.w = net, null_label, guided, w

    def forward(self, x, t, y):
        with_label, without = self.net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, self.null_label)])).chunk(2)
        mixed = (1 + self.w) * with_label - self.w * without
        return torch.cat([mixed[:, :self.guided], with_label[:, self.guided:]], 1)


def classifier_free(model, w):
    """Puts `ClassifierFree` in the place of the model's theta. ValueError where training never dropped a label."""
    if model.null_label is None:
        raise ValueError("--cfg: the checkpoint knows no image without its label; expected a model trained with --label-dropout; leave --cfg out, or train one")
    setattr(model, model.theta, ClassifierFree(getattr(model, model.theta), model.null_label, model.guided, w))
