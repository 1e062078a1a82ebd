"""table1.py: runs are made once, and go on after a kill."""

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

import fid
from data import Images
from experiments import judge, rows, table1, tables, variants
from experiments.rows import Row
from neighbours.judge import load_judge
from refiner import build_model
from runs import ROOT, exit_code, settings_of
from support.checkpoint import read_checkpoint

SCORER = """
import json, sys, numpy as np
images = np.load(sys.argv[1])["arr_0"]
assert sys.argv[sys.argv.index("--dims") + 1] == "768"
if "--save-stats" in sys.argv:
    np.savez(sys.argv[sys.argv.index("--save-stats") + 1], n=len(images))
else:
    assert np.load(sys.argv[2])["n"] == 8 and "--json" in sys.argv
    scores = {"fid_768": float(images.mean()), "sfid": float(images.std()), "n_a": 4}
    print(json.dumps(scores | {"weights": "inception-0"}))
"""
SMALL = table1.Preset(
    16, "--channels 32 --res-blocks 1 --batch-size 2", 2, "--res-blocks 2", samples=4, reference=8
)


class Work:
    """A folder for tiny runs on shapes, their lines, and a fid.py of the mean and deviation."""

    def __init__(self, folder):
        self.folder, self.lines, self.fid = folder, folder / "lines.jsonl", folder / "my_fid.py"
        self.fid.write_text(SCORER)

    def argv(self, *more):
        places = ["--work", self.folder, "--results", self.lines]
        return ["--data", "shapes", *places, *more]

    def found(self):
        """{(row, seed): line}"""
        lines = map(json.loads, self.lines.read_text().splitlines())
        return {(line["row"], line["seed"]): line for line in lines}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """No judges, which take minutes to train."""
    found = Work(tmp_path)
    monkeypatch.setattr(table1, "FID", found.fid)
    monkeypatch.setattr(table1, "JUDGES", ())
    return found


# ---- the runs ----


@pytest.fixture
def few_rows(monkeypatch):
    """Rows of each kind: a frozen model, what it serves, sizes, a variant, images, a longer run."""
    steps = (10, 5)
    few = {
        "DDPM (eps)": Row("a", "--model ddpm"),
        "self-perceptual": Row("b", "--model casdm --self-perceptual FROZEN=0.1"),
        "matched": Row("b", "--model ddpm MATCHED"),
        "clamp": Row("b", variant="clamp-mixed", samples_of="self-perceptual", steps=(20,)),
        rows.REAL: Row("b"),
        "long": Row("b", "--model ddpm", begins_with="DDPM (eps)", length=2, steps=(5,)),
    }
    monkeypatch.setattr(table1, "PRESETS", {"cpu": SMALL})
    for module in (table1, tables):
        monkeypatch.setattr(module, "ROWS", few)
    monkeypatch.setattr(table1, "STEPS", steps)
    monkeypatch.setattr(tables, "PAIRS", [])
    monkeypatch.setattr(tables, "CURVES", ())
    monkeypatch.setattr(tables, "TABLE1", ())


