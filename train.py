r"""Trains Cas-DM, Dual Diffusion or DDPM; the loop of the paper's Sec. 4.1 is `train`.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models

    python train.py                                                     a small Cas-DM on the embedded shapes: minutes on two CPU cores
    python train.py --model casdm --lpips 0.1 --data cifar10            the paper's run
    python train.py --model ddpm --predict x0 --metric squeezenet=0.1 --data images.npz --iterations 20000
    torchrun --nproc_per_node=8 -- train.py --data cifar10              on 8 devices, 16 of the 128 images each
    python train.py --resume --out runs/casdm-cifar10                   goes on where it stopped, bit for bit on a CPU
    python train.py --model classifier                                  the noisy-image classifier of guidance.py

A run's folder holds checkpoint.pt (the last), log.jsonl (a row every 10 steps), curves.png and samples_STEP.png (from the EMA); with
--eval-every also FID, sFID and IS in the log, and best.pt, since the paper reports the best of its evaluated checkpoints.
All randomness of step k follows from (seed, k) and the data order from (seed, epoch), so a checkpoint holds no random state.
Ctrl-C or SIGTERM finishes the step, saves, prints the command that goes on, and exits with 130; another, a
second later or more, exits at once.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support import edges
import fid
from support import parallel
from data import DATASETS, HERE, batch_indices, from_pixels, load_images, stream
from diffusion import SCHEDULES, respace
from losses import METRICS, FeatureDistance, SelfPerceptual, training_losses
from refiner import DEFAULTS, MODELS, OBJECTIVES, REFINER_INPUTS, REFINERS, Classifier, build_model
from support.run import GRID_STEPS, Run, pending
from sample import check_same_noise, load_model, read_checkpoint

# The paper's settings (Cas-DM Sec. 4.1), and what differs on `shapes`, so that a first run takes minutes.
PAPER = DEFAULTS | dict(data="shapes", data_dir=None, skip_bad=False, metric={}, metric_size=None, init_eps=None, class_cond=False, iterations=400_000, batch_size=128, accumulate=1, lr=1e-4,
                        ema=0.9999, seed=0, precision="fp32", compile=False, sample_every=10_000, save_every=10_000, eval_every=0, eval_samples=10_000)
SHAPES = dict(channels=32, res_blocks=1, T=1000, iterations=1200, batch_size=16, lr=1e-3, sample_every=600, save_every=600)
# Settings that --resume may change; `moved` knows more.
FREE = ("iterations", "accumulate", "sample_every", "save_every", "eval_every", "eval_samples",
        "data_dir")


def train(run, stop):
    """Draw, noise, predict, loss, step, EMA, until `iterations` or a signal. Returns whether it reached the end; the last step is saved."""
    s, schedule = run.settings, run.model.schedule
    T, pixels, bf16 = len(schedule.beta) - 1, run.images.pixels, s["precision"] == "bf16"
    with tqdm(total=s["iterations"], initial=run.step, unit="it", desc="training", file=sys.stderr, disable=parallel.rank() > 0) as bar:
        while run.step < s["iterations"] and not run.stopped(stop):
            draw = stream(s["seed"], "step", run.step)
            image = batch_indices(len(pixels), s["batch_size"], run.step, s["seed"])
            t = draw.integers(1, T + 1, s["batch_size"])
            eps = draw.standard_normal((s["batch_size"], 3, *pixels.shape[1:3]), dtype="float32")
            torch.manual_seed(int(draw.integers(2 ** 31)) + parallel.rank())      # dropout's
            drawn = dict(t=t, eps=eps) | run.extras(draw, image)

            run.optimizer.zero_grad()
            for mine in run.shares():
                x0 = from_pixels(run.put(pixels[image[mine]]))
                losses = training_losses(run.net, x0, **{name: run.put(value[mine]) for name, value in drawn.items()}, schedule=schedule,
                                         metrics=run.metrics, bf16=bf16, watch=run.watch(mine))
                (losses["loss"] / s["accumulate"]).backward()
                run.note(losses)
            run.guard(stop)
            run.optimizer.step()
            run.update_ema()

            run.step += 1
            bar.update()
            run.after_step(bar, stop)
    if run.saved != run.step:
        run.save()
    parallel.meet()     # a rank that left now would have torchrun end rank 0, which may be writing
    return run.step == s["iterations"]


# ---- the script ----

def parse_args(argv):
    """(settings, arguments): the settings are plain values that the checkpoint keeps; typed ones alone are in arguments.typed."""
    p = edges.Parser(__doc__)
    whole, real = edges.whole, edges.real

    def flag(group, name, text, **how):
        key = name.replace("-", "_")
        default = f"{PAPER[key]}" + (f"; on shapes {SHAPES[key]}" if key in SHAPES else "") if key in PAPER else None
        group.add_argument(f"--{name}", help=text + (f" (default: {default})" if default not in (None, "None", "{}", "False") else ""), **how)

    what = p.add_argument_group("what")
    flag(what, "model", "figure 1's", choices=MODELS)
    flag(what, "predict", "what DDPM's network predicts", choices=("eps", "x0"))
    flag(what, "refiner", "Cas-DM's phi: the U-Net, or the Fix-Res CNN", choices=REFINERS)
    flag(what, "refiner-input", "what phi sees: x0*, or concat(x0*, eps')", choices=REFINER_INPUTS)
    flag(what, "init-eps", "start Cas-DM's theta, or a DDPM that predicts eps, from an "
         "improved-diffusion checkpoint", metavar="FILE")
    flag(what, "lpips", "lambda of LPIPS; the same as --metric lpips=W; the paper's is 0.1", type=real(0), metavar="W")
    flag(what, "metric", f"a metric on x0' and its lambda: {', '.join(METRICS)}; may be repeated", type=parse_metric, action="append", metavar="NAME=W")
    flag(what, "metric-size", "side to which a network's metric enlarges images; time grows with its square (default: the paper's 224)", type=whole(32), metavar="S")
    flag(what, "self-perceptual", "a frozen model of ours as a metric, or as DDPM's whole objective, and its lambda", type=parse_perceptual, metavar="CKPT=W")
    flag(what, "learn-sigma", "DDPM learns the variance of the step back too", action="store_true", default=None)
    flag(what, "objective", "of DDPM's eps mode; hybrid with --learn-sigma", choices=OBJECTIVES)
    flag(what, "class-cond", "condition on the labels that the data bring", action="store_true", default=None)
    flag(what, "label-dropout", "share of images trained without their label, for classifier-free guidance", type=real(0, 1), metavar="P")
    flag(what, "data", f"{', '.join(DATASETS)}, a folder of images, or an images .npz", metavar="NAME|PATH")
    flag(what, "data-dir", "where a named set lies, or is downloaded to", metavar="DIR")
    flag(what, "skip-bad", "leave out images that cannot be read, and count them", action="store_true", default=None)
    flag(what, "image-size", "side of the images; a named set or an .npz brings its own", type=whole(1))
    flag(what, "channels", "width of the U-Nets' first level", type=whole(1, 100_000))
    flag(what, "res-blocks", "residual blocks a level", type=whole(1, 100))
    flag(what, "dropout", "improved-diffusion's CIFAR-10 recipe has 0.3", type=real(0, 0.99))
    flag(what, "schedule", "of beta", choices=SCHEDULES)
    flag(what, "T", "diffusion steps", type=whole(1, 100_000))
    how = p.add_argument_group("how")
    flag(how, "iterations", "steps of the whole run", type=whole(1))
    flag(how, "batch-size", "images a step", type=whole(1, 1_000_000))
    flag(how, "accumulate", "parts in which a process takes its share of the batch, one after another, to save memory", type=whole(1))
    flag(how, "lr", "AdamW's, constant", type=real(0, above=True))
    flag(how, "ema", "decay of the weights' moving average", type=real(0, 1))
    flag(how, "seed", "of weights, order, noise and samples", type=whole(0))
    flag(how, "precision", "bf16: the networks under autocast", choices=("fp32", "bf16"))
    flag(how, "compile", "torch.compile the model", action="store_true", default=None)
    how.add_argument("--device", type=edges.device, default="auto", help="auto: a GPU where there is one")
    where = p.add_argument_group("where")
    where.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/MODEL-DATA)")
    where.add_argument("--resume", action="store_true",
                       help="go on with the run in --out; settings come from its checkpoint; "
                       "--data, --data-dir and --self-perceptual may name where things are now")
    flag(where, "sample-every", "steps between grids of samples; 0: never", type=whole(0))
    flag(where, "save-every", "steps between checkpoints; 0: only the last", type=whole(0))
    flag(where, "eval-every", "steps between evaluations (FID, sFID, IS); 0: never", type=whole(0))
    flag(where, "eval-samples", "images of an evaluation; the paper's 50000 on CIFAR-10", type=whole(2))
    a = p.parse_args(argv)
    return settings_of(p, a), a


def settings_of(p, a):
    """What was typed, over the defaults that the data bring; a combination that means nothing is a usage error."""
    typed = {key: value for key, value in vars(a).items() if key in PAPER and value is not None}
    if a.metric or a.lpips is not None:
        typed["metric"] = {name: weight for name, weight in [*(a.metric or []), ("lpips", a.lpips or 0)] if weight}
    data = typed.get("data", PAPER["data"])
    for key in ("data", "data_dir", "init_eps"):        # a run may be resumed from another folder
        if key in typed and not (key == "data" and data in DATASETS):
            typed[key] = str(Path(typed[key]).absolute())
    a.typed = typed
    implied = {"image_size": DATASETS[data].image_size if data in DATASETS else None}
    if data == "shapes":
        implied |= SHAPES
    if data == "cifar10":
        implied["data_dir"] = str(HERE.absolute())
    if MODELS[a.model or PAPER["model"]] is Classifier:
        implied["sample_every"] = 0
    if a.learn_sigma:
        implied["objective"] = "hybrid"
    s = PAPER | implied | typed
    if not a.resume:        # `reopen` checks what a resumed run comes to
        try:
            check(s, typed)
        except ValueError as e:
            p.error(str(e))
    return s


def check(s, typed):
    """ValueError, one line, for settings that mean nothing together; of a new run, a usage error."""
    options = set(MODELS[s["model"]].options)
    foreign = {key for model in MODELS.values() for key in model.options} - options
    for key in sorted(foreign & set(typed)):
        raise ValueError(f"--{key.replace('_', '-')} means nothing to --model {s['model']}; "
                         "leave it out")
    processes = parallel.processes()
    if s["batch_size"] % (processes * s["accumulate"]):
        raise ValueError(f"--batch-size {s['batch_size']}: expected a multiple of "
                         f"{processes} processes x --accumulate {s['accumulate']}; "
                         "change one of them")
    with torch.device("meta"):
        model = build_model(s | {"image_size": s["image_size"] or DEFAULTS["image_size"]})
    schedule = SCHEDULES[s["schedule"]](s["T"])
    if schedule.beta.max() >= 1:
        raise ValueError(f"--schedule {s['schedule']} with --T {s['T']} reaches beta = 1; "
                         "expected a smaller one; use more steps or the cosine schedule")
    if s["metric"] and "x0" not in model.loss_terms:
        raise ValueError("a metric compares clean images, and neither DDPM's eps mode nor a "
                         "classifier learns any; use --predict x0, --model dual or --model casdm")
    if s["learn_sigma"] != (s["objective"] != "simple"):
        raise ValueError(f"--objective {s['objective']}: hybrid and vlb train the variance of "
                         "--learn-sigma, simple does not; give both or neither")
    if s["learn_sigma"] and (s["predict"] != "eps" or s["self_perceptual"]):
        raise ValueError("--learn-sigma belongs to DDPM's eps mode and its own objectives; "
                         "leave out --predict x0 and --self-perceptual")
    if s["init_eps"] and (s["predict"] != "eps" or not model.loss_terms):
        raise ValueError("--init-eps: published weights predict eps, where --predict x0 does not "
                         "and --self-perceptual starts from its judge; leave one of them out")
    if s["label_dropout"] and not s["class_cond"]:
        raise ValueError("--label-dropout drops labels; expected --class-cond too")
    if s["sample_every"] or s["eval_every"]:
        if MODELS[s["model"]] is Classifier:
            raise ValueError("--sample-every and --eval-every: a classifier makes no images; "
                             "leave them out")
        respace(schedule, min(GRID_STEPS, s["T"]))      # the steps of grids and evaluations


def parse_metric(text):
    name, equals, weight = text.partition("=")
    if name not in METRICS or not equals:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected NAME=W with NAME one of {', '.join(METRICS)}")
    return name, edges.real(0)(weight)


def parse_perceptual(text):
    path, equals, weight = text.rpartition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected CKPT=W, a checkpoint of ours and its lambda")
    return {str(Path(path).absolute()): edges.real(0, above=True)(weight)}


def main(argv=None):
    """Trains a new run or goes on with one; returns the exit code."""
    s, a = parse_args(argv)
    device = parallel.begin(edges.open_device(a.device))
    folder = (a.out or Path("runs") / f"{s['model']}-{Path(s['data']).stem}").absolute()
    state = reopen(folder, a.typed) if a.resume else None
    if state:
        s = state["settings"]
    if state and state["step"] >= s["iterations"] and not any(pending(s, folder, state["step"])):
        print(f"{folder} is finished: {state['step']} of {s['iterations']} steps; --iterations N goes on to N")
        return 0
    if not state and parallel.rank() == 0:
        refuse_taken(folder)
    images, metrics, network = parallel.first(lambda: load_inputs(s))
    if state:
        check_data(state, s, images)
    s |= {"image_size": images.pixels.shape[1], "num_classes": classes(s, images)}
    if network:
        network = network.to(device)
    run = Run(s, folder, device, images, metrics, network, resumed=bool(state))
    folder.mkdir(parents=True, exist_ok=True)
    if state:
        run.load(state)
    if network:
        fid.reference(images, network)      # before the first step: it takes minutes, and can fail
    introduce(run)
    stop = edges.Stop()
    try:
        if state:
            run.show(stop)
        finished = train(run, stop) and not any(parallel.first(lambda: pending(run.settings, folder, run.step)))
    finally:
        stop.restore()
    return conclude(run, finished)


def reopen(folder, typed):
    """The checkpoint in `folder`, its settings with what was typed, where --resume may change it.

    ValueError, naming it, for any other change, and for settings that mean nothing together.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no checkpoint.pt; expected a run to resume; "
                                "name its folder by --out, or leave --resume out to start one")
    state = read_checkpoint(path)
    kept = PAPER | state["settings"]
    for key, value in typed.items():
        if key not in FREE and value != kept[key] and not moved(key, kept[key], value):
            raise ValueError(f"--{key.replace('_', '-')} {value}: the run in {folder} has "
                             f"{kept[key]}; expected the same; leave it out, or start another run")
    state["settings"] = kept | typed
    check(state["settings"], typed)
    return state


