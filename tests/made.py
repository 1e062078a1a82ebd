"""Images and features that tests make, and how a refusal of images reads."""

import numpy as np
import pytest

from data import load_images


def random_pixels(n, height, width, seed=0):
    """uint8 [n, height, width, 3]"""
    shape = (n, height, width, 3)
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def normal(*shape, seed=0):
    """Draws of N(0, 1), float64."""
    return np.random.default_rng(seed).normal(size=shape)


def gaussian(n=200, d=24, seed=0):
    """Mean and covariance of n rows; the covariance is singular where n <= d."""
    x = normal(n, d, seed=seed) * np.linspace(0.1, 2, d) + seed
    return x.mean(0), np.cov(x, rowvar=False)


def refusal(*how, **options):
    """The message, one line, of the ValueError or OSError that load_images raises."""
    with pytest.raises((ValueError, OSError)) as e:
        load_images(*how, **options)
    message = str(e.value)
    assert "\n" not in message
    assert message.count(";") >= 2, f"not `got; expected; what to do`: {message}"
    return message
