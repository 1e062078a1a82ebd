"""table1.py: its runs are made once, go on after a kill, and its table is the arithmetic of their lines."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from support import edges
import fid
from experiments import table1
import train
from experiments import variants
from refiner import build_model
from sample import read_checkpoint

SCORER = """
import json, sys, numpy as np
images = np.load(sys.argv[1])["arr_0"]
if "--make-stats" in sys.argv:
    np.savez(sys.argv[sys.argv.index("--stats") + 1], n=len(images))
else:
    assert np.load(sys.argv[sys.argv.index("--stats") + 1])["n"] == 8
    print(json.dumps({"n": len(images), "FID-768": float(images.mean()), "sFID": float(images.std())}))
"""


SMALL = table1.Preset(16, "--channels 32 --res-blocks 1 --batch-size 2", 2, "--res-blocks 2", 4, 8)


@pytest.mark.slow
def test_runs_are_made_once_and_go_on_where_they_were(tmp_path, monkeypatch, capsys):
    """Two rows and two seeds, one of them a judge of another; a lost line costs no training."""
    (tmp_path / "score.py").write_text(SCORER)
    monkeypatch.setattr(table1, "PRESETS", {"cpu": SMALL})
    monkeypatch.setattr(table1, "ROWS", {("a", "DDPM (eps)"): table1.Row("--model ddpm", steps=(10, 5)),
                                         ("b", "self-perceptual"): table1.Row("--model casdm --self-perceptual JUDGE=0.1", steps=(10, 5)),
                                         ("b", "matched"): table1.Row("--model ddpm MATCHED", steps=(10, 5)),
                                         ("b", "clamp"): table1.Row("", "clamp-mixed", "self-perceptual", steps=(20,)),
                                         ("b", table1.REAL): table1.Row(steps=()), ("b", "long"): table1.Row("--model ddpm", weights="DDPM (eps)", share=2, steps=(5,))})
    monkeypatch.setattr(table1, "STEPS", (10, 5))
    monkeypatch.setattr(table1, "PAIRS", [])
    monkeypatch.setattr(table1, "CURVES", ())
    how = ["--data", "shapes", "--seeds", "2", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "lines.jsonl"), "--scorer", str(tmp_path / "score.py")]
    (tmp_path / "work/ddpm-eps-0").mkdir(parents=True)
    (tmp_path / "work/ddpm-eps-0/log.jsonl").touch()        # killed before its first checkpoint
    assert edges.run(table1.main, [*how, "--group", "a"]) == 0
    lines = (tmp_path / "lines.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]
    (tmp_path / "lines.jsonl").write_text(lines[0] + "\n")
    checkpoint = tmp_path / "work/ddpm-eps-1/checkpoint.pt"
    before = checkpoint.stat().st_mtime_ns
    assert edges.run(table1.main, [*how, "--group", "all", "--jobs", "3"]) == 0
    assert checkpoint.stat().st_mtime_ns == before
    found = {(line["row"], line["seed"]): line for line in map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())}
    assert len(found) == 12 and found["DDPM (eps)", 1]["10"] == json.loads(lines[1])["10"] and "--seed 1" in found["DDPM (eps)", 1]["flags"]
    assert "--res-blocks 2" in found["matched", 0]["flags"] and "ddpm-eps-1" in found["self-perceptual", 1]["flags"]
    assert "20" in found["clamp", 0] and "5" not in found["clamp", 0]
    assert "step 2 of 4" in (tmp_path / "work/output.log").read_text() and "--iterations 4" in found["long", 1]["flags"]
    assert [read_checkpoint(tmp_path / f"work/{run}/checkpoint.pt")["step"] for run in ("ddpm-eps-1", "long-1")] == [2, 4]
    real = [np.load(tmp_path / f"work/training-images-{seed}/real.npz")["arr_0"] for seed in (0, 1)]
    assert len(real[0]) == 4 and not np.array_equal(*real) and found[table1.REAL, 1]["10"]["FID-768"] == real[1].mean()
    assert found["clamp", 0]["variant"] == "clamp-mixed" and not (tmp_path / "work/clamp-0/checkpoint.pt").exists()
    assert "| DDPM (eps) | 2 |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_every_run_and_nothing_is_left_running(sent, code, tmp_path):
    """It reaches the two trainings, which save; where table1.py itself is killed they end too, saved or not."""
    (tmp_path / "score.py").write_text(SCORER)
    script = f"""if True:
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from support import edges, table1
        table1.PRESETS = {{"cpu": table1.Preset(16, "--channels 32 --res-blocks 1 --batch-size 2", 100000, "", 4, 8)}}
        sys.exit(edges.run(table1.main, ["--data", "shapes", "--jobs", "2", "--work", {str(tmp_path)!r}, "--results", {str(tmp_path / "lines.jsonl")!r}, "--scorer", {str(tmp_path / "score.py")!r}]))
    """
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a shell's background jobs start with Ctrl-C ignored
    logs = [tmp_path / row / "log.jsonl" for row in ("ddpm-eps-0", "ddpm-x0-0")]
    try:
        end = time.monotonic() + 240
        while not all(log.exists() for log in logs):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(sent)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == code and said.endswith("interrupted\n") == (code == 130) and "Traceback" not in said
    while any(str(tmp_path).encode() in words for words in map(command_line, Path("/proc").glob("[0-9]*"))):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not (tmp_path / "lines.jsonl").exists()
    if code == 130:
        assert [0 < read_checkpoint(log.with_name("checkpoint.pt"))["step"] < 100000 for log in logs] == [True, True]


def command_line(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_every_rows_flags_mean_something_to_train(tmp_path, monkeypatch):
    """Each row at each scale, with the metric named, the sizes matched, and the judge's place filled in."""
    for preset in ("cpu", "paper"):
        experiment = table1.Experiment(preset, tmp_path)
        monkeypatch.setattr(experiment, "train", lambda row, seed: experiment.place(row, seed) / "checkpoint.pt")
        for row, how in experiment.rows.items():
            assert how.variant in ("", *variants.VARIANTS)
            if how.flags:
                s, _ = train.parse_args(["--data", "cifar10", "--image-size", str(experiment.preset.image_size), *experiment.flags(row, 2)])
                assert s["seed"] == 2 and s["iterations"] == experiment.preset.iterations * how.share
                assert set(s["metric"]) <= {"squeezenet", "lpips", "ssim", "haarpsi"}
                assert not how.weights or how.flags == experiment.rows[how.weights].flags       # going on with another run's checkpoint is that run, longer