def moved(key, old, new):
    """Whether a resumed run's `new` value of a setting may be another place of the `old` one."""
    if key == "data":       # `check_data` compares what is there
        return not {old, new} & DATASETS.keys()
    return key == "self_perceptual" and list(old.values()) == list(new.values())


def check_data(state, s, images):
    """ValueError where a resumed run would go on with other images than its own.

    A folder's fingerprint holds its files' times, which a copy may change: there it is a note.
    """
    if state["data"] == images.fingerprint:
        return
    place = s["data_dir"] if s["data"] in DATASETS else s["data"]
    if not Path(place or "").is_dir():
        raise ValueError(f"{images.name} is not what this run began with; expected the same "
                         "images; name their place by --data or --data-dir, or start another run")
    print(f"note: files in {place} have changed since this run began, or were copied with new "
          "times", file=sys.stderr)


def refuse_taken(folder):
    """Before any work: an earlier run is never written over, and a folder that cannot be written is found out now."""
    if any((folder / name).exists() for name in ("checkpoint.pt", "log.jsonl")):
        raise ValueError(f"{folder} holds a run; expected a new folder; use --resume to go on with it, or --out for another")
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(f"{parent} cannot be written to; expected a writable folder; choose another --out")


def load_inputs(s):
    """(images, {name: (lambda, metric)}, FID's network or None); OSError that names everything that is missing, not only the first."""
    missing = []

    def attempt(load, *how):
        try:
            return load(*how)
        except OSError as e:
            missing.append(str(e))

    images = attempt(load_images, s["data"], s["image_size"], s["data_dir"], s["skip_bad"])
    metrics = {name: (weight, attempt(METRICS[name])) for name, weight in s["metric"].items()}
    for path, weight in s["self_perceptual"].items():
        metrics["self-perceptual"] = (weight, attempt(judge_of, path, s, images))
    network = attempt(fid.InceptionFeatures) if s["eval_every"] else None
    if missing:
        raise OSError(" | ".join(missing))
    if s["metric_size"]:
        set_size([metric for _, metric in metrics.values()], s["metric_size"])
    return images, metrics, network


