"""What every score is computed from: a side's features, their mean and covariance.

A side is a set of images.  Its features are the rows that a network such as Inception makes of
them: pool [n, D], spatial [n, 2023] and logits [n, 1008]; a judge's are pool alone.
"""

import contextlib
import itertools
import sys
from typing import NamedTuple

import numpy as np
import torch

from scores import SPLIT, checked_gaussian, inception_score
from support import cli, parallel
from support.files import atomic, read_npz
from support.images import cache_folder

STEADY = 2048  # below so many images the covariance of pool_3 is singular


class Features(NamedTuple):
    """What is kept of one side; None where it is not known."""

    mu: np.ndarray  # [D] of pool
    sigma: np.ndarray  # [D, D]
    mu_s: np.ndarray | None = None  # [2023] of spatial
    sigma_s: np.ndarray | None = None  # [2023, 2023]
    n: int | None = None  # images
    weights: str | None = None  # the network's name
    score: tuple | None = None  # Inception Score: mean, standard deviation
    pool: torch.Tensor | None = None  # [n, D] float16, for KID, precision and recall


@torch.inference_mode()
def features_of(batches, network, n=None, keep_pool=False):
    """Features of uint8 batches [N, 3, H, W], whose sizes may differ.

    In constant memory, but for the rows that keep_pool keeps.

    n         : how many images there are at most: for the progress bar, and room for the rows
    keep_pool : keep the rows of pool too, in float16; n must be given
    ValueError below 2 images and where a feature is not finite.
    """
    pool_sums, spatial_sums, splits, kept = Statistics(), Statistics(), Splits(), None
    with cli.progress(n, "features", "image") as bar:
        for batch in batches:
            rows = network(batch)
            pool, spatial, logits = (None if x is None else parallel.concat(x) for x in rows)
            pool_sums.add(pool)
            if spatial is not None:
                spatial_sums.add(spatial)
            if logits is not None:
                splits.add(logits)
            if keep_pool and kept is None:  # once, since joining batches would take it twice
                kept = pool.new_empty((n, pool.shape[1]), dtype=torch.float16)
            if keep_pool:
                kept[pool_sums.n - len(pool) : pool_sums.n] = pool
            bar.update(len(pool))
    mu, sigma = pool_sums.gaussian()
    found = Features(mu, sigma, n=pool_sums.n, weights=network.name)
    if spatial_sums.n:
        mu_s, sigma_s = spatial_sums.gaussian()
        found = found._replace(mu_s=mu_s, sigma_s=sigma_s)
    if splits.pending is not None:
        found = found._replace(score=splits.score())
    if keep_pool:
        kept = kept[: pool_sums.n]
        if not kept.isfinite().all():
            raise ValueError(
                "a feature is beyond 65504, float16's greatest; expected smaller ones; "
                "check the network's weights"
            )
        found = found._replace(pool=kept)
    return found


