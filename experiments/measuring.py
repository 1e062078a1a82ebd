"""How a row of benchmark.py is made, timed and printed."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

SIZE = 32  # of the images, where a row does not say another


class Peak(NamedTuple):
    """The work's operations, and the share of the convolutions' FLOP/s that it must reach."""

    flops: int  # of the work
    dtype: torch.dtype  # of the convolutions
    least: float | None = None  # share of the peak; None: the share is printed alone


class Row(NamedTuple):
    """One line of the table."""

    work: Callable
    reference: Callable | None
    target: str  # ">= 1.08 x": reference / work; "<= 1.02": work / reference; "<= 2 s": the work
    tolerance: float | None = None  # of what the two return; None: not compared
    peak: Peak | None = None
    unit: str = "s"  # or "MB", which the two return
    warm: int = 6  # turns that do not count: the first take new memory from the system


class Measured(NamedTuple):
    """What came out of a row."""

    work: float  # median, in the row's unit
    reference: float | None
    differ: float | None  # largest relative difference of what the two return
    share: float | None  # of the convolutions' peak


def print_line(name, row, repeats, device):
    """The row's figures, beside what was asked of them."""
    found = measure(row, repeats, device)
    ratio = bounded(found, row.target)
    reference = peak = differ = ""
    if found.reference:
        reference = f"{found.reference:.3f} {row.unit}"
    if found.share:
        peak = f"{found.share:.2f}"
        if row.peak.least:
            peak += f" >= {row.peak.least}"
    if found.differ is not None:
        differ = f"{found.differ:.0e} <= {row.tolerance:.0e}"
    work = f"{found.work:.3f} {row.unit}"
    verdict = "met" if is_met(found, row, ratio) else "MISSED"
    print_cells(name, work, reference, f"{ratio:.3f}", row.target, peak, differ, verdict)


def bounded(found, target):
    """What the target bounds: seconds (2 s), a speed-up (1.08 x) or a cost (1.02)."""
    if target.endswith(" s"):
        return found.work
    if target.endswith(" x"):
        return found.reference / found.work
    return found.work / found.reference


def is_met(found, row, ratio):
    """Whether the ratio keeps to the target, the share to its least, and the results agree."""
    sign, bound, *_ = row.target.split()
    met = [ratio >= float(bound) if sign == ">=" else ratio <= float(bound)]
    if found.share and row.peak.least:
        met.append(found.share >= row.peak.least)
    if found.differ is not None:
        met.append(found.differ <= row.tolerance)
    return all(met)


def print_cells(*cells):
    """A line of the table, each cell in its column."""
    widths = (18, 13, 13, 9, 11, 15, 18, 0)
    line = "".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=False))
    print(line, flush=True)


def measure(row, repeats, device):
    """The row's calls, taken in turns -> Measured"""
    calls = [row.work]
    if row.reference:
        calls.append(row.reference)
    convolutions = []
    if row.peak:
        convolutions = peak_convolutions(device, row.peak.dtype)
    every = [*calls, *(call for call, _ in convolutions)]
    seconds, results = interleaved(every, repeats, device, row.warm)
    figures = results if row.unit == "MB" else seconds
    reference = differ = share = None
    work = statistics.median(figures[0])
    if row.reference:
        reference = statistics.median(figures[1])
    if row.tolerance:
        differ = difference(results[0][-1], results[1][-1])
    if row.peak:
        costs = [cost for _, cost in convolutions]
        fastest = [min(times) for times in seconds[len(calls) :]]
        best = max(cost / time for cost, time in zip(costs, fastest, strict=True))
        share = row.peak.flops / work / best
    return Measured(work, reference, differ, share)


def interleaved(calls, repeats, device, warm=6):
    """Each of `calls` in turn, `repeats` times after `warm` turns that do not count.

    returns : (seconds, results), a list a call
    """
    seconds, results = [[] for _ in calls], [[] for _ in calls]
    for repeat in range(-warm, repeats):
        for call, times, values in zip(calls, seconds, results, strict=True):
            begun = time.perf_counter()
            value = call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 0:
                times.append(time.perf_counter() - begun)
                values.append(value)
    return seconds, results


def difference(a, b):
    """The largest, over the largest number in b."""
    a, b = as_float64(a), as_float64(b)
    return float(np.abs(a - b).max() / np.abs(b).max())


def as_float64(value):
    """A tensor or a number, as a NumPy array."""
    if torch.is_tensor(value):
        value = value.cpu()
    return np.asarray(value, np.float64)


def peak_convolutions(device, dtype):
    """[(call, FLOPs)] of large 3 x 3 convolutions, forward and backward.

    Channels last, which is never the slower layout.
    """

    def one(n, c, size):
        """(call, FLOPs) of one of them, n images of c channels."""
        conv = nn.Conv2d(c, c, 3, padding=1, bias=False, device=device, dtype=dtype)
        conv = conv.to(memory_format=torch.channels_last)
        x = torch.randn(n, c, size, size, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        gradient = torch.randn_like(x)
        x.requires_grad_()

        def call():
            return torch.autograd.grad(conv(x), (x, conv.weight), gradient)

        return call, 3 * 2 * n * c * c * 9 * size * size

    return [one(32, 256, 16), one(8, 256, 64)]


def flops(call):
    """What torch counts of one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def randomised(net):
    """The same weights each time, none of them zero.

    What starts at zero would compare as equal, and has gradients that no later step has.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
    return net


def batch_size(device):
    """Images a training step takes."""
    return 128 if device.type == "cuda" else 8


def in_turn(*calls):
    """One call after the other."""

    def call():
        for one in calls:
            one()

    return call