@pytest.mark.slow
def test_runs_are_made_once_and_go_on_where_they_were(work, few_rows, capsys):
    """Two seeds; a run killed before its first checkpoint starts anew, a lost line trains none."""
    (work.folder / "ddpm-eps-0").mkdir()
    (work.folder / "ddpm-eps-0/log.jsonl").touch()
    assert exit_code(table1.main, *work.argv("--seeds", 2, "--group", "a")) == 0
    zero, one = work.lines.read_text().splitlines()
    assert list(work.found()) == [("DDPM (eps)", 0), ("DDPM (eps)", 1)]

    work.lines.write_text(zero + "\n")
    checkpoint = work.folder / "ddpm-eps-1/checkpoint.pt"
    before = checkpoint.stat().st_mtime_ns
    assert exit_code(table1.main, *work.argv("--seeds", 2, "--group", "all", "--jobs", 3)) == 0
    assert checkpoint.stat().st_mtime_ns == before
    found = work.found()
    assert len(found) == 12
    assert found["DDPM (eps)", 1]["10"] == json.loads(one)["10"]
    assert "| DDPM (eps) | 2 |" in capsys.readouterr().out

    assert "--seed 1" in found["DDPM (eps)", 1]["flags"]
    assert "--res-blocks 2" in found["matched", 0]["flags"]
    assert "ddpm-eps-1" in found["self-perceptual", 1]["flags"]
    assert "--iterations 4" in found["long", 1]["flags"]

    assert found["clamp", 0]["variant"] == "clamp-mixed"  # it samples what another row trained
    assert {"20"} == {key for key in found["clamp", 0] if key.isdigit()}
    assert not (work.folder / "clamp-0/checkpoint.pt").exists()

    assert "step 2 of 4" in (work.folder / "output.log").read_text()  # where the row's run ends
    assert read_checkpoint(checkpoint)["step"] == 2
    assert read_checkpoint(work.folder / "long-1/checkpoint.pt")["step"] == 4

    zero, one = (
        np.load(work.folder / f"training-images-{seed}/real.npz")["arr_0"] for seed in (0, 1)
    )
    assert len(zero) == 4
    assert not np.array_equal(zero, one)
    assert found[rows.REAL, 1]["10"]["fid_768"] == one.mean()
    assert found[rows.REAL, 1]["10"]["weights"] == ["inception-0"]


SCRIPT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from experiments import table1
from support import cli
flags = "--channels 32 --res-blocks 1 --batch-size 2"
table1.FID, table1.JUDGES = sys.argv.pop(1), ()
table1.PRESETS = {"cpu": table1.Preset(16, flags, 100000, "", 4, 8)}
sys.exit(cli.run(table1.main))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent, code", [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_signal_ends_every_run_and_nothing_is_left_running(sent, code, work):
    """It reaches the two trainings, which save; where table1.py itself is killed they end too."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, ROOT, work.fid, *map(str, work.argv("--jobs", 2))],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=with_ctrl_c,
    )
    runs = [work.folder / row for row in ("ddpm-eps-0", "ddpm-x0-0")]
    end = time.monotonic() + 300
    try:
        while not all((run / "log.jsonl").exists() for run in runs):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(sent)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == code
    assert "Traceback" not in said
    while any(str(work.folder).encode() in words for words in command_lines()):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not work.lines.exists()
    if code == 130:
        assert said.endswith("interrupted\n")
        for run in runs:
            assert 0 < read_checkpoint(run / "checkpoint.pt")["step"] < 100000


def with_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs start without it


def command_lines():
    """Of every process; one that ends meanwhile has none."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append((process / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def test_weights_that_do_not_fit_stop_the_runs_before_the_first_ends(work, capsys):
    """The statistics come first."""
    work.fid.write_text("raise SystemExit(1)")
    assert exit_code(table1.main, *work.argv()) == 1
    assert "my_fid.py" in capsys.readouterr().err
    assert not list(work.folder.glob("*/checkpoint.pt"))


def test_weights_that_are_not_there_are_one_line(work, capsys):
    assert exit_code(table1.main, *work.argv("--weights", work.folder / "none.pth")) == 1
    assert "none.pth does not exist" in capsys.readouterr().err


