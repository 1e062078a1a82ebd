"""Files in and out, and command lines: each fault is injected and must end in one line, with what stood there unharmed."""
import argparse
import errno
import hashlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from support import edges


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-0.1", "x", "", "1e999"])
def test_real_refuses_what_is_no_number_in_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number"):
        edges.real(0)(text)


def test_real_can_leave_its_lower_end_out():
    assert edges.real(0)("0") == 0 and edges.real(0, above=True)("1e-4") == 1e-4
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        edges.real(0, above=True)("0")


@pytest.mark.parametrize("text", ["0", "11", "2.0", "x", "1e3"])
def test_whole_refuses_what_is_no_whole_number_in_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 10"):
        edges.whole(1, 10)(text)


@pytest.mark.parametrize("error, code", [(None, 0), (ValueError("a\nb"), 1), (FileNotFoundError("a b"), 1), (ArithmeticError("a b"), 1), (KeyboardInterrupt(), 130)])
def test_run_turns_every_end_into_its_exit_code_and_one_line(error, code, capsys):
    def main(argv):
        if error:
            raise error
    assert edges.run(main) == code
    said = capsys.readouterr().err
    assert said == {0: "", 1: "error: a b\n", 130: "interrupted\n"}[code]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(TypeError):
        edges.run(lambda argv: None + 1)


# ---- signals ----

@pytest.fixture
def stop():
    """A Stop in place of the usual handlers."""
    stop = edges.Stop()
    yield stop
    stop.restore()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds, left", [(0.9, []), (1.1, [130])])
def test_a_second_signal_leaves_at_once_unless_it_echoes_the_first(
        first, second, seconds, left, stop, monkeypatch):
    """torchrun signals its processes once more after a batch system has signalled them all."""
    codes, clock = [], [100.0]
    monkeypatch.setattr(edges.os, "_exit", codes.append)
    monkeypatch.setattr(edges.time, "monotonic", lambda: clock[0])
    signal.raise_signal(first)
    assert stop.asked and not codes
    signal.raise_signal(second)
    clock[0] += seconds
    signal.raise_signal(second)
    assert stop.asked and codes == left


