"""Files out and in: each fault is injected, ends in one line, and harms nothing there."""

import errno
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from support import files

# ---- files out ----


def test_atomic_leaves_the_old_file_and_no_other_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.atomic(path) as f:
        f.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_atomic_says_where_there_is_no_room(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    full = pytest.raises(OSError, match=r"no room for .*file.* unchanged")
    with full, files.atomic(tmp_path / "file") as f:
        f.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "file").read_bytes() == b"old"


def dead_process():
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_atomic_removes_what_a_dead_process_of_this_host_left_and_nothing_else(tmp_path):
    here, elsewhere = files._host(), "another-host-1"
    stray = tmp_path / f".file.{here}.{dead_process()}.partial"
    kept = [
        tmp_path / f".file.{here}.{os.getppid()}.partial",  # of a living process
        tmp_path / f".file.{elsewhere}.{dead_process()}.partial",  # who knows whether it lives
        tmp_path / ".file.txt",
        tmp_path / f".other.{here}.{dead_process()}.partial",
    ]
    for path in (stray, *kept):
        path.write_bytes(b"x")
    with files.atomic(tmp_path / "file") as f:
        f.write(b"new")
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "file"])


def test_atomic_removes_what_any_host_left_once_a_day_has_passed(tmp_path):
    old = tmp_path / ".file.another-host-1.1.partial"
    old.write_bytes(b"x")
    os.utime(old, (1, 1))
    with files.atomic(tmp_path / "file") as f:
        f.write(b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


# ---- files in ----


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


DAMAGES = {
    "empty": lambda whole: b"",
    "garbage": lambda whole: bytes(range(256)) * 9,
    "HTML": lambda whole: b"<!DOCTYPE html><html><body>404</body></html>",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "text": lambda whole: b"hello",
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@damages
def test_a_bad_torch_file_is_one_line(damage, tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint .*expected") as e:
        files.read_tensors(path, "checkpoint")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_would_run_code_never_runs(new_format, tmp_path):
    evil = {"a": Evil(tmp_path / "marker")}
    torch.save(evil, tmp_path / "evil.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match="more than tensors"):
        files.read_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "marker").exists()


def test_any_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    """Every record of the file carries a CRC-32; 300 seeded flips over the whole file."""
    want = {"a": torch.arange(500.0), "b": {"c": 1}}
    torch.save(want, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    noticed = 0
    for bit in np.random.default_rng(0).integers(0, 8 * len(whole), 300):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            found = files.read_tensors(tmp_path / "flipped.pt")
        except ValueError:
            noticed += 1
        else:
            torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert noticed > 200


@damages
def test_a_bad_npz_is_one_line(damage, tmp_path):
    path = tmp_path / "file.npz"
    np.savez(path, mu=np.zeros(1000))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cannot be read as an .npz") as e:
        files.read_npz(path, ["mu"])
    assert "\n" not in str(e.value)


def test_an_npz_with_pickled_objects_is_refused_and_never_runs(tmp_path):
    np.savez(tmp_path / "evil.npz", mu=np.array([Evil(tmp_path / "marker")], dtype=object))
    with pytest.raises(ValueError, match="cannot be read"):
        files.read_npz(tmp_path / "evil.npz", ["mu"])
    assert not (tmp_path / "marker").exists()


def test_read_npz_gives_the_asked_arrays_that_are_there(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.ones(3), other=np.zeros(2))
    found = files.read_npz(tmp_path / "a.npz", ["mu", "sigma"])
    assert list(found) == ["mu"] and (found["mu"] == 1).all()


@pytest.mark.parametrize("read", [files.read_tensors, lambda path: files.read_npz(path, [])])
def test_a_missing_file_and_a_folder_are_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.* does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder"):
        read(tmp_path)


# ---- downloads ----


def test_a_download_is_kept_only_when_its_digest_is_right(tmp_path):
    """What is there is not fetched again."""
    (tmp_path / "there").write_bytes(b"weights")
    here = tmp_path / "here"
    how = f"file://{tmp_path}/there", 7, "--x", "do without"
    with pytest.raises(OSError, match=r"there .*7 MB.* is missing .*by hand, or do without"):
        files.download(*how, sha256="0" * 8, folder=here)
    assert not here.exists(), "half a file, a wrong one or an empty folder was left"
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    path = files.download(*how, sha256=digest, folder=here)
    assert path.read_bytes() == b"weights"
    (tmp_path / "there").unlink()
    assert files.download(*how, folder=here) == path
