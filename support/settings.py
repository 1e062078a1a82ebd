"""train.py's flags and the settings that they make: plain values, which the checkpoint keeps."""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

import fid
from data import CIFAR10_HOME, DATASETS, load_images
from diffusion import SCHEDULES
from losses import LAMBDAS
from metrics import METRICS, FeatureDistance, OnX0
from refiner import DEFAULTS, MODELS, PREDICTIONS, REFINER_INPUTS, REFINERS
from sample import samplers
from support import cli, parallel
from support.checkpoint import read_checkpoint
from support.models import build, class_of, neighbours

# The paper's settings (Cas-DM Sec. 4.1), and what differs on `shapes`, where a run takes minutes.
PAPER = DEFAULTS | {
    "data": "shapes",
    "data_dir": None,
    "skip_bad": False,
    "class_cond": False,
    "metric": {},
    "metric_size": None,
    **{f"lambda_{term}": weight for term, weight in LAMBDAS.items()},
    "iterations": 400_000,
    "batch_size": 128,
    "accumulate": 1,
    "lr": 1e-4,
    "ema": 0.9999,
    "seed": 0,
    "precision": "fp32",
    "compile": False,
    "sampler": "ddim",
    "sample_steps": 100,
    "sample_every": 10_000,
    "save_every": 10_000,
    "eval_every": 0,
    "eval_at": [],
    "eval_samples": 10_000,
}
SHAPES = {
    "channels": 32,
    "res_blocks": 1,
    "T": 1000,
    "iterations": 1200,
    "batch_size": 16,
    "lr": 1e-3,
    "sample_every": 600,
    "save_every": 600,
}
# What --resume may change.  `moved` allows two more, which are places.
FREE = (
    "iterations",
    "accumulate",
    "sample_every",
    "save_every",
    "eval_every",
    "eval_at",
    "eval_samples",
    "sampler",
    "sample_steps",
    "data_dir",
)


def defaults():
    """Every setting as it is where no flag is given: the paper's and the neighbours'."""
    found = dict(PAPER)
    for neighbour in neighbours():
        found |= neighbour.settings
    return found


