r"""phi, the network that refines x0* into x0', and the three models of figure 1.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models
    Dual     arXiv:2203.04304v2   Dynamic Dual-Output Diffusion Models
    ADM      arXiv:2105.05233v4   Diffusion Models Beat GANs

    DDPM            x_t -> [net] -> eps' or x0'
    DualDiffusion   x_t -> [net] -> x0', eps', r_t
    CasDM           x_t -> [theta] -> eps' -> Cas-DM Eq. 8 -> x0* -|-> [phi] -> x0', r_t      -|-  no gradient passes

Each is a function (x_t, t, y=None) -> Prediction(eps_hat, x0_hat, r_t), so that neither the losses nor the sampler ever ask which
model they hold:

    x_t : [B, 3, S, S] float     t : [B] int64, 1..T of the model's own schedule     y : [B] int64 labels if the model has classes

`model.loss_terms` names the losses that a model owns (Cas-DM Eq. 12); `options` the flags that mean something to it, not to all.
Beside them stands the Classifier of noisy images, (x_t, t) -> logits, that guidance.py needs.
"""
import torch
from torch import nn

from diffusion import SCHEDULES, Prediction, eps_from_x0, x0_from_eps
from unet import Encoder, UNet

# The paper's settings (Cas-DM Sec. 4.1); keys are train.py's flags.
DEFAULTS = dict(model="casdm", predict="eps", refiner="unet", refiner_input="x0", image_size=32, channels=128, res_blocks=3, dropout=0.0,
                schedule="cosine", T=4000, num_classes=None, label_dropout=0.0, learn_sigma=False, objective="simple", self_perceptual={})
REFINERS = {"unet": False, "fixres": True}          # name -> UNet's fixed_resolution
REFINER_INPUTS = {"x0": 3, "x0+eps": 6}             # name -> channels that phi sees
OBJECTIVES = {"simple": ("eps",), "hybrid": ("eps", "sigma"), "vlb": ("vlb",)}     # name -> losses of a DDPM that predicts eps


class Model(nn.Module):
    """What they share: the schedule they were trained with, the networks' time, and the labels.

    num_classes : of the labels 0..K-1, or None;  null_label : K, which stands for no label, if training dropped some
    theta       : the name of the network that sees x_t;  guided : how many of its outputs, the first, are an eps' or x0'
    """
    theta = "net"
    options = ("class_cond", "label_dropout", "self_perceptual")

    def __init__(self, s, schedule):
        super().__init__()
        self.schedule = schedule
        self.num_classes = s["num_classes"]
        self.null_label = s["num_classes"] if s["label_dropout"] else None

    def time(self, t, like):
        """(t - 1) * 1000 / T, improved-diffusion's time: what it was trained with, so that its published weights fit.   [B] float"""
        return (t - 1).to(like.device, like.dtype) * (1000 / (len(self.schedule.beta) - 1))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.schedule = self.schedule.to(next(self.parameters()).device)
        return self


class DDPM(Model):
    """One U-Net that predicts eps' (r_t = 0) or x0' (r_t = 1), the other follows from it; and v, if it learns the variance (variance.py)."""
    options = (*Model.options, "predict", "learn_sigma", "objective", "init_eps")
    guided = 3

    def __init__(self, s, schedule):
        super().__init__(s, schedule)
        self.net = network(s, 3, 6 if s["learn_sigma"] else 3)
        self.predicts_x0 = s["predict"] == "x0"
        self.loss_terms = () if s["self_perceptual"] else ("x0",) if self.predicts_x0 else OBJECTIVES[s["objective"]]

    def forward(self, x_t, t, y=None):
        out, *v = self.net(x_t, self.time(t, x_t), y).split(3, 1)
        r_t = torch.full_like(x_t[:, :1], float(self.predicts_x0))
        if self.predicts_x0:
            return Prediction(eps_from_x0(x_t, t, out, self.schedule), out, r_t)
        return Prediction(out, x0_from_eps(x_t, t, out, self.schedule), r_t, *v)


class DualDiffusion(Model):
    """One U-Net whose seven output channels are x0', eps' and the logit of r_t (Dual Sec. 3; the order is its official code's)."""
    loss_terms = ("eps", "x0", "mu")
    guided = 6

    def __init__(self, s, schedule):
        super().__init__(s, schedule)
        self.net = network(s, 3, 7)

    def forward(self, x_t, t, y=None):
        x0_hat, eps_hat, logit = self.net(x_t, self.time(t, x_t), y).split([3, 3, 1], 1)
        return Prediction(eps_hat, x0_hat, logit.sigmoid())


class CasDM(Model):
    """theta predicts the noise, phi refines the clean image that it implies.

    The two meet in `forward` alone, and no gradient passes there: whatever a metric asks of x0' can never disturb eps'.
    CHOICE: r_t is the sigmoid of one channel shared by R, G and B, as in Dual's official code, which the paper says it follows.
    CHOICE: phi sees x0* clamped to [-1, 1], in training and in sampling alike; at t = T it would be noise times 81,165.
    """
    options = (*Model.options, "refiner", "refiner_input", "init_eps")
    loss_terms = ("eps", "x0", "mu")
    theta, guided = "eps_net", 3

    def __init__(self, s, schedule):
        super().__init__(s, schedule)
        self.eps_net = network(s, 3, 3)                                                                             # theta
        self.refiner = network(s, REFINER_INPUTS[s["refiner_input"]], 4, fixed_resolution=REFINERS[s["refiner"]])   # phi
        self.refiner_sees_eps = s["refiner_input"] == "x0+eps"

    def forward(self, x_t, t, y=None):
        time = self.time(t, x_t)
        eps_hat = self.eps_net(x_t, time, y)
        x0_star = x0_from_eps(x_t, t, eps_hat.detach(), self.schedule)
        seen = x0_star.clamp(-1, 1)
        if self.refiner_sees_eps:
            seen = torch.cat([seen, eps_hat.detach()], 1)
        x0_hat, logit = self.refiner(seen, time, y).split([3, 1], 1)
        return Prediction(eps_hat, x0_hat, logit.sigmoid())


class Classifier(Model):
    """The label of a noisy image: half a U-Net's logits [B, K], by cross-entropy at every t (ADM Sec. 4)."""
    options = ()
    loss_terms = ("label",)

    def __init__(self, s, schedule):
        super().__init__(s, schedule)
        self.net = Encoder(s["num_classes"] or 1, s["image_size"], s["channels"], s["res_blocks"], s["dropout"])

    def forward(self, x_t, t, y=None):
        return self.net(x_t, self.time(t, x_t))


MODELS = {"ddpm": DDPM, "dual": DualDiffusion, "casdm": CasDM, "classifier": Classifier}


def network(s, in_channels, out_channels, fixed_resolution=False):
    classes = s["num_classes"] and s["num_classes"] + bool(s["label_dropout"])
    return UNet(in_channels, out_channels, s["image_size"], s["channels"], s["res_blocks"], s["dropout"], classes, fixed_resolution=fixed_resolution)


def build_model(settings):
    """The model that `settings` describe; its schedule is `model.schedule`. Keys are train.py's flags, absent ones take DEFAULTS.

    ValueError for sizes that the U-Net cannot have.
    """
    s = DEFAULTS | settings
    return MODELS[s["model"]](s, SCHEDULES[s["schedule"]](s["T"]))
