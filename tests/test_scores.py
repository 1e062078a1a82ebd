"""scores.py: closed forms, definitions, and independent references."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

import scores
from made import gaussian, normal

# ---- the Frechet distance ----


@pytest.mark.parametrize("n", [200, 10])
def test_equal_statistics_have_distance_zero(n):
    """d(A, A) = 0 exactly and is never -0.0, for a regular and a singular covariance."""
    mu, sigma = gaussian(n)
    d = scores.frechet_distance(mu, sigma, mu.copy(), sigma.copy())
    assert d == 0 and math.copysign(1, d) == 1


def test_distance_of_nearly_equal_statistics_is_never_negative():
    """Where rounding decides the sign the distance is clamped at 0."""
    mu, sigma = gaussian()
    for seed in range(20):
        noise = 1e-16 * normal(*mu.shape, seed=seed)
        d = scores.frechet_distance(mu, sigma, mu + noise, sigma + np.diag(noise))
        assert 0 <= d < 1e-9 and math.copysign(1, d) == 1


def test_fid_of_shifted_gaussian_equals_squared_shift():
    """With one covariance the distance is |mu1 - mu2|^2."""
    mu, sigma = gaussian()
    shift = np.linspace(-1, 1, len(mu))
    d = scores.frechet_distance(mu, sigma, mu + shift, sigma)
    assert d == pytest.approx((shift**2).sum(), rel=1e-10)


def test_distance_of_diagonal_covariances_has_a_closed_form():
    """For diagonal covariances it is the sum of (sqrt(a) - sqrt(b))^2; zero variances included."""
    a, b = np.array([4.0, 1.0, 0.25, 0.0]), np.array([1.0, 9.0, 0.0, 0.0])
    zero = np.zeros(4)
    d = scores.frechet_distance(zero, np.diag(a), zero, np.diag(b))
    assert d == pytest.approx(((a**0.5 - b**0.5) ** 2).sum(), rel=1e-12)
    assert scores.frechet_distance(zero, np.diag(zero), zero, np.diag(a)) == a.sum()


@pytest.mark.parametrize("n1, n2", [(200, 300), (10, 300), (10, 15), (10, 10)])
def test_distance_is_the_same_in_both_orders(n1, n2):
    """d(A, B) = d(B, A), bit for bit."""
    a, b = gaussian(n1), gaussian(n2, seed=1)
    assert scores.frechet_distance(*a, *b) == scores.frechet_distance(*b, *a)


def test_distance_agrees_with_a_matrix_square_root():
    """The eigenvalue form equals Tr(S1 + S2 - 2 sqrtm(S1 S2)) for regular covariances."""
    (mu1, s1), (mu2, s2) = gaussian(), gaussian(seed=1)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    want = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert scores.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(want, rel=1e-11)


@pytest.mark.parametrize("n", [2, 10, 24])
def test_distance_of_few_images_is_finite_and_exact(n):
    """Of singular covariances Tr sqrt(S1 S2) is a nuclear norm.

    That of the product of the features, centred and divided by the root of n - 1.
    """
    x, y = normal(n, 40), normal(n + 3, 40, seed=1) + 1
    cx = (x - x.mean(0)) / math.sqrt(n - 1)
    cy = (y - y.mean(0)) / math.sqrt(n + 2)
    shift = x.mean(0) - y.mean(0)
    root = np.linalg.norm(cx @ cy.T, "nuc")
    want = (shift**2).sum() + (cx**2).sum() + (cy**2).sum() - 2 * root
    sigma_x, sigma_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    got = scores.frechet_distance(x.mean(0), sigma_x, y.mean(0), sigma_y)
    assert got == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda mu, s: (mu * np.nan, s), "NaN or infinity"),
        (lambda mu, s: (mu, s / 0), "NaN or infinity"),
        (lambda mu, s: (mu[:5], s[:5, :5]), "of 24 and of 5 features"),
        (lambda mu, s: (mu, s[:5]), "expected [D] and [D, D]"),
        (lambda mu, s: (mu[None], s), "expected [D] and [D, D]"),
        (lambda mu, s: (mu, np.triu(s)), "not symmetric"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_statistics_that_are_none_are_refused_in_one_line(spoil, message):
    """NaN, infinity, other dimensions and what is no covariance each give one ValueError."""
    with pytest.raises(ValueError) as e:
        scores.frechet_distance(*gaussian(), *spoil(*gaussian(seed=1)))
    assert message in str(e.value) and "\n" not in str(e.value)


# ---- the Inception Score ----


def test_inception_score_of_uniform_rows_is_one():
    """Rows that know nothing score 1, the least."""
    assert scores.inception_score(torch.zeros(20, 7)) == (1, 0)


def test_inception_score_of_balanced_one_hot_classes_is_their_number():
    """K certain and balanced classes score K, though their other probabilities are exactly 0."""
    mean, std = scores.inception_score(2000 * torch.eye(6).repeat(5, 1))
    assert (mean, std) == (pytest.approx(6, rel=1e-12), pytest.approx(0, abs=1e-12))


def test_inception_score_is_that_of_its_definition_split_by_split():
    """exp(mean KL(p(y|x) || p(y))) of consecutive rows, the last split shorter: mean and std."""
    logits = normal(25, 6) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = []
    for part in (p[:10], p[10:20], p[20:]):
        divergences = [scipy.stats.entropy(row, part.mean(0)) for row in part]
        want.append(np.exp(np.mean(divergences)))
    got = scores.inception_score(torch.from_numpy(logits), 10)
    np.testing.assert_allclose(got, (np.mean(want), np.std(want)), rtol=1e-12)


# ---- KID ----


def moments(mean, deviation):
    """E x, E x^2, E x^3 of a normal x."""
    variance = deviation**2
    return mean, mean**2 + variance, mean**3 + 3 * mean * variance


def mmd_of_gaussians(a, b):
    """Of N(mean, deviation^2) on the line, in closed form: (xy + 1)^3 has the first 3 moments."""

    def kernel(p, q):
        return 1 + 3 * p[0] * q[0] + 3 * p[1] * q[1] + p[2] * q[2]

    a, b = moments(*a), moments(*b)
    return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


def test_kid_is_unbiased_on_gaussians_whose_discrepancy_is_known():
    """Its mean over many small sets is that of infinitely many rows, which few do not lower."""
    a, b = (0.3, 0.8), (0.0, 1.1)
    known = mmd_of_gaussians(a, b)
    rng, found = np.random.default_rng(0), []
    for _ in range(4000):
        x, y = (torch.from_numpy(rng.normal(*how, size=(12, 1))) for how in (a, b))
        found.append(scores.kernel_distance(x, y, subsets=1)[0])
    error = np.std(found) / len(found) ** 0.5
    assert error < 0.2 * known
    assert abs(np.mean(found) - known) < 3 * error


def test_kid_of_two_halves_of_one_set_is_zero_within_its_error():
    """So is not the one of two sets that differ."""
    x = torch.from_numpy(normal(1000, 20))
    mean, deviation = scores.kernel_distance(x[:500], x[500:])
    assert deviation > 0 and abs(mean) < 3 * deviation
    mean, deviation = scores.kernel_distance(x[:500], x[500:] + 0.3)
    assert mean > 3 * deviation


def test_kid_equals_a_plain_double_loop():
    """Every pair of two rows of one side, and of both, in the one subset that is drawn."""
    a, b = normal(10, 3), normal(14, 3, seed=1) + 0.5
    rng = np.random.RandomState(2020)
    a_5, b_5 = a[rng.choice(10, 5, replace=False)], b[rng.choice(14, 5, replace=False)]

    def mean(x, y, same):
        pairs = [(i, j) for i in range(5) for j in range(5) if not (same and i == j)]
        return np.mean([(x[i] @ y[j] / 3 + 1) ** 3 for i, j in pairs])

    want = mean(a_5, a_5, True) + mean(b_5, b_5, True) - 2 * mean(a_5, b_5, False)
    got = scores.kernel_distance(torch.from_numpy(a), torch.from_numpy(b), subsets=1)
    np.testing.assert_allclose(got, (want, 0), rtol=1e-12)


def test_kid_of_a_small_side_is_over_halves_of_it_and_of_three_images_refused():
    """Halves of 6 and 9 images are 3 of each; a half of 3 has no pair."""
    a, b = torch.from_numpy(normal(6, 3)), torch.from_numpy(normal(9, 3))
    assert scores.kernel_distance(a, b) == scores.kernel_distance(a, b, size=3)
    with pytest.raises(ValueError, match="at least 4 of each"):
        scores.kernel_distance(a[:3], b)


def test_kid_agrees_with_torch_fidelity():
    """The same subsets of the same rows give the same mean and deviation."""
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = (torch.from_numpy(normal(2100, 16, seed=seed) + seed) for seed in (0, 1))
    want = kid.kid_features_to_metric(a, b, kid_subsets=10, verbose=False)
    got = scores.kernel_distance(a, b, subsets=10)
    np.testing.assert_allclose(got, list(want.values()), rtol=1e-9)


# ---- precision and recall ----


def test_precision_and_recall_of_equal_sets_are_one():
    """Every point lies in its own ball."""
    a = torch.from_numpy(normal(30, 5))
    assert scores.precision_recall(a, a) == (1, 1)


def test_precision_and_recall_of_distant_sets_are_zero():
    """No ball reaches from one cluster to another far away."""
    a = torch.from_numpy(normal(30, 5))
    assert scores.precision_recall(a, a + 1000) == (0, 0)


def share_in_balls(points, centres):
    """Which share of points lies within a centre's third neighbour of it (PR Eq. 1), one by one."""

    def inside(point, centre):
        radius = sorted(np.linalg.norm(centre - other) for other in centres)[3]
        return np.linalg.norm(point - centre) <= radius

    return np.mean([any(inside(point, centre) for centre in centres) for point in points])