def test_every_sample_is_scored_by_inception_and_two_judges(tmp_path, monkeypatch):
    """Statistics and judges are made once; every call means to fid.py what table1.py means."""
    monkeypatch.setattr(table1, "ASSETS", tmp_path / "none")
    weights = tmp_path / "w.pth"
    experiment, calls, judges = table1.Experiment("cpu", tmp_path, weights=weights), [], []
    experiment.training = Images(np.zeros((2, 16, 16, 3), np.uint8), np.arange(2), "two", "0")

    def call(program, *arguments, capture=False):
        words = list(map(str, arguments))
        if program == "experiments.judge":
            judges.append(judge.parse_args(words))
            judges[-1].out.touch()
            return None
        assert program == Path(fid.__file__)
        calls.append(fid.parse_args(words))
        if not capture:
            calls[-1].save_stats.touch()
        if calls[-1].judge is None:
            return '{"fid_768": 0.3, "sfid": 50, "kid": 0.1, "n_a": 1, "weights": "inception-0"}'
        kind = Path(calls[-1].judge).stem
        return json.dumps({f"fd_{kind}": 1.5, "precision_judge": 1, "weights": f"{kind}-0"})

    monkeypatch.setattr(experiment.programs, "call", call)
    monkeypatch.setattr(experiment, "save_real", lambda path, first, n: path.touch())
    for _ in range(2):
        found = experiment.score("images.npz")
    assert found["weights"] == ["inception-0", "judge-classes-0", "judge-rotations-0"]
    assert {"fid_768": 0.3, "sfid": 50, "kid": 0.1}.items() <= found.items()
    assert "n_a" not in found and "precision_judge" not in found
    assert [args.task for args in judges] == ["classes", "rotations"]
    assert all(args.image_size == 16 for args in judges)
    made = [args for args in calls if args.save_stats]
    scored = [args for args in calls if not args.save_stats]
    assert (len(made), len(scored)) == (3, 6)
    assert {args.A for args in made} == {str(tmp_path / "reference.npz")}
    assert all(args.A == "images.npz" and args.json for args in scored)
    first = scored[0]
    assert (first.dims, first.weights, first.judge) == (768, str(weights), None)
    assert [args.B for args in scored] == 2 * [
        str(experiment.statistics(n)) for n in experiment.networks()
    ]


def test_the_judges_in_assets_are_those_of_the_longer_runs():
    """By the names that fid.py wrote into the lines; another machine's lines compare with these."""
    experiment = table1.Experiment("cpu", results=ROOT / "experiments/table1_cpu_long.jsonl")
    names = [load_judge(experiment.judge(f"judge-{task}")).name for task in table1.JUDGES]
    for line in experiment.lines():
        for steps in filter(str.isdigit, line):
            assert line[steps]["weights"][1:] == names


def test_the_papers_scale_is_scored_by_fid_itself(tmp_path):
    """2048 features of the whole file, which fid.py downloads."""
    flags = table1.Experiment("paper", tmp_path).network_flags("inception")
    assert flags == ["--dims", 2048]


def test_the_papers_scale_takes_the_papers_metric_whatever_is_in_the_cache(tmp_path, monkeypatch):
    """LPIPS; the small preset takes SqueezeNet where VGG's weights are not there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert table1.Experiment("paper", tmp_path).metric == "lpips"
    assert table1.Experiment("cpu", tmp_path).metric == "squeezenet"


# ---- the rows ----


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_low_noise_rows_limit_cas_dms_metric_as_their_names_say(share, tmp_path):
    """And differ from Cas-DM + metric in nothing else."""
    experiment, found = table1.Experiment("cpu", tmp_path), []
    for row in (f"metric at t <= {share} T", "Cas-DM + metric"):
        flags = ["--data", "cifar10", "--image-size", 16, *experiment.flags(row, 0)]
        found.append(settings_of(*flags))
    assert found[0].pop("metric_until") == share
    assert found[1].pop("metric_until") == 1
    assert found[0] == found[1]


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_no_real_image_of_three_seeds_is_in_the_reference(preset, tmp_path, monkeypatch):
    """Of CIFAR-10's 50,000 training images, whose order is drawn once."""
    experiment, taken = table1.Experiment(preset, tmp_path, tmp_path / "lines.jsonl"), []
    monkeypatch.setattr(
        experiment, "save_real", lambda path, first, n: taken.extend(range(first, first + n))
    )
    monkeypatch.setattr(experiment, "score", lambda images: {})
    experiment.reference()
    for seed in range(3):
        experiment.run(rows.REAL, seed)
    assert len(taken) == experiment.preset.reference + 3 * experiment.preset.samples
    assert len({number % 50_000 for number in taken}) == len(taken)


