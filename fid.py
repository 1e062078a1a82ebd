r"""FID, sFID, Inception Score, KID, precision and recall, by the paper's tables' conventions.

    python fid.py runs/casdm-cifar10/best.pt cifar10     a checkpoint, sampled on the fly (--n)
    python fid.py samples.npz reference.npz --json       images, or statistics of any maker
    python fid.py cifar10 --save-stats reference.npz     statistics for later
    python fid.py FOLDER shapes --weights random         the whole path without a download; no FID
    python fid.py A B --dims 768 --weights PATH          an earlier layer: fid_768, never fid

    A, B        a folder of images, an images .npz (arr_0 uint8 [N, H, W, 3]), a checkpoint .pt, a
                data set's name, or a statistics .npz (mu, sigma, mu_s, sigma_s, n, pool) made here,
                by guided-diffusion or by pytorch-fid
    FID         `frechet_distance` of pool_3's 2048 features                            (TTUR)
    sFID        that of mixed_6/conv's first 7 channels, 7 x 17 x 17 = 2023 features    (Nash)
    IS          `inception_score` of A                                                  (IS)
    KID         `kernel_distance` of A and B, which does not depend on n                (KID)
    precision   `precision_recall`: the share of A near B, and recall that of B near A  (PR)
                these and KID up to 50,000 images a side, and beyond with --precision-recall

    Cas-DM   arXiv:2401.02414v1      TTUR   arXiv:1706.08500      Nash   arXiv:2103.03841
    IS       arXiv:1606.03498        KID    arXiv:1801.01401      PR     arXiv:1904.06991

With --dims 64, 192 or 768 (pytorch-fid's) pool is an earlier layer: the distance is fid_64 and so
on, and KID, precision and recall are of that layer too.

CHOICE: the paper names the features by the nodes of guided-diffusion's evaluator, so its
conventions are followed: the network and resize of inception.py, uint8 images, unbiased
covariances, IS without bias over splits of 5000 in the given order.  Reference images are never
flipped.  Two distances compare only at equal n: FID falls with n, and sFID much more so.
"""

import copy
import itertools
import json
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from data import DATASETS, raw_images, to_pixels
from features import STEADY, Features, batched, features_of, load_statistics, save_statistics
from inception import LAYERS, InceptionFeatures
from sample import check_sampler, open_model, open_sampler, sampler_defaults, sampler_flags
from scores import SPLIT, check_dims, frechet_distance, kernel_distance, precision_recall
from support import cli, parallel
from support.files import check_writable, read_npz
from support.models import neighbours

POOL = 2048  # features of pool_3
MOST_ROWS = 50_000  # images a side up to which KID, precision and recall are always computed


def compare(a, b):
    """Every number of SCORES that two Features allow; and n_a, n_b, where they are known.

    returns : {name: number}
    ValueError where different networks made them.  Warns of numbers that say little.
    """
    check_sides(a, b)
    found = {}
    for score in SCORES:
        found |= score(a, b)
    for name, features in (("n_a", a), ("n_b", b)):
        if features.n is not None:
            found[name] = features.n
    return found


def check_sides(a, b):
    """ValueError where different networks made the two; warns below 2,048 images, and the like."""
    check_weights(a.weights, b.weights)
    for n in {a.n, b.n} - {None}:
        if n < STEADY:
            warnings.warn(
                f"{n} images are few: below {STEADY:,} FID is far too high; "
                "compare only at equal n",
                stacklevel=3,
            )
    random = random_weights(a, b)
    last = a.n % SPLIT if a.score else 0
    if last and a.n > SPLIT and not random:
        warnings.warn(
            f"the last split of the Inception Score holds {last:,} images, "
            f"not {SPLIT:,}, and distorts it; score a multiple of {SPLIT:,}",
            stacklevel=3,
        )
    if random:
        warnings.warn(
            "the weights are random: these distances are no FID and say nothing about quality",
            stacklevel=3,
        )


def check_weights(one, other):
    """ValueError where two names of weights, as far as they are known, are not the same."""
    if one and other and one != other:
        raise ValueError(
            f"statistics of the weights {one} and of {other}; expected the same; "
            "make both with the same --weights, --dims or --judge"
        )


def score_fid(a, b):
    """The Frechet distance of pool, under the name that fits its network and layer."""
    return {distance_name(a, b): frechet_distance(a.mu, a.sigma, b.mu, b.sigma)}


