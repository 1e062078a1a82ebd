r"""The paper's Tables 1 to 4 on CIFAR-10, at a scale that one can afford, with error bars.

    python -m experiments.table1 --preset cpu --data images.npz      Table 1's runs that have no line in experiments/table1_cpu.jsonl yet; then the table
    python -m experiments.table1 --preset cpu --group all --seeds 1  so for all groups: table 1, size, choices, lambda, table 3, table 4, curves; one seed each, not 3
    python -m experiments.table1 --preset paper --jobs 8             eight runs side by side, each on its GPU, or its share of the cores
    python -m experiments.table1 --preset cpu --print                the tables of the lines that are there

Each run is trained by train.py, sampled from its moving average by sample.py with 10 and 100 steps, and scored: for `paper` by fid.py, else
by a program that stands apart from this project and prints FID-768 and sFID (`--scorer`).  Table 1 comes first, then the rest, each seed by
seed, so that what is there is comparable at any time; whatever is killed goes on where it was, and a run of twice the iterations goes on
where the row's own run ends.  A line holds the flags and the commit of its run and the seconds of its last attempt; means are over seeds with
their standard error, differences are of equal seeds.  The last checkpoint is scored; the paper takes the best of those that it evaluates.
FID-768 is no FID: it takes 768 features of a layer before FID's.

presets:
    cpu      16 x 16, 32 channels, 1 block, 2,500 iterations of 32; 2,048 images a score, against 10,000; Table 1 takes some 5 hours of two cores with --jobs 2
    gpu      32 x 32, the paper's networks in bf16, 5,000 iterations of 128; 10,000 images a score
    paper    the paper's settings: 400,000 iterations of 128; 50,000 images a score
"""
import collections
import ctypes
import json
import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent

import data
from support import edges
from sample import save_npz

FID = ROOT / "fid.py"
SCORER = ROOT / "../shared/tools/score.py"
STEPS = (100, 10)
DIGITS = {"FID": 2, "FID-768": 3, "sFID": 2}        # of the scores, behind the point


class Preset(NamedTuple):
    image_size: int
    flags: str
    iterations: int
    matched: str        # what gives one U-Net the parameters and the operations of Cas-DM's two, to some 4 %
    samples: int        # a score
    reference: int      # training images that they are scored against
    scorer: Path = SCORER


PRESETS = {
    "cpu": Preset(16, "--channels 32 --res-blocks 1 --batch-size 32 --lr 5e-4", 2500, "--res-blocks 3", 2048, 10_000),
    "gpu": Preset(32, "--precision bf16", 5000, "--res-blocks 7", 10_000, 40_000),
    "paper": Preset(32, "", 400_000, "--res-blocks 7", 50_000, 50_000, FID),
}
METRIC_SIZE = {16: "--metric-size 64"}      # by image size; the paper's 224 for its own sizes


class Row(NamedTuple):
    flags: str = ""
    variant: str = ""           # of variants.py
    weights: str = ""           # the row whose checkpoint it starts from; without flags that is what is sampled
    share: float = 1            # of the preset's iterations
    steps: tuple = STEPS


