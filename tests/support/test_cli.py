"""Command lines: what flags refuse, exit codes, signals, devices, progress."""

import argparse
import signal

import numpy as np
import pytest
import torch

from runs import error_of
from support import cli

# ---- flags ----


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-0.1", "x", "", "1e999"])
def test_real_refuses_what_is_no_number_in_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number"):
        cli.real(0)(text)


def test_real_can_leave_its_lower_end_out():
    assert cli.real(0)("0") == 0 and cli.real(0, above=True)("1e-4") == 1e-4
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        cli.real(0, above=True)("0")


@pytest.mark.parametrize("text", ["0", "11", "2.0", "x", "1e3"])
def test_whole_refuses_what_is_no_whole_number_in_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 10"):
        cli.whole(1, 10)(text)


@pytest.mark.parametrize("name", ["meta", "xla", "vulkan", "xpu:0", "tpu", "cuda:x", "", "auto:1"])
def test_a_device_that_is_no_cpu_cuda_or_mps_is_a_usage_error(name):
    with pytest.raises(argparse.ArgumentTypeError, match="expected auto, cpu, cuda, cuda:N or mps"):
        cli.device(name)


def test_a_device_that_is_not_there_is_said():
    with pytest.raises(ValueError, match="--device cuda:99 cannot be used"):
        cli.open_device("cuda:99")


# ---- exit codes ----


@pytest.mark.parametrize(
    "error, code",
    [
        (None, 0),
        (ValueError("a\nb"), 1),
        (FileNotFoundError("a b"), 1),
        (ArithmeticError("a b"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_run_turns_every_end_into_its_exit_code_and_one_line(error, code, capsys):
    def main(argv):
        if error:
            raise error

    assert cli.run(main) == code
    said = {0: "", 1: "error: a b\n", 130: "interrupted\n"}
    assert capsys.readouterr().err == said[code]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(TypeError):
        cli.run(lambda argv: None + 1)


@pytest.mark.parametrize("ask", [lambda: np.empty(2**57), lambda: torch.empty(2**57)])
def test_more_memory_than_there_is_ends_in_one_line(ask, capsys):
    """numpy's MemoryError and torch's RuntimeError; any other RuntimeError is a bug of ours."""
    assert cli.run(lambda argv: ask()) == 1
    assert error_of(capsys).startswith("error: out of memory (")
    with pytest.raises(RuntimeError):
        cli.run(lambda argv: torch.zeros(2) + torch.zeros(3))


# ---- signals ----


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds, left", [(0.9, []), (1.1, [130])])
def test_a_second_signal_leaves_at_once_unless_it_echoes_the_first(
    first, second, seconds, left, monkeypatch
):
    """torchrun signals its processes once more after a batch system has signalled them all."""
    codes, clock = [], [100.0]
    monkeypatch.setattr(cli.os, "_exit", codes.append)
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])
    with cli.Stop() as stop:
        signal.raise_signal(first)
        assert stop.asked and not codes
        signal.raise_signal(second)
        clock[0] += seconds
        signal.raise_signal(second)
        assert stop.asked and codes == left


def test_a_stop_takes_the_signals_only_while_it_is_entered():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = cli.Stop()
    assert signal.getsignal(signal.SIGINT) is before[0]
    with pytest.raises(ZeroDivisionError), stop:
        assert signal.getsignal(signal.SIGTERM) is stop
        raise ZeroDivisionError
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_what_can_be_left_undone_is_left_once_a_signal_asked():
    with cli.Stop() as stop:
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(cli.Stopped):
            stop.check("whatever", "a watch function gets")


def test_an_echo_of_sigterm_does_not_disturb_the_last_line(monkeypatch):
    """Before there is a Stop: the second SIGTERM comes while `interrupted` is printed."""
    monkeypatch.setattr("builtins.print", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert cli.run(lambda argv: signal.raise_signal(signal.SIGTERM)) == 130


# ---- progress ----


def test_a_bar_is_drawn_on_a_terminal_of_the_first_rank_alone(monkeypatch, capsys):
    """Nothing where stderr is a file: a log of it would be one endless line."""

    def drawn():
        with cli.progress(2, "working", "step") as bar:
            bar.update()
        return capsys.readouterr().err

    assert drawn() == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert "working" in drawn()
    monkeypatch.setattr("support.parallel.rank", lambda: 1)
    assert drawn() == ""