def set_size(metrics, size):
    """Has those metrics that are networks see images of size x size."""
    sized = [metric for metric in metrics if isinstance(metric, FeatureDistance)]
    if not sized:
        raise ValueError(f"--metric-size {size}: no metric enlarges images; expected one that is a network; give --lpips or --metric, or leave it out")
    for metric in sized:
        metric.size = size


def judge_of(path, s, images):
    """The frozen model of --self-perceptual, as a metric.

    ValueError where it does not know this run's noisy images or labels.
    images : the run's, or None where they are missing, which another message says
    """
    judge, _, theirs = load_model(path)
    size, num_classes = s["image_size"], judge.num_classes
    if images:
        size, num_classes = images.pixels.shape[1], classes(s, images)
    check_same_noise(path, theirs, s | {"image_size": size})
    needs_null = judge.num_classes and s["label_dropout"] and judge.null_label is None
    if judge.num_classes not in (None, num_classes) or needs_null:
        raise ValueError(f"{path} was trained with {judge.num_classes} classes; expected the "
                         "labels of this run; use the same --class-cond and --label-dropout")
    return SelfPerceptual(judge)


def classes(s, images):
    """How many labels, 0..K-1, the run trains with, or None. ValueError where any is missing."""
    if not s["class_cond"] and MODELS[s["model"]] is not Classifier:
        return None
    remedy = "from sub-folders or an .npz's arr_1; leave --class-cond out"
    if images.labels is None:
        raise ValueError(f"{images.name} has no labels; expected one for every image, {remedy}")
    present = np.unique(images.labels)
    if present[0] < 0:
        raise ValueError(f"{images.name} has negative labels; expected 0, 1, ..., {remedy}")
    missing = np.setdiff1d(np.arange(len(present)), present)
    if len(missing) and not s["num_classes"]:       # a run begun with a gap may go on with it
        names = ", ".join(map(str, missing[:5]))
        raise ValueError(f"{images.name} has labels up to {present[-1]}, but no image of "
                         f"{names}; expected 0, 1, ... without a gap; number them anew")
    return int(present[-1]) + 1


