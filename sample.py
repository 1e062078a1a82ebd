r"""Noise to images: figure 2 of the paper, by DDIM unless the run names another sampler.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models

    python sample.py runs/casdm-shapes/checkpoint.pt         64 images in one grid, samples.png
    python sample.py CHECKPOINT --n 50000 --out images.npz   arr_0 uint8 [N, H, W, 3], for fid.py
    python sample.py CHECKPOINT --n 1000 --out FOLDER        one PNG an image
    python sample.py CHECKPOINT --trace trace.png            x_t, x0*, x0' and r_t over the steps
    python sample.py CHECKPOINT --sampler dpm++ --steps 10   few steps, by neighbours/solvers.py
    python sample.py CHECKPOINT --label 3                    one class, of a model with classes
    python sample.py CHECKPOINT --save-weights FILE.pt       what it takes to sample, in float16

Samples come from the moving average of the weights (--raw: from the trained ones).  Image i
follows from (seed, i) alone: it is the same for any --n and --batch-size, its noise bitwise and its
pixels within one level.  What a checkpoint needs to be rebuilt is inside it; no flag repeats it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from data import to_pixels
from diffusion import (
    clean_estimates,
    ddim_mu_from_eps,
    ddim_mu_from_x0,
    ddim_sigma,
    eps_from_x0,
    mix,
    p_sample,
    per_image,
    respace,
)
from support import cli, parallel, pictures
from support.checkpoint import write_weights
from support.draws import Noise
from support.files import check_writable, save_npz
from support.models import load_model, neighbours, set_precision


@torch.inference_mode()
def sample(model, x_T, chain, step, y=None, watch=None):
    """x_T to x0, one step of the chain after another                           (Cas-DM figure 2)

    x_T     : [B, C, H, W] ~ N(0, I)      chain : the model's schedule, re-spaced
    step    : (x_t, t, estimates, chain) -> x_{t-1}      y : [B] int64 labels, or None
    watch   : called with each step's original t, x_t and estimates
    returns : [B, C, H, W], in [-1, 1]
    """
    x_t = x_T
    originals = chain.step.tolist()  # the t that the model knows
    for i in range(len(originals) - 1, 0, -1):
        t = torch.full((len(x_t),), i, device=x_t.device)
        pred = model(x_t, torch.full_like(t, originals[i]), y)  # eps', x0' and r_t
        estimates = clean_estimates(x_t, t, pred, chain)  # x0* and x0'
        if watch:
            watch(originals[i], x_t, estimates)
        x_t = step(x_t, t, estimates, chain)
    return x_t


class Ddim:
    """x_{t-1} = r_t mu_x0'^ddim + (1 - r_t) mu_eps'^ddim + sigma_t z    (Cas-DM Eqs. 4, 16, 17)

    eta : of `ddim_sigma`; 0 draws nothing      noise : called for each step's z [B, C, H, W]
    """

    def __init__(self, eta=0.0, noise=None):
        self.eta, self.noise = eta, noise

    def __call__(self, x_t, t, estimates, chain):
        x0_star, x0_hat, r_t, _ = estimates
        eps_hat = eps_from_x0(x_t, t, x0_star, chain)
        mu_x0 = ddim_mu_from_x0(x_t, t, x0_hat, chain, self.eta)
        mu_eps = ddim_mu_from_eps(x_t, t, eps_hat, chain, self.eta)
        mu = mix(mu_x0, mu_eps, r_t)
        if not self.eta:
            return mu
        return p_sample(mu, per_image(ddim_sigma(t, chain, self.eta), mu), self.noise())


class Sampler:
    """Draws images of a model: image i from (seed, i), for any number and any batch of them.

    make_step : (noise, y) -> the step of `sample`; DDIM's with eta = 0 unless it is given
    name      : the step's, for `described`
    """

    def __init__(self, model, image_size, steps=100, seed=0, make_step=None, name="ddim"):
        self.model, self.shape, self.seed = model, (3, image_size, image_size), seed
        self.device = next(model.parameters()).device
        self.chain = respace(model.schedule, steps)
        self.name = name
        self.make_step = make_step or (lambda noise, y: Ddim())
        self.classes = model.num_classes
        self.label = None  # the class of every image; None: image i has the label i mod `classes`

    def __call__(self, first, n, watch=None):
        """Images first .. first + n - 1, [n, 3, S, S] in [-1, 1]; watch as in `sample`.

        ArithmeticError where an image is not finite.
        """
        noise = Noise(self.seed, "sample", range(first, first + n), self.shape, self.device)
        y = self.labels(first, n)
        x0 = sample(self.model, noise(), self.chain, self.make_step(noise, y), y, watch)
        if not x0.isfinite().all():
            raise ArithmeticError(
                "a sampled image is not finite; "
                "expected finite weights and activations; use an earlier checkpoint"
            )
        return x0

    def described(self):
        """How many steps of what, and from where: few steps begin pure noise below t = T."""
        t, signal = self.chain.step[-1].item(), self.chain.alpha_bar[-1].sqrt().item()
        steps = len(self.chain.step) - 1
        return f"{steps} steps of {self.name} from t = {t} (sqrt(abar_t) = {signal:.3f})"

    def labels(self, first, n):
        """[n] int64, or None where there are no classes."""
        if not self.classes:
            return None
        if self.label is not None:
            return torch.full((n,), self.label, device=self.device)
        return torch.arange(first, first + n, device=self.device) % self.classes


# ---- the script ----


def ddim(args, settings):
    """The sampler that --sampler ddim and --eta ask for."""
    return lambda noise, y: Ddim(args.eta or 0.0, noise)


# To add one: a class like Ddim, a function like `ddim` and its row, or a neighbour's `samplers`.
SAMPLERS = {"ddim": ddim}  # name -> (arguments, settings of the model) -> (noise, y) -> step


def samplers():
    """SAMPLERS, and the neighbours'."""
    found = dict(SAMPLERS)
    for neighbour in neighbours():
        found |= neighbour.samplers
    return found