# METRIC is LPIPS where VGG's weights are at hand, else SqueezeNet's features; MATCHED is the preset's.
ROWS = {
    ("table 1", "DDPM (eps)"): Row("--model ddpm"),
    ("table 1", "DDPM (x0)"): Row("--model ddpm --predict x0"),
    ("table 1", "DDPM (x0) + metric"): Row("--model ddpm --predict x0 --metric METRIC=0.1"),
    ("table 1", "Dual"): Row("--model dual"),
    ("table 1", "Dual + metric"): Row("--model dual --metric METRIC=0.1"),
    ("table 1", "Cas-DM"): Row("--model casdm"),
    ("table 1", "Cas-DM + metric"): Row("--model casdm --metric METRIC=0.1"),
    ("table 1", "training images"): Row(steps=()),
    ("size", "DDPM (eps), Cas-DM's size"): Row("--model ddpm MATCHED"),
    ("size", "Dual, Cas-DM's size"): Row("--model dual MATCHED"),
    ("choices", "L_mu / coef1^2, clamped"): Row("--model casdm", "mu-scaled"),
    ("choices", "phi's input not clamped"): Row("--model casdm", "phi-unclamped"),
    ("choices", "r_t without sigmoid"): Row("--model casdm", "r-free"),
    ("choices", "r_t = 1 in sampling"): Row(variant="r-one", weights="Cas-DM"),
    ("choices", "x0 clamped after mixing"): Row(variant="clamp-mixed", weights="Cas-DM"),
    ("choices", "moving average without ramp"): Row("--model casdm", "no-ramp"),
    ("lambda", "metric, lambda 0.01"): Row("--model casdm --metric METRIC=0.01"),
    ("lambda", "metric, lambda 1"): Row("--model casdm --metric METRIC=1"),
    ("table 3", "SSIM"): Row("--model casdm --metric ssim=0.1"),
    ("table 3", "HaarPSI"): Row("--model casdm --metric haarpsi=0.1"),
    ("table 3", "self-perceptual"): Row("--model casdm --self-perceptual JUDGE=0.1"),
    ("table 3", "self-perceptual, eps^ derived"): Row("--model casdm --self-perceptual JUDGE=0.1", "noise-derived"),
    ("table 4", "Fix-Res"): Row("--model casdm --refiner fixres"),
    ("table 4", "Fix-Res + metric"): Row("--model casdm --refiner fixres --metric METRIC=0.1"),
    ("table 4", "Fix-Res, concat"): Row("--model casdm --refiner fixres --refiner-input x0+eps"),
}
CURVES = ("DDPM (eps)", "Cas-DM", "Cas-DM + metric")        # scored against steps, and against iterations with the fewest steps of a score
ROWS |= {("curves", f"{row}, other steps"): Row(weights=row, steps=(50, 20, 5)) for row in CURVES}
ROWS |= {("curves", f"{row}, {share} x the iterations"): Row(ROWS["table 1", row].flags, weights=row if share > 1 else "", share=share, steps=STEPS[-1:])
         for share in (0.5, 2) for row in CURVES}
JUDGE = "DDPM (eps)"        # of the self-perceptual metric
REAL = "training images"    # beside the reference: what a perfect model would score with as many images (0 in `paper`, whose reference has them all)
# FID and sFID on CIFAR-10, 100 steps (Cas-DM Table 1), and FID with Fix-Res (Cas-DM Table 4)
PAPER = {"DDPM (eps)": (6.79, 4.97), "DDPM (x0)": (17.78, 6.69), "DDPM (x0) + metric": (9.34, 6.94), "Dual": (6.52, 4.60), "Dual + metric": (5.65, 4.89),
         "Cas-DM": (6.80, 5.03), "Cas-DM + metric": (6.40, 4.87), "Fix-Res": (6.40, None), "Fix-Res + metric": (6.28, None), "Fix-Res, concat": (7.08, None)}
PAIRS = [("DDPM (x0) + metric", "DDPM (x0)"), ("Dual + metric", "Dual"), ("Cas-DM + metric", "Cas-DM"), ("Fix-Res + metric", "Fix-Res"), ("Fix-Res", "Cas-DM"),
         ("Fix-Res, concat", "Fix-Res"), ("Cas-DM", "DDPM (eps)"), ("Cas-DM", "DDPM (eps), Cas-DM's size"), ("Cas-DM", "Dual, Cas-DM's size"),
         *[(row, "Cas-DM") for group, row in ROWS if group in ("choices", "table 3")], *[(row, "Cas-DM + metric") for group, row in ROWS if group == "lambda"]]


# ---- one run ----

