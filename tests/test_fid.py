"""fid.py: what goes in, what is scored, and what comes out."""

import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import fid
from features import (
    Features,
    Statistics,
    features_of,
    save_statistics,
)
from made import gaussian, normal
from models import write_ddpm
from runs import ROOT, done, exit_code
from sample import Sampler
from tiny import Tiny, features, pixels

few = pytest.mark.filterwarnings("ignore:.*images are few")


@pytest.fixture
def tiny(monkeypatch):
    """The script scores by Tiny."""
    monkeypatch.setattr(fid, "InceptionFeatures", Tiny)


def run(*argv):
    """The exit code of `python fid.py argv`."""
    return exit_code(fid.main, *argv)


def failing(capsys, *argv):
    """The exit code of `python fid.py argv` and the one error that it ends with."""
    code = run(*argv)
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error")]
    assert errors == lines[-1:] and errors[0].startswith("error: ")
    return code, errors[0]


def printed(capsys, *argv):
    """The JSON object that `python fid.py argv --json` prints."""
    assert run(*argv, "--json") == 0
    return json.loads(capsys.readouterr().out)


# ---- the two sides and the script ----


@pytest.fixture
def files(tmp_path):
    """A side of each kind: folder, images.npz, stats.npz, pytorch_fid.npz, model.pt."""
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, image in enumerate([*pixels(5), *pixels(4, 6)]):
        place = tmp_path / "folder" / ("deep" if i % 2 else ".")
        Image.fromarray(image).save(place / f"{i}.PNG")
    np.savez(tmp_path / "images.npz", arr_0=pixels(12, seed=1))
    save_statistics(tmp_path / "stats.npz", features(pixels(30, seed=2)))
    mu, sigma = gaussian(d=12)
    np.savez(tmp_path / "pytorch_fid.npz", mu=mu, sigma=sigma)
    (tmp_path / "model.pt").write_bytes(b"")
    return tmp_path


@pytest.fixture
def checkpoint(files, monkeypatch):
    """A checkpoint of which image i is noise from (seed, i), whatever the batch, at 5 steps."""
    write_ddpm(files / "model.pt")

    def drawn(self, first, n, watch=None):
        assert self.chain.step.tolist() == [0, 1, 5, 9, 13, 17]
        seeds = [1000 * self.seed + i for i in range(first, first + n)]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return torch.stack([torch.rand(self.shape, generator=g) * 2 - 1 for g in generators])

    monkeypatch.setattr(Sampler, "__call__", drawn)
    return files / "model.pt"


SCORES = {"fid", "sfid", "is", "is_std", "n_a", "n_b", "weights"}
ALL = SCORES | {"kid", "kid_std", "precision", "recall"}
OF_STATISTICS = {"fid", "sfid", "n_a", "n_b", "weights"}


@few
@pytest.mark.parametrize(
    "a, b, keys, counts",
    [
        ("folder", "images.npz", ALL, (9, 12)),
        ("images.npz", "shapes", ALL, (12, 4096)),
        ("images.npz", "stats.npz", SCORES, (12, 30)),
        ("images.npz", "pytorch_fid.npz", SCORES - {"sfid", "n_b"}, (12, None)),
        ("stats.npz", "images.npz", OF_STATISTICS, (30, 12)),
        ("stats.npz", "stats.npz", OF_STATISTICS, (30, 30)),
        ("pytorch_fid.npz", "stats.npz", OF_STATISTICS - {"sfid", "n_a"}, (None, 30)),
    ],
)
def test_each_kind_of_side_gives_the_numbers_it_can(files, tiny, capsys, a, b, keys, counts):
    """Folder, images, a set's name, statistics with and without sFID's."""
    sides = [side if side == "shapes" else files / side for side in (a, b)]
    got = printed(capsys, *sides)
    assert set(got) == keys and (got.get("n_a"), got.get("n_b")) == counts
    assert all(isinstance(got[key], int) for key in keys & {"n_a", "n_b"})
    assert got.pop("weights") == "inception-00000000"
    assert all(np.isfinite(value) for value in got.values())


