r"""Noise to images: the paper's DDIM sampler and the ancestral one, checkpoints opened, pictures written.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models
    DDPM     arXiv:2006.11239v2   Denoising Diffusion Probabilistic Models

    python sample.py runs/casdm-shapes/checkpoint.pt                               64 images in one grid, samples.png
    python sample.py CHECKPOINT --n 50000 --out samples.npz                        arr_0 uint8 [N, H, W, 3], as fid.py and others read it
    python sample.py CHECKPOINT --n 1000 --out FOLDER                              one PNG an image
    python sample.py CHECKPOINT --trace trace.png                                  figure 2: x_t, x0*, x0' and r_t over the steps
    python sample.py CHECKPOINT --sampler ddpm --steps 250                         ancestral sampling (variance.py)
    python sample.py CHECKPOINT --label 3 --cfg 2                                  one class of a model trained with --class-cond (guidance.py)
    python sample.py CHECKPOINT --bits-per-dim --data cifar10                      the variational bound of images, term by term

Samples come from the EMA weights (--raw: from the trained ones).  Image i follows from (seed, i) alone: it is the same for any --n and
--batch-size, its noise bitwise and its pixels within one level.  What a checkpoint needs to be rebuilt is inside it; no flag repeats it.
"""
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from support import edges
from support import parallel
from data import DATASETS, batch_indices, from_pixels, load_images, stream, to_pixels
from diffusion import clean_estimates, ddim_mu_from_eps, ddim_mu_from_x0, ddim_sigma, eps_from_x0, mix, respace
from neighbours.guidance import classifier_free, classifier_gradient, guided_x0
from refiner import Classifier, build_model
from neighbours.variance import VARIANCES, ancestral_sample, bits_per_dim

KIND, VERSION = "cas-dm checkpoint", 1


