r"""What few sampling steps are worth on a trained model: a score by steps, sampler and spacing.

    python -m experiments.steps runs/casdm-shapes/checkpoint.pt --data shapes
    python -m experiments.steps A.pt B.pt --data images.npz --n 2048 --out assets/steps.png

The score is the Frechet distance of the pixels, in [-1, 1], of --n samples to the images of
--data.  It needs no network; it is no FID, and compares at equal n alone.  The line `images` is
what a random half of the data scores against the other.  Every number of a model is drawn from the
same noise.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from data import from_pixels, load_images, to_pixels
from fid import Statistics
from sample import load_model, open_sampler, sampler_defaults
from scores import frechet_distance
from support import cli
from support.draws import stream
from support.pictures import pyplot, save_figure

STEPS = (5, 7, 10, 15, 20, 50, 100)
WAYS = {  # name -> (--sampler, --spacing)
    "ddim, even": ("ddim", None),
    "ddim, logsnr": ("ddim", "logsnr"),
    "dpm++, even": ("dpm++", None),
    "dpm++, trailing": ("dpm++", "trailing"),
    "dpm++, logsnr": ("dpm++", "logsnr"),
}


def statistics(pixels):
    """(mu, sigma) of uint8 [N, H, W, 3] as rows of H W 3 numbers in [-1, 1]."""
    sums = Statistics()
    for start in range(0, len(pixels), 256):
        sums.add(from_pixels(pixels[start : start + 256]).flatten(1))
    return sums.gaussian()


def halves(pixels):
    """The distance of two random halves of the data: what a perfect model may score."""
    order = stream(0, "halves", 0).permutation(len(pixels))
    first, second = np.array_split(order, 2)
    return frechet_distance(*statistics(pixels[first]), *statistics(pixels[second]))


def draw(model, settings, way, steps, n):
    """uint8 [n, H, W, 3] of the model, by one of WAYS."""
    a = sampler_defaults()
    a.sampler, spacing = WAYS[way]
    a.steps = steps
    if spacing:
        a.spacing = spacings()[spacing]
    sampler = open_sampler(a, model, settings)
    parts = [to_pixels(sampler(first, min(64, n - first))) for first in range(0, n, 64)]
    return torch.cat(parts).numpy()


def spacings():
    from neighbours.solvers import SPACINGS

    return SPACINGS


def scores(checkpoint, images, n):
    """{way: [score of each of STEPS]} of one checkpoint."""
    model, _, settings = load_model(checkpoint)
    reference = statistics(images)
    found = {}
    for way in WAYS:
        found[way] = []
        for steps in STEPS:
            pixels = draw(model, settings, way, steps, n)
            found[way].append(frechet_distance(*statistics(pixels), *reference))
            print(f"{checkpoint} {way} {steps}: {found[way][-1]:.3f}", file=sys.stderr)
    return found


def table(found):
    """Markdown: a row a way, a column a number of steps."""
    lines = [
        f"| | {' | '.join(f'{steps} steps' for steps in STEPS)} |",
        "| --- |" + " --- |" * len(STEPS),
    ]
    for way, values in found.items():
        lines.append(f"| {way} | {' | '.join(f'{value:.2f}' for value in values)} |")
    return "\n".join(lines)


def save_picture(every, path):
    """A panel a checkpoint: the score against steps, a line a way."""
    size = (5 * len(every), 3.5)
    figure, axes = pyplot().subplots(1, len(every), figsize=size, squeeze=False)
    for axis, (name, found) in zip(axes[0], every.items(), strict=True):
        for way, values in found.items():
            axis.loglog(STEPS, values, marker="o", label=way)
        axis.set(title=name, xlabel="steps", ylabel="distance of the pixels")
        axis.set_xticks(STEPS, [str(steps) for steps in STEPS])
        axis.minorticks_off()
    axes[0][0].legend()
    save_figure(figure, path, 110)


def main(argv=None):
    """The tables, and the picture if one is asked for."""
    p = cli.Parser(__doc__)
    p.add_argument("checkpoints", nargs="+", type=Path)
    p.add_argument("--data", default="shapes", help="the images that the models were trained on")
    p.add_argument("--n", type=cli.whole(2), default=1024, help="samples a score")
    p.add_argument("--out", type=Path, metavar="FILE.png", help="also as a picture")
    a = p.parse_args(argv)
    every = {}
    for checkpoint in a.checkpoints:
        _, _, settings = load_model(checkpoint)
        images = load_images(a.data, settings["image_size"]).pixels
        every[checkpoint.parent.name] = scores(checkpoint, images, a.n)
        print(f"\n{checkpoint}, {a.n} samples; images: {halves(images):.2f}\n")
        print(table(every[checkpoint.parent.name]))
    if a.out:
        save_picture(every, a.out)
        print(f"\n{a.out} written")


if __name__ == "__main__":
    sys.exit(cli.run(main))
