"""A run under random interruptions ends where the undisturbed one does, bit for bit, and memory does not grow."""
import ctypes
import gc
import mmap
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

import train
from test_train import SMALL, Features, assert_same_run, images, run, started  # noqa: F401   (images is a fixture)


@pytest.mark.parametrize("steps, interruptions", [pytest.param(80, 5, marks=pytest.mark.slow), pytest.param(2000, 60, marks=pytest.mark.soak)])
def test_random_signals_and_kills_change_nothing(steps, interruptions, images, tmp_path):  # noqa: F811
    flags = [*SMALL, "--data", images, "--metric", "ssim=0.1", "--dropout", "0.1", "--sample-every", 40, "--save-every", 5, "--iterations", steps]
    assert run(*flags, "--out", tmp_path / "one") == 0
    chance, log = random.Random(steps), tmp_path / "two/log.jsonl"
    p, seen = started(*flags, "--out", tmp_path / "two", cwd=tmp_path), 0
    for _ in range(interruptions):
        while p.poll() is None and not (log.exists() and log.stat().st_mtime_ns > seen):        # --resume writes it anew, training adds to it
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 2 * steps / interruptions / 30))       # so that the interruptions lie over the whole run
        p.send_signal(chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL]))
        said = p.communicate(timeout=120)[0]
        assert p.returncode in (0, 130, -signal.SIGKILL) and "Traceback" not in said, said
        seen = log.stat().st_mtime_ns
        p = started(*(["--resume"] if (tmp_path / "two/checkpoint.pt").exists() else flags), "--out", tmp_path / "two", "--device", "cpu", cwd=tmp_path)
    said = p.communicate(timeout=600)[0]
    assert p.returncode == 0, said
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == sorted(f.name for f in (tmp_path / "two").iterdir())


RUNS = {
    "evaluation": "--model ddpm --eval-every 5 --eval-samples 4 --sample-every 5",
    "importance sampling": "--model ddpm --learn-sigma --objective vlb",
    "dual": "--model dual",
    "casdm with a metric": "--model casdm --metric ssim=0.1",
    "classifier": "--model classifier",
}
WARM_UP = 40        # steps until the allocator has met every size


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize(
    "steps", [pytest.param(100, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.soak)]
)
def test_memory_grows_by_less_than_20_kB_a_step(steps, flags, labelled, tmp_path, monkeypatch):
    """Resident memory at the run's end, less that after a warm-up; what is free goes back first."""
    monkeypatch.setattr(train.fid, "InceptionFeatures", Features)
    monkeypatch.setattr("support.run.GRID", 4)
    monkeypatch.setattr("support.run.draw_curves", lambda *_: None)     # matplotlib's own takes 40 pictures
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    taken, after_step = {}, train.Run.after_step

    def watched(self, bar, stop):
        after_step(self, bar, stop)
        if self.step in (WARM_UP, WARM_UP + steps):
            taken[self.step] = resident()
    monkeypatch.setattr(train.Run, "after_step", watched)
    small = [*SMALL, "--T", 4, "--batch-size", 2, "--data", labelled, "--save-every", 5]
    out = ["--iterations", WARM_UP + steps, "--out", tmp_path / "run"]
    assert run(*small, *flags.split(), *out) == 0
    growth = (taken[WARM_UP + steps] - taken[WARM_UP]) / steps
    assert growth < 20_000, f"{growth:.0f} bytes a step"


def resident():
    """Bytes in use: of this process, after glibc has handed back what earlier work left free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


@pytest.fixture
def labelled(tmp_path):
    """Ten 16 x 16 images of three classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "labelled.npz", arr_0=pixels, arr_1=np.arange(10) % 3)
    return tmp_path / "labelled.npz"
