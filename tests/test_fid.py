"""fid.py: the distances' closed forms, the network's golden values, what goes in and what comes out."""
import importlib.util
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from support import edges
import fid
from test_parallel import done

ROOT = Path(fid.__file__).resolve().parent
SHARED = ROOT.parent / "shared"


def gaussian(n=200, d=24, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(0.1, 2, d) + seed
    return x.mean(0), np.cov(x, rowvar=False)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def pixels(n, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def batches(images, size):
    return list(fid.batched(images, size))


class Tiny(nn.Module):
    """A network of the same interface with 12, 5 and 7 features, in float64."""

    def __init__(self, weights=None):
        super().__init__()
        self.name = f"{weights or 'inception'}-00000000"
        self.fc = nn.Linear(1, 1)

    def forward(self, images):
        x = F.adaptive_avg_pool2d(images.double().contiguous() / 255, 2).flatten(1)
        return x, x[:, :5] ** 2, 9 * x[:, :7]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(fid, "InceptionFeatures", Tiny)


def failing(capsys, *argv):
    # the one line that `python fid.py argv` ends with, and its exit code
    try:
        code = edges.run(fid.main, [str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("error: ") and len([line for line in err if line.startswith("error")]) == 1
    return code, err[-1]


def printed(capsys, *argv):
    # the JSON object that `python fid.py argv --json` prints
    assert edges.run(fid.main, [*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- the Frechet distance ----

@pytest.mark.parametrize("n", [200, 10])
def test_equal_statistics_have_distance_zero(n):
    """d(A, A) = 0 exactly and is never -0.0, for a regular and a singular covariance."""
    mu, sigma = gaussian(n)
    d = fid.frechet_distance(mu, sigma, mu.copy(), sigma.copy())
    assert d == 0 and math.copysign(1, d) == 1


def test_distance_of_nearly_equal_statistics_is_never_negative():
    """Where rounding decides the sign the distance is clamped at 0."""
    mu, sigma = gaussian()
    for seed in range(20):
        noise = 1e-16 * np.random.default_rng(seed).normal(size=mu.shape)
        d = fid.frechet_distance(mu, sigma, mu + noise, sigma + np.diag(noise))
        assert 0 <= d < 1e-9 and math.copysign(1, d) == 1


def test_fid_of_shifted_gaussian_equals_squared_shift():
    """With one covariance the distance is |mu1 - mu2|^2."""
    mu, sigma = gaussian()
    shift = np.linspace(-1, 1, len(mu))
    np.testing.assert_allclose(fid.frechet_distance(mu, sigma, mu + shift, sigma), (shift ** 2).sum(), rtol=1e-10)


def test_distance_of_diagonal_covariances_has_a_closed_form():
    """For diagonal covariances it is the sum of (sqrt(a) - sqrt(b))^2; zero variances included."""
    a, b = np.array([4.0, 1.0, 0.25, 0.0]), np.array([1.0, 9.0, 0.0, 0.0])
    got = fid.frechet_distance(np.zeros(4), np.diag(a), np.zeros(4), np.diag(b))
    np.testing.assert_allclose(got, ((a ** 0.5 - b ** 0.5) ** 2).sum(), rtol=1e-12)
    assert fid.frechet_distance(np.zeros(4), np.zeros((4, 4)), np.zeros(4), np.diag(a)) == a.sum()


@pytest.mark.parametrize("n1, n2", [(200, 300), (10, 300), (10, 15), (10, 10)])
def test_distance_is_the_same_in_both_orders(n1, n2):
    """d(A, B) = d(B, A), bit for bit."""
    a, b = gaussian(n1), gaussian(n2, seed=1)
    assert fid.frechet_distance(*a, *b) == fid.frechet_distance(*b, *a)


def test_distance_agrees_with_a_matrix_square_root():
    """The eigenvalue form equals Tr(S1 + S2 - 2 sqrtm(S1 S2)) for regular covariances."""
    (mu1, s1), (mu2, s2) = gaussian(), gaussian(seed=1)
    want = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2)).real
    np.testing.assert_allclose(fid.frechet_distance(mu1, s1, mu2, s2), want, rtol=1e-11)


@pytest.mark.parametrize("n", [2, 10, 24])
def test_distance_of_few_images_is_finite_and_exact(n):
    """For singular covariances Tr sqrt(S1 S2) is the nuclear norm of the product of the centred features."""
    x, y = normal(n, 40), normal(n + 3, 40, seed=1) + 1
    cx, cy = (x - x.mean(0)) / math.sqrt(n - 1), (y - y.mean(0)) / math.sqrt(n + 2)
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + (cx ** 2).sum() + (cy ** 2).sum() - 2 * np.linalg.norm(cx @ cy.T, "nuc")
    got = fid.frechet_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("spoil, message", [
    (lambda mu, s: (mu * np.nan, s), "NaN or infinity"), (lambda mu, s: (mu, s / 0), "NaN or infinity"),
    (lambda mu, s: (mu[:5], s[:5, :5]), "of 24 and of 5 features"), (lambda mu, s: (mu, s[:5]), "expected [D] and [D, D]"),
    (lambda mu, s: (mu[None], s), "expected [D] and [D, D]"), (lambda mu, s: (mu, np.triu(s)), "not symmetric")])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_statistics_that_are_none_are_refused_in_one_line(spoil, message):
    """NaN, infinity, other dimensions and what is no covariance each give one ValueError."""
    with pytest.raises(ValueError) as e:
        fid.frechet_distance(*gaussian(), *spoil(*gaussian(seed=1)))
    assert message in str(e.value) and "\n" not in str(e.value)


# ---- Inception Score, precision and recall ----

def test_inception_score_of_uniform_rows_is_one():
    """Rows that know nothing score 1, the least."""
    assert fid.inception_score(torch.zeros(20, 7)) == (1, 0)


def test_inception_score_of_balanced_one_hot_classes_is_their_number():
    """K certain and balanced classes score K, though their other probabilities are exactly 0."""
    mean, std = fid.inception_score(2000 * torch.eye(6).repeat(5, 1))
    np.testing.assert_allclose((mean, std), (6, 0), rtol=1e-12)


def test_inception_score_is_that_of_its_definition_split_by_split():
    """exp(mean KL(p(y|x) || p(y))) of consecutive rows, the last split shorter; mean and standard deviation over the splits."""
    logits = torch.from_numpy(normal(25, 6) * 3)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    want = [np.exp(np.mean([scipy.stats.entropy(row, part.mean(0)) for row in part])) for part in (p[:10], p[10:20], p[20:])]
    np.testing.assert_allclose(fid.inception_score(logits, 10), (np.mean(want), np.std(want)), rtol=1e-12)


def test_precision_and_recall_of_equal_sets_are_one():
    """Every point lies in its own ball."""
    a = torch.from_numpy(normal(30, 5))
    assert fid.precision_recall(a, a) == (1, 1)


def test_precision_and_recall_of_distant_sets_are_zero():
    """No ball reaches from one cluster to another far away."""
    a = torch.from_numpy(normal(30, 5))
    assert fid.precision_recall(a, a + 1000) == (0, 0)


@pytest.mark.parametrize("tile", [1, 7, 1000])
def test_precision_and_recall_agree_with_every_pair_compared(monkeypatch, tile):
    """The balls of (PR Eqs. 1, 2), pair by pair, for any size of a tile."""
    monkeypatch.setattr(fid, "TILE", tile)
    a, b = normal(40, 4), normal(25, 4, seed=3) * 0.6 + 1
    ball = [lambda x, s=s: any(np.linalg.norm(x - c) <= sorted(np.linalg.norm(c - o) for o in s)[3] for c in s) for s in (a, b)]
    want = np.mean([ball[1](x) for x in a]), np.mean([ball[0](x) for x in b])
    assert 0.1 < want[0] < 0.9 and 0.1 < want[1] < 0.97 and want[0] != want[1]
    np.testing.assert_allclose(fid.precision_recall(torch.from_numpy(a), torch.from_numpy(b)), want, rtol=1e-12)


def test_precision_and_recall_of_2000_points_agree_with_all_distances_at_once(monkeypatch):
    """Tiles that do not divide the sets change nothing."""
    monkeypatch.setattr(fid, "TILE", 768)
    a = torch.from_numpy(normal(2000, 64))
    b = torch.from_numpy(normal(1900, 64, seed=1) * 0.95 + 0.1)
    radius_a, radius_b = (torch.cdist(x, x).kthvalue(4).values for x in (a, b))
    distances = torch.cdist(a, b)
    precision = (distances <= radius_b).any(1).double().mean()
    recall = (distances <= radius_a[:, None]).any(0).double().mean()
    assert 0.1 < precision < recall < 0.9
    np.testing.assert_allclose(fid.precision_recall(a, b), (precision, recall), rtol=1e-12)


def test_precision_and_recall_hold_a_tile_of_each_side_in_float32(monkeypatch):
    """However many images: neither side is ever copied whole, and no row of all distances kept."""
    monkeypatch.setattr(fid, "TILE", 8)
    seen = []

    def cdist(a, b, cdist=torch.cdist):
        seen.append((len(a), len(b), a.dtype, b.dtype))
        return cdist(a, b)
    monkeypatch.setattr(torch, "cdist", cdist)
    a = torch.from_numpy(normal(30, 5)).half()
    assert fid.precision_recall(a, a) == (1, 1)
    assert {(n, m) for n, m, *_ in seen} == {(8, 8), (8, 6), (6, 8), (6, 6)}
    assert {dtype for *_, left, right in seen for dtype in (left, right)} == {torch.float32}


def test_precision_needs_more_images_than_neighbours():
    """Three images have no third neighbour."""
    with pytest.raises(ValueError, match="more than k = 3"):
        fid.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


# ---- statistics ----

@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_streamed_statistics_equal_numpys(batch_size):
    """Mean and unbiased covariance, whatever the batches and however far the mean from 0."""
    x = normal(100, 6) + 100
    s = fid.Statistics()
    for rows in torch.from_numpy(x).split(batch_size):
        s.add(rows)
    for got, want in zip(s.gaussian(), (x.mean(0), np.cov(x, rowvar=False))):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_sums_of_two_accumulators_are_those_of_all_rows():
    """n, sum and outer add up, so that many devices can share the work."""
    x = torch.from_numpy(normal(30, 4))
    a, b, merged = fid.Statistics(), fid.Statistics(), fid.Statistics()
    a.add(x[:11])
    b.add(x[11:])
    merged.n, merged.sum, merged.outer = a.n + b.n, a.sum + b.sum, a.outer + b.outer
    for got, want in zip(merged.gaussian(), (x.numpy().mean(0), np.cov(x.numpy(), rowvar=False))):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(value):
    """One bad feature is an error at once, not a NaN at the end."""
    with pytest.raises(ValueError, match="NaN or infinity"):
        fid.Statistics().add(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_are_refused(n):
    """One image has no covariance."""
    with pytest.raises(ValueError, match=f"got {n} images; expected at least 2"):
        fid.features_of(batches(pixels(n), 4), Tiny())


def test_any_batch_size_and_order_give_the_same_numbers():
    """Statistics do not depend on how the images come, and the Inception Score not on the batches."""
    images, other = pixels(60), fid.features_of(batches(pixels(50, seed=1), 9), Tiny())
    whole = fid.features_of(batches(images, 60), Tiny())
    for batch_size, order in ((1, slice(None)), (7, slice(None, None, -1))):
        part = fid.features_of(batches(images[order], batch_size), Tiny())
        np.testing.assert_allclose(fid.frechet_distance(*part[:2], *other[:2]), fid.frechet_distance(*whole[:2], *other[:2]), rtol=1e-10)
        np.testing.assert_allclose(part.score, whole.score, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_size", [3, 10, 64])
def test_streamed_inception_score_equals_that_of_all_logits(monkeypatch, batch_size):
    """Splits are cut across batches."""
    monkeypatch.setattr(fid, "SPLIT", 10)
    images = pixels(35)
    want = fid.inception_score(Tiny()(batches(images, 35)[0])[2], 10)
    np.testing.assert_allclose(fid.features_of(batches(images, batch_size), Tiny()).score, want, rtol=1e-12)


def test_nothing_that_grows_with_the_images_is_kept_unless_asked_for():
    """Without keep_pool the features are sums alone; with it, one float16 row an image.

    Of 22 images announced two could not be read.
    """
    assert fid.features_of(batches(pixels(20), 4), Tiny()).pool is None
    pool = fid.features_of(batches(pixels(20), 4), Tiny(), 22, keep_pool=True).pool
    assert pool.dtype == torch.float16 and pool.shape == (20, 12)


def test_statistics_survive_their_file(tmp_path):
    """What is saved is what is read, under guided-diffusion's keys."""
    features = fid.features_of(batches(pixels(20), 4), Tiny())
    fid.save_statistics(tmp_path / "s.npz", features)
    assert set(np.load(tmp_path / "s.npz").files) == {"mu", "sigma", "mu_s", "sigma_s", "n", "weights"}
    got = fid.load_statistics(tmp_path / "s.npz")
    assert got.n == 20 and got.weights == features.weights
    for x, y in zip(got[:4], features[:4]):
        np.testing.assert_array_equal(x, y)


def test_reference_is_computed_once_per_data_network_and_precision(tmp_path, monkeypatch, capsys):
    """The cache answers for the same fingerprint, not for other data or another precision; a damaged file is made again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(fid, "features_of", lambda *a, f=fid.features_of: calls.append(1) or f(*a))
    images = fid.data.Images(pixels(10), None, "ten", "abcd")
    first = fid.reference(images, Tiny())
    np.testing.assert_array_equal(fid.reference(images, Tiny()).sigma, first.sigma)
    assert len(calls) == 1
    fid.reference(images._replace(fingerprint="ef01"), Tiny())
    fid.reference(images, Tiny().bfloat16())
    fid.reference(images, Tiny("other"))
    assert len(calls) == 4
    cached = next(tmp_path.rglob("abcd-inception*float32.npz"))
    cached.write_bytes(cached.read_bytes()[:-200])
    np.testing.assert_array_equal(fid.reference(images, Tiny()).sigma, first.sigma)
    assert len(calls) == 5


# ---- the network ----

def test_tf1_resize_has_its_golden_values():
    """[[0, 10, 20], [30, 40, 50]] to 4 x 4 as TensorFlow 1 gives it."""
    got = fid.tf1_resize(torch.tensor([[[[0.0, 10, 20], [30, 40, 50]]]]), 4)
    want = torch.tensor([[0, 7.5, 15, 20], [15, 22.5, 30, 35], [30, 37.5, 45, 50], [30, 37.5, 45, 50]])
    torch.testing.assert_close(got[0, 0], want, rtol=0, atol=0)


@pytest.mark.parametrize("height, width", [(32, 32), (299, 299), (1, 1), (400, 333)])
def test_tf1_resize_is_exact(height, width):
    """Bit for bit TensorFlow 1's float32 arithmetic, pixel by pixel: columns first, start + (end - start) * fraction."""
    x = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.float32)

    def place(target, length):
        source = np.float32(target) * np.float32(np.float32(length) / np.float32(299))
        low = int(source)
        return low, min(low + 1, length - 1), np.float32(source - np.float32(low))
    want = np.empty((299, 299), np.float32)
    for i in range(0, 299, 13):
        top, bottom, down = place(i, height)
        for j in range(299):
            left, right, along = place(j, width)
            upper, lower = (x[r, left] + (x[r, right] - x[r, left]) * along for r in (top, bottom))
            want[i, j] = upper + (lower - upper) * down
    got = fid.tf1_resize(torch.from_numpy(x)[None, None], 299)[0, 0].numpy()
    np.testing.assert_array_equal(got[::13], want[::13])


def inception_shapes():
    with torch.device("meta"):
        net = fid.inception.Inception3(1008, aux_logits=False, init_weights=False)
    return {k: v.shape for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}


def test_network_has_pytorch_fids_keys():
    """472 tensors, Conv2d_1a_3x3.bn.bias first and fc.weight last; the names are torchvision's."""
    names = sorted(inception_shapes())
    assert (len(names), names[0], names[-1]) == (472, "Conv2d_1a_3x3.bn.bias", "fc.weight")


@pytest.mark.slow
def test_network_has_its_golden_values(tmp_path):
    """With weights filled by formula, in float64, pool, spatial and logits are the reference network's to 1e-6."""
    state = {}
    for k, (name, shape) in enumerate(sorted(inception_shapes().items())):
        s = torch.sin(torch.arange(shape.numel(), dtype=torch.float64) + k + 1).reshape(shape)
        positive = name.endswith(("bn.weight", "running_var"))
        state[name] = s * math.sqrt(2 / shape[1:].numel()) if len(shape) > 1 else 1 + 0.1 * s if positive else 0.1 * s
    torch.save(state, tmp_path / "golden.pth")
    j = torch.arange(2 * 3 * 299 * 299, dtype=torch.float64)
    images = (127.5 * torch.sin(0.011 * j) + 128).round().clamp(0, 255).to(torch.uint8).reshape(2, 3, 299, 299)
    pool, spatial, logits = fid.InceptionFeatures(tmp_path / "golden.pth")(images)
    assert pool.shape == (2, 2048) and spatial.shape == (2, 2023) and logits.shape == (2, 1008) and pool.dtype == torch.float64
    got = [pool.mean(), pool[1, -2], pool[1, -1], spatial.mean(), logits.std(), *logits[0, :3], logits[1, -1]]
    want = [0.04723476905957459, 0.15820473617329045, 0.2240281278766469, 0.035646912102288604, 0.17158360777440945,
            0.24222783496476002, 0.2329817285696694, 0.20031365905359927, 0.23939112896961298]
    np.testing.assert_allclose([float(v) for v in got], want, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_sfid_of_real_images_agrees_with_an_independent_scorer():
    """With TensorFlow's own weights up to mixed_7, sFID between 60 and 60 CIFAR-10 images equals the scorer's to 1e-3."""
    weights, tool, mosaics = (SHARED / p for p in ("data/inception_2015_to_mixed_7.pth", "tools/score.py", "data/cifar10_train"))
    if not (weights.exists() and tool.exists() and mosaics.exists()):
        pytest.skip(f"needs {weights.name} and CIFAR-10 in ../shared/data, and ../shared/tools")
    spec = importlib.util.spec_from_file_location("score", tool)
    score = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(score)
    mosaic = np.asarray(Image.open(mosaics / "00.webp").convert("RGB")).reshape(50, 32, 50, 32, 3)      # 50 x 50 images, row by row
    images = mosaic.transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)[:120]
    net = fid.InceptionFeatures("random")
    for key, tensor in torch.load(weights, weights_only=True).items():
        name, kind = key.rsplit(".", 1)
        getattr(net.get_submodule(name).conv, kind).data.copy_(tensor)
    (mu_1, sigma_1, _, _), (mu_2, sigma_2, _, _) = [fid.features_of(batches(part, 50), net)[2:6] for part in (images[:60], images[60:])]
    theirs = [score.statistics(part, score.Inception(weights), "cpu", 50)[2:] for part in (images[:60], images[60:])]
    np.testing.assert_allclose(mu_1, theirs[0][0], atol=1e-4)
    np.testing.assert_allclose(fid.frechet_distance(mu_1, sigma_1, mu_2, sigma_2), score.frechet(*theirs[0], *theirs[1]), atol=1e-3)


@pytest.mark.slow
def test_batch_size_and_order_move_the_network_by_less_than_a_millionth():
    """The distance of the real network's features is the same for any batch size and file order."""
    net, images, other = fid.InceptionFeatures("random"), pixels(12, 32), pixels(9, 32, seed=1) // 2
    first, b = fid.features_of(batches(images, 12), net), fid.features_of(batches(other, 9), net)
    for order, size in ((images, 1), (images[::-1], 5)):
        again = fid.features_of(batches(order, size), net)
        for mu, sigma in (0, 1), (2, 3):        # of 100 features: an eigen-decomposition of all of them takes seconds
            got, want = (fid.frechet_distance(f[mu][:100], f[sigma][:100, :100], b[mu][:100], b[sigma][:100, :100]) for f in (again, first))
            np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.slow
def test_random_network_is_the_same_every_time_and_bf16_keeps_it_close():
    """--weights random is fixed; bfloat16 weights give float32 features within a few per cent."""
    a, b = fid.InceptionFeatures("random"), fid.InceptionFeatures("random")
    assert a.name == b.name and a.name.startswith("random-")
    x = batches(pixels(3, 40), 3)[0]
    for exact, same, rough in zip(a(x), a(x), b.bfloat16()(x)):
        torch.testing.assert_close(exact, same, rtol=0, atol=0)
        assert rough.dtype == torch.float32 and (rough - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("content, message", [
    (b"<!doctype html><title>404</title>", "cannot be read as a file of Inception weights"), ([1, 2], "lacks 472 of FID-Inception's 472"),
    ({"fc.weight": torch.zeros(1000, 2048)}, "lacks 472 of FID-Inception's 472"), ({"fc.weight": torch.zeros(1008, 2048)}, "lacks 471 of")])
def test_wrong_weights_are_refused_in_one_line(tmp_path, content, message):
    """An HTML page, another object, missing keys and other shapes each name the file and the way out."""
    path = tmp_path / "w.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError) as e:
        fid.InceptionFeatures(path)
    assert message in str(e.value) and "w.pth" in str(e.value) and "\n" not in str(e.value)


def test_published_weights_are_fetched_from_their_place_and_checked_by_hash(monkeypatch, tmp_path):
    """Without --weights the file is pytorch-fid's, and the digest in its name is what the download is held to."""
    asked = []
    monkeypatch.setattr(edges, "download", lambda url, *a: asked.append((url, a[-1])) or tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match="none.pth"):
        fid.InceptionFeatures()
    (url, sha256), = asked
    assert url == "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
    assert sha256 == "6726825d"


# ---- the two sides and the script ----

def test_batches_hold_neighbours_of_one_size():
    """Images of different sizes are never mixed, keep their order and fill batches of at most the given size."""
    images = [np.full((4, w, 3), i, np.uint8) for i, w in enumerate([4, 4, 4, 5, 5, 4])]
    got = list(fid.batched(iter(images), 2))
    assert [tuple(b.shape) for b in got] == [(2, 3, 4, 4), (1, 3, 4, 4), (2, 3, 4, 5), (1, 3, 4, 4)]
    assert [int(v) for b in got for v in b[:, 0, 0, 0]] == [0, 1, 2, 3, 4, 5]


def test_images_are_read_as_they_are_needed():
    """The first batch comes before the last image is opened."""
    opened = []
    images = (opened.append(i) or np.zeros((2, 2, 3), np.uint8) for i in range(100))
    next(fid.batched(images, 5))
    assert len(opened) <= 6


@pytest.fixture
def files(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, image in enumerate([*pixels(5), *pixels(4, 6)]):
        Image.fromarray(image).save(tmp_path / "folder" / ("deep" if i % 2 else ".") / f"{i}.PNG")
    np.savez(tmp_path / "images.npz", arr_0=pixels(12, seed=1))
    fid.save_statistics(tmp_path / "stats.npz", fid.features_of(batches(pixels(30, seed=2), 10), Tiny()))
    mu, sigma = gaussian(d=12)
    np.savez(tmp_path / "pytorch_fid.npz", mu=mu, sigma=sigma)
    (tmp_path / "model.pt").write_bytes(b"")
    return tmp_path


@pytest.fixture
def checkpoint(monkeypatch):
    # image i of a seed is a function of both, whatever the batch; the model and the schedule are only handed through
    model = SimpleNamespace(schedule="schedule")
    monkeypatch.setattr(fid.sample, "load_model", lambda path, device: (model, model.schedule, {"image_size": 8}))

    def drawn(net, schedule, shape, seed, steps, first=0, watch=None):
        assert (net, schedule, steps) == (model, "schedule", 7) and shape[1:] == (3, 8, 8)
        generators = [torch.Generator().manual_seed(1000 * seed + first + i) for i in range(shape[0])]
        return torch.stack([torch.rand(shape[1:], generator=g) * 2 - 1 for g in generators])
    monkeypatch.setattr(fid.sample, "sample", drawn)


ALL = {"fid", "sfid", "is", "is_std", "precision", "recall", "n_a", "n_b"}


@pytest.mark.filterwarnings("ignore:.*images are few")
@pytest.mark.parametrize("a, b, keys, counts", [
    ("folder", "images.npz", ALL, (9, 12)), ("images.npz", "shapes", ALL, (12, 4096)),
    ("images.npz", "stats.npz", ALL - {"precision", "recall"}, (12, 30)),
    ("images.npz", "pytorch_fid.npz", ALL - {"precision", "recall", "sfid", "n_b"}, (12, None)),
    ("stats.npz", "images.npz", {"fid", "sfid", "n_a", "n_b"}, (30, 12)), ("stats.npz", "stats.npz", {"fid", "sfid", "n_a", "n_b"}, (30, 30)),
    ("pytorch_fid.npz", "stats.npz", {"fid", "n_b"}, (None, 30))])
def test_each_kind_of_side_gives_the_numbers_it_can(files, tiny, monkeypatch, capsys, a, b, keys, counts):
    """Folder, images, statistics with and without sFID's, and a data set's name: the keys are exactly those that can be computed."""
    got = printed(capsys, *(side if side == "shapes" else files / side for side in (a, b)))
    assert set(got) == keys and (got.get("n_a"), got.get("n_b")) == counts
    assert all(isinstance(got[k], int) for k in keys & {"n_a", "n_b"}) and all(np.isfinite(v) for v in got.values())


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_a_checkpoint_is_sampled_on_the_fly_and_the_batch_size_does_not_matter(files, tiny, checkpoint, capsys):
    """--n images of --seed by --steps steps; every image is its own, so batches of 4 and of 50 give the same number."""
    argv = files / "model.pt", files / "images.npz", "--n", 10, "--steps", 7, "--seed", 3
    one, two, other = printed(capsys, *argv), printed(capsys, *argv, "--batch-size", 4), printed(capsys, *argv[:-1], 4)
    assert set(one) == ALL and one["n_a"] == 10
    np.testing.assert_allclose([one[k] for k in sorted(ALL)], [two[k] for k in sorted(ALL)], rtol=1e-9, atol=1e-9)
    assert abs(one["fid"] - other["fid"]) > 1e-6


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_two_statistics_files_need_no_network(files, monkeypatch, capsys):
    """Nothing is downloaded or built where no image is looked at."""
    monkeypatch.setattr(fid, "InceptionFeatures", None)
    a, b = np.load(files / "stats.npz"), np.load(files / "pytorch_fid.npz")
    got = printed(capsys, files / "stats.npz", files / "pytorch_fid.npz")
    assert got["fid"] == fid.frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_random_weights_never_give_a_number_called_fid(files, tiny, capsys):
    """Their distances have names of their own, in JSON and in text, with a warning; statistics remember it."""
    argv = files / "folder", files / "images.npz", "--weights", "random"
    with pytest.warns(UserWarning, match="no FID"):
        got = printed(capsys, *argv, "--save-stats", files / "random.npz")
    assert set(got) == {"random_feature_distance", "random_spatial_distance", "n_a", "n_b"}
    with pytest.warns(UserWarning, match="no FID"):
        fid.main([str(a) for a in argv])
    assert "fid " not in capsys.readouterr().out.lower().replace("no fid", "")
    with pytest.warns(UserWarning, match="no FID"):
        assert "fid" not in printed(capsys, files / "random.npz", files / "random.npz")
    assert "expected the same" in failing(capsys, files / "random.npz", files / "stats.npz")[1]


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_saved_statistics_stand_in_for_their_images(files, tiny, capsys):
    """With A alone --save-stats only saves, and the file scores as the images did."""
    assert edges.run(fid.main, [str(files / "images.npz"), "--save-stats", str(files / "s.npz")]) == 0
    assert str(files / "s.npz") in capsys.readouterr().out and not list(files.glob(".*partial"))
    direct, saved = (printed(capsys, files / "folder", files / b) for b in ("images.npz", "s.npz"))
    assert (direct["fid"], direct["sfid"], direct["n_b"]) == (saved["fid"], saved["sfid"], saved["n_b"])


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_counts_and_conventions_stand_beside_the_numbers(files, tiny, capsys):
    """The line to quote: images of each side, resize, weights, covariance, splits."""
    assert edges.run(fid.main, [str(files / "folder"), str(files / "images.npz")]) == 0
    out = capsys.readouterr().out
    for words in ("A: 9 images; B: 12 images", "TF1 bilinear resize to 299", "(v - 128) / 128", "inception-0000", "(n - 1)", "1 split(s) of 5000"):
        assert words in out


def test_few_images_are_warned_of_and_many_are_not():
    """Below 2,048 images there is a warning, from there on none."""
    features = fid.features_of(batches(pixels(9), 9), Tiny())
    with pytest.warns(UserWarning, match="9 images are few: below 2,048"):
        fid.scores(features, features._replace(n=2048))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fid.scores(features._replace(n=2048), features._replace(n=None))


def test_a_short_last_split_of_the_inception_score_is_warned_of():
    """Images after the last 5,000 make a split of their own; alone, or none, they are no news."""
    features = fid.features_of(batches(pixels(9), 9), Tiny())
    other = features._replace(n=None)
    with pytest.warns(UserWarning, match="Inception Score holds 7 images, not 5,000"):
        fid.scores(features._replace(n=10_007), other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fid.scores(features._replace(n=10_000), other)
        fid.scores(features._replace(n=4_999), other)
        fid.scores(features._replace(n=10_007, score=None), other)


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_precision_and_recall_of_many_images_are_left_out_unless_asked_for(
        files, tiny, monkeypatch, capsys):
    """One line says so, and no feature is kept; with --precision-recall it names the cost first."""
    monkeypatch.setattr(fid, "PAIRED", 10)
    cost = "note: precision and recall of 9 and 12 images take 0.0 GB and 0 trillion operations"
    kept = []

    def features_of(*a, f=fid.features_of):
        features = f(*a)
        kept.append(features.pool is not None)
        return features
    monkeypatch.setattr(fid, "features_of", features_of)
    for flags, asked in ([], False), (["--precision-recall"], True):
        argv = [str(files / "folder"), str(files / "images.npz"), "--json", *flags]
        assert edges.run(fid.main, argv) == 0
        out, err = capsys.readouterr()
        assert set(json.loads(out)) == (ALL if asked else ALL - {"precision", "recall"})
        assert cost + "; left out; --precision-recall asks for them" * (not asked) + "\n" in err
    assert kept == [False, False, True, True]

    monkeypatch.setattr(fid, "features_of", None)       # named before it is paid
    with pytest.raises(TypeError):
        fid.main(argv)
    assert cost in capsys.readouterr().err


def test_the_cost_of_precision_and_recall_is_that_of_all_pairs(capsys):
    """10,000 images against ImageNet: float16 rows of 2048, and 2 x 2048 operations a distance."""
    assert fid._affordable(50_000, 50_000, False) and not capsys.readouterr().err
    assert not fid._affordable(10_000, 1_281_167, False)
    assert "take 5.3 GB and 6,776 trillion operations" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_precision_and_recall_of_statistics_cannot_be_asked_for(files, tiny, capsys):
    """A statistics file has no single images' features."""
    code, line = failing(capsys, files / "folder", files / "stats.npz", "--precision-recall")
    assert code == 1 and "expected images on both sides" in line


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_bf16_says_by_how_much_it_moved_the_number(files, tiny, capsys, monkeypatch):
    """The first 1,000 images of A are measured by both networks, and all of them still count."""
    np.savez(files / "many.npz", arr_0=pixels(1030, 4))
    monkeypatch.setattr(Tiny, "forward", lambda self, images, f=Tiny.forward:
                        tuple(x + (0.5 if self.fc.weight.dtype == torch.bfloat16 else 0) for x in f(self, images)))
    assert edges.run(fid.main, [str(files / "many.npz"), str(files / "stats.npz"), "--precision", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "A: 1030 images" in out and "bfloat16" in out
    before, after = (float(x) for x in out.split("(")[-1].replace("in fp32, ", "").split()[:2])
    assert "first 1000 images" in out and f"by {after - before:+.3f}"[:-1] in out and after != before


@pytest.mark.parametrize("argv, words", [
    (["folder"], "only A was given"), (["folder", "images.npz", "--n", 5], "neither A nor B is a checkpoint"), (["model.pt", "folder", "--n", 1], "--n"),
    (["folder", "--save-stats", "s.txt"], "expected FILE.npz"), (["folder", "images.npz", "--batch-size", 0], "--batch-size"),
    (["folder", "images.npz", "--prec", "bf16"], "unrecognized"), ([], "A"),
    (["folder", "--save-stats", "s.npz", "--precision-recall"], "A against B"),
    (["folder", "images.npz", "--weights", "random", "--precision-recall"], "Inception weights")])
def test_usage_errors_end_with_exit_code_2(files, capsys, argv, words):
    """What the flags alone show to be wrong is refused before anything is read."""
    code, line = failing(capsys, *argv)
    assert code == 2 and words in line


def broken_files(folder):
    np.savez(folder / "no_mu.npz", sigma=np.eye(3))
    np.savez(folder / "no_sigma.npz", mu=np.zeros(3))
    np.savez(folder / "objects.npz", mu=np.array([{}], object), sigma=np.eye(1))
    np.savez(folder / "flat.npz", mu=np.zeros(3), sigma=np.zeros(3))
    np.savez(folder / "nan.npz", mu=np.full(12, np.nan), sigma=np.eye(12))
    np.savez(folder / "small.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(folder / "one.npz", arr_0=pixels(1))
    np.savez(folder / "float.npz", arr_0=np.zeros((3, 8, 8, 3)))
    (folder / "cut.npz").write_bytes((folder / "stats.npz").read_bytes()[:-100])
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    Image.fromarray(pixels(1)[0]).save(folder / "bad" / "a.png")
    Image.fromarray(pixels(1)[0]).save(folder / "bad" / "c.png")
    (folder / "bad" / "b.png").write_bytes(b"no image")


@pytest.mark.parametrize("name, words", [
    ("no_mu.npz", "no_mu.npz"), ("no_sigma.npz", "expected at least mu and sigma"), ("objects.npz", "objects.npz"), ("flat.npz", "[D, D]"),
    ("nan.npz", "nan.npz: mu or sigma holds NaN"), ("small.npz", "of 4 and of 12 features"), ("one.npz", "got 1 images"), ("float.npz", "uint8"),
    ("cut.npz", "cut.npz"), ("empty", "empty"), ("bad", "b.png"), ("missing", "does not exist"), ("missing.pt", "does not exist"), ("model.pt", "model.pt")])
@pytest.mark.filterwarnings("ignore:.*images are few")
def test_each_bad_input_is_one_line_and_exit_code_1(files, tiny, capsys, name, words):
    """Statistics without mu or of other shapes, truncated or pickled files, an empty folder, a broken image: named, never a traceback."""
    broken_files(files)
    code, line = failing(capsys, files / name, files / "stats.npz")
    assert code == 1 and words in line and len(line) < 500


@pytest.mark.filterwarnings("ignore:.*images are few")
def test_skip_bad_leaves_out_what_cannot_be_read(files, tiny, capsys):
    """--skip-bad counts only the images that were read."""
    broken_files(files)
    with pytest.warns(UserWarning):
        assert printed(capsys, files / "bad", files / "stats.npz", "--skip-bad")["n_a"] == 2


@pytest.mark.slow
def test_whole_path_runs_offline_as_a_script(files):
    """`python fid.py FOLDER IMAGES --weights random --json` prints one JSON object and warns in one line each."""
    command = [sys.executable, fid.__file__, str(files / "folder"), str(files / "images.npz"), "--weights", "random", "--json", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"random_feature_distance", "random_spatial_distance", "n_a", "n_b"}
    assert "warning: the weights are random" in done.stderr and "Traceback" not in done.stderr


# ---- two processes ----

TWO = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from support import edges, fid, parallel
from test_fid import Tiny, pixels
fid.InceptionFeatures = Tiny
"""
SCORE = TWO + """
sys.exit(edges.run(fid.main))
"""
REFERENCE = TWO + """
os.environ["XDG_CACHE_HOME"] += os.environ.get("RANK", "0")      # a home on each machine
parallel.begin(torch.device("cpu"))
images = fid.data.Images(pixels(10), None, "ten", "abcd")
statistics = fid.reference(images, Tiny())
print(float(parallel.add(torch.tensor(statistics.sigma)).sum()) / parallel.size())
"""


@pytest.mark.slow
def test_two_processes_measure_bf16_on_a_folder_of_mixed_sizes(tmp_path):
    """Batches of 50 and of 30 in turn: both ranks leave the first 1,000 images together."""
    (tmp_path / "folder").mkdir()
    image = [Image.fromarray(picture) for picture in (pixels(1, 4)[0], pixels(1, 5)[0])]
    for i in range(2400):
        image[i % 80 >= 50].save(tmp_path / f"folder/{i:04}.png")
    (tmp_path / "score.py").write_text(SCORE)
    argv = tmp_path / "folder", "shapes", "--precision", "bf16", "--device", "cpu"
    one, two = (done(tmp_path / "score.py", *argv, processes=n) for n in (1, 2))
    assert "the first 1010 images" in one and "the first 1040 images" in two
    assert one.splitlines()[0] == two.splitlines()[0]


@pytest.mark.slow
def test_the_first_process_decides_for_all_whether_the_reference_is_there(tmp_path, monkeypatch):
    """The other rank's own cache is empty; once rank 0 has the statistics, it has them too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "reference.py").write_text(REFERENCE)
    made = done(tmp_path / "reference.py")
    found = done(tmp_path / "reference.py", processes=2)
    assert found == made and not list((tmp_path / "cache1").rglob("*.npz"))
