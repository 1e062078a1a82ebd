"""A network of Inception's interface that costs nothing, and images for it."""

import torch.nn.functional as F
from torch import nn

import inception
from features import batched, features_of
from made import random_pixels


def pixels(n, size=8, seed=0):
    return random_pixels(n, size, size, seed)


def batches(images, size):
    return list(batched(images, size))


class Tiny(nn.Module):
    """A network of the same interface with 12, 5 and 7 features, in float64."""

    convention = inception.InceptionFeatures.convention

    def __init__(self, weights=None, dims=2048):
        super().__init__()
        self.name, self.dims = f"{weights or 'inception'}-00000000", 12
        self.fc = nn.Linear(1, 1)

    def forward(self, images):
        x = F.adaptive_avg_pool2d(images.double().contiguous() / 255, 2).flatten(1)
        return x, x[:, :5] ** 2, 9 * x[:, :7]

    def precision(self):
        return str(self.fc.weight.dtype).removeprefix("torch.")


def features(images, batch_size=9):
    return features_of(batches(images, batch_size), Tiny())
