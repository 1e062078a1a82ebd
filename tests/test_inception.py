"""inception.py: the resize's and the network's golden values, and the files of weights."""

import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import Inception3

import fid
import inception
from features import features_of
from inception import InceptionFeatures, layers_up_to, tf1_resize
from made import random_pixels
from runs import ROOT
from tiny import batches

SHARED = ROOT.parent / "shared"

# ---- the resize ----


def test_tf1_resize_has_its_golden_values():
    """[[0, 10, 20], [30, 40, 50]] to 4 x 4 as TensorFlow 1 gives it."""
    got = tf1_resize(torch.tensor([[[[0.0, 10, 20], [30, 40, 50]]]]), 4)
    want = [[0, 7.5, 15, 20], [15, 22.5, 30, 35], [30, 37.5, 45, 50], [30, 37.5, 45, 50]]
    torch.testing.assert_close(got[0, 0], torch.tensor(want), rtol=0, atol=0)


def place(target, length):
    """Where a target pixel of 299 lies in a row of `length`: left, right, how far between."""
    source = np.float32(target) * np.float32(np.float32(length) / np.float32(299))
    left = int(source)
    return left, min(left + 1, length - 1), np.float32(source - np.float32(left))


@pytest.mark.parametrize("height, width", [(32, 32), (299, 299), (1, 1), (400, 333)])
def test_tf1_resize_is_exact(height, width):
    """TensorFlow 1's float32 arithmetic bit for bit, pixel by pixel.

    Columns first, start + (end - start) * fraction; every 13th row is compared.
    """
    x = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.float32)
    got = tf1_resize(torch.from_numpy(x)[None, None], 299)[0, 0].numpy()
    for i in range(0, 299, 13):
        top, bottom, down = place(i, height)
        for j in range(299):
            left, right, along = place(j, width)
            upper = x[top, left] + (x[top, right] - x[top, left]) * along
            lower = x[bottom, left] + (x[bottom, right] - x[bottom, left]) * along
            assert got[i, j] == upper + (lower - upper) * down


# ---- the network ----


def shapes():
    """The shape of each tensor in a file of weights, by torchvision's names."""
    with torch.device("meta"):
        state = Inception3(1008, aux_logits=False, init_weights=False).state_dict()
    return {key: v.shape for key, v in state.items() if not key.endswith("num_batches_tracked")}


def test_network_has_pytorch_fids_keys():
    """472 tensors; the names are torchvision's."""
    names = sorted(shapes())
    assert (len(names), names[0], names[-1]) == (472, "Conv2d_1a_3x3.bn.bias", "fc.weight")


def golden(k, name, shape):
    """Tensor number k of the golden network, by formula."""
    wave = torch.sin(torch.arange(shape.numel(), dtype=torch.float64) + k + 1).reshape(shape)
    if len(shape) > 1:
        return wave * math.sqrt(2 / shape[1:].numel())
    if name.endswith(("bn.weight", "running_var")):
        return 1 + 0.1 * wave
    return 0.1 * wave


