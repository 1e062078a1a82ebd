r"""The step back as a Gaussian of its own: its variance, fixed or learned, and the bound.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models
    IDDPM    arXiv:2102.09672v1   Improved Denoising Diffusion Probabilistic Models
    DDPM     arXiv:2006.11239v2   Denoising Diffusion Probabilistic Models

    DDPM Sec. 3.2    beta~_t or beta_t        `log_variance`
    IDDPM Eq. 15     v between the two logs   `LearnedVariance`
    DDPM Alg. 2      a step back              `Ancestral`
    IDDPM Eqs. 4-7   L_T, L_{t-1}, L_0        `prior_bits`, `bound`
    IDDPM Eq. 16     L_hybrid                 `sigma_loss`
    IDDPM Eq. 18     importance-sampled t     `ImportanceSampler`

    python train.py --model ddpm --learn-sigma                    eps' and v by L_hybrid
    python train.py --model ddpm --learn-sigma --objective vlb    by the bound alone
    python sample.py CHECKPOINT --sampler ddpm --steps 250
    python sample.py CHECKPOINT --bits-per-dim --data cifar10

Symbols and shapes are those of diffusion.py.  Log variances are [B, 1, 1, 1], or [B, C, H, W] where
they are learned.
"""

import functools
import math

import numpy as np
import torch

from data import DATASETS, from_pixels, load_images
from diffusion import (
    Prediction,
    at_step,
    clean_estimates,
    eps_from_x0,
    gaussian_kl,
    mix,
    mu_from_eps,
    mu_from_x0,
    p_sample,
    posterior_variance,
    q_sample,
    respace,
    x0_from_eps,
)
from losses import eps_loss
from neighbours.plug import Neighbour
from refiner import DDPM
from support import cli, parallel
from support.draws import Noise, batch_indices

VARIANCES = ("small", "large", "learned")
OBJECTIVES = ("simple", "hybrid", "vlb")


def log_variance(t, schedule, kind, like, v=None):
    """log sigma_t^2 of p(x_{t-1} | x_t), in the dtype of `like`.

    small   : log beta~_t, the variance of the posterior                        (DDPM Sec. 3.2)
    large   : log beta_t, that of the step to noise                             (DDPM Sec. 3.2)
    learned : (1 + v)/2 log beta_t + (1 - v)/2 log beta~_t                      (IDDPM Eq. 15)
              v [B, C, H, W], -1..1 but not held there: 2 v - 1 of the paper's v, as in its code

    CHOICE: beta~_1 is 0 and has no log; beta~_2 stands in its place, for `large` too, as in
    improved-diffusion, and beta_1 in a chain of one step.
    """
    steps = torch.arange(len(schedule.beta), device=schedule.beta.device)
    large = schedule.beta.log()
    small = large
    if len(steps) > 2:
        small = posterior_variance(steps.clamp(min=2), schedule).log()
    if kind == "learned":
        return (1 + v) / 2 * at_step(large, t, like) + (1 - v) / 2 * at_step(small, t, like)
    if kind == "large":
        return at_step(torch.where(steps == 1, small, large), t, like)
    return at_step(small, t, like)


# ---- sampling ----


class Ancestral:
    """x_{t-1} = mu + sigma_t z, with the mixed mean of Cas-DM Eq. 11    (DDPM Alg. 2, Cas-DM Eq. 4)

    kind : one of VARIANCES           noise : called for each step's z [B, C, H, W] but the last's
    """

    def __init__(self, kind, noise):
        self.kind, self.noise = kind, noise

    def __call__(self, x_t, t, estimates, chain):
        return self.draw(t, *self.gaussian(x_t, t, estimates, chain))

    def gaussian(self, x_t, t, estimates, chain):
        """Mean and log variance of p(x_{t-1} | x_t)                        (Cas-DM Eqs. 4, 11)"""
        x0_star, x0_hat, r_t, v = estimates
        eps_hat = eps_from_x0(x_t, t, x0_star, chain)
        mu_x0, mu_eps = mu_from_x0(x_t, t, x0_hat, chain), mu_from_eps(x_t, t, eps_hat, chain)
        return mix(mu_x0, mu_eps, r_t), log_variance(t, chain, self.kind, x_t, v)

    def draw(self, t, mu, log_var):
        """x_{t-1} of that Gaussian; at t = 1 its mean."""
        z = self.noise() if (t > 1).any() else 0  # a rank's last batch may be empty
        return p_sample(mu, (log_var / 2).exp(), z)