def main(argv=None):
    """Samples, a trace, the weights alone, or what a neighbour does instead."""
    args = parse_args(argv)
    device = parallel.begin(cli.open_device(args.device))
    if args.save_weights:
        if parallel.rank() == 0:
            save_weights(args)
        return
    model, settings = open_model(args, args.checkpoint, device)
    for neighbour in neighbours():
        if neighbour.instead(args, model, settings):
            return
    check_writable(args.trace or args.out)
    set_precision(model, args.precision)
    sampler = open_sampler(args, model, settings)
    if args.trace:
        draw_trace(sampler, args.trace)
    else:
        write_images(args, sampler)
    what = "a trace" if args.trace else f"{args.n} images"
    weights = "trained" if args.raw else "EMA"
    print(
        f"{what} of {weights} weights, {sampler.described()}, "
        f"written to {(args.trace or args.out).absolute()}"
    )


def open_model(args, path, device):
    """(model, settings) of a checkpoint, or of what a neighbour can open."""
    for neighbour in neighbours():
        opened = neighbour.open(args, path)
        if opened:
            model, settings = opened
            return model.to(device).eval(), settings
    model, _, settings = load_model(path, device, args.raw)
    return model, settings


def open_sampler(args, model, settings):
    """The Sampler that the arguments describe; ValueError where the model cannot do it.

    Its sampler and its steps are the settings' own where none were typed.
    """
    name = args.sampler or settings.get("sampler", "ddim")
    if args.eta is not None:
        name = "ddim"
    if name not in samplers():
        raise ValueError(
            f"the model's sampler is {name}; "
            f"expected {', '.join(samplers())}; name one by --sampler"
        )
    T = len(model.schedule.beta) - 1
    steps = 100
    if name == settings.get("sampler", "ddim"):
        steps = settings.get("sample_steps", 100)
    steps = args.steps or min(T, steps)
    make_step = samplers()[name](args, settings)
    sampler = Sampler(model, settings["image_size"], steps, args.seed, make_step, name)
    for neighbour in neighbours():
        neighbour.steer(args, sampler, settings)
    if args.label is not None and args.label >= (sampler.classes or 0):
        known = "the model has no classes"
        if sampler.classes:
            known = f"the model has the classes 0 to {sampler.classes - 1}"
        raise ValueError(
            f"--label {args.label}: {known}; "
            "expected one that was trained; leave it out, or train with --class-cond"
        )
    sampler.label = args.label
    return sampler


def save_weights(args):
    """A new file with the weights and the settings alone, to be opened like the checkpoint."""
    path = args.save_weights
    check_writable(path)
    if path.exists():
        raise ValueError(f"{path} exists; expected a new file; remove it, or choose another")
    model, _, settings = load_model(args.checkpoint, raw=args.raw, classifier=None)
    write_weights(path, settings, "model" if args.raw else "ema", model.state_dict())
    weights = "trained" if args.raw else "EMA"
    megabytes = path.stat().st_size / 1e6
    print(f"{weights} weights in float16, {megabytes:.1f} MB, written to {path.absolute()}")


def draw_trace(sampler, path, most=10):
    """One image's way as a picture, of some steps that are spread evenly."""
    columns = []

    def watch(t, x_t, estimates):
        x0_star, x0_hat, r_t, _ = estimates
        images = {"x_t": x_t, "x0*": x0_star, "x0'": x0_hat}
        column = {name: to_pixels(image)[0].cpu().numpy() for name, image in images.items()}
        columns.append((f"t = {t}", column | {"r_t": r_t[0, 0].cpu().numpy()}))

    sampler(0, 1, watch)
    picked = np.unique(np.linspace(0, len(columns) - 1, most).round().astype(int))
    if parallel.rank() == 0:
        pictures.save_trace([columns[i] for i in picked], path)


