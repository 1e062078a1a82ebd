r"""Where the project meets the world: command lines, exit codes, files, weights from elsewhere.

Everything that comes in is checked here once, and everything that goes out is written whole or not at all:

    an error is one line       error: what was got; what was expected; what to do
    exit codes                 0 done, 1 a run-time error, 2 a usage error, 130 interrupted
    a file appears whole       written beside its place, flushed to the disk, then renamed (`atomic`)
    nothing read can run code  torch files open with weights_only=True, npz files without pickles
    a flipped bit is noticed   torch files are zip files: every record's CRC-32 is compared (`read_tensors`)

What is inside a checkpoint is `sample.py`'s business, what is inside an image `data.py`'s.
"""
import argparse
import ctypes
import errno
import math
import os
import signal
import socket
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


# ---- command lines ----

class Parser(argparse.ArgumentParser):
    """argparse with every default shown, no abbreviations, and one-line errors (exit code 2)."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=_Formatter, allow_abbrev=False)

    def error(self, message):
        print("error: " + " ".join(message.split()) + "; see --help", file=sys.stderr)
        raise SystemExit(2)


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def whole(low, high=None):
    """An argparse type: an integer in low..high."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number {_range(low, high)}")
        return value
    return parse


def real(low, high=None, above=False):
    """An argparse type: a finite number, low <= number (low < number if `above`) and number <= high."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low or (above and value == low) or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a number {'above ' + str(low) if above else _range(low, high)}")
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
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except Exception as e:      # each backend has its own way of saying that it is not there
        raise ValueError(f"--device {name} cannot be used here ({_line(e)}); expected a device that torch sees; use --device cpu") from None
    return torch.device(name)


def run(main, argv=None):
    """Calls main(argv) and turns its end into an exit code; SIGTERM ends it as Ctrl-C does. A bug of ours keeps its traceback."""
    former = signal.signal(signal.SIGTERM, _interrupt_once)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError) as e:
        print(f"error: {_line(e)}", file=sys.stderr)
    except (RuntimeError, MemoryError) as e:
        if _out_of_memory(e):
            print(f"error: out of memory ({_line(e)[:200]}); expected the model and a batch to "
                  "fit; use a smaller --batch-size or a smaller model", file=sys.stderr)
        elif dist.is_initialized() and any(w in str(e) for w in ("peer", "onnection", "NCCL")):
            print(f"error: rank {dist.get_rank()} lost another process of this run; expected all "
                  "to live; see that one's message, then --resume", file=sys.stderr)
        else:
            raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        signal.signal(signal.SIGTERM, former)
    return 1


def _out_of_memory(e):
    # numpy and CUDA have a class for it, torch's allocators for the CPU and for MPS only words
    words = ("DefaultCPUAllocator", "MPS backend out of memory", "Invalid buffer size")
    known = isinstance(e, (MemoryError, torch.OutOfMemoryError))
    return known or any(word in str(e) for word in words)


def keep_memory():
    """Has glibc keep what is freed for the next step instead of handing it back page by page: 3 % of a large step on a CPU.

    Elsewhere than on glibc it does nothing.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)         # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, -1)        # M_TRIM_THRESHOLD: the heap's end is never given back


# ---- signals ----

class Stopped(Exception):
    """A signal asks for the end of whatever can be left undone."""


def _interrupt_once(signum, frame):
    signal.signal(signum, signal.SIG_IGN)       # its echo must not interrupt the last line
    raise KeyboardInterrupt


class Stop:
    """The first SIGINT or SIGTERM sets `asked`; one a second later or more leaves at once.

    One that follows sooner is an echo of the first: a batch system signals every process, and
    torchrun then signals its own once more.  Leaving at once harms no file: each is written whole
    or not at all.
    """

    def __init__(self):
        self.asked, self.since = False, math.inf
        self.former = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}

    def __call__(self, signum, frame):
        now = time.monotonic()
        if now - self.since >= 1:
            os._exit(130)
        self.asked, self.since = True, min(self.since, now)

    def check(self, *_):
        """Raises Stopped, once asked; called between the parts of work that can be left undone."""
        if self.asked:
            raise Stopped

    def restore(self):
        for s, handler in self.former.items():
            signal.signal(s, handler)


# ---- files out ----