def test_a_row_is_sampled_by_its_own_flags_and_under_its_variant(tmp_path, monkeypatch):
    experiment, calls = table1.Experiment("cpu", tmp_path), []

    def call(*words, variant):
        calls.append((" ".join(map(str, words)), variant))

    monkeypatch.setattr(experiment.programs, "call", call)
    for how in (Row("a", sampling="--sampler dpm++"), Row("a", variant="r-linear")):
        experiment.sample(tmp_path / "checkpoint.pt", 10, 0, tmp_path / "10.npz", how)
    (solver, none), (ddim, variant) = calls
    assert solver.endswith(" --sampler dpm++")
    assert none == ""
    assert "--sampler" not in ddim
    assert variant == "r-linear"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_every_rows_flags_mean_something_to_train(preset, tmp_path, monkeypatch):
    """With the metric named, the sizes matched, and the frozen model's place filled in."""
    experiment = table1.Experiment(preset, tmp_path)
    frozen = tmp_path / "checkpoint.pt"
    monkeypatch.setattr(experiment, "train", lambda row, seed: frozen)
    size = experiment.preset.image_size
    for row, how in rows.ROWS.items():
        assert how.variant in ("", *variants.VARIANTS)
        if not how.flags:
            continue
        flags = experiment.flags(row, 2)
        settings = settings_of("--data", "cifar10", "--image-size", size, *flags)
        assert settings["seed"] == 2
        assert settings["iterations"] == experiment.preset.iterations * how.length
        assert set(settings["metric"]) <= {"squeezenet", "lpips", "ssim", "haarpsi"}
        if how.begins_with:  # to go on with another run's checkpoint is that run, longer
            assert how.flags == rows.ROWS[how.begins_with].flags
            assert how.length > rows.ROWS[how.begins_with].length


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_one_network_is_matched_to_cas_dms_two(preset):
    """The size-matched rows have Cas-DM's parameters and operations to 4 %."""
    preset = table1.PRESETS[preset]
    casdm = size_of("casdm", preset, preset.flags)
    for model in ("ddpm", "dual"):
        matched = size_of(model, preset, f"{preset.flags} {preset.matched}")
        assert matched == pytest.approx(casdm, rel=0.04)


def size_of(model, preset, flags):
    """(parameters, operations) of a model's networks."""
    where = ["--data", "cifar10", "--image-size", preset.image_size]
    settings = settings_of(*where, "--model", model, *flags.split())
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(settings)
        for network in model.children():
            x = torch.empty(1, 3, preset.image_size, preset.image_size)
            network.decode(*network.encode(x, torch.zeros(1)))  # `forward` asks for a device
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def test_table_1_comes_first_and_everything_goes_seed_by_seed(work):
    wanted = table1.Experiment("cpu", work.folder, work.lines).wanted("all", 3)
    first, rest = wanted[:24], wanted[24:]
    names = [*list(rows.PAPER)[:7], rows.REAL]
    assert first == [(row, seed) for seed in range(3) for row in names]
    assert [seed for _, seed in rest] == sorted(seed for _, seed in rest)
    assert len(set(wanted)) == len(wanted) == 3 * len(table1.ROWS)


def test_a_run_that_lacks_steps_is_wanted_again_and_its_lines_are_one(work):
    """--steps 10 first and 100 later: the score with ten steps is kept."""
    first = {"row": "Dual", "seed": 0, "commit": "a", "10": {"fid_768": 1.0}}
    work.lines.write_text(json.dumps(first) + "\n")
    ten = table1.Experiment("cpu", work.folder, work.lines, steps=(10,))
    assert ("Dual", 0) not in ten.wanted("table 1", 1)
    both = table1.Experiment("cpu", work.folder, work.lines)
    assert ("Dual", 0) in both.wanted("table 1", 1)
    assert both.missing("Dual", 0) == [100]
    with open(work.lines, "a") as f:
        later = {"row": "Dual", "seed": 0, "commit": "b", "100": {"fid_768": 2.0}}
        f.write(json.dumps(later) + "\n")
    assert ("Dual", 0) not in both.wanted("table 1", 1)
    assert both.lines() == [first | {"100": {"fid_768": 2.0}}]