def ancestral(args, settings):
    """The sampler that --sampler ddpm and --variance ask for."""
    kind = variance_of(args, settings)
    return lambda noise, y: Ancestral(kind, noise)


def variance_of(args, settings):
    """--variance, or the model's own if it learned one, else small."""
    learned = settings.get("learn_sigma")
    if args.variance == "learned" and not learned:
        raise ValueError(
            "--variance learned: the model learned none; "
            "expected one trained with --learn-sigma; use small or large"
        )
    return args.variance or ("learned" if learned else "small")


# ---- the bound ----


def bound(x0, x_t, t, mu, log_var, schedule):
    """One term of the variational bound, in bits a dimension -> [B]            (IDDPM Eqs. 5, 6)

    t > 1 : L_{t-1} = KL( q(x_{t-1} | x_t, x0) || N(mu, exp(log_var)) )
    t = 1 : L_0 = -log p(x0 | x_1), the decoder on 256 levels
    """
    small = log_variance(t, schedule, "small", x_t)
    kl = gaussian_kl(mu_from_x0(x_t, t, x0, schedule), small, mu, log_var)
    decoder = -discretised_log_likelihood(x0, mu, log_var / 2)
    first = (t == 1).view(-1, 1, 1, 1).to(x0.device)
    return torch.where(first, decoder, kl).mean((1, 2, 3)) / math.log(2)


def discretised_log_likelihood(x, mu, log_sigma):
    """log of the mass of N(mu, sigma^2) on [x - 1/255, x + 1/255], an 8-bit level's bin.

    DDPM Eq. 13.  The bins of 0 and 255 reach to infinity.  Mass and tails come from erfc on the
    side away from the mean, so that a far bin is not lost to rounding.  A mass below 1e-12 counts
    as 1e-12.
    """

    def edge(offset):
        return ((x - mu + offset) / log_sigma.exp()).clamp(-1e4, 1e4) / math.sqrt(2)

    low, high = edge(-1 / 255), edge(1 / 255)
    low = torch.where(x < -0.999, torch.full_like(low, -math.inf), low)
    high = torch.where(x > 0.999, torch.full_like(high, math.inf), high)
    flip = low > 0  # the tail on the left is the exact one
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    mass = (torch.erfc(-high) - torch.erfc(-low)) / 2
    return mass.clamp(min=1e-12).log()


def prior_bits(x0, schedule):
    """L_T = KL( q(x_T | x0) || N(0, I) ), in bits a dimension -> [B]           (IDDPM Eq. 7)"""
    abar = schedule.alpha_bar[-1].to(x0.device, x0.dtype)
    zero = torch.zeros_like(x0)
    kl = gaussian_kl(abar.sqrt() * x0, (1 - abar).log() + zero, zero, zero)
    return kl.mean((1, 2, 3)) / math.log(2)


@torch.inference_mode()
def bits_per_dim(model, x0, steps, kind, noise, y=None, watch=None):
    """The bound L_0 + ... + L_T of images, in bits a dimension                 (IDDPM Eq. 4)

    Over the re-spaced chain of `steps` steps.
    x0      : [B, C, H, W] in [-1, 1], of 256 levels
    noise   : called for each step's eps, [B, C, H, W]
    returns : [B, steps + 1]: the terms of t = 1 .. steps, then the prior's
    """
    chain = respace(model.schedule, steps)
    step_back = Ancestral(kind, noise)
    terms = []
    originals = chain.step.tolist()
    for i in range(1, len(originals)):
        t = torch.full((len(x0),), i, device=x0.device)
        x_t = q_sample(x0, t, noise(), chain)
        pred = model(x_t, torch.full_like(t, originals[i]), y)
        estimates = clean_estimates(x_t, t, pred, chain)
        mu, log_var = step_back.gaussian(x_t, t, estimates, chain)
        terms.append(bound(x0, x_t, t, mu, log_var, chain))
        if watch:
            watch()
    return torch.stack([*terms, prior_bits(x0, chain)], 1)


# ---- learning it ----


