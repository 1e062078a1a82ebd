r"""Trains a judge of one data set (neighbours/judge.py), and checks that it orders real images.

    python -m experiments.judge --data cifar10                    the ten classes
    python -m experiments.judge --data cifar10 --task rotations   no labels: how is it turned?
    python -m experiments.judge --data cifar10 --out JUDGE.pt     checks it alone, if it is there

    RotNet   arXiv:1803.07728   Unsupervised Representation Learning by Predicting Image Rotations

A tenth of the images is held out: it gives the accuracy, and the two sides of the check.  The check
scores images that a judge must find ever worse: blurred, noised, of shifted colour, compressed, and
of half the classes; each against the same reference, at equal n.
"""

import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from data import from_pixels, load_images
from experiments.tables import markdown, markdown_header
from features import batched, features_of
from fid import compare, judge_name
from neighbours.judge import Judge, load_judge, save_judge
from support import cli
from support.draws import batch_indices, stream

TASKS = ("classes", "rotations")
DEFAULTS = {"image_size": None, "task": "classes", "iterations": 4000, "channels": 32, "seed": 0}
HELD_OUT = 0.1  # of the images
LEAST = 200  # images, so that the check's sides are not empty
REFERENCE = 12_000  # images that it was trained on, of which the check makes its two sides
BATCH, LR, WEIGHT_DECAY = 128, 0.1, 5e-4
SHIFT = 2  # pixels an image is moved by at most, in training


def train(judge, pixels, labels, iterations, seed):
    """SGD with momentum under one cycle of the learning rate."""
    optimizer = torch.optim.SGD(
        judge.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=iterations)
    judge.train()
    with cli.progress(iterations, "judge", "it") as bar:
        for step in range(iterations):
            chosen = batch_indices(len(pixels), BATCH, step, seed)
            rng = stream(seed, "judge", step)
            x = varied(from_pixels(pixels[chosen]), rng)
            x, target = problem(judge.settings["task"], x, labels, chosen, rng)
            loss = F.cross_entropy(judge.logits(x), target, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    judge.eval().requires_grad_(False)


def varied(x, rng):
    """The batch moved by a few pixels, and half of it mirrored."""
    size = x.shape[-1]
    top, left = rng.integers(0, 2 * SHIFT + 1, 2)
    x = F.pad(x, [SHIFT] * 4, mode="reflect")[:, :, top : top + size, left : left + size]
    mirrored = torch.from_numpy(rng.random(len(x)) < 0.5)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def problem(task, x, labels, chosen, rng):
    """What the judge learns from a batch: its images, and the answers."""
    if task == "classes":
        return x, torch.from_numpy(np.asarray(labels[chosen]))
    turns = torch.from_numpy(rng.integers(4, size=len(x)))
    return turned(x, turns), turns


def turned(x, turns):
    """Each image of x [N, 3, S, S] by so many right angles; turns int64 [N]."""
    return torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(x, turns, strict=True)])


@torch.inference_mode()
def accuracy(judge, pixels, labels, seed):
    """The share of right answers."""
    right, rng = 0, stream(seed, "held out", 0)
    for start in range(0, len(pixels), 500):
        chosen = np.arange(start, min(start + 500, len(pixels)))
        x = from_pixels(pixels[chosen])
        x, target = problem(judge.settings["task"], x, labels, chosen, rng)
        right += int((judge.logits(x).argmax(1) == target).sum())
    return right / len(pixels)


# ---- does it order what it must order? ----


def blurred(pixels, radius):
    """By a Gaussian of so many pixels."""
    return each(pixels, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def compressed(pixels, quality):
    """By JPEG of that quality."""

    def through_jpeg(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return each(pixels, through_jpeg)


def noised(pixels, deviation):
    """By normal noise of so many levels."""
    noise = stream(0, "noise", 0).normal(scale=deviation, size=pixels.shape)
    return np.rint(pixels + noise).clip(0, 255).astype(np.uint8)


def shifted(pixels, levels):
    """Red up and blue down by so many levels."""
    shift = np.array([levels, 0, -levels])
    return (pixels.astype(np.int64) + shift).clip(0, 255).astype(np.uint8)


def each(pixels, change):
    """Every image, changed as a Pillow image."""
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels])


SPOILED = {  # what -> (how, by how much, from little to much)
    "blurred by {} pixels": (blurred, (0.5, 0.7, 1)),
    "noise of {} levels": (noised, (4, 8, 16)),
    "colours shifted by {} levels": (shifted, (4, 8, 16)),
    "JPEG of quality {}": (compressed, (90, 70, 40)),
}


