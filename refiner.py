r"""phi, the network that refines x0* into x0', and the three models of figure 1.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models
    Dual     arXiv:2203.04304v2   Dynamic Dual-Output Diffusion Models

    DDPM            x_t -> [theta] -> eps' or x0'
    DualDiffusion   x_t -> [theta] -> x0', eps', r_t
    CasDM           x_t -> [theta] -> eps' -> Cas-DM Eq. 8 -> x0* -|-> [phi] -> x0', r_t

                                                                   -|-  no gradient passes

Each is a function (x_t, t, y=None) -> Prediction(eps_hat, x0_hat, r_t), so that neither the losses
nor the sampler ever ask which model they hold:

    x_t : [B, 3, S, S] float     t : [B] int64, 1..T     y : [B] int64 labels, or None

and each owns its losses, {term: [B]} (Cas-DM Eq. 12).
"""

import torch
from torch import nn

from diffusion import SCHEDULES, Prediction, eps_from_x0, x0_from_eps
from losses import eps_loss, mu_loss, x0_loss
from unet import UNet

# The paper's settings (Cas-DM Sec. 4.1); the keys are train.py's flags.
DEFAULTS = {
    "model": "casdm",
    "predict": "eps",
    "refiner": "unet",
    "refiner_input": "x0",
    "image_size": 32,
    "channels": 128,
    "res_blocks": 3,
    "dropout": 0.0,  # CHOICE: improved-diffusion's default; the paper names none
    "schedule": "cosine",
    "T": 4000,
    "num_classes": None,
    "label_dropout": 0.0,
}
REFINERS = {"unet": False, "fixres": True}  # name -> UNet's fixed_resolution
REFINER_INPUTS = {"x0": 3, "x0+eps": 6}  # name -> channels that phi sees


class Model(nn.Module):
    """What the models share: their schedule, the time that networks see, and the labels.

    num_classes : how many labels there are, 0..K-1; None: the model has none
    """

    terms = ()  # the names of its losses, in their order
    options = ()  # settings that mean something to this model and not to all
    makes_images, needs_labels = True, False

    def __init__(self, settings):
        super().__init__()
        self.schedule = SCHEDULES[settings["schedule"]](settings["T"])
        self.num_classes = settings["num_classes"]

    def time(self, t, like):
        """(t - 1) * 1000 / T   [B] float

        CHOICE: improved-diffusion's time, for theta and phi alike, so that its weights fit.
        """
        return (t - 1).to(like.device, like.dtype) * (1000 / (len(self.schedule.beta) - 1))

    def _apply(self, fn, recurse=True):
        # the schedule follows the weights to a device: a step on a GPU never waits for the CPU
        super()._apply(fn, recurse)
        self.schedule = self.schedule.to(next(self.parameters()).device)
        return self


class DDPM(Model):
    """One U-Net predicts eps'; x0' follows by Cas-DM Eq. 8, and r_t = 0."""

    terms = ("eps",)
    options = ("predict",)
    out_channels = 3

    def __init__(self, settings):
        super().__init__(settings)
        self.theta = network(settings, 3, self.out_channels)

    def forward(self, x_t, t, y=None):
        eps_hat = self.theta(x_t, self.time(t, x_t), y)
        x0_hat = x0_from_eps(x_t, t, eps_hat, self.schedule)
        return Prediction(eps_hat, x0_hat, torch.zeros_like(x_t[:, :1]))

    def losses(self, pred, batch):
        return {"eps": eps_loss(pred, batch)}


class DDPMx0(DDPM):
    """One U-Net predicts x0'; eps' follows by Cas-DM Eq. 3, and r_t = 1."""

    terms = ("x0",)

    def forward(self, x_t, t, y=None):
        x0_hat = self.theta(x_t, self.time(t, x_t), y)
        eps_hat = eps_from_x0(x_t, t, x0_hat, self.schedule)
        return Prediction(eps_hat, x0_hat, torch.ones_like(x_t[:, :1]))

    def losses(self, pred, batch):
        return {"x0": x0_loss(pred, batch)}


