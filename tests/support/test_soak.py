"""A run under random interruptions ends where the undisturbed one does; memory does not grow."""

import ctypes
import gc
import mmap
import random
import signal
import time
from pathlib import Path

import pytest

from runs import SMALL, assert_same_run, file_names, run, started
from support.run import Run
from tiny import Tiny


@pytest.mark.parametrize(
    "steps, interruptions",
    [
        pytest.param(80, 5, marks=pytest.mark.slow),
        pytest.param(2000, 60, marks=pytest.mark.soak),
    ],
)
def test_random_signals_and_kills_change_nothing(steps, interruptions, images, tmp_path):
    flags = [*SMALL, "--data", images, "--metric", "ssim=0.1", "--dropout", 0.1]
    flags += ["--sample-every", 40, "--save-every", 5, "--iterations", steps]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*flags, "--out", one) == 0
    chance, log, seen = random.Random(steps), two / "log.jsonl", 0
    pause = 2 * steps / interruptions / 30  # seconds, so that they lie over the whole run

    def begin():
        how = ["--resume", "--device", "cpu"] if (two / "checkpoint.pt").exists() else flags
        return started(*how, "--out", two, cwd=tmp_path)

    p = begin()
    for _ in range(interruptions):
        # --resume writes the log anew, training adds to it
        while p.poll() is None and not (log.exists() and log.stat().st_mtime_ns > seen):
            time.sleep(0.02)
        time.sleep(chance.uniform(0, pause))
        p.send_signal(chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL]))
        said = p.communicate(timeout=120)[0]
        assert p.returncode in (0, 130, -signal.SIGKILL) and "Traceback" not in said, said
        seen = log.stat().st_mtime_ns
        p = begin()
    said = p.communicate(timeout=600)[0]
    assert p.returncode == 0, said
    assert_same_run(one, two)
    assert file_names(one) == file_names(two)


RUNS = {
    "evaluation": "--model ddpm --eval-every 5 --eval-samples 4 --sample-every 5",
    "importance sampling": "--model ddpm --learn-sigma --objective vlb",
    "dual": "--model dual",
    "casdm with a metric": "--model casdm --metric ssim=0.1",
    "classifier": "--model classifier",
}
WARM_UP = 40  # steps until the allocator has met every size


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize(
    "steps", [pytest.param(100, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.soak)]
)
def test_memory_grows_by_less_than_20_kB_a_step(steps, flags, images, tmp_path, monkeypatch):
    """Resident memory at the run's end, less that after a warm-up; what is free goes back first.

    Curves are left out: matplotlib's own memory takes 40 pictures to settle.
    """
    monkeypatch.setattr("fid.InceptionFeatures", Tiny)
    monkeypatch.setattr("support.run.GRID", 4)
    monkeypatch.setattr("support.pictures.draw_curves", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    taken = {}

    def watched(self, after_step=Run.after_step):
        after_step(self)
        if self.step in (WARM_UP, WARM_UP + steps):
            taken[self.step] = resident()

    monkeypatch.setattr(Run, "after_step", watched)
    small = [*SMALL, "--T", 4, "--batch-size", 2, "--data", images, "--save-every", 5]
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
