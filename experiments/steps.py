r"""What few sampling steps are worth on trained models: a score by steps, sampler and spacing.

    python -m experiments.steps runs/casdm-shapes/checkpoint.pt --data shapes
    python -m experiments.steps A/checkpoint.pt B/checkpoint.pt --data images.npz --judge JUDGE.pt
    python -m experiments.steps --out assets/steps.png        the tables of all lines, and a picture

The score is a Frechet distance of --n samples to the images of --data: of a judge's features
(judge.py), or of the pixels, in [-1, 1], which needs no network.  It is not an FID: compare scores
at equal n only.  The column `images` is what as many of the images score against the rest: what a
perfect model may reach.  Every sample of a model is drawn from the same noise.

Each score is a line of --results; a score that has its line is not taken again.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from data import load_images, to_pixels
from experiments.tables import markdown, markdown_header
from features import batched, features_of
from inception import Rows
from neighbours.judge import load_judge
from neighbours.solvers import SPACINGS
from sample import load_model, open_sampler, sampler_defaults
from scores import frechet_distance
from support import cli
from support.draws import stream
from support.pictures import pyplot, save_figure

STEPS = (5, 7, 10, 15, 20, 50, 100)
RESULTS = Path("experiments/steps.jsonl")


class Way(NamedTuple):
    """How a sample is drawn, and the most steps that it is tried with."""

    sampler: str
    spacing: str | None
    most: int


WAYS = {
    "DDIM, even": Way("ddim", None, 100),
    "DDIM, trailing": Way("ddim", "trailing", 20),
    "DDIM, log SNR": Way("ddim", "logsnr", 20),
    "DPM++(2M), even": Way("dpm++", None, 20),
    "DPM++(2M), trailing": Way("dpm++", "trailing", 20),
    "DPM++(2M), log SNR": Way("dpm++", "logsnr", 20),
}


class Pixels(nn.Module):
    """A network of features that are the pixels."""

    name = "pixels-0"

    def forward(self, images):
        return Rows(images.flatten(1) / 127.5 - 1)


class Scorer:
    """The distance of samples to images, by one network, at n samples."""

    def __init__(self, network, images, n):
        self.network, self.n = network, n
        order = stream(0, "reference", 0).permutation(len(images))
        self.reference = self.features(images[np.sort(order[n:])])
        self.perfect = self.distance(images[np.sort(order[:n])])

    def features(self, pixels):
        """What is compared of uint8 [n, H, W, 3]."""
        return features_of(batched(pixels, 500), self.network, len(pixels))

    def distance(self, pixels):
        """pixels : uint8 [n, H, W, 3]"""
        found = self.features(pixels)
        return frechet_distance(found.mu, found.sigma, self.reference.mu, self.reference.sigma)


def draw(model, settings, way, steps, n):
    """uint8 [n, H, W, 3] of the model, by one of WAYS."""
    args = sampler_defaults()
    args.sampler, args.steps = WAYS[way].sampler, steps
    if WAYS[way].spacing:
        args.spacing = SPACINGS[WAYS[way].spacing]
    sampler = open_sampler(args, model, settings)
    parts = [to_pixels(sampler(first, min(64, n - first))) for first in range(0, n, 64)]
    return torch.cat(parts).numpy()


def take_scores(checkpoint, args):
    """A line of args.results for each way and number of steps of one checkpoint."""
    model, _, settings = load_model(checkpoint)
    network = load_judge(args.judge) if args.judge else Pixels()
    name = name_of(checkpoint)
    kind = {"model": name, "network": network.name, "n": args.n}
    wanted, found = [], lines(args)
    for way, how in WAYS.items():
        for steps in STEPS:
            key = kind | {"way": way, "steps": steps}
            if steps <= how.most and not taken(key, found):
                wanted.append(key)
    if not wanted:
        return
    images = load_images(args.data, settings["image_size"]).pixels
    if len(images) < args.n + 2:
        raise ValueError(
            f"--n {args.n} of {len(images)} images; expected fewer, so that some are left to "
            "compare with; use a smaller one"
        )
    scorer = Scorer(network, images, args.n)
    for key in tqdm(wanted, desc=name, unit="score", file=sys.stderr):
        distance = scorer.distance(draw(model, settings, key["way"], key["steps"], args.n))
        with open(args.results, "a") as f:
            f.write(json.dumps(key | {"distance": distance, "images": scorer.perfect}) + "\n")


def name_of(checkpoint):
    """A run's folder, or the name of a file of weights."""
    if checkpoint.name == "checkpoint.pt":
        return checkpoint.absolute().parent.name
    return checkpoint.stem