@few
def test_a_checkpoint_is_sampled_on_the_fly_and_the_batch_size_does_not_matter(
    checkpoint, tiny, files, capsys
):
    """--n images of --seed by --steps steps; batches of 4 and of 50 give the same number."""
    argv = [checkpoint, files / "images.npz", "--n", 10, "--steps", 5]
    one = printed(capsys, *argv, "--seed", 3)
    same = printed(capsys, *argv, "--seed", 3, "--batch-size", 4)
    other = printed(capsys, *argv, "--seed", 4)
    assert set(one) == ALL and one["n_a"] == 10
    assert one.pop("weights") == same.pop("weights")
    assert same == {key: pytest.approx(value, rel=1e-9, abs=1e-9) for key, value in one.items()}
    assert abs(one["fid"] - other["fid"]) > 1e-6


@few
def test_two_statistics_files_need_no_network(files, monkeypatch, capsys):
    """Nothing is downloaded or built where no image is looked at."""
    monkeypatch.setattr(fid, "InceptionFeatures", None)
    a, b = np.load(files / "stats.npz"), np.load(files / "pytorch_fid.npz")
    got = printed(capsys, files / "stats.npz", files / "pytorch_fid.npz")
    assert got["fid"] == fid.frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])


@pytest.mark.parametrize(
    "flags", [["--weights", "random"], ["--dims", 192], ["--precision", "bf16"]]
)
@few
def test_a_network_for_statistics_alone_is_refused(flags, files, capsys):
    """It would change nothing."""
    code, error = failing(capsys, files / "stats.npz", files / "stats.npz", *flags)
    assert code == 1 and "hold statistics" in error


@few
def test_random_weights_never_give_a_number_called_fid(files, tiny, capsys):
    """Their distances have names of their own, with a warning; statistics remember it."""
    argv = [files / "folder", files / "images.npz", "--weights", "random"]
    random = files / "random.npz"
    with pytest.warns(UserWarning, match="no FID"):
        got = printed(capsys, *argv, "--save-stats", random)
    names = {"random_feature_distance", "random_spatial_distance"}
    assert set(got) == names | {"n_a", "n_b", "weights"}
    with pytest.warns(UserWarning, match="no FID"):
        run(*argv)
    assert "fid " not in capsys.readouterr().out.lower().replace("no fid", "")
    with pytest.warns(UserWarning, match="no FID"):
        assert "fid" not in printed(capsys, random, random)
    assert "expected the same" in failing(capsys, random, files / "stats.npz")[1]


@few
def test_saved_statistics_stand_in_for_their_images(files, tiny, capsys):
    """With A alone --save-stats only saves, and the file scores as the images did."""
    assert run(files / "images.npz", "--save-stats", files / "s.npz") == 0
    assert str(files / "s.npz") in capsys.readouterr().out
    assert not list(files.glob(".*partial"))
    direct = printed(capsys, files / "folder", files / "images.npz")
    saved = printed(capsys, files / "folder", files / "s.npz")
    assert saved == direct and saved.keys() >= {"kid", "precision"}


@few
def test_rows_that_are_not_the_statistics_own_are_refused(files, tiny, capsys):
    """Rows of fewer images than n, or of another type, would give another KID."""
    assert run(files / "images.npz", "--save-stats", files / "s.npz") == 0
    held = dict(np.load(files / "s.npz"))
    pool = held["pool"]
    for spoiled in (pool[:-1], pool.astype(np.float32), np.full_like(pool, np.nan)):
        np.savez(files / "spoiled.npz", **held | {"pool": spoiled})
        code, line = failing(capsys, files / "spoiled.npz", files / "s.npz")
        assert code == 1 and "expected finite float16 [12, 12]" in line


@few
def test_counts_and_conventions_stand_beside_the_numbers(files, tiny, capsys):
    """The line to quote: images of each side, resize, weights, covariance, splits."""
    assert run(files / "folder", files / "images.npz") == 0
    out = capsys.readouterr().out
    assert "A: 9 images; B: 12 images" in out
    assert "TF1 bilinear resize to 299, (v - 128) / 128" in out
    for words in ("weights inception-00000000 in float32", "/ (n - 1)", "1 split(s) of 5000"):
        assert words in out