def score_sfid(a, b):
    """The Frechet distance of spatial, where both have it."""
    if a.mu_s is None or b.mu_s is None:
        return {}
    name = "random_spatial_distance" if random_weights(a, b) else "sfid"
    return {name: frechet_distance(a.mu_s, a.sigma_s, b.mu_s, b.sigma_s)}


def score_is(a, b):
    """The Inception Score of A and its deviation over splits, where logits were taken."""
    if a.score is None or random_weights(a, b):
        return {}
    mean, deviation = a.score
    return {"is": mean, "is_std": deviation}


def score_kid(a, b):
    """KID and its deviation over subsets, where the rows of both are there."""
    if not have_rows(a, b):
        return {}
    mean, deviation = kernel_distance(a.pool, b.pool.to(a.pool.device))
    name = f"kid{judge_name(a, b)}"
    return {name: mean, f"{name}_std": deviation}


def score_precision_recall(a, b):
    """Improved precision and recall, where the rows of both are there."""
    if not have_rows(a, b):
        return {}
    precision, recall = precision_recall(a.pool, b.pool.to(a.pool.device))
    judge = judge_name(a, b)
    return {f"precision{judge}": precision, f"recall{judge}": recall}


# To add one: a function (a, b) -> {name: number} of two Features, {} where they lack what it needs,
# and its row.
SCORES = (
    score_fid,
    score_sfid,
    score_is,
    score_kid,
    score_precision_recall,
)


def have_rows(a, b):
    """Whether KID, precision and recall can be taken: both sides have the rows of 4 images."""
    kept = a.pool is not None and b.pool is not None
    return kept and not random_weights(a, b) and min(a.n, b.n) >= 4


def distance_name(a, b):
    """What the Frechet distance of pool is called: FID is that of 2048 features of Inception."""
    if random_weights(a, b):
        return "random_feature_distance"
    judge = judge_name(a, b)
    if judge:
        return f"fd{judge}"
    earlier = [dims for dims in LAYERS if dims != POOL]
    return f"fid_{len(a.mu)}" if len(a.mu) in earlier else "fid"


def judge_name(a, b):
    """_judge or the like, where another network than Inception made the features."""
    kind = kind_of_weights(a, b)
    return "" if kind == "inception" else f"_{kind}"


def random_weights(a, b):
    """Whether the network that made the features knows nothing of images."""
    return kind_of_weights(a, b) == "random"


def kind_of_weights(a, b):
    """KIND of the name KIND-HASH that the weights have; where no side knows it, Inception's."""
    weights = a.weights or b.weights or "inception-"
    return weights.rpartition("-")[0]


# ---- the two sides ----


class Side(NamedTuple):
    """A or B: features where a file holds them, or else images that are still to come."""

    n: int | None  # how many images; None: the file does not say
    features: Features | None = None
    batches: Iterator | None = None  # uint8 [N, 3, H, W]
    drawn: bool = False  # by a model, which takes long


def open_side(source, args, device):
    """The Side that `source` names; the one place that tells the kinds apart."""
    path = Path(source)
    if source not in DATASETS and not path.exists():
        raise FileNotFoundError(
            f"{source} does not exist; expected a folder, an images or statistics .npz, "
            f"a checkpoint .pt, or one of {', '.join(DATASETS)}; check the path"
        )
    if is_checkpoint(source):
        model, settings = open_model(args, path, device)
        batches = sampled(open_sampler(args, model, settings), args.n, args.batch_size)
        return Side(args.n, batches=batches, drawn=True)
    if path.suffix == ".npz" and read_npz(path, ["mu"]):
        features = load_statistics(path)
        return Side(features.n, features)
    images = raw_images(source, args.data_dir, args.skip_bad)
    return Side(len(images), batches=batched(images, args.batch_size))


def is_checkpoint(source):
    return source is not None and source not in DATASETS and Path(source).suffix == ".pt"


def sampled(sampler, n, batch_size, watch=None):
    """This rank's share of images 0 .. n - 1 of a sample.Sampler, quantised as sample.py does.

    uint8 [N, 3, H, W] batches; watch as in sample.sample
    """
    for first, count in parallel.share(n, batch_size):
        yield to_pixels(sampler(first, count, watch)).permute(0, 3, 1, 2)


# ---- the script ----