@contextmanager
def atomic(path):
    """Opens a binary file that takes the place of `path` when it is complete, and leaves `path` as it was when anything goes wrong.

    The half-written file is `.NAME.PID.partial` beside it; what a killed process left there is removed.
    OSError names the path and what was tried when the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    _remove_strays(path)
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as e:
        written = partial.stat().st_size if partial.exists() else 0
        partial.unlink(missing_ok=True)
        cause = e if isinstance(e, OSError) else e.__context__      # torch.save hides the disk's error behind one of its own
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"no room for {path.absolute()} ({os.strerror(cause.errno)} after {written / 1e6:.1f} MB); "
                          "whatever stood there is unchanged; free some space and go on") from None
        raise


def check_writable(path):
    """Before the work: the place for the result exists and is not taken by something that must not be mixed with it."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.absolute().parent} does not exist; expected the folder for {path.name}; make it first")
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise ValueError(f"{path} is a folder that holds something; expected a new or empty folder, or a file's name; choose another")
    if path.is_file() and not path.suffix:
        raise ValueError(f"{path} is a file; expected a folder's name or one that ends in .png or .npz; choose another")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PermissionError(f"{path.absolute().parent} cannot be written to; expected a writable folder; choose another")


def _remove_strays(path):
    for stray in path.parent.glob(f".{path.name}.*.partial"):
        if not _alive(int(pid) if (pid := stray.suffixes[-2][1:]).isdigit() else 0):
            stray.unlink(missing_ok=True)


def _alive(pid):
    if os.name == "nt":     # os.kill would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid > 0


# ---- files in ----

def read_tensors(path, what="torch file"):
    """What torch.save wrote to `path`, on the CPU: tensors, numbers, strings and their containers, nothing that runs.

    ValueError, one line, for a file that is truncated, empty, damaged, not torch's, or holds anything else.
    """
    path = existing(path, what)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as records:
                if any(r.compress_type != zipfile.ZIP_STORED for r in records.infolist()) or records.testzip():
                    raise ValueError("its checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:      # a bad file can fail anywhere inside zipfile, pickle and torch, each with an exception of its own
        if isinstance(e, OSError) and e.filename is not None:
            raise
        reason = "it holds more than tensors and plain values" if "weights_only" in str(e) or "Unsupported" in str(e) else _line(e)[:120] or type(e).__name__
        raise ValueError(f"{path} cannot be read as a {what} ({reason}); expected a whole file that torch.save wrote; get or make it again") from None


def read_npz(path, names):
    """Those of the arrays `names` that the `.npz` file holds, as a dict. ValueError, one line, for a damaged file or pickled objects."""
    with readable_npz(path := existing(path, ".npz file")), np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names if name in arrays}


@contextmanager
def readable_npz(path):
    """ValueError, one line, for whatever goes wrong in the block because the `.npz` file at `path` is damaged or holds pickled objects."""
    try:
        yield
    except Exception as e:      # as above: numpy, zipfile and zlib all speak here
        if isinstance(e, OSError) and e.filename:       # without a name it is a damaged offset's "Invalid argument"
            raise
        raise ValueError(f"{path} cannot be read as an .npz file ({_line(e)[:120] or type(e).__name__}); expected one that numpy.savez wrote; make it again") from None


def existing(path, what):
    """`path` as a Path; FileNotFoundError where no such file is."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a {what}; name the file itself")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a {what}; check the path")
    return path


# ---- weights from elsewhere ----

def download(url, megabytes, needed_for, instead, sha256=None, folder=None):
    """The path of a public file: where torch.hub keeps it, or in `folder`; fetched first where it is missing.

    sha256: its digest or the first digits of it; a download that differs is thrown away. Half a file is never left.
    OSError, one line: what is missing, how large, from where, where to put it by hand, what to do instead.
    """
    path = Path(folder or Path(torch.hub.get_dir()) / "checkpoints") / url.rsplit("/", 1)[1]
    if path.exists():
        return path
    size = f"{megabytes:.3g} MB"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} ({size}) to {path.absolute()}", file=sys.stderr)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as e:     # RuntimeError: the digest differs
        if made:
            with suppress(OSError):
                path.parent.rmdir()
        raise OSError(f"{path.name} ({size}) is missing and cannot be fetched from {url} ({_line(e)[:160]}); {needed_for} needs it; "
                      f"put it at {path.absolute()} by hand, or {instead}") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path


# ---- small words ----

def _line(error):
    return " ".join(str(error).split())


def _range(low, high):
    return f">= {low}" if high is None else f"from {low} to {high}"
