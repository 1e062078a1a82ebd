r"""Files: out whole or not at all, in checked, and weights from elsewhere.

a file appears whole       written beside its place, flushed to the disk, then renamed (`atomic`)
nothing read can run code  torch files open with weights_only=True, npz files without pickles
a flipped bit is noticed   torch files are zip files: every record's CRC-32 is compared
"""

import errno
import glob
import os
import shutil
import socket
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from support.cli import one_line

# ---- files out ----


@contextmanager
def atomic(path):
    """Opens a binary file that takes the place of `path` when it is complete.

    When anything goes wrong `path` stays as it was.
    OSError names the path and what was tried when the disk is full.
    """
    path = Path(path)
    partial = partial_of(path)
    try:
        with open(partial, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException as e:
        written = partial.stat().st_size if partial.exists() else 0
        partial.unlink(missing_ok=True)
        cause = e
        if not isinstance(e, OSError):  # torch.save hides the disk's error behind one of its own
            cause = e.__context__
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(cause, OSError) and cause.errno in full:
            raise OSError(
                f"no room for {path.absolute()} ({os.strerror(cause.errno)} after "
                f"{written / 1e6:.1f} MB); whatever stood there is unchanged; "
                "free some space and go on"
            ) from None
        raise


def check_writable(path):
    """Before the work: the place for the result exists, and nothing stands in its way."""
    if not path.name:
        raise ValueError(f"{path} has no name of its own; expected a new folder or file; name one")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"{path.absolute().parent} does not exist; "
            f"expected the folder for {path.name}; make it first"
        )
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise ValueError(
            f"{path} is a folder that holds something; "
            "expected a new or empty folder, or a file's name; choose another"
        )
    if path.is_file() and not path.suffix:
        raise ValueError(
            f"{path} is a file; "
            "expected a folder's name or one that ends in .png or .npz; choose another"
        )
    if not os.access(path.absolute().parent, os.W_OK):
        raise PermissionError(
            f"{path.absolute().parent} cannot be written to; "
            "expected a writable folder; choose another"
        )


def partial_of(path):
    """Where `path` is written until it is whole: `.NAME.HOST.PID.partial` beside it.

    What killed processes left there is removed: at once where this host can tell that the process
    is gone, else when a day has passed since it was last written to.
    """
    ours = f".{path.name}.{_host()}."
    for stray in path.parent.glob(glob.escape(f".{path.name}.") + "*.partial"):
        pid = stray.name.removeprefix(ours).removesuffix(".partial")
        if (pid.isdigit() and not _alive(int(pid))) or _untouched_for_a_day(stray):
            _remove(stray)
    return path.with_name(f"{ours}{os.getpid()}.partial")


def _remove(stray):
    if stray.is_dir():
        shutil.rmtree(stray, ignore_errors=True)
    else:
        with suppress(OSError):  # gone already, or another user's
            stray.unlink()


def _host():
    # A process number means something on one host; in a container, in its own namespace alone.
    namespace = "/proc/self/ns/pid"
    number = os.stat(namespace).st_ino if os.path.exists(namespace) else 0
    return f"{socket.gethostname()}-{number}"


def _untouched_for_a_day(path):
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > 24 * 60 * 60
    return False  # its writer has just finished


def _alive(pid):
    if os.name == "nt":  # os.kill would end the process there
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
    """What torch.save wrote to `path`, on the CPU.

    Tensors, numbers, strings and their containers, nothing that runs.  ValueError, one line, for a
    file that is truncated, empty, damaged, not torch's, or holds anything else.
    """
    path = existing(path, what)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as records:
                # torch never compresses: another type is a flipped bit
                packed = any(r.compress_type != zipfile.ZIP_STORED for r in records.infolist())
                if packed or records.testzip():
                    raise ValueError("its records are damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a bad file can fail anywhere inside zipfile, pickle and torch
        if isinstance(e, OSError) and e.filename is not None:
            raise
        reason = one_line(e)[:120] or type(e).__name__
        if "weights_only" in str(e) or "Unsupported" in str(e):
            reason = "it holds more than tensors and plain values"
        raise ValueError(
            f"{path} cannot be read as a {what} ({reason}); "
            "expected a whole file that torch.save wrote; get or make it again"
        ) from None


def read_npz(path, names):
    """{name: array} of those of `names` that the .npz file holds.

    ValueError, one line, for a damaged file or pickled objects.
    """
    path = existing(path, ".npz file")
    with readable_npz(path), np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names if name in arrays}


@contextmanager
def readable_npz(path):
    """ValueError, one line, for what goes wrong in the block because of the .npz file at `path`."""
    try:
        yield
    except Exception as e:  # as above: numpy, zipfile and zlib all speak here
        # an OSError without a file's name is a damaged offset's "Invalid argument"
        if isinstance(e, OSError) and e.filename:
            raise
        raise ValueError(
            f"{path} cannot be read as an .npz file ({one_line(e)[:120] or type(e).__name__}); "
            "expected one that numpy.savez wrote; make it again"
        ) from None


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
    """The path of a public file, where torch.hub keeps it or in `folder`; fetched if it is missing.

    sha256 : its digest or the first digits of it; a download that differs is thrown away
    Half a file is never left.  OSError, one line: what is missing, how large, from where, where to
    put it by hand, what to do instead.
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
        torch.hub.download_url_to_file(
            url, str(path), hash_prefix=sha256, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError) as e:  # RuntimeError: the digest differs
        if made:
            with suppress(OSError):
                path.parent.rmdir()
        raise OSError(
            f"{path.name} ({size}) is missing and cannot be fetched from {url} "
            f"({one_line(e)[:160]}); {needed_for} needs it; "
            f"put it at {path.absolute()} by hand, or {instead}"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def save_npz(pixels, path):
    """uint8 [N, H, W, 3] as an images .npz."""
    with atomic(path) as f:
        np.savez(f, arr_0=pixels)