def write_images(args, sampler):
    """--n images to --out, each rank drawing its share."""
    pixels = []
    steps = len(sampler.chain.step) - 1
    with cli.progress(args.n * steps, "sampling", "step") as bar:
        for first, n in parallel.share(args.n, args.batch_size):
            done = n * parallel.size()
            images = sampler(first, n, lambda *_, done=done: bar.update(done))
            pixels.append(parallel.concat(to_pixels(images)).cpu().numpy())
    if parallel.rank():
        return
    pixels = np.concatenate(pixels)
    if args.out.suffix == ".png":
        pictures.save_grid(pixels, args.out, sampler.classes if args.label is None else None)
    elif args.out.suffix == ".npz":
        save_npz(pixels, args.out)
    else:
        pictures.save_folder(pixels, args.out)


def parse_args(argv):
    """The arguments; SystemExit 2, one line, for whatever they alone show to be wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--n", type=cli.whole(1), default=64, help="images")
    text = "draw one image's way instead: x_t, x0*, x0' and r_t over the steps"
    parser.add_argument("--trace", type=Path, metavar="FILE.png", help=text)
    text = "write the weights and the settings alone instead, in float16; opened like a checkpoint"
    parser.add_argument("--save-weights", type=Path, metavar="FILE.pt", help=text)
    where = parser.add_argument_group("where")
    text = (
        "FILE.png: a grid; FILE.npz: arr_0 uint8 [N, H, W, 3]; else a folder of PNGs "
        "(default: samples.png)"
    )
    where.add_argument("--out", type=Path, help=text)
    where.add_argument("--batch-size", type=cli.whole(1, 1_000_000), default=64)
    text = "bf16: the networks under autocast"
    where.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help=text)
    where.add_argument("--device", type=cli.device, default="auto")
    sampler_flags(parser.add_argument_group("how"))
    for neighbour in neighbours():
        neighbour.sample_flags(parser)
    args = parser.parse_args(argv)
    if args.trace:
        check_trace(parser, args)
    for neighbour in neighbours():
        neighbour.check_sample(parser, args)
    if args.save_weights:
        check_save(parser, args)
    args.out = args.out or Path("samples.png")
    if args.out.suffix not in ("", ".png", ".npz"):
        parser.error(
            f"--out {args.out}: expected FILE.png, FILE.npz or a folder's name without a dot"
        )
    check_sampler(parser, args)
    return args


def check_trace(parser, args):
    """parser.error, one line, where --trace names no .png, or a flag means nothing to it."""
    if args.trace.suffix != ".png":
        parser.error(f"--trace {args.trace}: expected FILE.png")
    for key in ("out", "n", "batch_size"):
        if getattr(args, key) != parser.get_default(key):
            flag = cli.flag_of(key)
            parser.error(f"{flag} means nothing to --trace, which draws one image; leave it out")


def check_save(parser, args):
    """parser.error, one line, where --save-weights names no .pt, or a flag means nothing to it."""
    if args.save_weights.suffix != ".pt":
        parser.error(f"--save-weights {args.save_weights}: expected FILE.pt")
    for key, value in vars(args).items():
        known = key in ("checkpoint", "save_weights", "raw", "device")
        if not known and value != parser.get_default(key):
            parser.error(f"{cli.flag_of(key)} means nothing to --save-weights; leave it out")


def sampler_flags(parser):
    """How images are drawn, here and by fid.py."""
    text = "sampling steps, 1 to T (default: the run's --sample-steps; the paper's 100)"
    parser.add_argument("--steps", type=cli.whole(1), help=text)
    text = (
        "ddim: the paper's; ddpm: ancestral; dpm++: of second order, for few steps "
        "(default: the run's --sampler; the paper's ddim)"
    )
    parser.add_argument("--sampler", choices=samplers(), help=text)
    text = "of ddim; 0: deterministic; 1: the noise of the posterior (default: 0)"
    parser.add_argument("--eta", type=cli.real(0, 1), help=text)
    parser.add_argument("--seed", type=cli.whole(0), default=0, help="of the noise")
    text = "the trained weights instead of their moving average"
    parser.add_argument("--raw", action="store_true", help=text)
    text = "all images of class K, 0, 1, ... (default: every class in turn)"
    parser.add_argument("--label", type=cli.whole(0), metavar="K", help=text)
    for neighbour in neighbours():
        neighbour.sampler_flags(parser)


def check_sampler(parser, args):
    """parser.error, one line, where two of `sampler_flags` contradict each other."""
    if args.eta is not None and args.sampler not in (None, "ddim"):
        parser.error("--eta is DDIM's; leave it out, or leave --sampler out")
    for neighbour in neighbours():
        neighbour.check_sampler(parser, args)


def sampler_defaults():
    """What `sampler_flags` give where none is typed."""
    parser = argparse.ArgumentParser()
    sampler_flags(parser)
    return parser.parse_args([])


if __name__ == "__main__":
    sys.exit(cli.run(main))