@torch.inference_mode()
def sample(model, schedule, shape, seed, steps=100, eta=0.0, first=0, y=None, watch=None, variance=None, gradient=None, bf16=False):
    """Images `first` .. `first + N - 1` of `seed`, by DDIM over the re-spaced chain of `steps` steps (Cas-DM Eqs. 16, 17 and their mix).

    shape    : (N, C, H, W)         schedule : the model's own, not re-spaced
    y        : [N] int64 labels; None: image i of a model with K classes has label i mod K
    variance : one of VARIANCES: ancestral sampling with it instead, x_{t-1} = mu + s Sigma g + sigma_t z      (DDPM Algorithm 2)
    gradient : (x_t, t, y) -> s g, a classifier's, or None               bf16 : the networks under autocast; every step stays in float32
    watch    : called after each prediction with its t, 1..T, and the step's x_t, x0*, x0', r_t
    returns  : [N, C, H, W] in [-1, 1] on the model's device;  ArithmeticError where an image is not finite
    """
    device = next(model.parameters()).device
    chain = respace(schedule, steps)
    streams = [stream(seed, "sample", first + i) for i in range(shape[0])]
    if y is None and getattr(model, "num_classes", None):
        y = labels(first, shape[0], model.num_classes, device)
    training = model.training
    model.eval()
    x_t = _normal(streams, shape, device)
    for i, original in reversed(list(enumerate(chain.step.tolist()))[1:]):
        t = torch.full((shape[0],), i, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            pred = model(x_t, torch.full_like(t, original), y)
        x0_star, x0_hat = clean_estimates(x_t, t, pred, chain)
        if watch:
            watch(original, x_t, x0_star, x0_hat, pred.r_t)
        g = gradient(x_t, torch.full_like(t, original), y) if gradient else None
        z = _normal(streams, shape, device) if (variance and i > 1) or eta else 0
        if variance:
            x_t = ancestral_sample(x_t, t, x0_star, x0_hat, pred.r_t, chain, variance, pred.v, z, g)
        else:
            x_t = p_sample(x_t, t, x0_star, x0_hat, pred.r_t, chain, eta, z, g)
    model.train(training)
    if not x_t.isfinite().all():
        raise ArithmeticError("a sampled image is not finite; expected finite weights and activations; use an earlier checkpoint")
    return x_t


def p_sample(x_t, t, x0_star, x0_hat, r_t, chain, eta=0.0, z=0, g=None):
    """x_{t-1} = r_t mu_x0'^ddim + (1 - r_t) mu_eps'^ddim + sigma_t z: a draw of Cas-DM Eq. 4 with the mean after Cas-DM Eq. 17.

    g : [B, C, H, W], a classifier's gradient, which guides both estimates, or None
    CHOICE: x0* and x0' come clamped to [-1, 1], before the means are formed, and eps' is re-derived from the clamped x0*: with
    r_t = 0 and r_t = 1 that is improved-diffusion's own clipping.  sigma_1 = 0, so the last step adds no noise.
    """
    if g is not None:
        x0_star, x0_hat = guided_x0(x0_star, t, g, chain), guided_x0(x0_hat, t, g, chain)
    eps_hat = eps_from_x0(x_t, t, x0_star, chain)
    mu = mix(ddim_mu_from_x0(x_t, t, x0_hat, chain, eta), ddim_mu_from_eps(x_t, t, eps_hat, chain, eta), r_t)
    return mu + ddim_sigma(t, chain, eta).to(x_t.device, x_t.dtype).view(-1, 1, 1, 1) * z


def labels(first, n, classes, device="cpu"):
    """The labels of images first .. first + n - 1: every class in turn.   [n] int64"""
    return torch.arange(first, first + n, device=device) % classes


def _normal(streams, shape, device):
    """N(0, 1) noise, image i from streams[i]; drawn on the CPU, so that every device gets the same."""
    noise = np.empty(shape, np.float32)
    for image, s in zip(noise, streams):
        s.standard_normal(out=image, dtype=np.float32)
    return torch.from_numpy(noise).to(device)


# ---- checkpoints ----

def write_checkpoint(path, settings, **state):
    """One file of plain tensors and values with the settings inside, whole or not at all (edges.atomic)."""
    with edges.atomic(path) as f:
        torch.save({"kind": KIND, "version": VERSION, "settings": settings, **state}, f)


def read_checkpoint(path):
    """The dict that `write_checkpoint` was given; ValueError, one line, for anything else."""
    state = edges.read_tensors(path, "checkpoint")
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise ValueError(f"{path} is a torch file but not a checkpoint of ours; expected one that train.py wrote; check the path")
    if state.get("version") != VERSION:
        raise ValueError(f"{path} has format version {state.get('version')}; expected {VERSION}; use the release that wrote it")
    return state


def load_model(path, device="cpu", raw=False, classifier=False):
    """(model, schedule, settings) of a checkpoint: the EMA's weights, or the trained ones if `raw`; in eval mode.

    ValueError, one line, where it is a model of images and a classifier was asked for, or the other way round, where the weights do not
    fit the settings or are not finite.
    """
    state = read_checkpoint(path)
    try:
        model = build_model(state["settings"])
        model.load_state_dict(state["model" if raw else "ema"])
    except Exception as e:      # settings or tensors of any wrong kind: the file is ours only by its label
        raise ValueError(f"{path}: its tensors do not fit its settings ({' '.join(str(e).split())[:160]}); expected what train.py wrote") from None
    if isinstance(model, Classifier) != classifier:
        kinds = ("classifier", "model of images") if classifier else ("model of images", "classifier")
        raise ValueError(f"{path} is a {kinds[1]}; expected a {kinds[0]}; train one with{'' if classifier else 'out'} --model classifier")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(f"{path} holds weights that are not finite; expected numbers; use an earlier checkpoint")
    model = model.to(device).eval()
    return model, model.schedule, state["settings"]


# ---- pictures ----

def save_grid(pixels, path, classes=None):
    """uint8 [N, H, W, 3] as one PNG, row by row, near square.

    classes : image i has label i mod `classes`; then a row a class, unless that would be more than
              ten times as high as wide.
    """
    pixels = torch.as_tensor(pixels).permute(0, 3, 1, 2)
    columns = math.ceil(math.sqrt(len(pixels)))
    if classes and classes <= 10 * math.ceil(len(pixels) / classes):
        columns = math.ceil(len(pixels) / classes)
        pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, columns * classes - len(pixels)))      # black where the last images are missing
        pixels = pixels.unflatten(0, (columns, classes)).transpose(0, 1).flatten(0, 1)
    grid = make_grid(pixels, nrow=columns)
    with edges.atomic(path) as f:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(f, "PNG")


def save_npz(pixels, path):
    with edges.atomic(path) as f:
        np.savez(f, arr_0=pixels)