class Experiment:
    """A preset's runs, in `folder`, and their lines in `results`; by default runs/table1-NAME and experiments/table1_NAME.jsonl."""

    def __init__(self, name, folder=None, results=None, source=None, scorer=None, jobs=1):
        self.preset, self.source = PRESETS[name], source
        self.scorer = (scorer or self.preset.scorer).resolve()
        self.folder = (folder or ROOT / "runs" / f"table1-{name}").absolute()
        self.results = (results or ROOT / "experiments" / f"table1_{name}.jsonl").absolute()
        self.metric = "lpips" if list(Path(torch.hub.get_dir(), "checkpoints").glob("vgg16-*.pth")) else "squeezenet"
        self.rows = {row: how for (_, row), how in ROWS.items()}
        self.programs = Programs(jobs, self.folder / "output.log")
        self.locks = collections.defaultdict(threading.Lock)        # a checkpoint, and the statistics, are made once

    def run(self, row, seed):
        """Trains, samples and scores one row with one seed, from wherever an earlier attempt got to, and writes its line."""
        how, begun = self.rows[row], time.monotonic()
        sampled = row if how.flags else how.weights
        tqdm.write(f"{row}, seed {seed}")
        place = self.place(row, seed)
        place.mkdir(exist_ok=True)
        if row == REAL:
            self.save_real(place / "real.npz", self.preset.reference + seed * self.preset.samples, self.preset.samples)
        else:
            checkpoint = self.train(sampled, seed)
        flags = self.flags(sampled, seed) if row != REAL else []
        line = {"row": row, "seed": seed, "flags": " ".join(flags), "variant": how.variant, "commit": commit(),
                "metric": self.metric, "n": self.preset.samples}
        for steps in how.steps:
            images = place / f"{steps}.npz"
            if not images.exists():
                self.programs.call("sample.py", checkpoint, "--n", self.preset.samples, "--steps", steps, "--seed", seed, "--batch-size", 128,
                                   "--precision", "bf16", "--out", images, variant=how.variant)
            line[str(steps)] = self.score(images)
        if row == REAL:
            line |= dict.fromkeys(map(str, STEPS), self.score(place / "real.npz"))
        line["seconds"] = round(time.monotonic() - begun)
        with self.locks["results"], open(self.results, "a") as f:
            f.write(json.dumps(line) + "\n")

    def train(self, row, seed):
        """The row's finished checkpoint; the run is made, or gone on with, if it is not there: `weights` names the row whose checkpoint it begins with."""
        how, place = self.rows[row], self.place(row, seed)
        checkpoint = place / "checkpoint.pt"
        with self.locks[place]:
            if how.weights and not checkpoint.exists():         # two goes equal one, at half the cost
                start = self.train(how.weights, seed).read_bytes()
                with edges.atomic(checkpoint) as f:
                    f.write(start)
            if checkpoint.exists():
                self.programs.call("train.py", "--resume", "--iterations", self.iterations(row), "--out", place, variant=how.variant)
            else:
                shutil.rmtree(place, ignore_errors=True)        # a log at most: it was killed before its first checkpoint
                self.programs.call("train.py", "--data", self.source, "--image-size", self.preset.image_size, "--sample-every", 0,
                                   "--save-every", self.preset.iterations // 20 or 1, *self.flags(row, seed), "--out", place, variant=how.variant)
        return checkpoint

    def iterations(self, row):
        return round(self.preset.iterations * self.rows[row].share)

    def flags(self, row, seed):
        how = self.rows[row]
        flags = f"{self.preset.flags} --iterations {self.iterations(row)} {how.flags} --seed {seed}".replace("MATCHED", self.preset.matched)
        if "METRIC" in flags:
            flags = f"{flags.replace('METRIC', self.metric)} {METRIC_SIZE.get(self.preset.image_size, '')}"
        if "JUDGE" in flags:
            flags = flags.replace("JUDGE", os.path.relpath(self.train(JUDGE, seed), ROOT))
        return flags.split()

    def place(self, row, seed):
        return self.folder / f"{re.sub('[^a-z0-9]+', '-', row.lower()).strip('-')}-{seed}"

    def score(self, images):
        """{score: value} of an .npz."""
        against = [self.statistics()] if self.scorer == FID else ["--stats", self.statistics()]
        said = json.loads(self.programs.call(self.scorer, images, *against, "--json", capture=True))
        if self.scorer == FID:
            said = {"FID": said["fid"], "sFID": said["sfid"]}
        return {key: value for key, value in said.items() if key in DIGITS}

    def statistics(self):
        """The scorer's statistics of the training images, which it makes once."""
        path = self.folder / f"{self.scorer.stem}_{self.preset.image_size}_{self.preset.reference}.npz"
        with self.locks[path]:
            if not path.exists():
                made = path.with_suffix(".partial.npz")
                self.save_real(self.folder / "reference.npz", 0, self.preset.reference)
                self.programs.call(self.scorer, self.folder / "reference.npz", *(["--save-stats"] if self.scorer == FID else ["--make-stats", "--stats"]), made)
                os.replace(made, path)
        return path

    def save_real(self, path, first, n):
        """n training images, in an order drawn once; past the last one the first come again."""
        images = self.images()
        order = data.stream(0, "reference", 0).permutation(len(images))
        save_npz(images[np.sort(order.take(range(first, first + n), mode="wrap"))], path)

    def images(self):
        """The training images, from where the scripts look for them."""
        return data.load_images(self.source, self.preset.image_size, ROOT / "data").pixels

    def lines(self):
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def wanted(self, group, seeds):
        """The runs that have no line yet: Table 1 first, then the other groups, each seed by seed."""
        there = {(line["row"], line["seed"]) for line in self.lines()}
        runs = [(mine != "table 1", seed, row) for seed in range(seeds) for mine, row in ROWS if group in (mine, "all")]
        return [(row, seed) for _, seed, row in sorted(runs, key=lambda run: run[:2]) if (row, seed) not in there]


class Programs:
    """The project's scripts, as processes of which `jobs` run at once: each has its GPU, or its share of the cores."""

    def __init__(self, jobs, log):
        self.jobs, self.log, self.running, self.stopped = jobs, log, set(), False
        self.devices = queue.SimpleQueue()
        for job in range(jobs):
            self.devices.put(job % max(1, torch.cuda.device_count()))

    def call(self, script, *arguments, variant="", capture=False):
        """Runs a script of the project, under a variant of variants.py if named; KeyboardInterrupt where it was interrupted, ValueError where
        it failed. Returns what it printed, if captured."""
        if self.stopped:
            raise KeyboardInterrupt
        device = self.devices.get()
        command = [*(["-m", "experiments.variants", variant] if variant else []), ROOT / script, *arguments]
        # glibc would give freed pages back and take them again: a third of the scorer's time
        settings = {"MALLOC_TRIM_THRESHOLD_": str(2 ** 32), "MALLOC_MMAP_THRESHOLD_": str(2 ** 30)}
        settings |= {"CUDA_VISIBLE_DEVICES": str(device)} if torch.cuda.is_available() else {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // self.jobs))}
        with open(self.log, "a") as log:        # a session of its own: a Ctrl-C reaches it by `stop` alone, once
            process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True, env=os.environ | settings,
                                       stdout=subprocess.PIPE if capture else log, stderr=log, start_new_session=True, preexec_fn=die_with_parent)
            self.running.add(process)
            if self.stopped:        # since it was asked above: `stop` may not have seen this one
                process.terminate()
            said = process.communicate()[0]
        self.running.discard(process)
        self.devices.put(device)
        if process.returncode in (130, -2, -15):
            raise KeyboardInterrupt
        if process.returncode:
            raise ValueError(f"{Path(script).name} {' '.join(map(str, arguments))} ended with {process.returncode}; expected 0; see the end of {self.log}, and start this again")
        return said

    def stop(self):
        """Asks what runs to save and end, and lets nothing new begin."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def die_with_parent():
    """Has Linux send SIGTERM to this process when the one that started it is killed: two must never train in one folder."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)      # PR_SET_PDEATHSIG


def commit():
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True, capture_output=True)
    return found.stdout.strip() or "unknown"


