r"""The paper's Tables 1 to 4 on CIFAR-10, at a scale that one can afford, with error bars.

    python tests/table1.py --preset cpu --data images.npz      every run that has no line in tests/table1_cpu.jsonl yet; then the table
    python tests/table1.py --preset cpu --only "table 1"       one of the groups: table 1, table 3, table 4, lambda
    python tests/table1.py --preset cpu --print                the table of the lines that are there

Each run is trained by train.py, sampled from its moving average by sample.py with 10 and 100 steps, and scored by a program that stands
apart from this project and prints FID-768 and sFID (`--scorer`).  Runs go seed by seed, so that what is there is comparable at any time;
whatever is killed goes on where it was.  A line holds the flags, the commit and the seconds of its run; means are over seeds with their
standard error, differences are of equal seeds.  FID-768 is no FID: it takes 768 features of a layer before FID's.

presets:
    cpu      16 x 16, 32 channels, 1 block, 1,500 iterations of 32; 2,048 images a score, against 10,000; sized so that table 1 fits in some 8 hours of two cores
    gpu      32 x 32, the paper's networks in bf16, 5,000 iterations of 128; 10,000 images a score
    paper    the paper's settings: 400,000 iterations of 128; 50,000 images a score
"""
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data             # noqa: E402 (the modules lie one folder up)
import edges            # noqa: E402

SCORER = ROOT / "../shared/tools/score.py"
STEPS = (100, 10)


class Preset(NamedTuple):
    image_size: int
    flags: str
    samples: int        # a score
    reference: int      # training images that they are scored against
    seeds: int


PRESETS = {
    "cpu": Preset(16, "--channels 32 --res-blocks 1 --iterations 1500 --batch-size 32 --lr 5e-4", 2048, 10_000, 3),
    "gpu": Preset(32, "--iterations 5000 --precision bf16", 10_000, 50_000, 3),
    "paper": Preset(32, "", 50_000, 50_000, 3),
}

# (group, row) -> flags; METRIC is LPIPS where VGG's weights are at hand, else SqueezeNet's features.
ROWS = {
    ("table 1", "DDPM (eps)"): "--model ddpm",
    ("table 1", "DDPM (x0)"): "--model ddpm --predict x0",
    ("table 1", "DDPM (x0) + metric"): "--model ddpm --predict x0 --metric METRIC=0.1",
    ("table 1", "Dual"): "--model dual",
    ("table 1", "Dual + metric"): "--model dual --metric METRIC=0.1",
    ("table 1", "Cas-DM"): "--model casdm",
    ("table 1", "Cas-DM + metric"): "--model casdm --metric METRIC=0.1",
    ("table 4", "Fix-Res"): "--model casdm --refiner fixres",
    ("table 4", "Fix-Res + metric"): "--model casdm --refiner fixres --metric METRIC=0.1",
    ("table 4", "Fix-Res, concat"): "--model casdm --refiner fixres --refiner-input x0+eps",
    ("table 3", "SSIM"): "--model casdm --metric ssim=0.1",
    ("table 3", "HaarPSI"): "--model casdm --metric haarpsi=0.1",
    ("table 3", "self-perceptual"): "--model casdm --self-perceptual JUDGE=0.1",
    ("lambda", "metric, lambda 0.01"): "--model casdm --metric METRIC=0.01",
    ("lambda", "metric, lambda 1"): "--model casdm --metric METRIC=1",
}
# FID and sFID on CIFAR-10, 100 steps (Cas-DM Table 1), and FID with Fix-Res (Cas-DM Table 4)
PAPER = {"DDPM (eps)": (6.79, 4.97), "DDPM (x0)": (17.78, 6.69), "DDPM (x0) + metric": (9.34, 6.94), "Dual": (6.52, 4.60), "Dual + metric": (5.65, 4.89),
         "Cas-DM": (6.80, 5.03), "Cas-DM + metric": (6.40, 4.87), "Fix-Res": (6.40, None), "Fix-Res + metric": (6.28, None), "Fix-Res, concat": (7.08, None)}
PAIRS = [("DDPM (x0) + metric", "DDPM (x0)"), ("Dual + metric", "Dual"), ("Cas-DM + metric", "Cas-DM"), ("Fix-Res + metric", "Fix-Res"), ("Cas-DM", "DDPM (eps)")]


# ---- one run ----