def parse_args(doc, argv):
    """(settings, args): the defaults with what was typed over them, and what argparse found.

    args.typed holds the settings that were typed, alone.
    """
    parser = cli.Parser(doc)
    every = defaults()

    def adder(group):
        """The function that adds flags to a group of --help."""

        def flag(name, text, **how):
            """Adds a flag, its default said in its help."""
            key = name.replace("-", "_")
            default = every.get(key)
            if not cli.is_unset(default):
                shown = f"{default}; on shapes {SHAPES[key]}" if key in SHAPES else default
                text += f" (default: {shown})"
            group.add_argument(f"--{name}", help=text, **how)

        return flag

    whole, real = cli.whole, cli.real
    flag = adder(parser.add_argument_group("what"))
    models = [*MODELS, *(name for n in neighbours() for name in n.models)]
    flag("model", "which of figure 1's models, or a neighbour's", choices=models)
    flag("predict", "what a DDPM's network predicts", choices=PREDICTIONS)
    flag("refiner", "Cas-DM's phi: the U-Net, or the Fix-Res CNN", choices=REFINERS)
    flag("refiner-input", "what phi sees: x0*, or concat(x0*, eps')", choices=REFINER_INPUTS)
    for term in LAMBDAS:
        flag(f"lambda-{term}", f"weight of L_{term}", type=real(0), metavar="W")
    text = "lambda of LPIPS; the same as --metric lpips=W; the paper's is 0.1"
    flag("lpips", text, type=real(0), metavar="W")
    text = f"a metric on x0' and its lambda: {', '.join(METRICS)}; may be repeated"
    flag("metric", text, type=parse_metric, action="append", metavar="NAME=W")
    text = (
        "side to which a network's metric enlarges images; time grows with its square "
        "(default: the paper's 224)"
    )
    flag("metric-size", text, type=whole(32), metavar="S")
    text = "condition on the labels that the data bring"
    flag("class-cond", text, action="store_true", default=None)
    text = f"{', '.join(DATASETS)}, a folder of images, or an images .npz"
    flag("data", text, metavar="NAME|PATH")
    flag("data-dir", "where a named set lies, or is downloaded to", metavar="DIR")
    text = "leave out images that cannot be read, and count them"
    flag("skip-bad", text, action="store_true", default=None)
    text = "side of the images; a named set or an .npz brings its own; shapes have 16"
    flag("image-size", text, type=whole(1))
    flag("channels", "width of the U-Nets' first level", type=whole(1, 100_000))
    flag("res-blocks", "residual blocks a level", type=whole(1, 100))
    flag("dropout", "improved-diffusion's CIFAR-10 recipe has 0.3", type=real(0, 0.99))
    flag("schedule", "how beta grows over t", choices=SCHEDULES)
    flag("T", "diffusion steps", type=whole(1, 100_000))

    flag = adder(parser.add_argument_group("how"))
    flag("iterations", "steps of the whole run", type=whole(1))
    flag("batch-size", "images a step", type=whole(1, 1_000_000))
    text = "parts in which a process takes its share of the batch, to save memory"
    flag("accumulate", text, type=whole(1))
    flag("lr", "AdamW's learning rate, constant", type=real(0, above=True))
    flag("ema", "decay of the weights' moving average", type=real(0, 1))
    flag("seed", "of the weights, the order of the images, noise and samples", type=whole(0))
    text = "bf16: the networks compute under autocast"
    flag("precision", text, choices=("fp32", "bf16"))
    flag("compile", "torch.compile the model", action="store_true", default=None)
    text = "auto: a GPU where there is one"
    flag("device", text, type=cli.device, default="auto")

    where = parser.add_argument_group("where")
    text = "the run's folder (default: runs/MODEL-DATA)"
    where.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = (
        "go on with the run in --out; its settings come from its checkpoint; "
        "--data, --data-dir and --self-perceptual may name where things are now"
    )
    where.add_argument("--resume", action="store_true", help=text)
    flag = adder(where)
    flag("sample-every", "steps between grids of samples; 0: never", type=whole(0))
    flag("save-every", "steps between checkpoints; 0: only the last", type=whole(0))
    flag("eval-every", "steps between evaluations (FID, sFID, IS); 0: never", type=whole(0))
    text = "steps at which to evaluate, beside those of --eval-every; 0: none"
    flag("eval-at", text, type=parse_steps, metavar="A,B,...")
    text = "how grids and evaluations are sampled; on shapes dpm++"
    flag("sampler", text, choices=samplers())
    flag("sample-steps", "and in how many steps; on shapes 10", type=whole(1))
    text = "images of an evaluation; the paper's 50000 on CIFAR-10"
    flag("eval-samples", text, type=whole(2))

    flag = adder(parser.add_argument_group("beyond the paper"))
    for neighbour in neighbours():
        neighbour.train_flags(flag)
    args = parser.parse_args(argv)
    return settings_of(parser, args), args


def settings_of(parser, args):
    """What was typed, over the defaults that the data bring.

    A combination that means nothing is a usage error; of a resumed run `reopen` finds it.
    """
    every = defaults()
    args.typed = {
        key: value for key, value in vars(args).items() if key in every and value is not None
    }
    if args.metric or args.lpips is not None:
        weights = list(args.metric or [])
        if args.lpips is not None:
            weights.append(("lpips", args.lpips))
        names = [name for name, _ in weights]
        if len(names) > len(set(names)):
            parser.error(f"metrics {', '.join(names)}; expected each once; leave out the others")
        args.typed["metric"] = {name: weight for name, weight in weights if weight}
    data = args.typed.get("data", every["data"])
    if data not in DATASETS:  # a run may be resumed from another folder
        args.typed["data"] = str(Path(data).absolute())
    if args.data_dir:
        args.typed["data_dir"] = str(Path(args.data_dir).absolute())
    settings = every | implied(data) | args.typed
    for neighbour in neighbours():
        found = neighbour.implied(settings, args.typed)
        settings |= {key: value for key, value in found.items() if key not in args.typed}
    if not args.resume:
        try:
            check(settings, args.typed)
        except ValueError as e:
            parser.error(str(e))
    return settings


def implied(data):
    """The settings that --data brings."""
    found = {"image_size": DATASETS[data].image_size if data in DATASETS else None}
    if data == "shapes":
        found |= SHAPES
    if data == "cifar10":
        found["data_dir"] = str(CIFAR10_HOME.absolute())
    return found