class LearnedVariance(DDPM):
    """A DDPM whose network says v beside eps', by L_hybrid                 (IDDPM Eqs. 15, 16)"""

    terms = ("eps", "sigma")
    out_channels = 6

    def forward(self, x_t, t, y=None):
        eps_hat, v = self.theta(x_t, self.time(t, x_t), y).split(3, 1)
        x0_hat = x0_from_eps(x_t, t, eps_hat, self.schedule)
        return Prediction(eps_hat, x0_hat, torch.zeros_like(x_t[:, :1]), v)

    def losses(self, pred, batch):
        return {"eps": eps_loss(pred, batch), "sigma": sigma_loss(pred, batch, self.schedule)}


class VlbDDPM(LearnedVariance):
    """The same by the bound alone, L_vlb                                       (IDDPM Eq. 4)"""

    terms = ("vlb",)

    def losses(self, pred, batch):
        return {"vlb": vlb_loss(pred, batch, self.schedule)}


def vlb_loss(pred, batch, schedule):
    """L_vlb = L_0 + ... + L_{T-1}: T times the term of t, in bits a dimension  (IDDPM Eq. 4)"""
    x_t, t = batch.x_t, batch.t
    mu = mu_from_eps(x_t, t, pred.eps_hat, schedule)
    log_var = log_variance(t, schedule, "learned", x_t, pred.v)
    return (len(schedule.beta) - 1) * bound(batch.x0, x_t, t, mu, log_var, schedule)


def sigma_loss(pred, batch, schedule):
    """What L_hybrid = L_simple + 0.001 L_vlb adds to L_simple                  (IDDPM Eq. 16)

    The mean is detached, so that it trains v alone.
    """
    return 0.001 * vlb_loss(pred._replace(eps_hat=pred.eps_hat.detach()), batch, schedule)


class ImportanceSampler:
    """t with p_t ~ sqrt(E[L_t^2]) over the last ten L_t of each t              (IDDPM Eq. 18)

    Uniform until each t has ten.  A thousandth of p is kept uniform, as in improved-diffusion, so
    that a t once thought easy is seen again.
    """

    name, history = "importance", 10

    def __init__(self, T):
        self.seen, self.counts = np.zeros((T, self.history)), np.zeros(T, np.int64)

    def p(self):
        """p_t of t = 1..T   [T] float64"""
        T = len(self.counts)
        if (self.counts < self.history).any():
            return np.full(T, 1 / T)
        p = np.sqrt((self.seen**2).mean(1))
        return 0.999 * p / p.sum() + 0.001 / T

    def draw(self, rng, n):
        """t [n] int64, 1..T, and its weight 1 / (T p_t) [n], which makes up for a t drawn often."""
        p = self.p()
        t = rng.choice(len(p), n, p=p)
        return {"t": t + 1, "weight": (1 / (len(p) * p[t])).astype(np.float32)}

    def note(self, t, losses):
        """L_t [n] of the drawn t [n], unweighted; what is not finite is left out."""
        for i, loss in zip(t - 1, losses["vlb"], strict=True):
            if np.isfinite(loss):
                self.seen[i, self.counts[i] % self.history] = loss
                self.counts[i] += 1

    def state_dict(self):
        return {
            "seen": torch.from_numpy(self.seen.copy()),
            "counts": torch.from_numpy(self.counts.copy()),
        }

    def load_state_dict(self, state):
        self.seen[:], self.counts[:] = state["seen"].numpy(), state["counts"].numpy()


# ---- the flags ----


