r"""data.py: the image range, the embedded shapes, and the sets by their names.

Cas-DM   arXiv:2401.02414v1
"""

import errno
import hashlib
import io
import pickle
import tarfile
import time
import warnings

import numpy as np
import pytest
import torch

import data
from made import random_pixels, refusal
from runs import ROOT, error_of, exit_code

pytestmark = pytest.mark.usefixtures("own_cache")

# ---- range ----


def test_pixels_survive_the_round_trip_for_all_256_values():
    """to_pixels(from_pixels(v)) == v for every level, also 0.4 of a level beside it."""
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    x = data.from_pixels(levels)
    np.testing.assert_array_equal(data.to_pixels(x).numpy(), levels)
    for beside in (-0.4, 0.4):
        near = data.to_pixels(x.double() + beside / 127.5)
        np.testing.assert_array_equal(near.numpy(), levels)


def test_image_range_is_minus_one_to_one():
    """Levels 0, 255 and 51 are -1, 1 and -0.6; the layout is [B, 3, H, W], contiguous float32."""
    pixels = random_pixels(2, 4, 5)
    pixels[0, 0, 0] = 0, 255, 51
    x = data.from_pixels(pixels)
    assert x.shape == (2, 3, 4, 5) and x.dtype == torch.float32 and x.is_contiguous()
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    expected = torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2)
    torch.testing.assert_close(x.double(), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(data.from_pixels(torch.from_numpy(pixels)), x)


def test_values_outside_the_range_are_clamped_not_wrapped():
    """-7 is black and 7 is white."""
    x = torch.tensor([-7.0, 7.0, float("inf")]).reshape(1, 3, 1, 1)
    assert data.to_pixels(x).flatten().tolist() == [0, 255, 255]


def test_nan_is_never_written_as_black():
    """One NaN among the images is an error."""
    x = torch.zeros(2, 3, 2, 2)
    x[1, 2, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        data.to_pixels(x)


def test_reading_a_memory_map_neither_warns_nor_writes(tmp_path):
    """from_pixels takes read-only arrays."""
    pixels = random_pixels(2, 4, 4)
    np.save(tmp_path / "a.npy", pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.from_pixels(np.load(tmp_path / "a.npy", mmap_mode="r")[:2])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), pixels)


# ---- shapes ----


def test_shapes_are_three_balanced_classes_that_never_change():
    """Discs, squares and triangles, about a third each, the same at every call bit for bit."""
    images = data.load_images("shapes")
    assert images.pixels.shape == (4096, 16, 16, 3) and images.pixels.dtype == np.uint8
    counts = np.bincount(images.labels)
    assert len(counts) == 3 and counts.min() > 0.9 * 4096 / 3
    np.testing.assert_array_equal(images.pixels, data.load_images("shapes").pixels)


@pytest.mark.parametrize("size", [16, 48])
def test_shapes_cover_the_areas_of_their_geometry(size):
    """Of radius r: pi r^2, (1.7 r)^2 and 3 sqrt(3) (r / 1.6)^2, over that of the disc.

    Anti-aliasing keeps them at any size.
    """
    pixels, labels = (part[:1500] for part in data.shapes(size))
    ground = pixels[:, :1, :1].astype(float)
    distance = abs(pixels - ground).max(-1)  # from the ground's colour
    share = distance / distance.max((1, 2))[:, None, None]  # of a pixel inside the shape
    outline = (share > 0.05) & (share < 0.95)
    assert outline.mean() < 2 / size, "the outline is wider than a pixel"
    area = np.array([share[labels == k].mean() for k in range(3)])
    geometry = np.array([np.pi, 1.7**2, 27**0.5 / 1.6**2])
    np.testing.assert_allclose(area / area[0], geometry / np.pi, rtol=0.04)


def test_shapes_stand_out_from_their_ground():
    """The middle is brighter than a corner by 60 levels or more in some channel of every image."""
    pixels = data.load_images("shapes").pixels.astype(int)
    middle = pixels[:, 4:12, 4:12].max((1, 2))
    assert (middle - pixels[:, 0, 0]).max(-1).min() >= 60


def test_shapes_at_another_size_are_the_same_pictures():
    """32 x 32 shapes averaged over 2 x 2 pixels are the 16 x 16 ones, within the anti-aliasing."""
    small, large = data.shapes(16)[0].astype(float), data.shapes(32)[0].astype(float)
    halved = large.reshape(4096, 16, 2, 16, 2, 3).mean((2, 4))
    assert abs(halved - small).mean() < 2


# ---- names ----


def test_unknown_source_lists_what_is_known():
    """A misspelt name is answered with the names there are."""
    message = refusal("cifar")
    assert all(name in message for name in data.DATASETS)


@pytest.mark.parametrize("name", ["celebahq", "lsun-bedroom", "imagenet64"])
def test_sets_without_download_ask_for_the_users_copy(name, folder):
    """Without --data-dir one line; with it the folder or .npz, at 64 x 64 (Cas-DM Sec. 5)."""
    assert "--data-dir" in refusal(name)
    assert "does not exist" in refusal(name, data_dir=folder / "nothing")
    images = data.load_images(name, data_dir=folder)
    assert images.pixels.shape == (6, 64, 64, 3) and images.name == name
    np.testing.assert_array_equal(data.raw_images(name, data_dir=folder), images.pixels)
    np.savez(folder / "a.npz", random_pixels(2, 80, 70))
    assert data.load_images(name, data_dir=folder / "a.npz").pixels.shape == (2, 64, 64, 3)


def test_a_set_is_one_function_and_one_row(monkeypatch):
    """What a reader adds: its images come at the size that is asked for, with their labels."""

    def open_grey(image_size, data_dir):
        pixels = np.full((5, image_size, image_size, 3), 128, np.uint8)
        return data.Frames(pixels, np.arange(5) % 2, "grey", image_size)

    monkeypatch.setitem(data.DATASETS, "grey", data.Dataset(32, open_grey))
    assert data.load_images("grey", 32).pixels.shape == (5, 32, 32, 3)
    small = data.load_images("grey", 16)
    assert small.pixels.shape == (5, 16, 16, 3) and (small.pixels == 128).all()
    assert small.labels.tolist() == [0, 1, 0, 1, 0]
    assert small.fingerprint != data.load_images("grey").fingerprint


def test_cifar10_that_cannot_be_had_names_the_offline_command(tmp_path, monkeypatch):
    """No network: what is missing, how large, where to put it, the same in small; no half file."""

    def offline(*args, **kwargs):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    message = refusal("cifar10", data_dir=tmp_path / "data")
    assert "170 MB" in message and "--data shapes" in message
    assert str(tmp_path / "data" / "cifar-10-python.tar.gz") in message
    assert not (tmp_path / "data").exists()


def test_damaged_cifar10_archive_is_refused_without_network(tmp_path):
    """An archive with another SHA-256 is neither opened nor fetched again."""
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b half an archive")
    assert "SHA-256" in refusal("cifar10", data_dir=tmp_path)


def small_cifar10(path, planes):
    """Writes an archive of CIFAR-10's structure, and returns torchvision's class with its sums.

    planes : uint8 [5 files, n, 3, 32, 32]; the images of file i have the label i
    """
    files = {}
    for i, images in enumerate(planes):
        rows = images.reshape(len(images), 3072)
        files[f"data_batch_{i + 1}"] = {"data": rows, "labels": [i] * len(rows)}
    files["test_batch"] = files["data_batch_1"]
    files["batches.meta"] = {"label_names": list("abcdefghij")}
    sums = {}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            packed = pickle.dumps(content)
            sums[name] = hashlib.md5(packed).hexdigest()
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(packed)
            archive.addfile(entry, io.BytesIO(packed))

    class Small(data.CIFAR10):
        tgz_md5 = hashlib.md5(path.read_bytes()).hexdigest()
        train_list = [[name, sums[name]] for name in files if name.startswith("data")]
        test_list = [["test_batch", sums["test_batch"]]]
        meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}

    return Small