# ---- the table ----

def table(lines):
    """The rows' means over seeds, with standard errors; the paper's numbers; the differences of Table 2, of equal seeds."""
    found = {}
    for line in lines:
        found.setdefault(line["row"], {})[line["seed"]] = line
    columns = [(str(steps), score) for steps in STEPS for score in scores_of(lines)]
    print(f"metric: {', '.join(sorted({line['metric'] for line in lines}))}; {', '.join(sorted({str(line['n']) for line in lines}))} images a score; "
          f"commits {', '.join(sorted({line['commit'] for line in lines}))}\n")
    print(markdown("row", "seeds", *[f"{score}, {steps} steps" for steps, score in columns], "paper's FID, sFID"))
    print(markdown(*["---"] * 7))
    for row in (row for (_, row), how in ROWS.items() if row in found and how.steps in (STEPS, ())):
        paper = ", ".join(f"{value:.2f}" for value in PAPER.get(row, ()) if value)
        print(markdown(row, len(found[row]), *[spread([line[steps][score] for line in found[row].values()], DIGITS[score]) for steps, score in columns], paper))
    print(f"\n{markdown('difference', 'seeds', *[f'{score}, {steps} steps' for steps, score in columns], 'paper')}\n{markdown(*['---'] * 7)}")
    for a, b in PAIRS:
        seeds = sorted(found.get(a, {}).keys() & found.get(b, {}).keys())
        if seeds:
            paper = ", ".join(f"{x - y:+.2f}" for x, y in zip(PAPER.get(a, ()), PAPER.get(b, ())) if x and y)
            print(markdown(f"{a} - {b}", len(seeds), *[spread([found[a][s][steps][score] - found[b][s][steps][score] for s in seeds], DIGITS[score], "+")
                                                       for steps, score in columns], paper))
    print_curves(lines)


