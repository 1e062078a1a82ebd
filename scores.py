r"""The scores: each is a function of the features of two sets of images.

FID, sFID   `frechet_distance` of two Gaussians      (TTUR)
IS          `inception_score` of logits              (IS)
KID         `kernel_distance` of two sets of rows    (KID)
precision   `precision_recall` of them, and recall   (PR)

TTUR   arXiv:1706.08500      IS   arXiv:1606.03498
KID    arXiv:1801.01401      PR   arXiv:1904.06991
"""

import math

import numpy as np
import scipy.linalg
import torch
from scipy.linalg import blas

SPLIT = 5000  # images a split of the Inception Score
TILE = 4096  # distances are taken so many rows by so many columns at a time


def frechet_distance(mu1, sigma1, mu2, sigma2):
    r"""Squared Frechet distance of two Gaussians, in float64.

    d = |mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))            (TTUR)

    With sigma = F F^T the trace of that root is the sum of the roots of the eigenvalues of M M^T,
    M = F1^T F2: symmetric, so never complex.
    mu : [D]          sigma : [D, D]          returns a float >= 0, the same for both orders
    ValueError for what is not finite, not symmetric or of another dimension.
    """
    mu1, sigma1 = checked_gaussian(mu1, sigma1)
    mu2, sigma2 = checked_gaussian(mu2, sigma2)
    check_dims(len(mu1), len(mu2))
    if np.array_equal(mu1, mu2) and np.array_equal(sigma1, sigma2):
        return 0.0  # rounding would leave 1e-6
    # the smaller factor comes first, so that both orders of the arguments give the same bits
    F1, F2 = sorted((_factor(sigma1), _factor(sigma2)), key=lambda F: (F.shape[1], np.sum(F * F)))
    # [R1, R2], R1 <= R2; in scipy's BLAS all of this takes 0.8 of the time that it takes in numpy's
    M = blas.dgemm(1, F1, F2, trans_a=1)
    # in scipy 1.13 "evd" fails for 1 x 1 (two images) and the default for 0 x 0 (equal images)
    eigenvalues = scipy.linalg.eigvalsh(blas.dsyrk(1, M, lower=1), driver="ev")
    root = np.sqrt(eigenvalues.clip(0)).sum()
    distance = np.sum((mu1 - mu2) ** 2) + (np.trace(sigma1) + np.trace(sigma2)) - 2 * root
    return max(0.0, float(distance))


def check_dims(one, other):
    """ValueError where two sets of features have not equally many dimensions."""
    if one != other:
        raise ValueError(
            f"statistics of {one} and of {other} features; expected equally many; "
            "make both with the same network and --dims"
        )


def _factor(sigma):
    # [D, R] with F F^T = sigma: Cholesky's, or where sigma is singular the eigenvectors whose
    # eigenvalues are above rounding
    try:
        return scipy.linalg.cholesky(sigma, lower=True)
    except scipy.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(sigma)
        kept = values > len(sigma) * np.finfo(np.float64).eps * values[-1]
        return vectors[:, kept] * np.sqrt(values[kept])


def checked_gaussian(mu, sigma, name="statistics"):
    """(mu [D], sigma [D, D]) in float64.

    ValueError, beginning with `name`, for other shapes, NaN, or a sigma that is not symmetric.
    """
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"{name}: mu has shape {mu.shape} and sigma {sigma.shape}; "
            "expected [D] and [D, D]; make them again"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(
            f"{name}: mu or sigma holds NaN or infinity; expected finite numbers; make them again"
        )
    symmetric = scipy.linalg.issymmetric(sigma)
    if not symmetric and np.abs(sigma - sigma.T).max() > 1e-4 * np.abs(sigma).max():
        raise ValueError(f"{name}: sigma is not symmetric; expected a covariance; make it again")
    return mu, sigma


