"""Many processes do what one does: shares cover everything once, and runs agree to rounding."""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from support import parallel
import train
from data import batch_indices, from_pixels, stream
from losses import training_losses

ROOT = Path(__file__).parent.parent.parent
SMALL = ["--channels", "32", "--res-blocks", "1", "--T", "20", "--batch-size", "8", "--sample-every", "0", "--device", "cpu"]


def script(name, *argv, processes=1, cwd=ROOT):
    launch = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    return subprocess.Popen([*launch, ROOT / name, *map(str, argv)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def done(*how, **where):
    p = script(*how, **where)
    out, err = p.communicate(timeout=240)
    assert p.returncode == 0, err
    return out


@pytest.mark.parametrize("n, batch, size", [(10, 3, 2), (1, 4, 3), (12, 4, 3), (7, 1, 4), (5, 8, 1)])
def test_shares_cover_every_image_once_in_equally_many_rounds(n, batch, size, monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: size)
    shares = []
    for r in range(size):
        monkeypatch.setattr(parallel, "rank", lambda r=r: r)
        shares.append(list(parallel.share(n, batch)))
    assert len({len(s) for s in shares}) == 1
    in_order = [i for turn in zip(*shares) for first, count in turn for i in range(first, first + count)]
    assert in_order == list(range(n))


@pytest.mark.parametrize("parts, size", [(1, 2), (4, 1), (2, 2)])
def test_parts_of_the_batch_give_the_gradient_of_the_undivided_batch(parts, size, tmp_path, monkeypatch):
    """In float64: mean over ranks and accumulated parts of the parts' gradients = gradient of the whole batch."""
    s, _ = train.parse_args([*SMALL, "--accumulate", str(parts)])
    images, *_ = train.load_inputs(s)
    run = train.Run(s, tmp_path, torch.device("cpu"), images, {})
    for p in run.model.double().parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    draw = stream(0, "test", 0)
    x0 = from_pixels(images.pixels[batch_indices(len(images.pixels), 8, 0, 0)]).double()
    t, eps = torch.from_numpy(draw.integers(1, 21, 8)), torch.from_numpy(draw.standard_normal(x0.shape))

    def gradient(slices):
        run.optimizer.zero_grad()
        for mine in slices:
            (training_losses(run.model, x0[mine], t[mine], eps[mine], run.model.schedule)["loss"] / len(slices)).backward()
        return [p.grad.clone() for p in run.weights]

    monkeypatch.setattr(parallel, "size", lambda: size)
    slices = []
    for r in range(size):
        monkeypatch.setattr(parallel, "rank", lambda r=r: r)
        slices += list(run.shares())
    torch.testing.assert_close(gradient(slices), gradient([slice(None)]), rtol=1e-9, atol=1e-12)


@pytest.fixture
def torchrun_of_three(monkeypatch):
    """The environment that torchrun gives one of three processes; no group is joined."""
    for name, value in zip(parallel.TORCHRUN, ("0", "0", "3", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)


def test_a_batch_that_does_not_divide_is_a_usage_error(torchrun_of_three, capsys):
    with pytest.raises(SystemExit) as end:
        train.main([*SMALL, "--accumulate", "2"])
    assert end.value.code == 2 and "multiple of 3 processes x --accumulate 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", parallel.TORCHRUN)
def test_a_part_of_torchruns_environment_is_a_single_process(name, monkeypatch):
    """A batch system sets WORLD_SIZE, or LOCAL_RANK, for purposes of its own."""
    monkeypatch.setenv(name, "3")
    assert parallel.processes() == 1
    assert parallel.begin(torch.device("cpu")) == torch.device("cpu") and parallel.size() == 1
    train.parse_args([*SMALL, "--batch-size", "4"])


@pytest.mark.parametrize("size, start", [(1, "python"), (16, "torchrun --nproc_per_node=8 --")])
def test_a_stopped_run_prints_the_command_that_goes_on(size, start, tmp_path, monkeypatch, capsys):
    """As many processes a node as there were, and a path that is right from here."""
    monkeypatch.setattr(parallel, "size", lambda: size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for here, place in ((tmp_path, "a/b"), (tmp_path / "c", tmp_path / "a/b")):
        here.mkdir(exist_ok=True)
        monkeypatch.chdir(here)
        assert train.conclude(argparse.Namespace(folder=tmp_path / "a/b", step=3), False) == 130
        said = capsys.readouterr().out
        assert said.endswith(f"to go on: {start} train.py --resume --out {place}\n")


PATIENCE = """
import sys, time
from datetime import timedelta
from functools import partial
import torch
import torch.distributed as dist
from support import parallel
dist.init_process_group = partial(dist.init_process_group, timeout=timedelta(seconds=3))
parallel.begin(torch.device("cpu"))
parallel.first(lambda: time.sleep(0 if parallel.rank() else 7))
print(int(parallel.add(torch.ones(1))), "ranks met")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_wait_for_the_first_beyond_the_limit_of_a_collective(tmp_path, monkeypatch):
    """Preparing ImageNet takes longer than NCCL's ten minutes; here, seven seconds of three."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "patience.py").write_text(PATIENCE)
    assert done(tmp_path / "patience.py", processes=2) == "2 ranks met\n"


SLOW_DISK = """
import sys, time
from support import edges, run, train
write = run.write_checkpoint
def write_slowly(*a, **k):
    time.sleep({seconds})
    write(*a, **k)
run.write_checkpoint = write_slowly
sys.exit(edges.run(train.main))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds, all_of_them", [(0, True), (0.1, True), (3, False)])
def test_a_signal_to_every_process_saves_and_says_how_to_go_on(
        seconds, all_of_them, tmp_path, monkeypatch):
    """Each worker gets a second one from torchrun: at once, or when another worker has left.

    all_of_them : torchrun itself is signalled too, or its workers alone.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "slow_disk.py").write_text(SLOW_DISK.format(seconds=seconds))
    p = script(tmp_path / "slow_disk.py", *SMALL, "--iterations", 100_000, "--save-every", 0,
               "--out", tmp_path / "run", processes=2)
    end = time.monotonic() + 120
    while not (tmp_path / "run/log.jsonl").exists():
        assert time.monotonic() < end and p.poll() is None
        time.sleep(0.05)
    workers = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout
    for pid in [*map(int, workers.split()), *[p.pid] * all_of_them]:
        os.kill(pid, signal.SIGTERM)
    said = p.communicate(timeout=60)[0]
    step = train.read_checkpoint(tmp_path / "run/checkpoint.pt")["step"]
    again = "torchrun --nproc_per_node=2 -- train.py --resume --out"
    assert f"stopped at step {step}, which is saved; to go on: {again}" in said


@pytest.mark.slow
def test_two_processes_train_sample_and_score_as_one_does(tmp_path):
    """Losses of ten steps, images and distances; weights only roughly, since Adam makes steps of lr from gradients of rounding's size."""
    results = []
    for n in (1, 2):
        folder = tmp_path / str(n)
        done("train.py", *SMALL, "--model", "dual", "--metric", "ssim=0.1", "--accumulate", 2, "--iterations", 10, "--out", folder, processes=n)
        row = json.loads((folder / "log.jsonl").read_text())
        done("sample.py", tmp_path / "1/checkpoint.pt", "--n", 5, "--steps", 4, "--batch-size", 2, "--out", folder / "s.npz", "--device", "cpu", processes=n)
        score = json.loads(done("fid.py", tmp_path / "1/s.npz", tmp_path / "1/s.npz", "--weights", "random", "--batch-size", 2, "--json", "--device", "cpu",
                                "--save-stats", folder / "stats.npz", processes=n))
        assert score["random_feature_distance"] == 0 and score["n_a"] == 5
        results.append(([row[key] for key in ("eps", "x0", "mu", "ssim", "loss")], np.load(folder / "s.npz")["arr_0"].astype(int), np.load(folder / "stats.npz")["sigma"]))
    one, two = results
    np.testing.assert_allclose(one[0], two[0], rtol=1e-4)
    assert abs(one[1] - two[1]).max() <= 1
    np.testing.assert_allclose(one[2], two[2], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--class-cond", "--label-dropout", "0.3"], ["--model", "ddpm", "--learn-sigma", "--objective", "vlb", "--T", "2"]], ids=["labels", "vlb"])
def test_two_processes_draw_labels_and_important_t_as_one_does(flags, tmp_path):
    """The log of 20 steps, and what the importance sampler remembers; with T = 2 it decides after a few."""
    rows, seen = [], []
    for n in (1, 2):
        done("train.py", *SMALL, *flags, "--accumulate", 2, "--lr", "1e-6", "--iterations", 20, "--out", tmp_path / str(n), processes=n)
        rows.append([json.loads(line)["loss"] for line in (tmp_path / str(n) / "log.jsonl").read_text().splitlines()])
        seen.append(train.read_checkpoint(tmp_path / str(n) / "checkpoint.pt").get("importance", {}).get("seen", torch.zeros(1)))
    np.testing.assert_allclose(*rows, rtol=1e-3)
    torch.testing.assert_close(*seen, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_dies_ends_the_others_and_leaves_a_whole_checkpoint(number, tmp_path):
    """Killed: the others end within a minute. Asked to stop: all stop after the same step and save."""
    p = script("train.py", *SMALL, "--iterations", 100_000, "--save-every", 10, "--out", tmp_path / "run", processes=2)
    end = time.monotonic() + 120
    while not (tmp_path / "run/checkpoint.pt").exists():
        assert time.monotonic() < end and p.poll() is None
        time.sleep(0.1)
    worker = int(subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split()[-1])
    os.kill(worker, number)
    p.communicate(timeout=60)
    assert p.returncode != 0
    state = train.read_checkpoint(tmp_path / "run/checkpoint.pt")
    assert state["step"] % 10 == 0