def check(settings, typed):
    """ValueError, one line, for settings that mean nothing together."""
    for neighbour in neighbours():
        neighbour.check(settings)
    with torch.device("meta"):
        model = build(settings | {"image_size": settings["image_size"] or DEFAULTS["image_size"]})
    foreign = {f"lambda_{term}" for term in LAMBDAS}
    for of_figure_1 in (*MODELS.values(), *PREDICTIONS.values()):
        foreign.update(of_figure_1.options)
    known = {*model.options, *(f"lambda_{term}" for term in model.terms)}
    for key in sorted((foreign - known) & set(typed)):
        raise ValueError(
            f"{cli.flag_of(key)} means nothing to --model {settings['model']}; leave it out"
        )
    if "data_dir" in typed and settings["data"] not in DATASETS:
        raise ValueError(
            f"--data-dir {typed['data_dir']} is for a set's name, and --data is "
            f"{settings['data']}; expected one of them; leave --data-dir out"
        )
    processes = parallel.processes()
    if settings["batch_size"] % (processes * settings["accumulate"]):
        raise ValueError(
            f"--batch-size {settings['batch_size']}: expected a multiple of "
            f"{processes} processes x --accumulate {settings['accumulate']}; change one of them"
        )
    schedule = SCHEDULES[settings["schedule"]](settings["T"])
    if schedule.beta.max() >= 1:
        raise ValueError(
            f"--schedule {settings['schedule']} with --T {settings['T']} reaches beta = 1; "
            "expected a smaller one; use more steps or the cosine schedule"
        )
    if settings["metric"] and "x0" not in model.terms:
        raise ValueError(
            "a metric compares clean images, and neither DDPM's eps mode nor a classifier "
            "learns any; use --predict x0, --model dual or --model casdm"
        )
    late = [step for step in typed.get("eval_at", []) if step > settings["iterations"]]
    if late:
        raise ValueError(
            f"--eval-at {late[0]}; expected at most the {settings['iterations']} of --iterations; "
            "leave it out"
        )
    if "sample_steps" in typed and settings["sample_steps"] > settings["T"]:
        raise ValueError(
            f"--sample-steps {settings['sample_steps']}; "
            f"expected at most the {settings['T']} steps of --T; use fewer"
        )


def parse_metric(text):
    """An argparse type: NAME=W -> (name, lambda)"""
    name, equals, weight = text.partition("=")
    if name not in METRICS or not equals:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected NAME=W with NAME one of {', '.join(METRICS)}"
        )
    return name, cli.real(0)(weight)


def parse_steps(text):
    """An argparse type: 20000,40000 -> [20000, 40000]; 0 -> []"""
    steps = {cli.whole(0)(step) for step in text.split(",")}
    return sorted(steps - {0})


# ---- a run to go on with ----


def reopen(folder, typed):
    """The checkpoint in `folder`, its settings with what was typed, where --resume may change it.

    ValueError, naming it, for any other change, and for settings that mean nothing together.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no checkpoint.pt; expected a run to resume; "
            "name its folder by --out, or leave --resume out to start one"
        )
    state = read_checkpoint(path)
    if not {"step", "data"} <= state.keys():
        raise ValueError(
            f"{path} holds no step or no data; expected a run's checkpoint; use another one"
        )
    kept = defaults() | state["settings"]
    for key, value in typed.items():
        if key not in FREE and value != kept[key] and not moved(key, kept[key], value):
            raise ValueError(
                f"{cli.flag_of(key)} {value}: the run in {folder} has {kept[key]}; "
                "expected the same; leave it out, or start another run"
            )
    check_passed(state["step"], kept, typed)
    state["settings"] = kept | typed
    check(state["settings"], typed)
    return state


def check_passed(step, kept, typed):
    """ValueError for what a resumed run is to do at steps that it has passed."""
    if typed.get("iterations", step) < step:
        raise ValueError(
            f"--iterations {typed['iterations']}: the run has done {step} steps; "
            "expected at least as many; leave it out"
        )
    for asked in typed.get("eval_at", []):
        if asked < step and asked not in kept["eval_at"]:
            raise ValueError(
                f"--eval-at {asked}: the run has done {step} steps; "
                "expected a step to come; leave it out"
            )


def moved(key, old, new):
    """Whether a resumed run's `new` value of a setting may be another place of the `old` one."""
    if key == "data":  # `check_data` compares what is there
        return not {old, new} & DATASETS.keys()
    return key == "self_perceptual" and list(old.values()) == list(new.values())


