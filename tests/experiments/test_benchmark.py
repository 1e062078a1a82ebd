"""benchmark.py: its rows drive the project's own loop, and a verdict is that of the figures."""

import types

import pytest
import torch

from experiments import benchmark, measuring, plain
from runs import error_of, exit_code
from unet import ResBlock, UNet

CPU = torch.device("cpu")
SMALL = {"channels": 32, "res_blocks": 1}


@pytest.mark.slow
def test_a_call_lets_the_real_loop_through_its_burst_and_leaves_the_log_alone(tmp_path):
    run = benchmark.Steps(CPU, tmp_path, model="ddpm", **SMALL)
    before = run.weights[0].detach().clone()
    run()
    assert run.step == 1
    assert not torch.equal(run.weights[0], before)
    run.burst = 10
    run()
    assert run.step == 10
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_the_reference_is_plain_and_in_fp32_whatever_the_work_computes_in():
    """It compares its outputs with the network's own before it is timed."""
    torch.manual_seed(0)
    net = measuring.randomised(UNet(3, 3, 32, **SMALL))
    net.bf16 = True
    weights = [p.detach().clone() for p in net.parameters()]
    plain.network_step(net, CPU, plain=True)()
    assert net.bf16
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
    assert type(net.middle[0]) is ResBlock


@pytest.mark.parametrize(
    "target, work, reference, ratio, verdict",
    [
        (">= 1.5 x", 1.0, 2.0, "2.000", "met"),
        (">= 1.5 x", 2.0, 2.0, "1.000", "MISSED"),
        ("<= 1.02", 1.0, 1.0, "1.000", "met"),
        ("<= 1.02", 1.1, 1.0, "1.100", "MISSED"),
        ("<= 2 s", 1.9, None, "1.900", "met"),
        ("<= 2 s", 2.1, None, "2.100", "MISSED"),
    ],
)
def test_a_ratio_is_a_speed_up_a_cost_or_the_time_itself(
    target, work, reference, ratio, verdict, monkeypatch, capsys
):
    found = measuring.Measured(work, reference, None, None)
    monkeypatch.setattr(measuring, "measure", lambda *how: found)
    measuring.print_line("a", measuring.Row(None, None, target), 1, CPU)
    said = capsys.readouterr().out
    assert ratio in said
    assert said.split()[-1] == verdict


@pytest.mark.parametrize("differ, share", [(1e-3, 0.9), (1e-6, 0.5)])
def test_a_fast_row_that_differs_or_is_far_from_the_peak_is_missed(
    differ, share, monkeypatch, capsys
):
    found = measuring.Measured(1.0, 2.0, differ, share)
    monkeypatch.setattr(measuring, "measure", lambda *how: found)
    peak = measuring.Peak(1, torch.float32, 0.72)
    row = measuring.Row(None, None, ">= 1.5 x", 1e-5, peak)
    measuring.print_line("a", row, 1, CPU)
    assert capsys.readouterr().out.split()[-1] == "MISSED"


def test_a_row_is_medians_of_turns_after_the_warm_up_and_the_relative_difference(monkeypatch):
    """Work and reference in turn, by a clock that they move: of four turns the first is warm-up."""
    now, turns = [0.0], []
    clock = types.SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(measuring, "time", clock)

    def takes(name, seconds, value):
        seconds = iter(seconds)

        def call():
            turns.append(name)
            now[0] += next(seconds)
            return torch.tensor(value)

        return call

    work = takes("work", (9, 1, 2, 6), [1.0, 2.0])
    reference = takes("reference", (9, 4, 4, 4), [1.0, 4.0])
    row = measuring.Row(work, reference, ">= 1 x", tolerance=1.0, warm=1)
    found = measuring.measure(row, 3, CPU)
    assert found == measuring.Measured(2, 4, 0.5, None)  # |2 - 4| of at most 4
    assert turns == ["work", "reference"] * 4


def test_a_row_of_no_name_is_one_line(capsys):
    assert exit_code(benchmark.main, "step", "stepp") == 2
    assert "got stepp; expected rows of the table" in error_of(capsys)