@pytest.mark.parametrize("dims, name", [(64, "fid_64"), (192, "fid_192"), (768, "fid_768")])
def test_the_distance_of_an_earlier_layer_is_never_called_fid(dims, name):
    """Nor is that of another maker's statistics, whose weights have no name."""
    rows = torch.from_numpy(normal(3000, dims))
    sums = Statistics()
    sums.add(rows)
    for weights in ("inception-0", None):
        side = Features(*sums.gaussian(), n=3000, weights=weights)
        assert list(fid.compare(side, side)) == [name, "n_a", "n_b"]


@few
def test_rows_of_a_are_saved_whatever_b_is(files, tiny, monkeypatch):
    """B has statistics alone, or too many images for KID."""
    monkeypatch.setattr(fid, "MOST_ROWS", 12)
    for b in ("stats.npz", "folder"):
        saved = files / "s.npz"
        np.savez(files / "many.npz", arr_0=pixels(13))
        other = files / "many.npz" if b == "folder" else files / b
        assert run(files / "images.npz", other, "--save-stats", saved) == 0
        assert np.load(saved)["pool"].shape == (12, 12)


@few
def test_other_weights_are_refused_before_anything_is_scored(files, tiny, monkeypatch, capsys):
    """A's images may take hours to sample."""
    assert run(files / "images.npz", "--save-stats", files / "s.npz") == 0
    monkeypatch.setattr(fid, "features_of", None)
    code, line = failing(capsys, files / "images.npz", files / "s.npz", "--weights", "other")
    assert code == 1 and "make both with the same --weights, --dims or --judge" in line


def test_few_images_are_warned_of_and_many_are_not():
    """Below 2,048 images there is a warning, from there on none."""
    nine = features(pixels(9))
    with pytest.warns(UserWarning, match="9 images are few: below 2,048"):
        fid.compare(nine, nine._replace(n=2048))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fid.compare(nine._replace(n=2048), nine._replace(n=None))


