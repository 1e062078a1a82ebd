"""Many processes do what one does: shares cover everything once, and runs agree to rounding."""

import itertools
import json
import os
import signal

import numpy as np
import pytest
import torch

from diffusion import q_sample
from losses import Batch, objective, training_losses
from runs import (
    ROOT,
    SMALL,
    begun,
    done,
    new_run,
    run,
    settings_of,
    usage_error,
    wait_for,
    workers_of,
)
from support import parallel
from support.checkpoint import read_checkpoint

EIGHT = [*SMALL, "--batch-size", "8"]  # images a step


@pytest.mark.parametrize(
    "n, batch, size", [(10, 3, 2), (1, 4, 3), (12, 4, 3), (7, 1, 4), (5, 8, 1)]
)
def test_shares_cover_every_image_once_in_equally_many_rounds(n, batch, size, monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(list(parallel.share(n, batch)))
    assert len({len(share) for share in shares}) == 1
    in_order = []
    for turn in zip(*shares, strict=True):
        for first, count in turn:
            in_order += range(first, first + count)
    assert in_order == list(range(n))


def gradient(run, drawn, size, parts, monkeypatch):
    """In float64, by so many ranks with so many parts each: their mean.

    drawn : what the step draws for the whole batch
    """
    run.draws = itertools.repeat(drawn)
    monkeypatch.setattr(parallel, "size", lambda: size)
    run.settings["accumulate"] = parts
    run.optimizer.zero_grad()
    for rank in range(size):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        for x0, t, eps, rest in run.draw():
            x0, eps = x0.double(), eps.double()
            batch = Batch(x0, t, eps, q_sample(x0, t, eps, run.schedule), **rest)
            losses = training_losses(run.model, batch, run.metrics)
            run.backward(objective(losses, run.lambdas, batch), losses)
    return [p.grad / size for p in run.weights]


@pytest.mark.parametrize("parts, size", [(1, 2), (4, 1), (2, 2)])
def test_parts_of_the_batch_give_the_gradient_of_the_undivided_batch(
    parts, size, tmp_path, monkeypatch
):
    """In float64: the mean over ranks of the sum over accumulated parts."""
    run = new_run(tmp_path, "--model", "dual", "--batch-size", 4)
    generator = torch.Generator().manual_seed(0)
    for p in run.raw_model.double().parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator))
    drawn = next(run.draws)
    whole = gradient(run, drawn, 1, 1, monkeypatch)
    divided = gradient(run, drawn, size, parts, monkeypatch)
    torch.testing.assert_close(divided, whole, rtol=1e-9, atol=1e-12)


# ---- torchrun's environment ----