@pytest.mark.slow
def test_network_has_its_golden_values(tmp_path):
    """With weights by formula, in float64: pool, spatial and logits are the reference's to 1e-6."""
    named = enumerate(sorted(shapes().items()))
    state = {name: golden(k, name, shape) for k, (name, shape) in named}
    torch.save(state, tmp_path / "golden.pth")
    j = torch.arange(2 * 3 * 299 * 299, dtype=torch.float64)
    levels = (127.5 * torch.sin(0.011 * j) + 128).round().clamp(0, 255)
    images = levels.to(torch.uint8).reshape(2, 3, 299, 299)
    pool, spatial, logits = InceptionFeatures(tmp_path / "golden.pth")(images)
    assert pool.dtype == torch.float64
    assert (pool.shape, spatial.shape, logits.shape) == ((2, 2048), (2, 2023), (2, 1008))
    reference = {
        0.04723476905957459: pool.mean(),
        0.15820473617329045: pool[1, -2],
        0.2240281278766469: pool[1, -1],
        0.035646912102288604: spatial.mean(),
        0.17158360777440945: logits.std(),
        0.24222783496476002: logits[0, 0],
        0.2329817285696694: logits[0, 1],
        0.20031365905359927: logits[0, 2],
        0.23939112896961298: logits[1, -1],
    }
    for want, got in reference.items():
        assert float(got) == pytest.approx(want, rel=0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*images are few")
def test_scores_of_real_images_agree_with_an_independent_scorer(tmp_path, capsys):
    """fid_768 and sfid between 60 and 60 CIFAR-10 images, to 1e-3, with TensorFlow's own weights.

    The file holds the layers up to mixed_7 alone, batch norms folded.
    """
    weights, tool = SHARED / "data/inception_2015_to_mixed_7.pth", SHARED / "tools/score.py"
    mosaics = SHARED / "data/cifar10_train"
    if not (weights.exists() and tool.exists() and mosaics.exists()):
        pytest.skip(f"needs {weights.name} and CIFAR-10 in ../shared/data, and ../shared/tools")
    spec = importlib.util.spec_from_file_location("score", tool)
    score = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(score)
    mosaic = np.asarray(Image.open(mosaics / "00.webp").convert("RGB"))  # 50 x 50 images
    rows = mosaic.reshape(50, 32, 50, 32, 3).transpose(0, 2, 1, 3, 4)
    images = rows.reshape(-1, 32, 32, 3)
    network = score.Inception(weights)
    sides, theirs = [], []
    for name, part in (("a", images[:60]), ("b", images[60:120])):
        sides.append(str(tmp_path / f"{name}.npz"))
        np.savez(sides[-1], arr_0=part)
        theirs.append(score.statistics(part, network, "cpu", 50))
    fid.main([*sides, "--dims", "768", "--weights", str(weights), "--json"])
    ours = json.loads(capsys.readouterr().out)
    assert "fid" not in ours and ours["weights"].startswith("inception-")
    a, b = theirs
    assert ours["fid_768"] == pytest.approx(score.frechet(*a[:2], *b[:2]), rel=0, abs=1e-3)
    assert ours["sfid"] == pytest.approx(score.frechet(*a[2:], *b[2:]), rel=0, abs=1e-3)


@pytest.mark.parametrize(
    "dims, layer", [(64, "maxpool1"), (192, "maxpool2"), (768, "Mixed_6e"), (2048, "Mixed_7c")]
)
def test_features_of_each_size_are_the_mean_of_pytorch_fids_layer(whole, dims, layer):
    """Over the positions, of the whole network's output there; sFID's come from 768 on."""
    [images] = batches(random_pixels(2, 40, 40), 2)
    seen = []
    hook = whole.get_submodule(layer).register_forward_hook(lambda *how: seen.append(how[-1]))
    full = whole(images)
    hook.remove()
    rows = InceptionFeatures("random", dims)
    assert rows.name.startswith("random-")
    pool, spatial, logits = rows(images)
    assert pool.shape == (2, dims)
    torch.testing.assert_close(pool, seen[0].mean((2, 3)), rtol=1e-5, atol=1e-6)
    assert (spatial is not None, logits is not None) == (dims >= 768, dims == 2048)
    if spatial is not None:
        torch.testing.assert_close(spatial, full.spatial)


@pytest.mark.slow
def test_features_of_each_size_are_pytorch_fids(tmp_path, monkeypatch):
    """With the golden weights, of an image that is 299 x 299 already."""
    theirs = pytest.importorskip("pytorch_fid.inception")
    named = enumerate(sorted(shapes().items()))
    state = {name: golden(k, name, shape).float() for k, (name, shape) in named}
    torch.save(state, tmp_path / "golden.pth")
    with_bias = state | {"fc.bias": torch.zeros(1008)}
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: with_bias)
    network = theirs.InceptionV3([0, 1, 2, 3], resize_input=False, normalize_input=False).eval()
    [images] = batches(random_pixels(1, 299, 299), 1)
    layers = network((images - 128.0) / 128)
    for dims, layer in zip((64, 192, 768, 2048), layers, strict=True):
        pool = InceptionFeatures(tmp_path / "golden.pth", dims)(images).pool
        torch.testing.assert_close(pool, layer.mean((2, 3)), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def whole():
    """The whole network, with random weights."""
    return InceptionFeatures("random")


@pytest.mark.slow
def test_batch_size_and_order_move_the_network_by_less_than_a_millionth():
    """The distance of the network's features is the same for any batch size and file order.

    Of 100 features: an eigen-decomposition of all of them takes seconds.
    """
    net = InceptionFeatures("random")
    images, other = random_pixels(12, 32, 32), random_pixels(9, 32, 32, seed=1) // 2

    def first_100(images, size):
        found = features_of(batches(images, size), net)
        pool = found.mu[:100], found.sigma[:100, :100]
        return pool, (found.mu_s[:100], found.sigma_s[:100, :100])

    once, reference = first_100(images, 12), first_100(other, 9)
    for order, size in ((images, 1), (images[::-1], 5)):
        for kind, again in enumerate(first_100(order, size)):
            got = fid.frechet_distance(*again, *reference[kind])
            want = fid.frechet_distance(*once[kind], *reference[kind])
            assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
def test_random_network_is_the_same_every_time_and_bf16_keeps_it_close():
    """--weights random is fixed; bfloat16 gives float32 features within a few per cent."""
    a, b = InceptionFeatures("random"), InceptionFeatures("random")
    assert a.name == b.name and a.name.startswith("random-")
    [x] = batches(random_pixels(3, 40, 40), 3)
    exact, same = a(x), b(x)
    rough = b.bfloat16()(x)
    assert (a.precision(), b.precision()) == ("float32", "bfloat16")
    for kind in range(3):
        torch.testing.assert_close(exact[kind], same[kind], rtol=0, atol=0)
        assert rough[kind].dtype == torch.float32
        assert (rough[kind] - exact[kind]).norm() < 0.05 * exact[kind].norm()


# ---- the weights ----


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!doctype html><title>404</title>", "cannot be read as a file of Inception weights"),
        ([1, 2], "lacks 472 of FID-Inception's 472"),
        ({"fc.weight": torch.zeros(1000, 2048)}, "lacks 472 of FID-Inception's 472"),
        ({"fc.weight": torch.zeros(1008, 2048)}, "lacks 471 of"),
    ],
)
def test_wrong_weights_are_refused_in_one_line(tmp_path, content, message):
    """An HTML page, another object, missing keys, other shapes: the file and the way out."""
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as e:
        InceptionFeatures(path)
    error = str(e.value)
    assert message in error and "w.pth" in error and "\n" not in error


def test_a_file_of_earlier_layers_is_refused_by_naming_the_dims_that_it_is_enough_for(tmp_path):
    """Layers up to Mixed_6e give 768 features; the error says so."""
    early = layers_up_to(768)
    state = {k: torch.zeros(s) for k, s in shapes().items() if k.split(".")[0] in early}
    torch.save(state, tmp_path / "early.pth")
    with pytest.raises(ValueError, match="--dims 768 needs no more than it holds"):
        InceptionFeatures(tmp_path / "early.pth")
    assert InceptionFeatures(tmp_path / "early.pth", 768).dims == 768


def test_published_weights_are_fetched_from_their_place_and_checked_by_hash(monkeypatch, tmp_path):
    """Without --weights: pytorch-fid's file, held to the digest in its name."""
    asked = []

    def download(url, megabytes, needed_for, instead, sha256):
        asked.append((url, sha256))
        return tmp_path / "none.pth"

    monkeypatch.setattr(inception, "download", download)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        InceptionFeatures()
    place = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    assert asked == [(place + "pt_inception-2015-12-05-6726825d.pth", "6726825d")]