def test_a_short_last_split_of_the_inception_score_is_warned_of():
    """Images beyond the last full 5,000 form a short split, which is warned of.

    Not where that is the only split, or where there is no score.
    """
    nine = features(pixels(9))
    other = nine._replace(n=None)
    with pytest.warns(UserWarning, match="Inception Score holds 7 images, not 5,000"):
        fid.compare(nine._replace(n=10_007), other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fid.compare(nine._replace(n=10_000), other)
        fid.compare(nine._replace(n=4_999), other)
        fid.compare(nine._replace(n=10_007, score=None), other)


# ---- what is asked for ----

COST = "note: KID, precision and recall of 9 and 12 images take 0.0 GB and 0 trillion operations"


@few
@pytest.mark.parametrize(
    "flags, keys, says",
    [
        ([], SCORES, "; left out; --precision-recall asks for them\n"),
        (["--precision-recall"], ALL, "\n"),
    ],
)
def test_precision_and_recall_of_many_images_are_left_out_unless_asked_for(
    flags, keys, says, files, tiny, monkeypatch, capsys
):
    """One line says so, and no feature is kept; with --precision-recall it names the cost."""
    monkeypatch.setattr(fid, "MOST_ROWS", 10)
    kept = []

    def noted(*how):
        found = features_of(*how)
        kept.append(found.pool is not None)
        return found

    monkeypatch.setattr(fid, "features_of", noted)
    assert run(files / "folder", files / "images.npz", "--json", *flags) == 0
    out, err = capsys.readouterr()
    assert set(json.loads(out)) == keys
    assert COST + says in err
    assert kept == [keys is ALL, keys is ALL]


@few
def test_rows_in_files_are_left_alone_beyond_the_limit_unless_asked_for(
    files, tiny, monkeypatch, capsys
):
    """Both sides have them, and there are too many."""
    sides = [files / "a.npz", files / "b.npz"]
    for images, side in zip(("folder", "images.npz"), sides, strict=True):
        assert run(files / images, "--save-stats", side) == 0
    capsys.readouterr()
    monkeypatch.setattr(fid, "MOST_ROWS", 10)
    assert not {"kid", "precision"} & printed(capsys, *sides).keys()
    assert {"kid", "precision"} <= printed(capsys, *sides, "--precision-recall").keys()


def test_the_cost_of_precision_and_recall_is_named_before_it_is_paid(
    files, tiny, monkeypatch, capsys
):
    monkeypatch.setattr(fid, "MOST_ROWS", 10)
    monkeypatch.setattr(fid, "features_of", None)
    with pytest.raises(TypeError):
        fid.main([str(files / "folder"), str(files / "images.npz"), "--precision-recall"])
    assert COST in capsys.readouterr().err


def test_the_cost_of_precision_and_recall_is_that_of_all_pairs(capsys):
    """10,000 images against ImageNet: float16 rows of 2048, and 2 x 2048 operations a distance."""
    assert fid._affordable(50_000, 50_000, 2048, False) and not capsys.readouterr().err
    assert not fid._affordable(10_000, 1_281_167, 2048, False)
    assert "take 5.3 GB and 6,776 trillion operations" in capsys.readouterr().err


@few
def test_precision_and_recall_of_statistics_cannot_be_asked_for(files, tiny, capsys):
    """A statistics file has no single images' features."""
    code, line = failing(capsys, files / "folder", files / "stats.npz", "--precision-recall")
    assert code == 1 and "expected images, or statistics with rows, on both sides" in line


@few
def test_bf16_says_by_how_much_it_moved_the_number(files, tiny, capsys, monkeypatch):
    """The first 1,000 images of A are measured by both networks, and all of them still count."""
    np.savez(files / "many.npz", arr_0=pixels(1030, 4))

    def moved_in_bf16(self, images, forward=Tiny.forward):
        offset = 0.5 if self.precision() == "bfloat16" else 0
        return tuple(x + offset for x in forward(self, images))

    monkeypatch.setattr(Tiny, "forward", moved_in_bf16)
    assert run(files / "many.npz", files / "stats.npz", "--precision", "bf16") == 0
    out = capsys.readouterr().out
    assert "A: 1030 images" in out and "bfloat16" in out
    line = "of the first 1000 images by (.*) \\((.*) in fp32, (.*) in bf16\\)"
    by, before, after = map(float, re.search(line, out).groups())
    assert by == pytest.approx(after - before, abs=2e-4) and by != 0


@pytest.mark.parametrize(
    "argv, words",
    [
        ("", "A"),
        ("folder", "only A was given"),
        ("folder images.npz --n 5", "neither A nor B is a checkpoint"),
        ("folder images.npz --seed 5", "neither A nor B is a checkpoint"),
        ("model.pt folder --n 1", "--n"),
        ("folder images.npz --batch-size 0", "--batch-size"),
        ("folder images.npz --prec bf16", "unrecognized"),
        ("folder --save-stats s.txt", "expected FILE.npz"),
        ("folder --save-stats s.npz --precision-recall", "A against B"),
        ("folder images.npz --weights random --precision-recall", "Inception weights"),
    ],
)
def test_usage_errors_end_with_exit_code_2(capsys, argv, words):
    """What the flags alone show to be wrong is refused before anything is read."""
    code, line = failing(capsys, *argv.split())
    assert code == 2 and words in line


@pytest.fixture
def broken(files):
    """The same folder with files that cannot be scored."""
    np.savez(files / "no_mu.npz", sigma=np.eye(3))
    np.savez(files / "no_sigma.npz", mu=np.zeros(3))
    np.savez(files / "objects.npz", mu=np.array([{}], object), sigma=np.eye(1))
    np.savez(files / "flat.npz", mu=np.zeros(3), sigma=np.zeros(3))
    np.savez(files / "nan.npz", mu=np.full(12, np.nan), sigma=np.eye(12))
    np.savez(files / "small.npz", mu=np.zeros(4), sigma=np.eye(4))
    np.savez(files / "one.npz", arr_0=pixels(1))
    np.savez(files / "float.npz", arr_0=np.zeros((3, 8, 8, 3)))
    (files / "cut.npz").write_bytes((files / "stats.npz").read_bytes()[:-100])
    (files / "empty").mkdir()
    (files / "bad").mkdir()
    for name in ("a.png", "c.png"):
        Image.fromarray(pixels(1)[0]).save(files / "bad" / name)
    (files / "bad" / "b.png").write_bytes(b"no image")
    return files


@few
@pytest.mark.parametrize(
    "name, words",
    [
        ("no_mu.npz", "no_mu.npz"),
        ("no_sigma.npz", "expected at least mu and sigma"),
        ("objects.npz", "objects.npz"),
        ("flat.npz", "[D, D]"),
        ("nan.npz", "nan.npz: mu or sigma holds NaN"),
        ("small.npz", "of 4 and of 12 features"),
        ("one.npz", "got 1 images"),
        ("float.npz", "uint8"),
        ("cut.npz", "cut.npz"),
        ("empty", "empty"),
        ("bad", "b.png"),
        ("missing", "does not exist"),
        ("missing.pt", "does not exist"),
        ("model.pt", "model.pt"),
    ],
)
def test_each_bad_input_is_one_line_and_exit_code_1(broken, tiny, capsys, name, words):
    """Statistics without mu or of other shapes, cut or pickled files, broken images: named."""
    code, line = failing(capsys, broken / name, broken / "stats.npz")
    assert code == 1 and words in line and len(line) < 500


@few
@pytest.mark.parametrize("name", ["bad", "one.npz", "small.npz", "nan.npz"])
def test_a_bad_reference_is_found_before_a_checkpoint_is_sampled(
    broken, checkpoint, tiny, monkeypatch, capsys, name
):
    monkeypatch.setattr(Sampler, "__call__", None)
    code, line = failing(capsys, checkpoint, broken / name)
    assert code == 1 and line


@few
def test_skip_bad_leaves_out_what_cannot_be_read(broken, tiny, capsys):
    """--skip-bad counts only the images that were read."""
    with pytest.warns(UserWarning):
        assert printed(capsys, broken / "bad", broken / "stats.npz", "--skip-bad")["n_a"] == 2


@pytest.mark.slow
def test_whole_path_runs_offline_as_a_script(files):
    """`python fid.py A B --weights random --json`: one JSON object, and warnings of one line."""
    sides = [files / "folder", files / "images.npz"]
    flags = ["--weights", "random", "--json", "--device", "cpu"]
    command = [sys.executable, ROOT / "fid.py", *sides, *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    keys = {"random_feature_distance", "random_spatial_distance", "n_a", "n_b", "weights"}
    assert set(json.loads(ended.stdout)) == keys
    assert "warning: the weights are random" in ended.stderr
    assert "Traceback" not in ended.stderr


# ---- two processes ----

TWO = """
import os, sys
import torch
import fid
from data import Images
from features import reference_features
from support import cli, parallel
from tiny import Tiny, pixels
fid.InceptionFeatures = Tiny
"""
SCORE = """
sys.exit(cli.run(fid.main))
"""
REFERENCE = """
os.environ["XDG_CACHE_HOME"] += os.environ.get("RANK", "0")  # a home on each machine
def main(argv):
    parallel.begin(torch.device("cpu"))
    statistics = reference_features(Images(pixels(10), None, "ten", "abcd"), Tiny())
    print(float(parallel.add(torch.tensor(statistics.sigma)).sum()) / parallel.size())
sys.exit(cli.run(main))
"""


@pytest.fixture
def ours(monkeypatch):
    """Scripts from elsewhere find our modules, and those of tests/."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")


@pytest.mark.slow
def test_two_processes_measure_bf16_on_a_folder_of_mixed_sizes(tmp_path, ours):
    """Batches of 50 and of 30 in turn: both ranks leave the first 1,000 images together."""
    (tmp_path / "folder").mkdir()
    small, large = (Image.fromarray(pixels(1, size)[0]) for size in (4, 5))
    for i in range(2400):
        image = small if i % 80 < 50 else large
        image.save(tmp_path / f"folder/{i:04}.png")
    (tmp_path / "score.py").write_text(TWO + SCORE)
    argv = [tmp_path / "folder", "shapes", "--precision", "bf16", "--device", "cpu"]
    one, two = (done(tmp_path / "score.py", *argv, processes=n) for n in (1, 2))
    assert "the first 1010 images" in one and "the first 1040 images" in two
    assert one.splitlines()[0] == two.splitlines()[0]


@pytest.mark.slow
def test_the_first_process_decides_for_all_whether_the_reference_is_there(
    tmp_path, ours, monkeypatch
):
    """The other rank's own cache is empty; once rank 0 has the statistics, it has them too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "reference.py").write_text(TWO + REFERENCE)
    made = done(tmp_path / "reference.py")
    found = done(tmp_path / "reference.py", processes=2)
    assert found == made and not list((tmp_path / "cache1").rglob("*.npz"))