@pytest.fixture
def torchrun_of_three(monkeypatch):
    """The environment that torchrun gives one of three processes; no group is joined."""
    for name, value in zip(parallel.TORCHRUN, ("0", "0", "3", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)


def test_a_batch_that_does_not_divide_is_a_usage_error(torchrun_of_three, capsys):
    said = usage_error(capsys, *EIGHT, "--accumulate", 2)
    assert "multiple of 3 processes x --accumulate 2" in said


@pytest.mark.parametrize("name", parallel.TORCHRUN)
def test_a_part_of_torchruns_environment_is_a_single_process(name, monkeypatch):
    """A batch system sets WORLD_SIZE, or LOCAL_RANK, for purposes of its own."""
    monkeypatch.setenv(name, "3")
    assert parallel.processes() == 1
    assert parallel.begin(torch.device("cpu")) == torch.device("cpu")
    assert parallel.size() == 1
    settings_of(*SMALL, "--batch-size", 4)


@pytest.mark.parametrize(
    "device, says",
    [("cuda:1", "--device cuda:1 for 3 processes"), ("cuda", "process 3 on a machine of 2 GPUs")],
)
def test_a_gpu_that_a_process_cannot_have_is_one_line(device, says, torchrun_of_three, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=says):
        parallel.begin(torch.device(device))


# ---- two processes ----

PATIENCE = """
import time
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


@pytest.fixture
def ours(monkeypatch):
    """Scripts from elsewhere find our modules."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.slow
def test_ranks_wait_for_the_first_beyond_the_limit_of_a_collective(tmp_path, ours):
    """Preparing ImageNet takes longer than NCCL's ten minutes; here, seven seconds of three."""
    (tmp_path / "patience.py").write_text(PATIENCE)
    assert done(tmp_path / "patience.py", processes=2) == "2 ranks met\n"


SLOW_DISK = """
import sys, time
import train
from support import cli, run
write = run.write_checkpoint
def write_slowly(*args, **how):
    time.sleep({seconds})
    write(*args, **how)
run.write_checkpoint = write_slowly
sys.exit(cli.run(train.main))
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds, all_of_them", [(0, True), (0.1, True), (3, False)])
def test_a_signal_to_every_process_saves_and_says_how_to_go_on(
    seconds, all_of_them, tmp_path, ours
):
    """Each worker gets a second one from torchrun: at once, or when another worker has left.

    all_of_them : torchrun itself is signalled too, or its workers alone.
    """
    (tmp_path / "slow_disk.py").write_text(SLOW_DISK.format(seconds=seconds))
    flags = [*EIGHT, "--iterations", 100_000, "--save-every", 0, "--out", tmp_path / "run"]
    p = begun(tmp_path / "slow_disk.py", *flags, processes=2)
    wait_for(tmp_path / "run/log.jsonl", p)
    signalled = workers_of(p)
    if all_of_them:
        signalled.append(p.pid)
    for pid in signalled:
        os.kill(pid, signal.SIGTERM)
    said = p.communicate(timeout=60)[0]
    step = read_checkpoint(tmp_path / "run/checkpoint.pt")["step"]
    again = "torchrun --nproc_per_node=2 -- train.py --resume --out"
    assert f"stopped at step {step}, which is saved; to go on: {again}" in said


def train_with(processes, *flags):
    """train.py, here where it is alone, and under torchrun where it is not."""
    if processes == 1:
        assert run(*flags) == 0
    else:
        done("train.py", *flags, processes=processes)


@pytest.mark.slow
def test_two_processes_train_sample_and_score_as_one_does(tmp_path):
    """Losses of ten steps, images and distances.

    Weights agree only roughly, since Adam makes steps of lr from gradients of rounding's size.
    """
    losses, pictures, sigmas = [], [], []
    cpu = ["--device", "cpu"]
    for n in (1, 2):
        folder = tmp_path / str(n)
        flags = [*EIGHT, "--model", "dual", "--metric", "ssim=0.1", "--accumulate", 2]
        train_with(n, *flags, "--iterations", 10, "--out", folder)
        row = json.loads((folder / "log.jsonl").read_text())
        losses.append([row[key] for key in ("eps", "x0", "mu", "ssim", "loss")])

        images, of_one = folder / "s.npz", tmp_path / "1/s.npz"
        flags = ["--n", 5, "--steps", 4, "--batch-size", 2, "--out", images, *cpu]
        done("sample.py", tmp_path / "1/checkpoint.pt", *flags, processes=n)
        pictures.append(np.load(images)["arr_0"].astype(int))

        flags = ["--weights", "random", "--batch-size", 2, "--json", *cpu]
        flags += ["--save-stats", folder / "stats.npz"]
        score = json.loads(done("fid.py", of_one, of_one, *flags, processes=n))
        assert score["random_feature_distance"] == 0 and score["n_a"] == 5
        sigmas.append(np.load(folder / "stats.npz")["sigma"])
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert abs(pictures[0] - pictures[1]).max() <= 1
    np.testing.assert_allclose(*sigmas, rtol=1e-3, atol=1e-6)


VLB = ["--model", "ddpm", "--learn-sigma", "--objective", "vlb", "--T", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["--class-cond", "--label-dropout", "0.3"], VLB], ids=["labels", "vlb"]
)
def test_two_processes_draw_labels_and_important_t_as_one_does(flags, tmp_path):
    """The log of 20 steps, and what the importance sampler remembers.

    With T = 2 it decides after a few.
    """
    losses, seen = [], []
    for n in (1, 2):
        folder = tmp_path / str(n)
        small = [*EIGHT, *flags, "--accumulate", 2, "--lr", "1e-6", "--iterations", 20]
        train_with(n, *small, "--out", folder)
        lines = (folder / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        state = read_checkpoint(folder / "checkpoint.pt")
        assert ("importance" in state) == (flags is VLB)
        if flags is VLB:
            seen.append(state["importance"]["seen"])
    np.testing.assert_allclose(*losses, rtol=1e-3)
    if seen:
        torch.testing.assert_close(*seen, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_dies_ends_the_others_and_leaves_a_whole_checkpoint(number, tmp_path):
    """Killed: the others end within a minute. Asked to stop: all stop after one step and save."""
    flags = [*EIGHT, "--iterations", 100_000, "--save-every", 10, "--out", tmp_path / "run"]
    p = begun("train.py", *flags, processes=2)
    wait_for(tmp_path / "run/checkpoint.pt", p)
    os.kill(workers_of(p)[-1], number)
    p.communicate(timeout=60)
    assert p.returncode != 0
    assert read_checkpoint(tmp_path / "run/checkpoint.pt")["step"] % 10 == 0