@pytest.mark.parametrize("tile", [1, 7, 1000])
def test_precision_and_recall_agree_with_every_pair_compared(monkeypatch, tile):
    """The balls of PR Eqs. 1 and 2, pair by pair, for any size of a tile."""
    monkeypatch.setattr(scores, "TILE", tile)
    a, b = normal(40, 4), normal(25, 4, seed=3) * 0.6 + 1
    want = share_in_balls(a, b), share_in_balls(b, a)
    assert 0.1 < want[0] < 0.9 and 0.1 < want[1] < 0.97 and want[0] != want[1]
    got = scores.precision_recall(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_precision_and_recall_of_2000_points_agree_with_all_distances_at_once(monkeypatch):
    """Tiles that do not divide the sets change nothing."""
    monkeypatch.setattr(scores, "TILE", 768)
    a = torch.from_numpy(normal(2000, 64))
    b = torch.from_numpy(normal(1900, 64, seed=1) * 0.95 + 0.1)
    radius_a, radius_b = (torch.cdist(x, x).kthvalue(4).values for x in (a, b))
    distances = torch.cdist(a, b)
    precision = (distances <= radius_b).any(1).double().mean()
    recall = (distances <= radius_a[:, None]).any(0).double().mean()
    assert 0.1 < precision < recall < 0.9
    np.testing.assert_allclose(scores.precision_recall(a, b), (precision, recall), rtol=1e-12)


def test_precision_and_recall_hold_a_tile_of_each_side_in_float32(monkeypatch):
    """However many images: neither side is ever copied whole, and no row of all distances kept."""
    monkeypatch.setattr(scores, "TILE", 8)
    sizes, dtypes = set(), set()

    def cdist(a, b, cdist=torch.cdist):
        sizes.add((len(a), len(b)))
        dtypes.update((a.dtype, b.dtype))
        return cdist(a, b)

    monkeypatch.setattr(torch, "cdist", cdist)
    a = torch.from_numpy(normal(30, 5)).half()
    assert scores.precision_recall(a, a) == (1, 1)
    assert sizes == {(8, 8), (8, 6), (6, 8), (6, 6)} and dtypes == {torch.float32}


def test_precision_needs_more_images_than_neighbours():
    """Three images have no third neighbour."""
    with pytest.raises(ValueError, match="more than k = 3"):
        scores.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