def save_folder(pixels, path):
    """000000.png, 000001.png, ...; the folder appears when all of them are written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(partial / f"{i:06d}.png")
        if path.is_dir():       # empty: check_writable saw to it
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_trace(steps, path):
    """Figure 2's cascade of one image: a column a step, rows x_t, x0*, x0' and r_t (0 black, 1 white)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    rows = ("x_t", "x0*", "x0'", "r_t")
    figure, axes = plt.subplots(len(rows), len(steps), figsize=(1.2 * len(steps), 1.25 * len(rows)), squeeze=False)
    for column, (t, *images) in enumerate(steps):
        axes[0][column].set_title(f"t = {t}", fontsize=8)
        for axis, name, image in zip(axes[:, column], rows, images):
            shown = image[0, 0] if name == "r_t" else to_pixels(image)[0]
            axis.imshow(shown.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(name, rotation=0, ha="right", va="center")
    with edges.atomic(path) as f:
        figure.savefig(f, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)


# ---- the script ----

def parse_args(argv):
    """The arguments; SystemExit 2, one line, for whatever they alone show to be wrong."""
    p = edges.Parser(__doc__)
    p.add_argument("checkpoint", type=Path)
    what = p.add_argument_group("what")
    what.add_argument("--n", type=edges.whole(1), default=64, help="images")
    what.add_argument("--steps", type=edges.whole(1), default=100, help="sampling steps; a whole stride through T must give them")
    what.add_argument("--sampler", choices=("ddim", "ddpm"), default="ddim", help="ddpm: ancestral sampling")
    what.add_argument("--eta", type=edges.real(0, 1), help="of ddim; 0: deterministic; 1: as much noise as the posterior has (default: 0)")
    what.add_argument("--variance", choices=VARIANCES, help="of ddpm and of the bound: beta~_t, beta_t or the model's own (default: learned if it is, else small)")
    what.add_argument("--seed", type=edges.whole(0), default=0)
    what.add_argument("--raw", action="store_true", help="the trained weights instead of their moving average")
    label = p.add_argument_group("of which class")
    label.add_argument("--label", type=edges.whole(0), metavar="K", help="all images of class K, 0, 1, ... (default: every class in turn)")
    label.add_argument("--cfg", type=edges.real(0), metavar="W", help="classifier-free guidance: (1 + W) eps_label - W eps_null (default: 0)")
    label.add_argument("--classifier", type=Path, metavar="CLF.pt", help="guide by this classifier, which train.py --model classifier made")
    label.add_argument("--guidance", type=edges.real(0), metavar="S", help="scale of the classifier's gradient (default: 1)")
    bits = p.add_argument_group("instead of sampling")
    bits.add_argument("--trace", type=Path, metavar="FILE.png", help="draw one image's way: x_t, x0*, x0' and r_t over the steps")
    bits.add_argument("--bits-per-dim", action="store_true", help="print the variational bound of --n images of --data, over --steps steps")
    bits.add_argument("--data", metavar="NAME|PATH", help=f"{', '.join(DATASETS)}, a folder of images, or an images .npz")
    bits.add_argument("--data-dir", metavar="DIR", help="where a named set lies")
    where = p.add_argument_group("where")
    where.add_argument("--out", type=Path, default=Path("samples.png"), help="FILE.png: a grid, FILE.npz: arr_0 uint8 [N, H, W, 3], else a folder of PNGs")
    where.add_argument("--batch-size", type=edges.whole(1, 1_000_000), default=64)
    where.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: the networks under autocast")
    where.add_argument("--device", type=edges.device, default="auto")
    a = p.parse_args(argv)
    if a.out.suffix not in ("", ".png", ".npz"):
        p.error(f"--out {a.out}: expected FILE.png, FILE.npz or a folder's name without a dot")
    if a.trace and a.trace.suffix != ".png":
        p.error(f"--trace {a.trace}: expected FILE.png")
    if a.guidance is not None and not a.classifier:
        p.error("--guidance scales a classifier's gradient; expected --classifier too; name one, or use --cfg")
    if a.sampler == "ddpm" and a.eta is not None:
        p.error("--eta is DDIM's; expected --variance with --sampler ddpm")
    if a.variance and not (a.sampler == "ddpm" or a.bits_per_dim):
        p.error("--variance belongs to --sampler ddpm and --bits-per-dim; use --eta with DDIM")
    if a.bits_per_dim != (a.data is not None):
        p.error("--bits-per-dim and --data go together: the bound is that of given images")
    foreign = [flag for flag in ("trace", "eta", "label", "cfg", "classifier") if getattr(a, flag) is not None]
    foreign += ["precision"] if a.precision != "fp32" else []
    if a.bits_per_dim and foreign:
        p.error(f"--{foreign[0]} means nothing to --bits-per-dim; leave it out")
    return a


def main(argv=None):
    """Samples, a trace, or the bound of given images."""
    a = parse_args(argv)
    if not a.bits_per_dim:
        edges.check_writable(a.trace or a.out)
    device = parallel.begin(edges.open_device(a.device))
    model, schedule, settings = load_model(a.checkpoint, device, a.raw)
    respace(schedule, a.steps)
    variance = variance_of(a, settings)
    if a.bits_per_dim:
        return print_bits(a, model, settings, variance)
    size, classes, gradient = settings["image_size"], model.num_classes, None
    if a.classifier:
        gradient, classes = open_classifier(a, settings, device)
    if a.label is not None and not a.label < (classes or 0):
        raise ValueError(f"--label {a.label}: {f'the model has the classes 0 to {classes - 1}' if classes else 'the model has no classes'}; "
                         "expected one that was trained; leave it out, or train with --class-cond")
    if a.cfg:
        classifier_free(model, a.cfg)

    def images(first, n, watch):
        y = None if not classes else labels(first, n, classes, device) if a.label is None else torch.full((n,), a.label, device=device)
        return sample(model, schedule, (n, 3, size, size), a.seed, a.steps, a.eta or 0.0, first, y, watch, variance, gradient, a.precision == "bf16")

    if a.trace:
        seen = []
        images(0, 1, lambda *step: seen.append(step))
        picked = np.unique(np.linspace(0, len(seen) - 1, 10).round().astype(int))
        save_trace([seen[i] for i in picked], a.trace)
    else:
        pixels = []
        with progress(a) as bar:
            for first, n in parallel.share(a.n, a.batch_size):
                pixels.append(parallel.concat(to_pixels(images(first, n, lambda *_: bar.update(n * parallel.size())))).cpu().numpy())
        if parallel.rank() == 0:
            pixels = np.concatenate(pixels)
            if a.out.suffix == ".png":
                save_grid(pixels, a.out, classes if a.label is None else None)
            else:
                {".npz": save_npz, "": save_folder}[a.out.suffix](pixels, a.out)
    print(f"{'a trace' if a.trace else f'{a.n} images'} of {'trained' if a.raw else 'EMA'} weights written to {(a.trace or a.out).absolute()}")


def variance_of(a, settings):
    """The variance that the flags ask for, or None for DDIM."""
    learned = settings.get("learn_sigma")
    if a.variance == "learned" and not learned:
        raise ValueError(f"--variance learned: {a.checkpoint} learned none; expected a model trained with --learn-sigma; use small or large")
    return (a.variance or ("learned" if learned else "small")) if a.sampler == "ddpm" or a.bits_per_dim else None


def open_classifier(a, settings, device):
    """(the gradient that --classifier and --guidance ask for, its number of classes)."""
    classifier, _, theirs = load_model(a.classifier, device, classifier=True)
    check_same_noise(a.classifier, theirs, settings)
    if settings.get("num_classes") not in (None, theirs["num_classes"]):
        raise ValueError(f"{a.classifier} has {theirs['num_classes']} classes and {a.checkpoint} {settings['num_classes']}; expected the same labels; train one again")
    scale = 1.0 if a.guidance is None else a.guidance
    return lambda x_t, t, y: classifier_gradient(classifier, x_t, t, y, scale), theirs["num_classes"]


def check_same_noise(path, theirs, settings):
    """ValueError where the model at `path` was trained on other noisy images than `settings` describe; a size of None is any."""
    for key in ("schedule", "T", "image_size"):
        if settings[key] not in (None, theirs[key]):
            raise ValueError(f"{path} has {key} {theirs[key]} where the other model has {settings[key]}; expected the same noisy images; "
                             f"train with the same --{key.replace('_', '-')}")


def print_bits(a, model, settings, variance):
    """The bound of --n images of --data, a row a term, and their sum with the standard error of its mean over the images."""
    images = load_images(a.data, settings["image_size"], a.data_dir)
    if model.num_classes and (images.labels is None or images.labels.max() >= model.num_classes):
        raise ValueError(f"{a.data} lacks the labels that {a.checkpoint} was trained with; expected labelled images; name the set that it was trained on")
    n = min(a.n, len(images.pixels))
    chosen, found = batch_indices(len(images.pixels), n, 0, a.seed), []
    device = next(model.parameters()).device
    with progress(a) as bar:
        for first, count in parallel.share(n, a.batch_size):
            part = chosen[first:first + count]
            streams = [stream(a.seed, "bits", int(i)) for i in part]
            x0 = from_pixels(images.pixels[part]).to(device)
            y = torch.from_numpy(images.labels[part]).to(device) if model.num_classes else None
            bits = bits_per_dim(model, x0, a.steps, variance, lambda: _normal(streams, x0.shape, device), y, lambda: bar.update(count * parallel.size()))
            found.append(parallel.concat(bits).double().cpu())
    found = torch.cat(found)
    for name, term in zip([*respace(model.schedule, a.steps).step.tolist()[1:], "prior"], found.mean(0).tolist()):
        print(f"t {name:>6}  {term:.6f}")
    total, spread = found.sum(1).mean().item(), found.sum(1).std().item() / n ** 0.5 if n > 1 else math.nan
    print(f"{total:.4f} +- {spread:.4f} bits/dim of {n} images of {a.data}, {a.steps} steps, {variance} variance")


def progress(a):
    return tqdm(total=a.n * a.steps, unit="step", desc="sampling", file=sys.stderr, disable=parallel.rank() > 0 or None)


if __name__ == "__main__":
    sys.exit(edges.run(main))