def inception_score(logits, split_size=SPLIT):
    """exp(mean KL(p(y|x) || p(y))) of each split: (mean, standard deviation) over them       (IS)

    logits : [N, K] without bias, finite; taken in float64, where a log-softmax is never log(0)
    The splits are in the given order, and the last one may be smaller.
    """
    if len(logits) == 0 or not logits.isfinite().all():
        raise ValueError(
            f"logits {list(logits.shape)} are empty or not finite; "
            "expected [N, K] finite numbers; check the network's weights"
        )
    splits = []
    for part in logits.cpu().double().split(split_size):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        p_y = p.mean(0)
        kl = (p * log_p).sum(1).mean() - torch.special.xlogy(p_y, p_y).sum()
        splits.append(math.exp(kl))
    return float(np.mean(splits)), float(np.std(splits))


def kernel_distance(a, b, subsets=100, size=1000):
    """KID: the squared maximum mean discrepancy of k(x, y) = (x . y / D + 1)^3, unbiased (KID)

    a, b    : [N, D], [M, D] of any float type, N, M >= 4
    returns : its mean over subsets of each side, and its standard deviation over them.  That is no
              standard error of the mean.  It is close to one where each side has twice `size`
              rows and the sides differ, and too large where they are alike or have more rows.

    Its expectation does not depend on N and M.  It may be negative where a and b are alike.
    CHOICE: the subsets are torch-fidelity's, random rows from its seed; of a small side they are
    halves.
    """
    size = min(size, len(a) // 2, len(b) // 2)
    if size < 2:
        raise ValueError(
            f"KID of {len(a)} and {len(b)} images; expected at least 4 of each; add images"
        )
    rng = np.random.RandomState(2020)
    distances = []
    for _ in range(subsets):
        x = a[rng.choice(len(a), size, replace=False)]
        y = b[rng.choice(len(b), size, replace=False)]
        distances.append(_discrepancy(x, y))
    return float(np.mean(distances)), float(np.std(distances))


def _discrepancy(x, y):
    # mean k(x, x') + mean k(y, y') - 2 mean k(x, y), where x' and y' are other rows than x and y
    n = len(x)
    of_x, of_y, of_both = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    pairs_x = of_x.sum() - of_x.trace()
    pairs_y = of_y.sum() - of_y.trace()
    return ((pairs_x + pairs_y) / (n * (n - 1)) - 2 * of_both.sum() / n**2).item()


def _kernel(x, y):
    # k of every row of x and every row of y, in float64 on the CPU: MPS has none
    exact = torch.promote_types(x.dtype, torch.float32)
    return (x.to(exact) @ y.to(exact).T / x.shape[1] + 1).cpu().double() ** 3


def precision_recall(a, b, k=3):
    """The share of a within a ball of b, and of b within a ball of a (PR Eqs. 1, 2).

    A ball reaches to the k-th neighbour in its own set.
    a, b : [N, D], [M, D] of any float type, N, M > k; never more than a tile of them in float32
    """
    if min(len(a), len(b)) <= k:
        raise ValueError(
            f"precision and recall of {len(a)} and {len(b)} images; "
            f"expected more than k = {k}; add images"
        )
    radius_a, radius_b = _radii(a, k), _radii(b, k)
    near_b = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    near_a = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    for rows, columns, distances in _tiles(a, b):
        near_b[rows] |= (distances <= radius_b[columns]).any(1)
        near_a[columns] |= (distances <= radius_a[rows, None]).any(0)
    return int(near_b.sum()) / len(a), int(near_a.sum()) / len(b)


def _radii(x, k):
    # distance of each row's k-th neighbour -> [N]; the nearest of all, number 0, is the row itself
    exact = torch.promote_types(x.dtype, torch.float32)
    nearest = x.new_full((len(x), k + 1), math.inf, dtype=exact)
    for rows, _, distances in _tiles(x, x):
        candidates = torch.cat([nearest[rows], distances], 1)
        nearest[rows] = candidates.topk(k + 1, largest=False).values
    return nearest[:, k]


def _tiles(a, b):
    # (rows, columns, distances of a[rows] to b[columns]) of every pair once, in float32 or better
    exact = torch.promote_types(a.dtype, torch.float32)
    for i in range(0, len(a), TILE):
        rows = slice(i, i + TILE)
        from_a = a[rows].to(exact)
        for j in range(0, len(b), TILE):
            columns = slice(j, j + TILE)
            yield rows, columns, torch.cdist(from_a, b[columns].to(exact))
