"""A run: what lives through it, what its log says, best.pt, how it samples and compiles."""

import types
import weakref

import pytest
import torch

import train
from runs import SMALL, new_run, run
from support import cli, parallel
from support import run as run_module
from support.checkpoint import read_checkpoint
from support.pictures import read_log
from support.run import Run, batch_size_of_samples, compile_mode, evaluation_due
from tiny import Tiny

# ---- memory ----


def tensors(value):
    """Every tensor inside tensors, modules, optimizers, and their containers."""
    if isinstance(value, torch.Tensor):
        yield value
        yield from tensors(value.grad) if value.is_leaf else ()
    elif isinstance(value, torch.nn.Module):
        yield from tensors([*value.parameters(), *value.buffers()])
    elif isinstance(value, torch.optim.Optimizer):
        yield from tensors([value.param_groups, *value.state.values()])
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from tensors(vars(value))


@pytest.mark.parametrize(
    "flags",
    [
        "--model casdm --metric ssim=0.1",
        "--model ddpm --learn-sigma --objective vlb",
        "--model classifier",
    ],
)
def test_nothing_that_lives_through_a_run_carries_a_graph(flags, tmp_path):
    """After two steps only the trained weights want a gradient, and no operation made them."""
    r = new_run(tmp_path, "--T", 4, *flags.split(), "--iterations", 2)
    train.train(r)
    weights = {id(p) for p in r.weights}
    assert len(weights) == len(r.averages) > 0
    found = dict(vars(r)) | {"guard's": vars(r.guard)}
    for name, value in found.items():
        for tensor in tensors(value):
            assert tensor.grad_fn is None, f"{name} carries a graph"
            wants = tensor.requires_grad and id(tensor) not in weights
            assert not wants, f"{name} wants a gradient"


def test_a_resumed_run_lets_the_checkpoint_go(begun_run, monkeypatch):
    """No tensor of the checkpoint's weights and averages is alive after the first step."""
    opened, alive = [], []

    def reopen(*how, reopen=train.reopen):
        state = reopen(*how)
        kept = [*state["model"].values(), *state["ema"].values()]
        opened.extend(weakref.ref(tensor) for tensor in kept)
        return state

    def after_step(self, after_step=Run.after_step):
        after_step(self)
        alive.append(sum(tensor() is not None for tensor in opened))

    monkeypatch.setattr(train, "reopen", reopen)
    monkeypatch.setattr(Run, "after_step", after_step)
    go_on = ["--resume", "--out", begun_run, "--device", "cpu"]
    assert run(*go_on, "--iterations", 2) == 0
    assert opened and alive == [0]


# ---- when ----


@pytest.mark.parametrize(
    "eval_every, eval_at, due",
    [(0, [], []), (3, [], [3, 6, 7]), (0, [2, 5], [2, 5]), (3, [2, 6], [2, 3, 6, 7])],
)
def test_evaluations_are_every_so_many_steps_and_at_the_steps_asked_for(eval_every, eval_at, due):
    """--eval-every counts the last step too; --eval-at is of its steps alone, as the paper's."""
    settings = {"eval_every": eval_every, "eval_at": eval_at, "iterations": 7}
    assert [step for step in range(8) if evaluation_due(settings, step)] == due


# ---- best.pt ----


