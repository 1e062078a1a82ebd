"""Small runs of the scripts, as many tests want them: what such a run leaves, and how it ends."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from support import cli
from support.checkpoint import read_checkpoint
from support.pictures import read_log
from support.run import Run
from support.settings import load_inputs, parse_args

ROOT = Path(__file__).parent.parent
FLAGS = "--channels 32 --res-blocks 1 --T 20 --batch-size 4 --sample-every 0 --device cpu"
SMALL = FLAGS.split()  # of a run of a second or two


def settings_of(*argv):
    """The settings that train.py makes of a command line."""
    return parse_args("", [str(word) for word in argv])[0]


def exit_code(main, *argv):
    """What a script ends with, a usage error's SystemExit included."""
    try:
        return cli.run(main, [str(word) for word in argv])
    except SystemExit as end:
        return end.code


def run(*argv):
    """train.py's exit code."""
    return exit_code(train.main, *argv)


def new_run(folder, *flags, stop=None):
    """A small Run of 16 x 16 shapes before its first step."""
    settings = settings_of(*SMALL, *flags)
    images, metrics, _ = load_inputs(settings)
    return Run(settings, folder, torch.device("cpu"), images, metrics, stop or cli.Stop())


def begun(name, *argv, processes=1, cwd=ROOT, **how):
    """A script of ours as a process of its own, under torchrun where there are several."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc_per_node={processes}", "--"]
    return subprocess.Popen(
        [*launch, ROOT / name, *map(str, argv)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=how.pop("stderr", subprocess.PIPE),
        text=True,
        **how,
    )


def started(*argv, **how):
    """train.py as a process of its own; all it says is on stdout."""
    return begun("train.py", *argv, stderr=subprocess.STDOUT, **how)


def done(*argv, **how):
    """What a script prints on stdout, once it has ended well."""
    p = begun(*argv, **how)
    out, err = p.communicate(timeout=240)
    assert p.returncode == 0, err
    return out


def wait_for(path, process=None, seconds=120):
    """Returns once the file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        assert process is None or process.poll() is None, "the process has ended"
        time.sleep(0.02)


def workers_of(process):
    """The numbers of a process's own processes."""
    listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def rows(folder):
    """The log of a run, without the clock."""
    found = read_log(folder)
    for row in found:
        row.pop("images_per_second", None)
    return found


def assert_same_run(a, b):
    """Weights, averages, optimiser, sums and log are bitwise equal."""
    first, second = read_checkpoint(a / "checkpoint.pt"), read_checkpoint(b / "checkpoint.pt")
    different = [key for key in first if key != "settings" and not same(first[key], second[key])]
    assert not different, f"{different} differ"
    assert rows(a) == rows(b)


def same(a, b):
    """Whether tensors, values and their containers are bitwise equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


def error_of(capsys):
    """The one line on stderr, an error's."""
    return one_error(capsys.readouterr().err)


def usage_error(capsys, *argv):
    """The one line with which train.py refuses a command line."""
    with pytest.raises(SystemExit) as end:
        settings_of(*argv)
    assert end.value.code == 2
    return error_of(capsys)


def one_error(said):
    """What was said, an error of one line and nothing else."""
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said