def test_an_echo_of_sigterm_does_not_disturb_the_last_line(monkeypatch):
    """Before there is a Stop: the second SIGTERM comes while `interrupted` is printed."""
    monkeypatch.setattr("builtins.print", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert edges.run(lambda argv: signal.raise_signal(signal.SIGTERM)) == 130


# ---- files out ----

def test_atomic_leaves_the_old_file_and_no_other_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with edges.atomic(path) as f:
            f.write(b"new")
            raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_atomic_says_where_there_is_no_room(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="no room for .*file.* unchanged"):
        with edges.atomic(tmp_path / "file") as f:
            f.write(b"new")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_atomic_removes_what_a_dead_process_left_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stray, alive, other = (tmp_path / name for name in (f".file.{dead.pid}.partial", f".file.{os.getppid()}.partial", ".file.txt"))
    for path in (stray, alive, other):
        path.write_bytes(b"x")
    with edges.atomic(tmp_path / "file") as f:
        f.write(b"new")
    assert sorted(tmp_path.iterdir()) == sorted([alive, other, tmp_path / "file"])


# ---- files in ----

class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


BAD_FILES = {
    "empty": lambda whole, _: b"",
    "garbage": lambda whole, _: bytes(range(256)) * 9,
    "HTML": lambda whole, _: b"<!DOCTYPE html><html><body>404</body></html>",
    "truncated": lambda whole, _: whole[:len(whole) // 2],
    "text": lambda whole, _: b"hello",
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_torch_file_is_one_line(kind, tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(BAD_FILES[kind](path.read_bytes(), None))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint .*expected") as e:
        edges.read_tensors(path, "checkpoint")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_would_run_code_never_runs(new_format, tmp_path):
    torch.save({"a": Evil(tmp_path / "marker")}, tmp_path / "evil.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match="more than tensors"):
        edges.read_tensors(tmp_path / "evil.pt")
    assert not (tmp_path / "marker").exists()


def test_any_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    """Every record of the file carries a CRC-32; 300 seeded flips over the whole file."""
    want = {"a": torch.arange(500.0), "b": {"c": 1}}
    torch.save(want, tmp_path / "whole.pt")
    raw, rng, noticed = (tmp_path / "whole.pt").read_bytes(), np.random.default_rng(0), 0
    for bit in rng.integers(0, 8 * len(raw), 300):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            torch.testing.assert_close(edges.read_tensors(tmp_path / "flipped.pt"), want, rtol=0, atol=0)
        except ValueError:
            noticed += 1
    assert noticed > 200


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_npz_is_one_line(kind, tmp_path):
    path = tmp_path / "file.npz"
    np.savez(path, mu=np.zeros(1000))
    path.write_bytes(BAD_FILES[kind](path.read_bytes(), None))
    with pytest.raises(ValueError, match="cannot be read as an .npz") as e:
        edges.read_npz(path, ["mu"])
    assert "\n" not in str(e.value)


def test_an_npz_with_pickled_objects_is_refused_and_never_runs(tmp_path):
    np.savez(tmp_path / "evil.npz", mu=np.array([Evil(tmp_path / "marker")], dtype=object))
    with pytest.raises(ValueError, match="cannot be read"):
        edges.read_npz(tmp_path / "evil.npz", ["mu"])
    assert not (tmp_path / "marker").exists()


def test_read_npz_gives_the_asked_arrays_that_are_there(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.ones(3), other=np.zeros(2))
    found = edges.read_npz(tmp_path / "a.npz", ["mu", "sigma"])
    assert list(found) == ["mu"] and (found["mu"] == 1).all()


@pytest.mark.parametrize("read", [edges.read_tensors, lambda path: edges.read_npz(path, [])])
def test_a_missing_file_and_a_folder_are_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.* does not exist"):
        read(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder"):
        read(tmp_path)


# ---- downloads ----

def test_a_download_is_kept_only_when_its_digest_is_right(tmp_path):
    (tmp_path / "there").write_bytes(b"weights")
    url, here = f"file://{tmp_path}/there", tmp_path / "here"
    with pytest.raises(OSError, match="there .*7 MB.* is missing .*by hand, or do without"):
        edges.download(url, 7, "--x", "do without", sha256="0" * 8, folder=here)
    assert not here.exists(), "half a file, a wrong one or an empty folder was left"
    path = edges.download(url, 7, "--x", "do without", sha256=hashlib.sha256(b"weights").hexdigest()[:8], folder=here)
    assert path.read_bytes() == b"weights"
    (tmp_path / "there").unlink()
    assert edges.download(url, 7, "--x", "do without", folder=here) == path, "what is there is not fetched again"


def test_a_device_that_is_not_there_is_said():
    with pytest.raises(ValueError, match="--device cuda:99 cannot be used"):
        edges.open_device("cuda:99")


@pytest.mark.parametrize("name", ["meta", "xla", "vulkan", "xpu:0", "tpu", "cuda:x", "", "auto:1"])
def test_a_device_that_is_no_cpu_cuda_or_mps_is_a_usage_error(name):
    with pytest.raises(argparse.ArgumentTypeError, match="expected auto, cpu, cuda, cuda:N or mps"):
        edges.device(name)


@pytest.mark.parametrize("ask", [lambda: np.empty(2 ** 57), lambda: torch.empty(2 ** 57)])
def test_more_memory_than_there_is_ends_in_one_line(ask, capsys):
    """numpy's MemoryError and torch's RuntimeError alike; any other RuntimeError is a bug of ours."""
    assert edges.run(lambda argv: ask()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory (") and error.count("\n") == 1
    with pytest.raises(RuntimeError):
        edges.run(lambda argv: torch.zeros(2) + torch.zeros(3))
