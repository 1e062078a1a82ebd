"""Images that tests make, and how a refusal of images reads."""

import numpy as np
import pytest

from data import load_images


def random_pixels(n, height, width, seed=0):
    """uint8 [n, height, width, 3]"""
    shape = (n, height, width, 3)
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def refusal(*how, **options):
    """The message, one line, of the ValueError or OSError that load_images raises."""
    with pytest.raises((ValueError, OSError)) as e:
        load_images(*how, **options)
    message = str(e.value)
    assert "\n" not in message
    assert message.count(";") >= 2, f"not `got; expected; what to do`: {message}"
    return message