def introduce(run):
    """The first lines: every setting, the sizes, and where the run is written."""
    s = run.settings
    print(", ".join(f"{key} {value}" for key, value in s.items() if value not in (None, {}, False)))
    print(f"{sum(p.numel() for p in run.weights):,} parameters on {run.device}; {len(run.images.pixels):,} images of {run.images.name}; step {run.step} of {s['iterations']}")
    print(f"writing to {run.folder}")


def conclude(run, finished):
    """The last lines: what to do next. Returns the exit code."""
    here = Path.cwd()
    place = run.folder.relative_to(here) if run.folder.is_relative_to(here) else run.folder
    if not finished:
        again = f"{parallel.launcher()} train.py --resume --out {place}"
        print(f"stopped at step {run.step}, which is saved; to go on: {again}")
        return 130
    print(f"{run.step} steps done; {run.folder} holds {', '.join(sorted(path.name for path in run.folder.iterdir()))}\nnext:")
    if isinstance(run.model, Classifier):
        print(f"  python sample.py CHECKPOINT --classifier {place}/checkpoint.pt --guidance 1 --label 0")
    else:
        print(f"  python sample.py {place}/checkpoint.pt --n 64 --out samples.png\n  python sample.py {place}/checkpoint.pt --trace trace.png")
    return 0


if __name__ == "__main__":
    sys.exit(edges.run(main))