class Statistics:
    """Running mean and covariance of rows of features, in float64 and constant memory."""

    n, sum, outer = 0, 0, 0

    def add(self, rows):
        """rows : [N, D] of any float type, finite"""
        if not rows.isfinite().all():
            raise ValueError(
                "the network's features hold NaN or infinity; "
                "expected finite numbers; check its weights"
            )
        if rows.device.type == "mps":  # which has no float64
            rows = rows.cpu()
        rows = rows.double()
        self.n += len(rows)
        self.sum += rows.sum(0)
        if not torch.is_tensor(self.outer):
            self.outer = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.outer.addmm_(rows.T, rows)  # in place: another D x D a batch costs more than the sum

    def gaussian(self):
        """(mu [D], sigma [D, D]), float64 arrays; sigma is unbiased: divided by n - 1."""
        if self.n < 2:
            raise ValueError(
                f"got {self.n} images; "
                f"expected at least 2, and {STEADY} for a steady FID; add images"
            )
        mu = self.sum / self.n
        sigma = (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()


class Splits:
    """The Inception Score of logits as they come: a split is scored and let go when it is full."""

    def __init__(self):
        self.scores, self.pending = [], None

    def add(self, logits):
        """logits : [N, K]"""
        if self.pending is not None:
            logits = torch.cat([self.pending, logits])
        while len(logits) >= SPLIT:
            self.scores.append(inception_score(logits[:SPLIT])[0])
            logits = logits[SPLIT:]
        self.pending = logits

    def score(self):
        """Its mean and deviation over the splits, the last of which may be smaller."""
        scores = list(self.scores)
        if len(self.pending):
            scores.append(inception_score(self.pending)[0])
        return float(np.mean(scores)), float(np.std(scores))


def batched(images, batch_size):
    """uint8 [H, W, 3] images as this rank's uint8 [N, 3, H, W] batches.

    A batch holds neighbours of one size, at most batch_size of them.
    """

    def batches():
        for _, same in itertools.groupby(images, key=np.shape):
            while batch := list(itertools.islice(same, batch_size)):
                yield torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)

    every = batches()
    while turn := list(itertools.islice(every, parallel.size())):
        # a rank without a batch of its own gets an empty one: all must go round equally often
        yield turn[parallel.rank()] if parallel.rank() < len(turn) else turn[0][:0]


# ---- in files ----

KEPT = ("mu", "sigma", "mu_s", "sigma_s", "n", "weights", "pool")


def reference_features(images, network):
    """Features of a data.Images, without its pool.

    Computed once, and kept under the images' fingerprint, the network's name and its precision.
    """
    path, found = None, None
    if parallel.rank() == 0:
        name = f"{images.fingerprint}-{network.name}-{network.precision()}.npz"
        path = cache_folder() / name
        with contextlib.suppress(FileNotFoundError, ValueError):  # not there yet, or damaged
            found = load_statistics(path)
        if found is None:
            print(
                f"statistics of {images.name} are computed once and kept at {path}", file=sys.stderr
            )
    found = parallel.same(found)
    if found is None:
        found = features_of(batched(images.pixels, 50), network, len(images.pixels))
        save_statistics(path, found)
    return found


def save_statistics(path, features):
    """An .npz with guided-diffusion's keys mu, sigma, mu_s, sigma_s; and n, weights, pool.

    pytorch-fid's are the first two.
    """
    if parallel.rank():
        return
    kept = {}
    for key in KEPT:
        value = getattr(features, key)
        if key == "pool" and value is not None:
            value = value.cpu().numpy()
        if value is not None:
            kept[key] = value
    with atomic(path) as f:
        np.savez(f, **kept)


def load_statistics(path):
    """Features of a statistics .npz, with sFID's, n and the rows of pool where it has them.

    ValueError, one line, for any other file.
    """
    found = read_npz(path, KEPT)
    if not found.keys() >= {"mu", "sigma"}:
        raise ValueError(
            f"{path} holds {', '.join(found) or 'no statistics'}; "
            "expected at least mu and sigma; make it again with --save-stats"
        )
    features = Features(*checked_gaussian(found["mu"], found["sigma"], path))
    if found.keys() >= {"mu_s", "sigma_s"}:
        mu_s, sigma_s = checked_gaussian(found["mu_s"], found["sigma_s"], path)
        features = features._replace(mu_s=mu_s, sigma_s=sigma_s)
    for key, kind in (("n", int), ("weights", str)):
        if key in found and found[key].size == 1:
            features = features._replace(**{key: kind(found[key].item())})
    if "pool" in found:
        features = features._replace(pool=rows_of(found["pool"], features, path))
    return features


def rows_of(pool, features, path):
    """The rows of pool in a statistics .npz, as a tensor; ValueError where they are not its own."""
    fits = pool.dtype == np.float16 and pool.shape == (features.n, len(features.mu))
    if not fits or not np.isfinite(pool).all():
        raise ValueError(
            f"{path}: pool is {pool.dtype} {list(pool.shape)}; "
            f"expected finite float16 [{features.n}, {len(features.mu)}]; make it again"
        )
    return torch.from_numpy(pool)