def taken(key, found):
    """Whether one of the lines is the score of that key."""
    return any(key.items() <= line.items() for line in found)


def lines(args):
    """The lines of --results, none where it is not there."""
    if not args.results.exists():
        return []
    return [json.loads(line) for line in args.results.read_text().splitlines()]


# ---- the table and the picture ----


def table(found):
    """Markdown of lines: a row a model and way, a column a number of steps."""
    names = [f"{steps} steps" for steps in STEPS]
    rows = [markdown_header("model", "way", *names, "images")]
    for model, way, distances, perfect in curves(found):
        cells = [f"{distances[steps]:.3f}" if steps in distances else "" for steps in STEPS]
        rows.append(markdown(model, way, *cells, f"{perfect:.3f}"))
    return "\n".join(rows)


def curves(found):
    """(model, way, {steps: distance}, what images score), in the order of the lines."""
    pairs = dict.fromkeys((line["model"], line["way"]) for line in found)
    for model, way in sorted(pairs, key=lambda pair: [pair[0], list(WAYS).index(pair[1])]):
        mine = [line for line in found if (line["model"], line["way"]) == (model, way)]
        yield model, way, {line["steps"]: line["distance"] for line in mine}, mine[0]["images"]


def save_picture(found, path):
    """A panel a model: the distance against steps, a line a way."""
    models = list(dict.fromkeys(line["model"] for line in found))
    size = (4 * len(models), 3.5)
    figure, axes = pyplot().subplots(1, len(models), figsize=size, squeeze=False)
    panels = dict(zip(models, axes[0], strict=True))
    for model, way, distances, _ in curves(found):
        x = sorted(distances)
        panels[model].semilogx(x, [distances[steps] for steps in x], marker="o", label=way)
    for model, axis in panels.items():
        axis.set(title=model, xlabel="steps", ylabel="Frechet distance")
        axis.set_xticks(STEPS, [str(steps) for steps in STEPS])
        axis.minorticks_off()
    axes[0][0].legend(fontsize="small")
    save_figure(figure, path, 110)


def main(argv=None):
    """Takes the scores that are missing, and prints a table for each network and n."""
    args = parse_args(argv)
    for checkpoint in args.checkpoints:
        take_scores(checkpoint, args)
    groups = {}
    for line in lines(args):
        groups.setdefault((line["network"], line["n"]), []).append(line)
    if not groups:
        raise ValueError(f"{args.results} has no line; expected scores; name a checkpoint")
    for (network, n), found in groups.items():
        print(f"\n{network}, {n} samples\n\n{table(found)}")
    if args.out:
        save_picture(list(groups.values())[-1], args.out)
        print(f"\n{args.out} written")


def parse_args(argv):
    """The arguments; SystemExit 2, one line, for whatever they alone show to be wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", type=Path, help="each in its run's folder")
    parser.add_argument(
        "--data", default="shapes", help="the images that the models were trained on"
    )
    parser.add_argument("--judge", metavar="FILE.pt", help="by its features instead of the pixels")
    parser.add_argument("--n", type=cli.whole(2), default=1024, help="samples a score")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE.jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the last table as a picture")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
