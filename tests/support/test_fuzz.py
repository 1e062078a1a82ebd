"""Whatever comes in, the end is success or a documented exit with one line.

No traceback, no hang, no changed input.
"""

import contextlib
import io
import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

import data
import fid
import sample
import train
from models import write_ddpm
from refiner import DEFAULTS
from runs import exit_code, one_error
from support.settings import defaults, parse_args

COMMON = hypothesis_settings(deadline=None, suppress_health_check=list(HealthCheck))
hundreds = pytest.mark.parametrize("cases", [100, pytest.param(5000, marks=pytest.mark.soak)])


def explore(cases, check):
    """Searches `check`'s arguments: the same by default, new ones in the thousands of a soak."""
    hypothesis_settings(COMMON, max_examples=cases, derandomize=cases < 1000)(check)()


# ---- command lines ----

FLAGS = ["--" + name.replace("_", "-") for name in defaults()]
FLAGS += ["--lpips", "--out", "--resume", "--device", "--n", "--steps", "--eta", "--trace"]
FLAGS += ["--raw", "--sampler", "--variance", "--label", "--cfg", "--classifier", "--guidance"]
FLAGS += ["--bits-per-dim", "--weights", "--json", "--save-stats", "--precision-recall"]
NUMBERS = ["0", "1", "-1", "16", "30", "nan", "inf", "1e400", "99999999999999999999"]
NAMES = ["ddpm", "dual", "casdm", "classifier", "x0", "eps", "fixres", "x0+eps", "cosine"]
NAMES += ["hybrid", "vlb", "learned"]
METRICS = ["lpips=0.1", "a.pt=1", "ssim=nan", "ssim=", "=1"]
PLACES = ["shapes", "cifar10", "cpu", "cuda:-1", "a.png", "a.npz", "a.jpg"]
ODD = ["", " ", "\0", "é", "--", "-"]
VALUES = st.sampled_from([*NUMBERS, *NAMES, *METRICS, *PLACES, *ODD]) | st.text(max_size=8)
PARSERS = {
    "train": lambda argv: parse_args("", argv),
    "sample": sample.parse_args,
    "fid": fid.parse_args,
}


@hundreds
def test_any_command_line_is_understood_or_a_usage_error_of_one_line(cases):
    flags = st.lists(st.tuples(st.sampled_from(FLAGS), st.none() | VALUES), max_size=6)

    @given(st.sampled_from(list(PARSERS)), flags, st.lists(VALUES, max_size=2))
    def check(script, flags, words):
        for flag, value in flags:
            words += [flag] if value is None else [flag, value]

        def parse(argv):
            PARSERS[script](argv)

        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = exit_code(parse, *words)
        error = said.getvalue()
        if code == 0:
            assert not error
        else:
            assert code == 2 and one_error(error)

    explore(cases, check)


SMALL = ["--model", "ddpm", "--data", "shapes", "--channels", "32", "--res-blocks", "1"]
SMALL += ["--T", "20", "--batch-size", "1", "--iterations", "1", "--sample-every", "0"]
NETWORK = ["--channels", "--res-blocks", "--image-size"]
SIZES = {
    train: [*NETWORK, "--batch-size", "--T", "--seed", "--metric-size"],
    sample: ["--batch-size", "--steps", "--seed", "--label"],
    fid: ["--batch-size"],
}
HUGE = ["3200000", "1000000000000"]
DEVICES = ["cpu", "cpu:1", "cuda:77", "cuda:-1", "mps:3", "meta", "xla", "vulkan", "xpu:0"]
CALLS = [(script, flag, value) for script in SIZES for flag in SIZES[script] for value in HUGE]
CALLS += [(script, "--device", value) for script in SIZES for value in DEVICES]


@hundreds
def test_any_number_or_device_is_used_or_refused_in_one_line(cases, checkpoint, tmp_path):
    """The scripts themselves run: a parser cannot know what the machine has."""
    statistics = tmp_path / "stats.npz"
    np.savez(statistics, mu=np.zeros(2), sigma=np.eye(2))
    runs = (tmp_path / str(i) for i in itertools.count())

    def words(script):
        if script is train:
            return [*SMALL, "--out", next(runs)]
        if script is sample:
            return [checkpoint, "--n", 1, "--steps", 2, "--out", tmp_path / "s.png"]
        return [statistics, statistics]

    @given(st.sampled_from(CALLS))
    def check(call):
        script, flag, value = call
        argv = [*words(script), "--device", "cpu", flag, value]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = exit_code(script.main, *argv)
        errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
        assert code in (0, 1, 2) and len(errors) == (code != 0), said.getvalue()

    explore(cases, check)


# ---- files ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "checkpoint.pt"
    write_ddpm(path)
    return path


@contextlib.contextmanager
def one_line(name=""):
    """Success, or an error that the scripts print as one line."""
    try:
        yield
    except (ValueError, OSError) as e:
        assert name in str(e) and "\n" not in str(e) and len(str(e)) < 800, e


@hundreds
def test_any_damage_to_a_checkpoint_is_harmless_or_one_line(cases, checkpoint):
    """Bytes changed, cut out, or put in, anywhere; what still opens has the very same weights."""
    whole, path = checkpoint.read_bytes(), checkpoint.with_name("damaged.pt")
    weights = sample.load_model(checkpoint)[0].state_dict()
    last = len(whole) - 1
    place = st.integers(0, last) | st.integers(0, 3000) | st.integers(last - 9000, last)
    damage = st.tuples(place, st.sampled_from([0, 1, 2, 16, 4096]), st.binary(max_size=32))

    @given(st.lists(damage, min_size=1, max_size=3))
    def check(damages):
        raw = bytearray(whole)
        for at, length, instead in damages:
            raw[at : at + length] = instead
        path.write_bytes(raw)
        with one_line():
            found = sample.load_model(path)[0].state_dict()
            torch.testing.assert_close(found, weights, rtol=0, atol=0)
        assert path.read_bytes() == raw

    explore(cases // 4, check)


@hundreds
def test_any_settings_in_a_checkpoint_open_or_are_one_line(cases, checkpoint):
    state, path = torch.load(checkpoint, weights_only=True), checkpoint.with_name("settings.pt")
    values = st.none() | st.integers(-5, 64) | st.floats() | st.text(max_size=4)
    values |= st.lists(st.integers(), max_size=2)
    keys = st.sampled_from([*DEFAULTS, "metric", "learn_sigma", "objective", "other"])

    @given(st.dictionaries(keys, values, max_size=6))
    def check(changes):
        torch.save(state | {"settings": state["settings"] | changes}, path)
        with one_line():
            sample.load_model(path)

    explore(cases // 4, check)


def picture(kind):
    """A small picture as bytes."""
    file = io.BytesIO()
    pixels = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@hundreds
def test_any_image_header_is_read_or_refused_by_name(cases, tmp_path):
    """The first bytes of a picture of each kind, changed at will."""
    kinds = ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA"]
    pictures = {kind: picture(kind) for kind in kinds}
    change = st.tuples(st.integers(0, 64), st.integers(0, 255))

    @given(st.sampled_from(kinds), st.lists(change, min_size=1, max_size=4))
    def check(kind, changes):
        raw = bytearray(pictures[kind])
        for at, byte in changes:
            raw[at % len(raw)] = byte
        path = tmp_path / f"a.{kind.lower()}"
        path.write_bytes(raw)
        with warnings.catch_warnings(), one_line(str(path)):
            warnings.simplefilter("ignore")
            [image] = data.raw_images(tmp_path)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert path.read_bytes() == raw
        path.unlink()

    explore(cases, check)
