"""Chance: every draw follows from (seed, purpose, index), so that nothing needs a saved state."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch


def stream(seed, purpose, index):
    """The numpy Generator of draw `index` for `purpose`; torch's own is seeded by these, too."""
    return np.random.default_rng([*purpose.encode(), seed, index])


class StepDraws:
    """All that training steps draw, for the global batch: the same for any number of processes.

    labels : [N] int64 of the images, or None          extras : what neighbours draw beside
    """

    def __init__(self, settings, pixels, labels, extras):
        self.settings, self.labels, self.extras = settings, labels, extras
        self.n_images, self.shape = len(pixels), (3, *pixels.shape[1:3])

    def __call__(self, steps):
        """For each step (indices of images [n], {field of losses.Batch: [n, ...]}, dropout's seed).

        t and eps are drawn during the step before; the rest may depend on what that step found.
        """
        for rng, indices, drawn, dropout_seed in ahead(map(self.begin, steps)):
            if self.settings["num_classes"]:
                drawn["y"] = self.draw_labels(rng, indices)
            for extra in self.extras:
                drawn |= extra.draw(rng, len(indices))
            yield indices, drawn, dropout_seed

    def begin(self, step):
        """What a step draws whatever the steps before it found."""
        settings, n = self.settings, self.settings["batch_size"]
        rng = stream(settings["seed"], "step", step)
        indices = batch_indices(self.n_images, n, step, settings["seed"])
        t = rng.integers(1, settings["T"] + 1, n)
        eps = rng.standard_normal((n, *self.shape), dtype="float32")
        return rng, indices, {"t": t, "eps": eps}, int(rng.integers(2**31))

    def draw_labels(self, rng, indices):
        """The images' labels [n]; K, which stands for none, where --label-dropout says so."""
        dropped = rng.random(len(indices)) < self.settings["label_dropout"]
        return np.where(dropped, self.settings["num_classes"], self.labels[indices])


def ahead(items):
    """The items of an iterator, each made in a thread while the one before it is in use.

    A GPU that is fed by the step's thread alone would wait for numpy's normal numbers.
    """
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item


class Noise:
    """N(0, I) for a batch of images, image k from the stream of indices[k].

    Each call is the next draw.
    shape : (C, H, W)          returns [N, C, H, W] float32, the same on every device
    """

    def __init__(self, seed, purpose, indices, shape, device="cpu"):
        self.streams = [stream(seed, purpose, i) for i in indices]
        self.shape, self.device = tuple(shape), device

    def __call__(self):
        noise = np.empty((len(self.streams), *self.shape), np.float32)
        for image, rng in zip(noise, self.streams, strict=True):
            rng.standard_normal(out=image, dtype=np.float32)
        return torch.from_numpy(noise).to(self.device)


def batch_indices(n, batch_size, step, seed):
    """Which of n images batch `step` (0, 1, ...) holds -> int64 [batch_size].

    An epoch is one permutation of 0..n-1, from (seed, epoch); batches run on from one into the
    next, so that n < batch_size is no error.
    """
    epoch, place = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    epochs = range(epoch[0], epoch[-1] + 1)
    return np.concatenate([_order(n, seed, e)[place[epoch == e]] for e in epochs])


@lru_cache(maxsize=2)
def _order(n, seed, epoch):
    return stream(seed, "order", epoch).permutation(n)
