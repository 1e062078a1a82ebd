r"""Command lines: flags, exit codes, signals, progress.

an error is one line       error: what was got; what was expected; what to do
exit codes                 0 done, 1 a run-time error, 2 a usage error, 130 interrupted
"""

import argparse
import ctypes
import math
import os
import signal
import sys
import time
import warnings
from contextlib import suppress

import torch
import torch.distributed as dist
from tqdm import tqdm

from support import parallel


class Parser(argparse.ArgumentParser):
    """argparse with every default shown, no abbreviations, and one-line errors (exit code 2)."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message):
        print(f"error: {one_line(message)}; see --help", file=sys.stderr)
        raise SystemExit(2)


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if is_unset(action.default) else super()._get_help_string(action)


def is_unset(value):
    """Whether a setting says nothing: None, False or empty.  0 says something."""
    return value is None or value is False or value in ({}, [])


def flag_of(key):
    """A setting's flag: --metric-size of metric_size."""
    return f"--{key.replace('_', '-')}"


def whole(low, high=None):
    """An argparse type: an integer in low..high."""

    def parse(text):
        """The whole number that `text` says, in range; ArgumentTypeError for others."""
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(
                f"got {text!r}; expected a whole number {_range(low, high)}"
            )
        return value

    return parse


def real(low, high=None, above=False):
    """An argparse type: a finite number in low..high, or greater than low if `above`."""

    def parse(text):
        """The finite number that `text` says, in range; ArgumentTypeError for others."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        too_low = value < low or (above and value == low)
        too_high = high is not None and value > high
        if not math.isfinite(value) or too_low or too_high:
            wanted = f"above {low}" if above else _range(low, high)
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a number {wanted}")
        return value

    return parse


def device(text):
    """An argparse type: a device's name; `auto` is a GPU where there is one.

    Whether it is usable is found out at the start.
    """
    if text == "auto":
        return text
    with suppress(RuntimeError):
        found = torch.device(text)
        if found.type in ("cpu", "cuda", "mps"):
            return str(found)
    raise argparse.ArgumentTypeError(f"got {text!r}; expected auto, cpu, cuda, cuda:N or mps")


def open_device(name):
    """The torch.device behind --device; ValueError where it cannot be used."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except Exception as e:  # each backend has its own way of saying that it is not there
        raise ValueError(
            f"--device {name} cannot be used here ({one_line(e)}); "
            "expected a device that torch sees; use --device cpu"
        ) from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # also for what asks for "cuda" alone
    return device


def run(main, argv=None):
    """Calls main(argv) and turns its end into an exit code; SIGTERM ends it as Ctrl-C does.

    A bug of ours keeps its traceback.
    """
    former = signal.signal(signal.SIGTERM, _interrupt_once)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as e:
        print(f"error: {one_line(e)}", file=sys.stderr)
    except (RuntimeError, MemoryError) as e:
        if _out_of_memory(e):
            print(
                f"error: out of memory ({one_line(e)[:200]}); expected the model and a batch to "
                "fit; use a smaller --batch-size or a smaller model",
                file=sys.stderr,
            )
        elif parallel.lost_another(e):
            print(
                f"error: rank {parallel.rank()} lost another process of this run; "
                "expected all to live; see that one's message, then --resume",
                file=sys.stderr,
            )
        else:
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        signal.signal(signal.SIGTERM, former)
    return 1


def progress(total, desc, unit, initial=0):
    """A bar on stderr; none in a file, and none of the other ranks."""
    hidden = True if parallel.rank() else None  # None: where stderr is no terminal
    return tqdm(total=total, initial=initial, desc=desc, unit=unit, file=sys.stderr, disable=hidden)


def keep_memory():
    """Has glibc keep what is freed for the next step: 3 % of a large step on a CPU.

    Otherwise it is handed back page by page.  Elsewhere than on glibc this does nothing.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap's end is never given back


# ---- signals ----


class Stopped(Exception):
    """A signal asks for the end of whatever can be left undone."""


class Stop:
    """The first SIGINT or SIGTERM sets `asked`; one a second later or more leaves at once.

    One that follows sooner is an echo of the first: a batch system signals every process, and
    torchrun then signals its own once more.  Leaving at once harms no file: each is written whole
    or not at all.  As a context it gives the signals back at its end.
    """

    def __init__(self):
        self.asked, self.since = False, math.inf

    def __enter__(self):
        self.former = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for s, handler in self.former.items():
            signal.signal(s, handler)

    def __call__(self, signum, frame):
        now = time.monotonic()
        if now - self.since >= 1:
            os._exit(130)
        self.asked, self.since = True, min(self.since, now)

    def check(self, *_):
        """Raises Stopped, once asked; called between the parts of work that can be left undone."""
        if self.asked:
            raise Stopped


# ---- helpers ----


def one_line(error):
    """The text of an error, or any other, on one line."""
    return " ".join(str(error).split())


def _range(low, high):
    return f">= {low}" if high is None else f"from {low} to {high}"


def _interrupt_once(signum, frame):
    signal.signal(signum, signal.SIG_IGN)  # its echo must not interrupt the last line
    raise KeyboardInterrupt


def _out_of_memory(e):
    # numpy and CUDA have a class for it, torch's allocators for the CPU and for MPS only words
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("DefaultCPUAllocator", "MPS backend out of memory", "Invalid buffer size")
    return any(word in str(e) for word in words)