def print_curves(lines):
    """FID (or FID-768) of CURVES, as the picture of it has them."""
    score = scores_of(lines)[0]
    curves = {row: curve(lines, row) for row in CURVES}
    points = sorted(set().union(*curves.values()), key=lambda point: (point[0] != 1, point))
    if points:
        names = [f"{steps} steps" if share == 1 else f"{steps} steps, {share} x the iterations" for share, steps in points]
        print(f"\n{markdown(score, *names)}\n{markdown(*['---'] * (1 + len(points)))}")
    for row, at in curves.items():
        if at:
            print(markdown(row, *[spread(at[point], DIGITS[score]) if point in at else "" for point in points]))


def curve(lines, row):
    """{(share of the iterations, sampling steps): [FID or FID-768 of each seed]} of what was sampled from a row, or from it trained longer or shorter."""
    flags = ROWS["table 1", row].flags
    mine = {name: how for (_, name), how in ROWS.items() if not how.variant and (how.weights == row or how.flags == flags)}
    score, found = scores_of(lines)[0], {}
    for line in lines:
        for steps in mine[line["row"]].steps if line["row"] in mine else ():
            found.setdefault((mine[line["row"]].share, steps), []).append(line[str(steps)][score])
    return found


def scores_of(lines):
    """The names of the scores in the lines, FID's first; ValueError where not all have the same."""
    kinds = {tuple(score for score in DIGITS if score in found) for line in lines for key, found in line.items() if key.isdigit()}
    if len(kinds) > 1:
        raise ValueError(f"lines with the scores {' and '.join(', '.join(kind) for kind in sorted(kinds))}; expected one scorer's; keep each scorer's lines in a file of its own (--results)")
    return kinds.pop()


def spread(values, digits, sign=""):
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{error}"


def markdown(*cells):
    return f"| {' | '.join(map(str, cells))} |"


# ---- the script ----

def run_all(experiment, wanted):
    """Makes the runs, experiment.programs.jobs at a time; what stops one stops all, and the next call goes on."""
    experiment.folder.mkdir(parents=True, exist_ok=True)
    experiment.images()         # fetched and prepared once, not by every run at a time
    with ThreadPoolExecutor(experiment.programs.jobs) as pool:
        reference = pool.submit(experiment.statistics)      # first: they take minutes, and a scorer that cannot work is found out now
        runs = [pool.submit(experiment.run, row, seed) for row, seed in wanted]
        try:
            with tqdm(total=len(runs), desc="table", unit="run", file=sys.stderr) as bar:
                for done in as_completed([reference, *runs]):
                    done.result()
                    bar.update(done is not reference)
        finally:
            for run in runs:
                run.cancel()
            experiment.programs.stop()


def main(argv=None):
    """The runs that are wanted and missing, then the table."""
    p = edges.Parser(__doc__)
    p.add_argument("--preset", choices=PRESETS, default="cpu")
    p.add_argument("--group", choices=[*dict.fromkeys(group for group, _ in ROWS), "all"], default="table 1", help="of rows")
    p.add_argument("--seeds", type=edges.whole(1), default=3, help="runs a row")
    p.add_argument("--data", default="cifar10", help="CIFAR-10 by name, or its images as an .npz")
    p.add_argument("--work", type=Path, help="where the runs lie (default: runs/table1-PRESET)")
    p.add_argument("--results", type=Path, help="a JSON line a run (default: experiments/table1_PRESET.jsonl)")
    p.add_argument("--jobs", type=edges.whole(1), default=1, help="runs side by side, each on its GPU or its share of the cores")
    p.add_argument("--scorer", type=Path, help="fid.py, or a program called as SCORER IMAGES.npz --stats FILE --json, and with --make-stats (default: the preset's)")
    p.add_argument("--print", action="store_true", help="the table alone")
    a = p.parse_args(argv)
    source = a.data if a.data in data.DATASETS else Path(a.data).absolute()
    experiment = Experiment(a.preset, a.work, a.results, source, a.scorer, a.jobs)
    wanted = experiment.wanted(a.group, a.seeds)
    if wanted and not a.print:
        edges.existing(experiment.scorer, "program that scores images")
        run_all(experiment, wanted)
    if not experiment.lines():
        raise ValueError(f"{experiment.results} has no line; expected finished runs; leave --print out")
    table(experiment.lines())


if __name__ == "__main__":
    sys.exit(edges.run(main))