@pytest.mark.slow
def test_the_best_has_the_least_fid_of_equally_many_samples(tmp_path, monkeypatch):
    """FID falls with n: 3 of 8 samples says nothing about 5 of 4, which begins anew."""
    monkeypatch.setattr("fid.InceptionFeatures", Tiny)
    monkeypatch.setattr(Run, "draw_grid", lambda self: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    distances = iter([3.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr("fid.compare", lambda *_: {"sfid": 1.0, "fid": next(distances)})
    out = ["--out", tmp_path / "run", "--device", "cpu"]
    flags = [*SMALL, "--T", 4, "--model", "ddpm", "--eval-every", 1, *out]

    def best():
        return read_checkpoint(tmp_path / "run/best.pt")["step"]

    assert run(*flags, "--iterations", 1, "--eval-samples", 8) == 0
    assert best() == 1
    for step, expected in ((2, 2), (3, 3), (4, 3)):
        assert run("--resume", *out, "--iterations", step, "--eval-samples", 4) == 0
        assert best() == expected
    scored = [row for row in read_log(tmp_path / "run") if "fid" in row]
    assert [row["n"] for row in scored] == [8, 4, 4, 4]


@pytest.mark.parametrize("earlier, best", [(4.0, False), (6.0, True)])
def test_an_earlier_row_without_n_counts_as_one_of_as_many(earlier, best, tmp_path, monkeypatch):
    """It is of a release that wrote none."""
    r = new_run(tmp_path, "--T", 4, "--model", "ddpm")
    r.write({"step": 1, "fid": earlier})
    monkeypatch.setattr("support.run.reference_features", lambda *_: None)
    monkeypatch.setattr("support.run.features_of", lambda *_: None)
    monkeypatch.setattr("fid.compare", lambda *_: {"fid": 5.0})
    r.evaluate()
    assert (tmp_path / "best.pt").exists() == best


# ---- the log ----


@pytest.mark.slow
def test_images_per_second_leaves_out_grids_evaluations_and_saves(tmp_path, monkeypatch):
    """By a clock on which a step of 4 images takes a second, and everything else a hundred."""
    now = [0.0]

    def takes(seconds, work=lambda *_: None):
        def call(*arguments):
            now[0] += seconds
            return work(*arguments)

        return call

    monkeypatch.setattr("fid.InceptionFeatures", Tiny)
    monkeypatch.setattr(run_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Run, "average", takes(1, Run.average))
    for name in ("save", "draw_grid", "evaluate"):
        monkeypatch.setattr(Run, name, takes(100))
    every = "--sample-every 12 --eval-every 14 --save-every 16 --iterations 20 --model ddpm"
    r = new_run(tmp_path, "--T", 4, *every.split())
    now[0] += 1000  # the data's statistics, before the first step
    train.train(r)
    assert [row["images_per_second"] for row in read_log(tmp_path)] == [4, 4]


def test_a_run_whose_stderr_is_a_file_draws_no_bar(tmp_path, monkeypatch, capsys):
    """Only errors are there; the losses are in log.jsonl."""
    monkeypatch.setattr(run_module, "GRID", 4)
    flags = [*SMALL, "--T", 4, "--model", "ddpm", "--iterations", 2, "--sample-every", 2]
    assert run(*flags, "--out", tmp_path / "run") == 0
    assert capsys.readouterr().err == ""


# ---- devices ----


@pytest.mark.parametrize(
    "device, parts, mode",
    [("cuda", 1, "reduce-overhead"), ("cuda", 2, None), ("cpu", 1, None), ("cpu", 2, None)],
)
def test_compiling_takes_cuda_graphs_only_without_accumulation(device, parts, mode):
    """Gradients of several backward passes come out wrong in them (pytorch#169545)."""
    assert compile_mode(torch.device(device), parts) == mode


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_grids_and_evaluations_sample_in_the_runs_precision(
    precision, tmp_path, monkeypatch, capsys
):
    """And in batches that fill the device, here of two; the first lines say both."""
    monkeypatch.setattr(run_module, "batch_size_of_samples", lambda device, settings: 2)
    flags = ["--model", "ddpm", "--precision", precision, "--sample-every", 4]
    r = new_run(tmp_path, "--T", 4, *flags)
    computed = []
    last = r.ema.theta.out[2]  # the network's last convolution
    last.register_forward_hook(lambda net, args, out: computed.append((out.dtype, len(out))))
    assert [len(batch) for batch in r.samples(3)] == [2, 1]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert computed == [(dtype, 2)] * 4 + [(dtype, 1)] * 4
    r.introduce()
    assert f"samples are drawn in {precision}, 2 at a time" in capsys.readouterr().out


@pytest.mark.parametrize(
    "device, batch_size, parts, size",
    [("cpu", 512, 1, 64), ("cuda", 128, 1, 256), ("cuda", 128, 2, 128), ("cuda", 16, 1, 64)],
)
def test_a_gpu_samples_twice_what_it_trains_at_a_time(device, batch_size, parts, size):
    """Within 64 and 256, since FID's network sees the batch at 299 x 299."""
    settings = {"batch_size": batch_size, "accumulate": parts}
    assert batch_size_of_samples(torch.device(device), settings) == size


# ---- what is said ----


@pytest.mark.parametrize("size, start", [(1, "python"), (16, "torchrun --nproc_per_node=8 --")])
def test_a_stopped_run_prints_the_command_that_goes_on(size, start, tmp_path, monkeypatch, capsys):
    """As many processes a node as there were, and a path that is right from here."""
    r = new_run(tmp_path / "a/b", "--T", 4)
    monkeypatch.setattr(parallel, "size", lambda: size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for here, place in ((tmp_path, "a/b"), (tmp_path / "c", tmp_path / "a/b")):
        here.mkdir(exist_ok=True)
        monkeypatch.chdir(here)
        assert r.conclude(False) == 130
        said = capsys.readouterr().out
        assert said.endswith(f"to go on: {start} train.py --resume --out {place}\n")


def test_the_command_that_goes_on_names_the_device_and_quotes_the_folder(
    tmp_path, monkeypatch, capsys
):
    """Of a run on a CPU beside a GPU, in a folder whose name has a space."""
    r = new_run(tmp_path / "a b", "--T", 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "open_device", lambda name: torch.device("cuda"))
    assert r.conclude(False) == 130
    said = capsys.readouterr().out
    assert said.endswith("python train.py --resume --out 'a b' --device cpu\n")


def test_a_classifiers_run_ends_with_the_command_that_uses_it(tmp_path, capsys):
    r = new_run(tmp_path, "--T", 4, "--model", "classifier", stop=cli.Stop())
    assert r.conclude(True) == 0
    assert "--classifier" in capsys.readouterr().out.splitlines()[-1]
