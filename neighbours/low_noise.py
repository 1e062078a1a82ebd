r"""Metrics at low noise alone: they act on images with t up to a share of T.

    Cas-DM   arXiv:2401.02414v1     PixelGen   arXiv:2602.02493     pMF   arXiv:2601.22158

    python train.py --metric squeezenet=0.1 --metric-until 0.5

Cas-DM's metrics act at every t (Cas-DM Eq. 13).
"""

import torch
from torch import nn

from neighbours.plug import Neighbour
from support import cli


class LowNoise(nn.Module):
    """A metric of the images with t <= last, and 0 for the others: (pred, batch) -> [B]

    metric : any (pred, batch) -> [B]; it sees those images alone, and is not called without any
    last   : 0..T
    The zeros count in the batch's mean.  On a GPU each call waits for the work before
    it: how many images it takes must be known.
    """

    def __init__(self, metric, last):
        super().__init__()
        self.metric, self.last = metric, last

    def forward(self, pred, batch):
        rows = (batch.t <= self.last).nonzero().flatten()
        none = torch.zeros(len(batch.t), device=batch.t.device)
        if not len(rows):
            return none
        return none.index_copy(0, rows, self.metric(those(pred, rows), those(batch, rows)))


def those(parts, rows):
    """The same Prediction or Batch with those rows of its tensors; a number or None stays."""
    chosen = [part[rows] if isinstance(part, torch.Tensor) else part for part in parts]
    return type(parts)(*chosen)


# ---- the flags ----


class Until(Neighbour):
    settings = {"metric_until": 1.0}

    def train_flags(self, flag):
        text = "metrics act only at t up to this share of T"
        flag("metric-until", text, type=cli.real(0, 1), metavar="SHARE")

    def check(self, settings):
        """ValueError for --metric-until where no metric stands beside other losses."""
        if settings["metric_until"] == 1:
            return
        frozen = settings.get("self_perceptual")
        if frozen and settings["model"] == "ddpm":
            raise ValueError(
                "--metric-until: --self-perceptual is a DDPM's whole objective; "
                "expected a metric beside others; leave one of them out"
            )
        if not (settings["metric"] or frozen):
            raise ValueError(
                f"--metric-until {settings['metric_until']}: the run has no metric; expected one; "
                "give --lpips, --metric or --self-perceptual, or leave it out"
            )

    def adapt(self, metric, settings):
        """The metric, limited to t <= share x T.

        The schedules are functions of t / T: a share means one noise level for any T.
        """
        if settings["metric_until"] == 1:
            return metric
        return LowNoise(metric, round(settings["metric_until"] * settings["T"]))