def parse_args(argv):
    """The arguments; SystemExit 2, one line, for whatever they alone show to be wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("A", help="what is scored")
    parser.add_argument("B", nargs="?", help="the reference; may be left out with --save-stats")
    what = parser.add_argument_group("what")
    text = "Inception weights (default: pytorch-fid's published file, downloaded once)"
    what.add_argument("--weights", metavar="PATH|random", help=text)
    text = "features of an earlier layer, as pytorch-fid has them: fid_64, fid_192 or fid_768"
    what.add_argument("--dims", type=int, choices=LAYERS, default=POOL, help=text)
    for neighbour in neighbours():
        neighbour.score_flags(what)
    what.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16 says by how much it moved the number",
    )
    what.add_argument(
        "--precision-recall",
        action="store_true",
        help=f"KID, precision and recall also of more than {MOST_ROWS:,} images a side",
    )
    what.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out images that cannot be read, and count them",
    )
    how = parser.add_argument_group("of a checkpoint")
    how.add_argument(
        "--n",
        type=cli.whole(2),
        default=10000,
        help="images to sample; the paper takes 50000 for CIFAR-10",
    )
    sampler_flags(how)
    where = parser.add_argument_group("where")
    where.add_argument("--data-dir", type=Path, help="where a named data set lies")
    text = f"save A's statistics, and up to {MOST_ROWS:,} images the rows that KID is taken from"
    where.add_argument("--save-stats", type=Path, metavar="FILE.npz", help=text)
    where.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, everything else on stderr"
    )
    where.add_argument("--batch-size", type=cli.whole(1, 1_000_000), default=50)
    where.add_argument("--device", type=cli.device, default="auto")
    args = parser.parse_args(argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """SystemExit 2, one line, for arguments that contradict each other."""
    if args.B is None and args.save_stats is None:
        parser.error("only A was given; expected A and B, or A and --save-stats")
    if args.precision_recall and (args.B is None or args.weights == "random"):
        parser.error(
            "--precision-recall is for A against B by Inception weights; "
            "leave it out, or give B and other weights"
        )
    if args.save_stats and args.save_stats.suffix != ".npz":
        parser.error(f"--save-stats {args.save_stats}: expected FILE.npz")
    for neighbour in neighbours():
        neighbour.check_score(parser, args)
    check_sampler(parser, args)
    if not (is_checkpoint(args.A) or is_checkpoint(args.B)):
        for flag in ("n", *vars(sampler_defaults())):
            if getattr(args, flag) != parser.get_default(flag):
                parser.error(f"--{flag} is for sampling, and neither A nor B is a checkpoint .pt")


def main(argv=None):
    """The scores of A against B, statistics for later, or both."""
    args = parse_args(argv)
    if args.save_stats:
        check_writable(args.save_stats)  # before hours of sampling
    device = parallel.begin(cli.open_device(args.device))
    sources = [source for source in (args.A, args.B) if source is not None]
    sides = parallel.first(lambda: [open_side(source, args, device) for source in sources])
    if args.precision_recall and not all(map(gives_rows, sides)):
        raise ValueError(
            "--precision-recall, and A or B holds statistics alone; "
            "expected images, or statistics with rows, on both sides; leave it out"
        )
    network = parallel.first(lambda: open_network(args, sides, device))
    by_rows = takes_rows(args, sides, network)
    save_rows = False
    if args.save_stats and args.weights != "random":
        save_rows = (sides[0].n or 0) <= MOST_ROWS

    exact, head = network, None
    if network and args.precision == "bf16":
        network = copy.deepcopy(exact).bfloat16()
        first = 0 if sides[0].batches is not None else 1
        head, sides[first] = _head(sides[first], device)
    features = [None for _ in sides]
    # files come first: what is wrong with them shows before hours of sampling
    for i, side in sorted(enumerate(sides), key=lambda found: found[1].drawn):
        keep = by_rows or (save_rows and i == 0)
        features[i] = side.features or features_of(side.batches, network, side.n, keep)

    note = sys.stdout  # which begin() has closed to every rank but the first
    if args.json and parallel.rank() == 0:
        note = sys.stderr
    if args.save_stats:
        save_statistics(args.save_stats, features[0])
        print(f"statistics of {args.A} written to {args.save_stats.absolute()}", file=note)
    if args.B:
        print_scores(features, by_rows, args.json)
    print(convention(features, network), file=note)
    if head:
        other = features[1 - first] if args.B else None
        print(bf16_effect(head, exact, network, other), file=note)


def gives_rows(side):
    """Whether a Side has, or will have, each image's features."""
    return side.batches is not None or side.features.pool is not None