def check_data(state, settings, images):
    """ValueError where a resumed run would go on with other images than its own.

    A folder's fingerprint holds its files' times, which a copy may change: there it is a note.
    """
    if state["data"] == images.fingerprint:
        return
    place = settings["data_dir"] if settings["data"] in DATASETS else settings["data"]
    if not place or not Path(place).is_dir():
        raise ValueError(
            f"{images.name} is not what this run began with; expected the same images; "
            "name their place by --data or --data-dir, or start another run"
        )
    print(
        f"note: files in {place} have changed since this run began, or were copied with new times",
        file=sys.stderr,
    )


def refuse_taken(folder):
    """Before any work: an earlier run is never written over, and the folder can be written."""
    if (folder / "checkpoint.pt").exists():
        raise ValueError(
            f"{folder} holds a run; expected a new folder; "
            "use --resume to go on with it, or --out for another"
        )
    patterns = ("log.jsonl", "best.pt", "samples_*.png")
    left = [path for pattern in patterns for path in folder.glob(pattern)]
    if left:
        raise ValueError(
            f"{left[0]} is of a run that has no checkpoint.pt; expected a new folder; "
            "remove it, or choose another --out"
        )
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(
            f"{parent} cannot be written to; expected a writable folder; choose another --out"
        )


# ---- what a run needs ----


def load_inputs(settings):
    """(images, {name: (lambda, metric)}, FID's Inception or None).

    The images' size and number of classes are written into `settings`.
    OSError that names everything that is missing, not only the first.
    """
    missing = []

    def attempt(load, *how):
        try:
            return load(*how)
        except OSError as e:
            missing.append(str(e))

    which = [settings[key] for key in ("data", "image_size", "data_dir", "skip_bad")]
    images = attempt(load_images, *which)
    if images:
        settings |= {"image_size": images.pixels.shape[1], "num_classes": classes(settings, images)}
    asked = settings["metric"].items()
    metrics = {name: (weight, attempt(METRICS[name])) for name, weight in asked}
    of_neighbours = [attempt(neighbour.metrics, settings) for neighbour in neighbours() if images]
    evaluates = settings["eval_every"] or settings["eval_at"]
    inception = attempt(fid.InceptionFeatures) if evaluates else None
    if missing:
        raise OSError(" | ".join(missing))
    return images, adapted(metrics, of_neighbours, settings), inception


def adapted(metrics, of_neighbours, settings):
    """Image metrics as losses of x0' at --metric-size, and as the neighbours change them.

    metrics, of_neighbours and what is returned : {name: (lambda, metric)}, in of_neighbours a list
    of them whose metrics are losses already
    """
    if settings["metric_size"]:
        set_size([metric for _, metric in metrics.values()], settings["metric_size"])
    metrics = {name: (weight, OnX0(metric)) for name, (weight, metric) in metrics.items()}
    for found in of_neighbours:
        metrics |= found
    for neighbour in neighbours():
        for name, (weight, metric) in metrics.items():
            metrics[name] = weight, neighbour.adapt(metric, settings)
    return metrics


def set_size(metrics, size):
    """Has those metrics that are networks see images of size x size."""
    sized = [metric for metric in metrics if isinstance(metric, FeatureDistance)]
    if not sized:
        raise ValueError(
            f"--metric-size {size}: no metric enlarges images; expected one that is a network; "
            "give --lpips or --metric, or leave it out"
        )
    least = max(metric.smallest for metric in sized)
    if size < least:
        raise ValueError(
            f"--metric-size {size}: a metric's network needs at least {least}; choose a larger one"
        )
    for metric in sized:
        metric.size = size


def classes(settings, images):
    """How many labels, 0..K-1, the run trains with, or None; ValueError where any is missing."""
    if not settings["class_cond"] and not class_of(settings).needs_labels:
        return None
    remedy = "from sub-folders or an .npz's arr_1; leave --class-cond out"
    if images.labels is None:
        raise ValueError(f"{images.name} has no labels; expected one for every image, {remedy}")
    present = np.unique(images.labels)
    if present[0] < 0:
        raise ValueError(f"{images.name} has negative labels; expected 0, 1, ..., {remedy}")
    missing = np.setdiff1d(np.arange(len(present)), present)
    if len(missing) and not settings["num_classes"]:  # a run begun with a gap may go on with it
        names = ", ".join(map(str, missing[:5]))
        raise ValueError(
            f"{images.name} has labels up to {present[-1]}, but no image of {names}; "
            "expected 0, 1, ... without a gap; number them anew"
        )
    return int(present[-1]) + 1
