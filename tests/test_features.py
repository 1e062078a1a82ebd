"""features.py: sums over batches, what is kept of a side, and files of it."""

import math

import numpy as np
import pytest
import torch

import fid
from data import Images
from features import (
    Statistics,
    batched,
    features_of,
    load_statistics,
    reference_features,
    save_statistics,
)
from made import normal
from scores import inception_score
from tiny import Tiny, batches, features, pixels

# ---- statistics ----


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_streamed_statistics_equal_numpys(batch_size):
    """Mean and unbiased covariance, whatever the batches and however far the mean from 0."""
    x = normal(100, 6) + 100
    sums = Statistics()
    for rows in torch.from_numpy(x).split(batch_size):
        sums.add(rows)
    mu, sigma = sums.gaussian()
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-10)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(value):
    """One bad feature is an error at once, not a NaN at the end."""
    with pytest.raises(ValueError, match="NaN or infinity"):
        Statistics().add(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_are_refused(n):
    """One image has no covariance."""
    with pytest.raises(ValueError, match=f"got {n} images; expected at least 2"):
        features(pixels(n))


@pytest.mark.parametrize("batch_size, order", [(1, 1), (7, -1)])
def test_any_batch_size_and_order_give_the_same_numbers(batch_size, order):
    """Of statistics and of a single split of the Inception Score."""
    images, other = pixels(60), features(pixels(50, seed=1))
    whole, parts = features(images, 60), features(images[::order], batch_size)
    got, want = (
        fid.frechet_distance(side.mu, side.sigma, other.mu, other.sigma) for side in (parts, whole)
    )
    assert got == pytest.approx(want, rel=1e-10)
    np.testing.assert_allclose(parts.score, whole.score, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_size", [3, 10, 64])
def test_streamed_inception_score_equals_that_of_all_logits(monkeypatch, batch_size):
    """Splits are cut across batches."""
    monkeypatch.setattr("features.SPLIT", 10)
    images = pixels(35)
    _, _, logits = Tiny()(batches(images, 35)[0])
    want = inception_score(logits, 10)
    np.testing.assert_allclose(features(images, batch_size).score, want, rtol=1e-12)


def test_nothing_that_grows_with_the_images_is_kept_unless_asked_for():
    """Without keep_pool the features are sums alone; with it, one float16 row an image.

    Of 22 images announced two could not be read.
    """
    assert features(pixels(20)).pool is None
    pool = features_of(batches(pixels(20), 4), Tiny(), 22, keep_pool=True).pool
    assert pool.dtype == torch.float16 and pool.shape == (20, 12)


def test_statistics_survive_their_file(tmp_path):
    """What is saved is what is read, under guided-diffusion's keys."""
    saved = features(pixels(20))
    save_statistics(tmp_path / "s.npz", saved)
    keys = {"mu", "sigma", "mu_s", "sigma_s", "n", "weights"}
    assert set(np.load(tmp_path / "s.npz").files) == keys
    got = load_statistics(tmp_path / "s.npz")
    assert got.n == 20 and got.weights == saved.weights
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_array_equal(getattr(got, name), getattr(saved, name))


def test_reference_is_computed_once_per_data_network_and_precision(own_cache, monkeypatch):
    """The cache answers for the same fingerprint, not for other data or another precision.

    A damaged file is made again.
    """
    made = []

    def counted(*how):
        made.append(1)
        return features_of(*how)

    monkeypatch.setattr("features.features_of", counted)
    images = Images(pixels(10), None, "ten", "abcd")
    first = reference_features(images, Tiny())
    np.testing.assert_array_equal(reference_features(images, Tiny()).sigma, first.sigma)
    assert len(made) == 1
    reference_features(images._replace(fingerprint="ef01"), Tiny())
    reference_features(images, Tiny().bfloat16())
    reference_features(images, Tiny("other"))
    assert len(made) == 4
    [cached] = own_cache.glob("abcd-inception*float32.npz")
    cached.write_bytes(cached.read_bytes()[:-200])
    np.testing.assert_array_equal(reference_features(images, Tiny()).sigma, first.sigma)
    assert len(made) == 5


# ---- batches ----


def test_batches_hold_neighbours_of_one_size():
    """Images of different sizes are never mixed, keep their order, and fill their batches."""
    widths = [4, 4, 4, 5, 5, 4]
    images = [np.full((4, width, 3), i, np.uint8) for i, width in enumerate(widths)]
    got = list(batched(iter(images), 2))
    assert [tuple(b.shape) for b in got] == [(2, 3, 4, 4), (1, 3, 4, 4), (2, 3, 4, 5), (1, 3, 4, 4)]
    assert [int(image[0, 0, 0]) for batch in got for image in batch] == [0, 1, 2, 3, 4, 5]


def test_images_are_read_as_they_are_needed():
    """The first batch comes before the last image is opened."""
    opened = []

    def images():
        for i in range(100):
            opened.append(i)
            yield np.zeros((2, 2, 3), np.uint8)

    next(batched(images(), 5))
    assert len(opened) <= 6