def open_network(args, sides, device):
    """The network that makes the features, as it made those in files; None where files hold all."""
    if not any(side.batches is not None for side in sides):
        refuse_for_statistics(args)
        return None
    network = feature_network(args).to(device)
    for side in sides:
        if side.features:
            # before hours of sampling
            check_weights(side.features.weights, network.name)
            check_dims(len(side.features.mu), network.dims)
    return network


def refuse_for_statistics(args):
    """ValueError for what says how features are made, where files hold all features."""
    asked = args.weights or args.dims != POOL or args.precision != "fp32"
    if asked or any(neighbour.score_network(args) for neighbour in neighbours()):
        raise ValueError(
            "a network or its precision was given, and A and B hold statistics; "
            "expected images on one side; leave --weights, --dims, --judge and --precision out"
        )


def feature_network(args):
    """The network whose features are compared: a neighbour's, or Inception's."""
    for neighbour in neighbours():
        network = neighbour.score_network(args)
        if network:
            return network
    return InceptionFeatures(args.weights, args.dims)


def takes_rows(args, sides, network):
    """Whether KID, precision and recall are computed: both sides have rows, at a fair cost."""
    if len(sides) < 2 or args.weights == "random" or not all(map(gives_rows, sides)):
        return False
    dims = network.dims if network else len(sides[0].features.mu)
    return _affordable(*(side.n for side in sides), dims, args.precision_recall)


def _affordable(n_a, n_b, dims, asked):
    # whether KID, precision and recall are computed; what they cost is said where it is much
    if max(n_a, n_b) <= MOST_ROWS:
        return True
    gigabytes = 2 * dims * (n_a + n_b) / 1e9  # float16
    operations = 2 * dims * (n_a**2 + n_a * n_b + n_b**2) / 1e12
    cost = (
        f"note: KID, precision and recall of {n_a:,} and {n_b:,} images take {gigabytes:,.1f} GB "
        f"and {operations:,.0f} trillion operations"
    )
    if not asked:
        cost += "; left out; --precision-recall asks for them"
    if parallel.rank() == 0:
        print(cost, file=sys.stderr)
    return asked


def _head(side, device):
    # the batches that hold the first 1,000 images of all ranks together, and the side as it was
    head, count = [], 0
    for batch in side.batches:
        head.append(batch)
        count += int(parallel.add(torch.tensor(len(batch), device=device)))
        if count >= 1000:
            break
    return head, side._replace(batches=itertools.chain(head, side.batches))


def print_scores(features, by_rows, as_json):
    """The scores of two Features, as one line; by_rows: with KID, precision and recall."""
    if not by_rows:
        features = [side._replace(pool=None) for side in features]
    found = compare(*features)
    if as_json:
        print(json.dumps(found | {"weights": features[0].weights or features[1].weights}))
    else:
        numbers = [f"{key} {value:.6g}" for key, value in found.items() if isinstance(value, float)]
        print("  ".join(numbers))


def convention(features, network):
    """One line to quote beside the numbers."""
    counts = "; ".join(
        f"{letter}: {'an unknown number of' if f.n is None else f.n} images"
        for letter, f in zip("AB", features, strict=False)
    )
    made = "features as the files' makers took them"
    if network:
        made = f"{network.convention}; weights {network.name} in {network.precision()}"
    splits = (
        f"; IS over {math.ceil(features[0].n / SPLIT)} split(s) of {SPLIT}"
        if features[0].score
        else ""
    )
    return f"{counts}; {made}; covariances / (n - 1){splits}"


def bf16_effect(batches, exact, network, other=None):
    """One line: the distance of the same images to `other`, by both networks.

    Without `other` it is the distance to themselves in fp32.
    """
    fp32, bf16 = features_of(batches, exact), features_of(batches, network)
    other = other or fp32
    before, after = (frechet_distance(x.mu, x.sigma, other.mu, other.sigma) for x in (fp32, bf16))
    return (
        f"bf16 moved the distance of the first {fp32.n} images by {after - before:+.4f} "
        f"({before:.4f} in fp32, {after:.4f} in bf16)"
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))
