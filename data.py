r"""Images in: the named sets, `shapes`, folders and .npz files; the one home of the image range.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models, Sec. 5

    range    `from_pixels`, `to_pixels`        uint8 0..255 <-> [-1, 1]
    images   `load_images`, `raw_images`       DATASETS names the sets

Training data is one uint8 array [N, H, W, 3], resident or memory-mapped: no worker processes, and
3 million images take no memory.  What is not such an array yet is made one once, by
support/images.py.

To add a set: its row in DATASETS, and a function like `open_shapes` if it can be fetched or made.
CHOICE: no augmentation, no flips; the paper names none and improved-diffusion uses none.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets import CIFAR10

from support.draws import stream
from support.files import download
from support.images import Frames, open_path, prepared

CIFAR10_HOME = Path("data")  # where CIFAR-10 is or goes, if no --data-dir says otherwise
CIFAR10_SHA256 = (
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"  # of the .tar.gz
)
VERSION = 1  # of what a prepared file holds; part of every fingerprint


class Images(NamedTuple):
    """A training set."""

    pixels: np.ndarray  # [N, H, W, 3] uint8 0..255, resident or memory-mapped
    labels: np.ndarray | None  # [N] int64
    name: str  # for messages
    fingerprint: str  # hex digits that change when the images or their size do


# ---- range ----


def from_pixels(pixels):
    """uint8 0..255 [B, H, W, 3], array or tensor -> float32 [-1, 1] [B, 3, H, W]: v / 127.5 - 1."""
    if not torch.is_tensor(pixels):
        pixels = torch.from_numpy(np.array(pixels))  # a copy: a memory map cannot be written
    assert pixels.dtype == torch.uint8, f"expected uint8 pixels, got {pixels.dtype}"
    x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(127.5).sub_(1)


def to_pixels(x):
    """[-1, 1] [B, 3, H, W], clamped -> uint8 0..255 [B, H, W, 3] on the same device.

    The inverse of `from_pixels` on all 256 values.
    CHOICE: the nearest level; improved-diffusion truncates, which darkens by half a level.
    ValueError for NaN, which would be black.
    """
    if x.isnan().any():
        raise ValueError(
            "the images hold NaN, so the network that made them has diverged; "
            "expected numbers; use an earlier checkpoint"
        )
    levels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


# ---- images ----


def load_images(source, image_size=None, data_dir=None, skip_bad=False):
    """The images of `source`, centre-cropped and resized to `image_size` -> Images.

    source     : a name in DATASETS, a folder, or an images .npz, as support/images.py takes them
    image_size : None: a named set's own, an .npz file's own, FOLDER_SIZE for folders
    data_dir   : where CIFAR-10 is or goes (None: ./data); for the sets without a download, their
                 folder or .npz
    skip_bad   : leave out the image files that cannot be read, and count them in one warning
    ValueError, FileNotFoundError or OSError, one line, where that fails.
    """
    found = _open(source, image_size, data_dir, skip_bad)
    size = image_size or found.size
    if size is None:
        raise ValueError(
            f"{source} holds images that are not square; "
            "expected square ones or a size to crop them to; give --image-size"
        )
    identity = f"{VERSION} {size} {found.digest}"
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
    pixels, labels = found.pixels, found.labels
    if not isinstance(pixels, np.ndarray) or pixels.shape[1:3] != (size, size):
        pixels, labels = prepared(pixels, labels, size, fingerprint, source)
    return Images(pixels, labels, str(source), fingerprint)


def raw_images(source, data_dir=None, skip_bad=False):
    """The images of `source` at their own size: len(), and uint8 [H, W, 3] arrays one by one.

    In constant memory.  A named set yields what `load_images` prepares.  With skip_bad a folder may
    yield fewer than len().
    """
    if source in DATASETS:
        return load_images(source, None, data_dir, skip_bad).pixels
    return _open(source, None, data_dir, skip_bad).pixels


def _open(source, image_size, data_dir, skip_bad):
    # -> Frames, of a named set's own size
    if source not in DATASETS:
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; "
                f"expected {', '.join(DATASETS)}, a folder of images or an .npz; check the path"
            )
        return open_path(path, skip_bad)
    dataset = DATASETS[source]
    if dataset.open:
        found = dataset.open(image_size or dataset.image_size, data_dir)
    elif data_dir is None:
        raise ValueError(
            f"{source} has no download and no --data-dir was given; expected your copy, a folder "
            "of images or an .npz with arr_0 uint8 [N, H, W, 3]; add --data-dir PATH"
        )
    elif not Path(data_dir).exists():
        raise FileNotFoundError(
            f"{data_dir} does not exist; expected a folder of images or an .npz; check --data-dir"
        )
    else:
        found = open_path(Path(data_dir), skip_bad)
    return found._replace(size=dataset.image_size)


# ---- the sets ----


def open_shapes(image_size, data_dir):
    """`shapes` as Frames; data_dir means nothing to it."""
    pixels, labels = shapes(image_size)
    return Frames(pixels, labels, "shapes", image_size)


def shapes(image_size=16):
    """4096 bright discs, squares and triangles on plain dark grounds, always the same.

    returns : uint8 [4096, S, S, 3], labels int64 [4096]
    """
    draw = stream(0, "shapes", 0)
    n = 4096
    labels = draw.integers(3, size=n)
    # the picture is [-1, 1]^2, y down
    centre = draw.uniform(-0.25, 0.25, (n, 2, 1, 1)).astype(np.float32)
    radius = draw.uniform(0.4, 0.6, (n, 1, 1)).astype(np.float32)
    bright = 0.2 + 0.8 * _hue(draw.uniform(size=(n, 1)))  # [n, 3]
    dark = 0.35 * _hue(draw.uniform(size=(n, 1)))
    grid = ((np.arange(image_size) + 0.5) * 2 / image_size - 1).astype(np.float32)
    pixels = np.empty((n, image_size, image_size, 3), np.uint8)
    for part in np.split(np.arange(n), 16):  # in parts, so that large sizes fit
        x = grid - centre[part, 0]  # [n/16, 1, S]
        y = grid[:, None] - centre[part, 1]  # [n/16, S, 1]
        r = radius[part]
        # distances to the outlines, negative inside: [n/16, S, S]
        disc = np.hypot(x, y) - r
        square = np.maximum(abs(x), abs(y)) - 0.85 * r
        triangle = np.maximum(y, math.sqrt(0.75) * abs(x) - 0.5 * y) - r / 1.6
        outside = np.choose(labels[part, None, None], [disc, square, triangle])
        # the share of each pixel that lies inside, so that edges are smooth
        cover = np.clip(0.5 - outside * image_size / 2, 0, 1)[..., None]
        ground, contrast = dark[part, None, None], (bright - dark)[part, None, None]
        pixels[part] = np.rint(255 * (ground + cover * contrast))
    return pixels, labels


def _hue(h):
    # [n, 1] in 0..1 -> the fully saturated colour [n, 3] in 0..1
    return np.clip(abs((h + np.array([0, 2, 1]) / 3) % 1 * 6 - 3) - 1, 0, 1).astype(np.float32)


def open_cifar10(image_size, data_dir):
    """torchvision's CIFAR-10 of `data_dir`, downloaded there if it is missing."""
    found = _cifar10(Path(data_dir or CIFAR10_HOME))
    return Frames(found.data, np.array(found.targets, np.int64), CIFAR10_SHA256, 32)


def _cifar10(folder):
    with suppress(RuntimeError):  # not unpacked there, or not whole
        return CIFAR10(folder)  # compares MD5 sums before it opens anything
    instead = (
        "train the same model in small, offline: "
        "python train.py --model casdm --metric ssim=0.1 --data shapes"
    )
    archive = download(CIFAR10.url, 170, "--data cifar10", instead, CIFAR10_SHA256, folder)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != CIFAR10_SHA256:
        raise ValueError(
            f"{archive} is damaged or another file; expected SHA-256 {CIFAR10_SHA256}; "
            "delete it and start again"
        )
    return CIFAR10(folder, download=True)  # finds the archive, so it only unpacks


class Dataset(NamedTuple):
    """What is known of a named set."""

    image_size: int  # the paper's (Cas-DM Sec. 5)
    open: Callable | None = None  # (image_size, data_dir) -> Frames; None: the user's own copy


DATASETS = {
    "shapes": Dataset(16, open_shapes),
    "cifar10": Dataset(32, open_cifar10),
    "celebahq": Dataset(64),
    "lsun-bedroom": Dataset(64),
    "imagenet64": Dataset(64),
}
