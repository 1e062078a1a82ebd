"""A run under random interruptions ends where the undisturbed one does, bit for bit, and memory does not grow."""
import random
import signal
import time

import pytest
import torch

import train
from test_train import SMALL, assert_same_run, images, run, started  # noqa: F401   (images is a fixture)


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


@pytest.mark.parametrize("steps", [pytest.param(100, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.soak)])
def test_memory_does_not_grow_after_warm_up(steps, images, tmp_path, monkeypatch):  # noqa: F811
    """Resident memory over the last three quarters of a run that also saves."""
    resident, after_step = [], train.Run.after_step

    def watched(self, bar, stop):
        after_step(self, bar, stop)
        with open("/proc/self/statm") as f:
            resident.append(int(f.read().split()[1]) * 4096)
    monkeypatch.setattr(train.Run, "after_step", watched)
    assert run(*SMALL, "--data", images, "--save-every", 5, "--iterations", steps, "--out", tmp_path / "run") == 0
    quarters = torch.tensor(resident, dtype=torch.float64).view(4, -1).amax(1)
    assert quarters[3] - quarters[0] < 64e6, quarters