def test_cifar10_is_unpacked_from_its_archive(tmp_path, monkeypatch):
    """A small archive of the same structure: unpacked once, rows to [H, W, 3], labels kept."""
    shape = (5, 4, 3, 32, 32)
    planes = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    archive = tmp_path / "cifar-10-python.tar.gz"
    monkeypatch.setattr(data, "CIFAR10", small_cifar10(archive, planes))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(data, "CIFAR10_SHA256", digest)
    images = data.load_images("cifar10", data_dir=tmp_path)
    expected = planes.reshape(20, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(images.pixels, expected)
    assert images.labels.tolist() == np.arange(5).repeat(4).tolist()
    assert images.labels.dtype == np.int64
    archive.unlink()  # once unpacked it is not needed
    assert data.load_images("cifar10", 16, data_dir=tmp_path).pixels.shape == (20, 16, 16, 3)


def test_a_folder_without_images_ends_a_script_with_exit_code_1(tmp_path, capsys):
    assert exit_code(lambda argv: data.load_images(tmp_path)) == 1
    assert "holds no images" in error_of(capsys)


# ---- real images ----

CIFAR10_NPZ = ROOT / "../shared/data/cifar10_train.npz"


@pytest.mark.skipif(not CIFAR10_NPZ.exists(), reason="needs ../shared/data/cifar10_train.npz")
def test_cifar10_npz_has_cifar10s_means_and_loads_at_once():
    """49,923 images, 77 fewer than CIFAR-10, open in less than a second."""
    start = time.perf_counter()
    images = data.load_images(CIFAR10_NPZ)
    assert time.perf_counter() - start < 1
    assert images.pixels.shape == (49923, 32, 32, 3) and np.bincount(images.labels).min() > 4900
    means = images.pixels.reshape(-1, 3).mean(0) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=2e-4)
