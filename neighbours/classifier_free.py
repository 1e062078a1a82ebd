r"""Classifier-free guidance: towards a label, by the difference that it makes to the model itself.

    CFG   arXiv:2207.12598v1   Classifier-Free Diffusion Guidance

    python train.py --class-cond --label-dropout 0.1
    python sample.py CHECKPOINT --cfg 2 --label 1

In Cas-DM it is theta's: phi sees the x0* of the guided eps', with the label.
"""

import torch
from torch import nn

from neighbours.plug import Neighbour
from refiner import DualDiffusion
from support import cli


class ClassifierFree(nn.Module):
    """(1 + w) out(y) - w out(no label) in the first `guided` channels, else out(y)   (CFG Eq. 6)

    w = 0 is the conditional network, w = -1 the unconditional one.  x0 is affine in eps, so that
    either output may be guided; a gate and a variance stay those of the label.
    """

    def __init__(self, net, null_label, guided, w):
        super().__init__()
        self.net, self.null_label, self.guided, self.w = net, null_label, guided, w

    def forward(self, x, t, y):
        both = torch.cat([y, torch.full_like(y, self.null_label)])
        out = self.net(torch.cat([x, x]), torch.cat([t, t]), both)
        with_label, without = out.chunk(2)
        mixed = (1 + self.w) * with_label - self.w * without
        return torch.cat([mixed[:, : self.guided], with_label[:, self.guided :]], 1)


def guide_theta(model, w):
    """Puts `ClassifierFree` in the place of theta.

    ValueError where training never dropped a label.
    """
    null_label = model.num_classes
    labels = model.theta.label_embed
    if labels is None or labels.num_embeddings == null_label:
        raise ValueError(
            "--cfg: the checkpoint knows no image without its label; expected a model trained "
            "with --label-dropout; leave --cfg out, or train one"
        )
    guided = 6 if isinstance(model, DualDiffusion) else 3  # channels that are an x0' or eps'
    model.theta = ClassifierFree(model.theta, null_label, guided, w)


# ---- the flags ----


class ClassifierFreeGuidance(Neighbour):
    settings = {"label_dropout": 0.0}

    def train_flags(self, flag):
        text = "share of images trained without their label, for classifier-free guidance"
        flag("label-dropout", text, type=cli.real(0, 1), metavar="P")

    def check(self, settings):
        if settings["label_dropout"] and not settings["class_cond"]:
            raise ValueError("--label-dropout drops labels; expected --class-cond too")

    def sampler_flags(self, parser):
        text = "classifier-free guidance: (1 + W) eps_label - W eps_null (default: 0)"
        parser.add_argument("--cfg", type=cli.real(0), metavar="W", help=text)

    def steer(self, args, sampler, settings):
        if args.cfg:
            guide_theta(sampler.model, args.cfg)