def check(judge, held_out, labels, trained):
    """Prints the distance of held-out images, plain and spoiled, to those the judge was trained on.

    held_out, labels : images that it has not seen        trained : some that it has
    """
    several_classes = labels.any()
    of_some = held_out[labels < (labels.max() + 1) // 2]
    n = len(held_out) // 2
    if several_classes:
        n = min(n, len(of_some))
    plain = held_out[:n]
    reference = features(judge, trained[n:])
    print(f"{n:,} images a row, against {len(trained) - n:,} that it was trained on\n")
    print(markdown_header("images", "Frechet distance", "KID x 1000"))
    kind = judge_name(reference, reference)

    def row(name, pixels):
        found = compare(features(judge, pixels), reference)
        distance = found[f"fd{kind}"]
        kid, error = found[f"kid{kind}"], found[f"kid{kind}_std"]
        print(markdown(name, f"{distance:.3f}", f"{1000 * kid:.3f} ± {1000 * error:.3f}"))

    row("trained on, not in the reference", trained[:n])
    row("held out", plain)
    for name, (spoil, amounts) in SPOILED.items():
        for amount in amounts:
            row(f"held out, {name.format(amount)}", spoil(plain, amount))
    if several_classes:
        row("held out, of half the classes", of_some[:n])


def features(judge, pixels):
    """What the judge says of the images -> Features, with the rows that KID needs."""
    return features_of(batched(pixels, 500), judge, len(pixels), keep_pool=True)


# ---- the script ----


def main(argv=None):
    """Trains the judge unless its file is there, and checks it."""
    args = parse_args(argv)
    judge = load_judge(args.out) if args.out.exists() else None
    settings = DEFAULTS | args.typed
    if judge:
        settings = judge.settings
        refuse_others(args.typed, settings, args.out)
    task, seed = settings["task"], settings["seed"]
    name, pixels, labels = images_of(args.data, settings)
    order = stream(seed, "held out", 0).permutation(len(pixels))
    held_out, trained = np.split(order, [round(HELD_OUT * len(order))])
    if judge is None:
        settings["data"], settings["image_size"] = name, pixels.shape[1]
        settings["classes"] = int(labels.max()) + 1 if task == "classes" else 4
        torch.manual_seed(seed)
        judge = Judge(settings)
        train(judge, pixels[trained], labels[trained], settings["iterations"], seed)
        right = accuracy(judge, pixels[held_out], labels[held_out], seed)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_judge(args.out, judge, right)
        print(f"{100 * right:.1f} % of {len(held_out):,} held-out images right; {args.out} written")
    check(load_judge(args.out), pixels[held_out], labels[held_out], pixels[trained[:REFERENCE]])


def images_of(source, settings):
    """(name, pixels, labels) of the data; where it has no labels, they are all 0.

    ValueError where there are too few, or no labels to learn.
    """
    images = load_images(source, settings["image_size"])
    pixels, labels = np.asarray(images.pixels), images.labels
    if labels is None and settings["task"] == "classes":
        raise ValueError(
            f"{images.name} has no labels; expected one for every image; use --task rotations"
        )
    if len(pixels) < LEAST:
        raise ValueError(
            f"{images.name} holds {len(pixels)} images; expected at least {LEAST}; use more"
        )
    if labels is None:
        labels = np.zeros(len(pixels), np.int64)
    return images.name, pixels, labels


def refuse_others(typed, settings, path):
    """ValueError where a flag asks for another judge than the one at `path`."""
    for key, value in typed.items():
        if settings[key] != value:
            raise ValueError(
                f"{cli.flag_of(key)} {value}: the judge at {path} has {settings[key]}; "
                "expected the same; leave it out, or name another file by --out"
            )


def parse_args(argv):
    """The arguments; `typed` holds those of DEFAULTS that were given."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", default="cifar10", help="the images, as train.py takes them")
    parser.add_argument("--image-size", type=cli.whole(8), help="(default: the images' own)")
    parser.add_argument("--task", choices=TASKS, help="what it learns (default: classes)")
    text = f"of {BATCH} images (default: {DEFAULTS['iterations']})"
    parser.add_argument("--iterations", type=cli.whole(1), help=text)
    # with fewer than 8 channels torch 2.14 may abort on a CPU
    text = f"of the first blocks (default: {DEFAULTS['channels']})"
    parser.add_argument("--channels", type=cli.whole(8), help=text)
    parser.add_argument("--seed", type=cli.whole(0), help="(default: 0)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.pt", help="(default: runs/judge-DATA-TASK.pt)"
    )
    args = parser.parse_args(argv)
    args.typed = {key: getattr(args, key) for key in DEFAULTS if getattr(args, key) is not None}
    task = args.task or DEFAULTS["task"]
    args.out = args.out or Path("runs") / f"judge-{Path(args.data).stem}-{task}.pt"
    return args


if __name__ == "__main__":
    sys.exit(cli.run(main))