class DualDiffusion(Model):
    """One U-Net whose seven output channels are x0', eps' and the logit of r_t   (Dual Sec. 3).

    The order of the channels is its official code's.
    """

    terms = ("eps", "x0", "mu")

    def __init__(self, settings):
        super().__init__(settings)
        self.theta = network(settings, 3, 7)

    def forward(self, x_t, t, y=None):
        out = self.theta(x_t, self.time(t, x_t), y)
        x0_hat, eps_hat, logit = out.split([3, 3, 1], 1)
        return Prediction(eps_hat, x0_hat, logit.sigmoid())

    def losses(self, pred, batch):
        """All three train the one network: here a metric on x0' disturbs eps'."""
        return {
            "eps": eps_loss(pred, batch),
            "x0": x0_loss(pred, batch),
            "mu": mu_loss(pred, batch, self.schedule),
        }


class CasDM(Model):
    """theta predicts the noise, phi refines the clean image that it implies   (Cas-DM figure 1)

    Figure 3, what trains what:

        L_eps -> theta        L_x0, L_lpips and every metric -> phi        L_mu -> phi, by r_t alone

    theta and phi meet in `forward` alone, and no gradient passes there: whatever a metric asks of
    x0' can never disturb eps'.
    CHOICE: r_t is the sigmoid of one channel shared by R, G and B, as in Dual's official code,
    which the paper says it follows.
    CHOICE: phi sees x0* clamped to [-1, 1], in training and in sampling alike; at t = T it would
    be noise times 81,165.
    """

    terms = ("eps", "x0", "mu")
    options = ("refiner", "refiner_input")

    def __init__(self, settings):
        super().__init__(settings)
        self.theta = network(settings, 3, 3)
        in_channels = REFINER_INPUTS[settings["refiner_input"]]
        self.phi = network(settings, in_channels, 4, REFINERS[settings["refiner"]])
        self.phi_sees_eps = settings["refiner_input"] == "x0+eps"

    def forward(self, x_t, t, y=None):
        time = self.time(t, x_t)
        eps_hat = self.theta(x_t, time, y)
        x0_star = x0_from_eps(x_t, t, eps_hat.detach(), self.schedule)
        seen = x0_star.clamp(-1, 1)
        if self.phi_sees_eps:
            seen = torch.cat([seen, eps_hat.detach()], 1)
        x0_hat, logit = self.phi(seen, time, y).split([3, 1], 1)
        return Prediction(eps_hat, x0_hat, logit.sigmoid())

    def losses(self, pred, batch):
        """L_eps, L_x0 and L_mu -> {term: [B]}                              (Cas-DM Eq. 12)"""
        return {
            "eps": eps_loss(pred, batch),  # trains theta           (Cas-DM Eq. 14)
            "x0": x0_loss(pred, batch),  # trains phi             (Cas-DM Eq. 15)
            "mu": mu_loss(pred, batch, self.schedule),  # trains phi, by r_t alone
        }


MODELS = {"ddpm": DDPM, "dual": DualDiffusion, "casdm": CasDM}
PREDICTIONS = {"eps": DDPM, "x0": DDPMx0}  # what a DDPM's network says


def build_model(settings):
    """The model of figure 1 that `settings` describe; its schedule is `model.schedule`.

    The keys are train.py's flags, absent ones take DEFAULTS.
    ValueError for sizes that the U-Net cannot have.
    """
    settings = DEFAULTS | settings
    return model_class(settings)(settings)


def model_class(settings):
    """The class that --model and --predict name."""
    if settings["model"] == "ddpm":
        return PREDICTIONS[settings["predict"]]
    return MODELS[settings["model"]]


def network(settings, in_channels, out_channels, fixed_resolution=False):
    """A U-Net of the settings' size; --label-dropout needs one label more, for none at all."""
    labels = settings["num_classes"]
    if labels and settings["label_dropout"]:
        labels += 1
    return UNet(
        in_channels,
        out_channels,
        settings["image_size"],
        settings["channels"],
        settings["res_blocks"],
        settings["dropout"],
        labels,
        fixed_resolution=fixed_resolution,
    )