class Variance(Neighbour):
    settings = {"learn_sigma": False, "objective": "simple"}
    samplers = {"ddpm": ancestral}

    def train_flags(self, flag):
        text = "DDPM learns the variance of the step back too"
        flag("learn-sigma", text, action="store_true", default=None)
        flag("objective", "of DDPM's eps mode; hybrid with --learn-sigma", choices=OBJECTIVES)

    def implied(self, settings, typed):
        return {"objective": "hybrid"} if settings["learn_sigma"] else {}

    def check(self, settings):
        """ValueError where --learn-sigma, --objective and the model contradict each other."""
        learns, objective = settings["learn_sigma"], settings["objective"]
        if learns != (objective != "simple"):
            raise ValueError(
                f"--objective {objective}: hybrid and vlb train the variance of --learn-sigma, "
                "simple does not; give both or neither"
            )
        mode = settings["model"], settings["predict"]
        if learns and (mode != ("ddpm", "eps") or settings.get("self_perceptual")):
            raise ValueError(
                "--learn-sigma belongs to DDPM's eps mode and its own objectives; "
                "leave out --predict x0, --self-perceptual and other models"
            )

    def model(self, settings):
        if settings["learn_sigma"]:
            return VlbDDPM if settings["objective"] == "vlb" else LearnedVariance

    def draws(self, settings):
        return [ImportanceSampler(settings["T"])] if settings["objective"] == "vlb" else []

    def sampler_flags(self, parser):
        """--variance."""
        parser.add_argument(
            "--variance",
            choices=VARIANCES,
            help="of --sampler ddpm and of the bound: beta~_t, beta_t or the model's own "
            "(default: learned if it is, else small)",
        )

    def sample_flags(self, parser):
        """--bits-per-dim, and the images that it is of."""
        bits = parser.add_argument_group("instead of sampling")
        text = "print the variational bound of --n images of --data, over --steps steps"
        bits.add_argument("--bits-per-dim", action="store_true", help=text)
        text = f"{', '.join(DATASETS)}, a folder of images, or an images .npz"
        bits.add_argument("--data", metavar="NAME|PATH", help=text)
        bits.add_argument("--data-dir", metavar="DIR", help="where a named set lies")

    def check_sample(self, parser, args):
        """parser.error where --bits-per-dim and other flags contradict each other."""
        if args.bits_per_dim != (args.data is not None):
            parser.error("--bits-per-dim and --data go together: the bound is that of given images")
        if not args.bits_per_dim:
            if args.data_dir:
                parser.error(
                    "--data-dir says where --data lies; leave it out, or give --bits-per-dim"
                )
            return
        foreign = ("sampler", "trace", "eta", "label", "cfg", "classifier", "spacing", "out")
        for flag in foreign:
            if getattr(args, flag, None) is not None:
                parser.error(f"--{flag} means nothing to --bits-per-dim; leave it out")
        if args.precision != "fp32":
            parser.error("--precision means nothing to --bits-per-dim; leave it out")

    def steer(self, args, sampler, settings):
        """ValueError for --variance with a sampler that has none."""
        if args.variance and sampler.name != "ddpm":
            raise ValueError(
                f"--variance {args.variance} with the sampler {sampler.name}; expected --sampler "
                "ddpm or --bits-per-dim; use --eta with DDIM"
            )

    def instead(self, args, model, settings):
        if args.bits_per_dim:
            print_bits(args, model, settings)
        return args.bits_per_dim


def print_bits(args, model, settings):
    """The bound of --n images of --data, a row a term, and their sum with its standard error."""
    kind = variance_of(args, settings)
    which = args.data, settings["image_size"], args.data_dir
    images = parallel.first(lambda: load_images(*which))
    labels = images.labels if model.num_classes else None
    if model.num_classes and (labels is None or labels.max() >= model.num_classes):
        raise ValueError(
            f"{args.data} lacks the labels that the model was trained with; "
            "expected labelled images; name the set that it was trained on"
        )
    n = min(args.n, len(images.pixels))
    n_steps = args.steps or min(100, len(model.schedule.beta) - 1)
    chosen, found = batch_indices(len(images.pixels), n, 0, args.seed), []
    device = next(model.parameters()).device
    with cli.progress(n * n_steps, "bound", "step") as bar:
        for first, count in parallel.share(n, args.batch_size):
            part = chosen[first : first + count]
            x0 = from_pixels(images.pixels[part]).to(device)
            noise = Noise(args.seed, "bits", part.tolist(), x0.shape[1:], device)
            y = None if labels is None else torch.from_numpy(labels[part]).to(device)
            done = count * parallel.size()
            watch = functools.partial(bar.update, done)
            bits = bits_per_dim(model, x0, n_steps, kind, noise, y, watch)
            found.append(parallel.concat(bits).cpu().double())
    found = torch.cat(found)
    steps = respace(model.schedule, n_steps).step.tolist()[1:]
    for name, term in zip([*steps, "prior"], found.mean(0).tolist(), strict=True):
        print(f"t {name:>6}  {term:.6f}")
    sums = found.sum(1)
    spread = sums.std().item() / n**0.5 if n > 1 else math.nan
    print(
        f"{sums.mean().item():.4f} +- {spread:.4f} bits/dim of {n} images of {args.data}, "
        f"{n_steps} steps, {kind} variance"
    )