def test_one_network_is_matched_to_cas_dms_two():
    """The size-matched rows have Cas-DM's parameters and operations to 4 %."""
    for preset in (table1.PRESETS["cpu"], table1.PRESETS["paper"]):
        sizes = {}
        for model, more in (("casdm", ""), ("ddpm", preset.matched), ("dual", preset.matched)):
            s, _ = train.parse_args(f"--data cifar10 --image-size {preset.image_size} --model {model} {preset.flags} {more}".split())
            with torch.device("meta"):
                nets = list(build_model(s).children())
                with FlopCounterMode(display=False) as counter:
                    for net in nets:
                        net(torch.empty(1, 3, *[preset.image_size] * 2), torch.zeros(1))
            sizes[model] = sum(p.numel() for net in nets for p in net.parameters()), counter.get_total_flops()
        assert all(abs(mine / theirs - 1) < 0.04 for model in ("ddpm", "dual") for mine, theirs in zip(sizes[model], sizes["casdm"]))


def test_table_1_comes_first_and_everything_goes_seed_by_seed(tmp_path):
    wanted = table1.Experiment("cpu", tmp_path, tmp_path / "lines.jsonl").wanted("all", 3)
    assert [row for row, _ in wanted[:8]] == [*list(table1.PAPER)[:7], table1.REAL] and [seed for _, seed in wanted[:24]] == [0] * 8 + [1] * 8 + [2] * 8
    rest = [seed for _, seed in wanted[24:]]
    assert rest == sorted(rest) and len(set(wanted)) == len(wanted) == 3 * len(table1.ROWS)


