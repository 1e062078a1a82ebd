r"""What images look like, beside a reference: their colours, contrast and saturation.

    python -m experiments.colours samples.npz FOLDER --reference cifar10

Each is a folder, an images .npz or a data set's name, and has a line.  The reference comes last.

colour       1000 times the Frechet distance of the images' mean colours, three numbers an image,
             to the reference's
contrast     the standard deviation of a channel within an image, the mean over all
saturation   a pixel's greatest channel less its least, the mean over all

Pixels count as 0..1.  No network has a say in these.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import raw_images
from experiments.tables import markdown, markdown_header
from scores import frechet_distance
from support import cli


class Look(NamedTuple):
    """What is kept of a set of images."""

    colours: np.ndarray  # [n, 3]   each image's mean, 0..1
    contrast: float
    saturation: float


def look(images):
    """Look of uint8 [H, W, 3] images; ValueError below 2."""
    colours, contrasts, saturations = [], [], []
    for image in images:
        x = image / 255
        colours.append(x.mean((0, 1)))
        contrasts.append(x.std((0, 1)).mean())
        saturations.append((x.max(2) - x.min(2)).mean())
    if len(colours) < 2:
        raise ValueError(f"got {len(colours)} images; expected at least 2; add images")
    return Look(np.array(colours), np.mean(contrasts), np.mean(saturations))


def colour_distance(a, b):
    """1000 times the Frechet distance of two Looks' colours."""
    return 1000 * frechet_distance(*moments(a), *moments(b))


def moments(side):
    """Mean [3] and covariance [3, 3] of a Look's colours."""
    return side.colours.mean(0), np.cov(side.colours.T)


def main(argv=None):
    """The table."""
    args = parse_args(argv)
    sources = [*args.images, args.reference]
    looks = {source: look(raw_images(source, args.data_dir)) for source in sources}
    print(markdown_header("images", "colour", "contrast", "saturation"))
    for source, found in looks.items():
        distance = colour_distance(found, looks[args.reference])
        numbers = [f"{distance:.2f}", f"{found.contrast:.3f}", f"{found.saturation:.3f}"]
        print(markdown(source, *numbers))


def parse_args(argv):
    """The arguments; SystemExit 2, one line, for whatever they alone show to be wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("images", nargs="+", help="folders, .npz files or names of data sets")
    parser.add_argument("--reference", required=True, help="what they are compared with")
    parser.add_argument("--data-dir", type=Path, help="where a named data set lies")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(cli.run(main))
