r"""PAPER.md is the map of the paper: each row names a function, and a test that holds it.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models

Here the map itself is held: it is whole, the functions cite their equations, and each named test
fails when its function is broken.
"""

import contextlib
import re
import types

import pytest
import torch

from experiments.paper_page import ROOT, ROWS, find_code, find_test, page
from support.run import Run

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def numbers(text):
    """The whole numbers in a text; the 0 of x0 is none."""
    return {int(number) for number in re.findall(r"\b\d+\b", text)}


def test_paper_md_is_what_its_program_writes():
    """`python -m experiments.paper_page` would change nothing."""
    assert (ROOT / "PAPER.md").read_text() == page()


def test_every_equation_and_figure_of_the_paper_has_a_row():
    """Eqs. 1-17 and figures 1-3."""
    equations = [numbers(row.name) for row in ROWS if row.name.startswith("Eq")]
    figures = [numbers(row.name) for row in ROWS if row.name.startswith("Figure")]
    assert set.union(*equations) == set(range(1, 18))
    assert set.union(*figures) == {1, 2, 3}


@each_row
def test_the_function_cites_its_equation(row):
    """By number, in its docstring or, where a method has none, in its class's."""
    text = find_code(row.code).__doc__
    if not text:
        text = find_code(row.code.rpartition(".")[0]).__doc__
    text = " ".join(text.split())
    mark = r"[Ff]igure" if row.name.startswith("Figure") else r"Cas-DM Eqs?\."
    cited = " ".join(re.findall(rf"{mark} ([\d, ]+)", text))
    assert numbers(row.name) <= numbers(cited)


@each_row
def test_the_named_test_fails_when_the_function_is_broken(row):
    """Not by an error of another kind, but because what the test claims no longer holds."""
    path, _ = find_test(row.test)
    with broken(find_code(row.code)):
        failures = run_test(f"{ROOT / path}::{row.test}")
    assert failures == [AssertionError]


@contextlib.contextmanager
def broken(function):
    """What the function gives is a little off, for whoever has imported it already, too."""
    kept = function.__code__, function.__defaults__, function.__kwdefaults__
    original = types.FunctionType(kept[0], function.__globals__, argdefs=kept[1])
    original.__kwdefaults__ = kept[2]
    function.__globals__.update(_original=original, _spoil=spoil)
    function.__defaults__ = function.__kwdefaults__ = None
    function.__code__ = stand_in.__code__
    try:
        yield
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = kept
        del function.__globals__["_original"], function.__globals__["_spoil"]


def stand_in(*args, **how):
    """Its code runs in the place of a broken function's, with the names that `broken` gave."""
    return _spoil(_original(*args, **how), args)  # noqa: F821


def spoil(value, args=()):
    """The value with each floating tensor in it changed; of a run in `args`, its weights too."""
    for run in args:
        if isinstance(run, Run):
            for p in run.weights:
                p.data = spoil(p.data)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value * 1.01 + 0.01
    if isinstance(value, dict):
        return {key: spoil(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return value._make(spoil(part) for part in value)
    return value


def run_test(name):
    """Runs a test up to its first failure, and gives the exceptions of those that failed."""
    failures = Failures()
    quiet = ["-q", "--no-header", "--no-summary"]
    # The last of them collects garbage at every end, which takes longer than the test.
    without = ["-pno:cacheprovider", "-pno:threadexception", "-pno:unraisableexception"]
    pytest.main([name, "-x", *quiet, *without], plugins=[failures])
    return failures.found


class Failures:
    """A plugin of pytest that keeps them."""

    def __init__(self):
        self.found = []

    def pytest_exception_interact(self, call):
        self.found.append(call.excinfo.type)