def test_the_tables_means_errors_and_differences_are_those_of_equal_seeds(capsys):
    def line(row, seed, fid):
        return {"row": row, "seed": seed, "metric": "lpips", "n": 4, "commit": "c", "100": {"FID-768": fid, "sFID": 1.0}, "10": {"FID-768": 0.0, "sFID": 0.0}}
    table1.table([line("Dual", 0, 1.0), line("Dual", 1, 3.0), line("Dual + metric", 1, 2.5), line("Dual + metric", 2, 9.0)])
    said = capsys.readouterr().out
    assert "| Dual | 2 | 2.000 ± 1.000 | 1.00 ± 0.00 | 0.000 ± 0.000 | 0.00 ± 0.00 | 6.52, 4.60 |" in said
    assert "| Dual + metric - Dual | 1 | -0.500 | +0.00 | +0.000 | +0.00 | -0.87, +0.29 |" in said


def test_the_curves_are_of_all_that_was_sampled_from_a_row_and_of_nothing_else(capsys):
    """Its weights with other steps, and its flags with other iterations; not its weights or flags under a variant."""
    def line(row, fid, *steps):
        return {"row": row, "seed": 0, "metric": "lpips", "n": 4, "commit": "c"} | {str(n): {"FID-768": fid + n, "sFID": 0.0} for n in steps}
    lines = [line("Cas-DM", 0.25, 100, 10), line("Cas-DM", 0.75, 100, 10), line("Cas-DM, other steps", 0, 50, 20, 5), line("Cas-DM, 0.5 x the iterations", 0.125, 10),
             line("r_t = 1 in sampling", 9, 100, 10), line("moving average without ramp", 9, 100, 10), line("Dual", 9, 100, 10)]
    table1.table([*lines, line("Cas-DM + metric", 0.5, 100, 10)])
    assert capsys.readouterr().out.endswith("""
| FID-768 | 5 steps | 10 steps | 20 steps | 50 steps | 100 steps | 10 steps, 0.5 x the iterations |
| --- | --- | --- | --- | --- | --- | --- |
| Cas-DM | 5.000 | 10.500 ± 0.250 | 20.000 | 50.000 | 100.500 ± 0.250 | 10.125 |
| Cas-DM + metric |  | 10.500 |  |  | 100.500 |  |
""")


def test_the_papers_scale_is_scored_by_fid_py(tmp_path, monkeypatch):
    """Its statistics are made once, and both calls mean to fid.py what table1.py means."""
    experiment, calls = table1.Experiment("paper", tmp_path), []

    def call(program, *arguments, capture=False):
        assert program == Path(fid.__file__)
        calls.append(fid.parse_args([str(word) for word in arguments]))
        if calls[-1].save_stats:
            calls[-1].save_stats.touch()
        return '{"fid": 6.4, "sfid": 4.87, "is": 9.1, "n_a": 50000}' if capture else None

    monkeypatch.setattr(experiment.programs, "call", call)
    monkeypatch.setattr(experiment, "save_real", lambda path, first, n: None)
    assert experiment.score("images.npz") == experiment.score("images.npz") == {"FID": 6.4, "sFID": 4.87}
    made, first, second = calls
    assert made.A == str(tmp_path / "reference.npz") and made.B is None and first == second and first.json and first.A == "images.npz"
    assert first.B == str(experiment.statistics()) and Path(first.B).exists() and made.save_stats != Path(first.B)


def test_a_scorer_that_cannot_work_stops_the_runs_before_the_first_ends(tmp_path, monkeypatch, capsys):
    """Its statistics come first."""
    (tmp_path / "score.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(table1, "PRESETS", {"cpu": SMALL})
    assert edges.run(table1.main, ["--data", "shapes", "--work", str(tmp_path), "--results", str(tmp_path / "lines.jsonl"), "--scorer", str(tmp_path / "score.py")]) == 1
    assert "score.py" in capsys.readouterr().err and not list(tmp_path.glob("*/checkpoint.pt"))


def test_lines_of_two_scorers_are_not_one_table():
    with pytest.raises(ValueError, match="FID, sFID and FID-768, sFID; expected one scorer's"):
        table1.scores_of([{"row": "Dual", "100": {score: 1.0, "sFID": 1.0}} for score in ("FID", "FID-768")])


def test_a_scorer_that_is_not_there_is_one_line(tmp_path, capsys):
    assert edges.run(table1.main, ["--results", str(tmp_path / "lines.jsonl"), "--scorer", str(tmp_path / "nowhere.py")]) == 1
    assert "nowhere.py does not exist" in capsys.readouterr().err