class Experiment:
    """A preset's runs, in `folder`, and their lines in `results`."""

    def __init__(self, preset, source, folder, results, scorer):
        self.preset, self.source, self.folder, self.results, self.scorer = preset, source, folder, results, scorer
        self.metric = "lpips" if list(Path(torch.hub.get_dir(), "checkpoints").glob("vgg16-*.pth")) else "squeezenet"

    def run(self, row, seed, flags):
        """Trains, samples and scores one row with one seed, from wherever an earlier attempt got to; returns its line."""
        place = self.folder / f"{''.join(c if c.isalnum() else '-' for c in row)}-{seed}"
        flags = flags.replace("METRIC", self.metric).replace("JUDGE", str(self.folder / f"DDPM--eps--{seed}" / "checkpoint.pt")).split()
        settings = [*self.preset.flags.split(), *flags, "--seed", seed]
        place.parent.mkdir(parents=True, exist_ok=True)
        if (place / "checkpoint.pt").exists():
            call("train.py", "--resume", "--out", place)
        else:
            call("train.py", "--data", self.source, "--image-size", self.preset.image_size, "--sample-every", 0, "--save-every", 250, *settings, "--out", place)
        line = {"row": row, "seed": seed, "flags": " ".join(map(str, settings)), "commit": commit(), "metric": self.metric, "n": self.preset.samples}
        for steps in STEPS:
            images = place / f"{steps}.npz"
            if not images.exists():
                call("sample.py", place / "checkpoint.pt", "--n", self.preset.samples, "--steps", steps, "--seed", seed, "--out", images)
            line[str(steps)] = self.score(images)
        return line

    def score(self, images):
        said = call(self.scorer, images, "--stats", self.statistics(), "--json", capture=True)
        return {key: value for key, value in json.loads(said).items() if key in ("FID-768", "sFID")}

    def statistics(self):
        """The scorer's statistics of the training images, which it makes once."""
        path = self.folder / f"statistics_{self.preset.image_size}_{self.preset.reference}.npz"
        if not path.exists():
            images = data.load_images(self.source, self.preset.image_size).pixels
            chosen = np.sort(data.stream(0, "reference", 0).permutation(len(images))[:self.preset.reference])
            with edges.atomic(self.folder / "reference.npz") as f:
                np.savez(f, arr_0=images[chosen])
            call(self.scorer, self.folder / "reference.npz", "--make-stats", "--stats", path.with_suffix(".partial.npz"))
            os.replace(path.with_suffix(".partial.npz"), path)
        return path

    def lines(self):
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def wanted(self, only):
        """The runs that have no line yet, seed by seed."""
        there = {(line["row"], line["seed"]) for line in self.lines()}
        return [(row, seed, flags) for seed in range(self.preset.seeds) for (group, row), flags in ROWS.items()
                if only in (None, group) and (row, seed) not in there]


def call(script, *arguments, capture=False):
    """Runs a script; KeyboardInterrupt where it was interrupted, RuntimeError where it failed. Returns what it printed, if captured."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE if capture else None)
    if done.returncode in (130, -2, -15):
        raise KeyboardInterrupt
    if done.returncode:
        raise ValueError(f"{Path(script).name} ended with {done.returncode}; expected 0; see its message above, and start this again")
    return done.stdout


def commit():
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, capture_output=True)
    return found.stdout.strip() or "unknown"


# ---- the table ----

def table(lines):
    """The rows' means over seeds, with standard errors; the paper's numbers; the differences of Table 2, of equal seeds."""
    found = {}
    for line in lines:
        found.setdefault(line["row"], {})[line["seed"]] = line
    columns = [(str(steps), score) for steps in STEPS for score in ("FID-768", "sFID")]
    print(f"metric: {', '.join(sorted({line['metric'] for line in lines}))}; {', '.join(sorted({str(line['n']) for line in lines}))} images a score; "
          f"commits {', '.join(sorted({line['commit'] for line in lines}))}\n")
    print(markdown("row", "seeds", *[f"{score}, {steps} steps" for steps, score in columns], "paper's FID, sFID"))
    print(markdown(*["---"] * 7))
    for row in (row for _, row in ROWS if row in found):
        paper = ", ".join(f"{value:.2f}" for value in PAPER.get(row, ()) if value)
        print(markdown(row, len(found[row]), *[spread([line[steps][score] for line in found[row].values()]) for steps, score in columns], paper))
    print(f"\n{markdown('difference', 'seeds', *[f'{score}, {steps} steps' for steps, score in columns], 'paper')}\n{markdown(*['---'] * 7)}")
    for a, b in PAIRS:
        seeds = sorted(found.get(a, {}).keys() & found.get(b, {}).keys())
        if seeds:
            paper = ", ".join(f"{x - y:+.2f}" for x, y in zip(PAPER[a], PAPER[b]) if x and y)
            print(markdown(f"{a} - {b}", len(seeds), *[spread([found[a][s][steps][score] - found[b][s][steps][score] for s in seeds], "+")
                                                       for steps, score in columns], paper))


def spread(values, sign=""):
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{error}"


def markdown(*cells):
    return f"| {' | '.join(map(str, cells))} |"


# ---- the script ----

def main(argv=None):
    p = edges.Parser(__doc__)
    p.add_argument("--preset", choices=PRESETS, default="cpu")
    p.add_argument("--only", choices=sorted({group for group, _ in ROWS}), help="one group of rows (default: all)")
    p.add_argument("--data", default="cifar10", help="CIFAR-10 by name, or its images as an .npz")
    p.add_argument("--work", type=Path, help="where the runs lie (default: runs/table1-PRESET)")
    p.add_argument("--results", type=Path, help="a JSON line a run (default: tests/table1_PRESET.jsonl)")
    p.add_argument("--scorer", type=Path, default=SCORER, help="called as SCORER IMAGES.npz --stats FILE --json, and with --make-stats")
    p.add_argument("--print", action="store_true", help="the table alone")
    a = p.parse_args(argv)
    folder = (a.work or ROOT / "runs" / f"table1-{a.preset}").absolute()
    results = (a.results or ROOT / "tests" / f"table1_{a.preset}.jsonl").absolute()
    source = a.data if a.data in data.DATASETS else Path(a.data).absolute()
    experiment = Experiment(PRESETS[a.preset], source, folder, results, edges.existing(a.scorer, "program that scores images").absolute())
    wanted = [] if a.print else experiment.wanted(a.only)
    for i, (row, seed, flags) in enumerate(wanted, 1):
        print(f"[{i} of {len(wanted)}] {row}, seed {seed}", flush=True)
        line = experiment.run(row, seed, flags)
        with open(results, "a") as f:
            f.write(json.dumps(line) + "\n")
    if not experiment.lines():
        raise ValueError(f"{results} has no line; expected finished runs; leave --print out")
    table(experiment.lines())


if __name__ == "__main__":
    sys.exit(edges.run(main))
