"""The paper's Tables 1 and 4 on CIFAR-10, at a scale that one can afford, with error bars.

    python -m experiments.table1 --preset cpu --data images.npz       Table 1's runs, then the table
    python -m experiments.table1 --preset cpu --group all --seeds 1   all groups; one seed, not 3
    python -m experiments.table1 --preset paper --jobs 8              eight runs side by side
    python -m experiments.table1 --preset cpu --print                 the tables of what is there
    python -m experiments.table1 --preset cpu --steps 10              sampled with ten steps alone

A run is trained by train.py, sampled from its moving average by sample.py with 100 and 10 steps,
and scored by fid.py: FID (`paper`) or FID-768, sFID, KID, precision and recall by Inception, and
the Frechet distance and KID by two judges (judge.py): those in assets, or others that are trained
first.  FID-768 uses an earlier layer: do not compare it with published FIDs.  For it, --weights may
hold the layers up to that one alone.

A finished run is a line of experiments/table1_PRESET.jsonl: its flags, its commit, its scores and
the seconds of its last attempt.  A run that has its scores for every number of --steps is skipped;
one that lacks some is sampled again, not trained.  What was killed goes on where it was.  A longer
run goes on from where the shorter one ends.
Table 1 comes first, then the other groups, each seed by seed, so that what is there can always be
compared.

Means are over seeds, with their standard error; differences are of equal seeds.  The last
checkpoint is scored; the paper takes the best of those that it evaluates.

presets:
    cpu      16 x 16, 32 channels, 1 block, 2,500 iterations of 32; 2,048 images a score,
             against 10,000; Table 1 takes some 5 hours of two cores with --jobs 2
    gpu      32 x 32, the paper's networks in bf16, 5,000 iterations of 128; 10,000 images a score,
             against 20,000
    paper    the paper's settings: 400,000 iterations of 128; 50,000 images a score
"""

import collections
import ctypes
import functools
import json
import os
import queue
import re
import shutil
import signal
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

import data
from experiments.rows import FROZEN_ROW, REAL, ROWS, STEPS
from experiments.tables import PRINTED, table
from support import cli
from support.draws import stream
from support.files import atomic, existing, save_npz

ROOT = Path(__file__).resolve().parents[1]
FID = ROOT / "fid.py"
ASSETS = ROOT / "assets"
JUDGES = ("classes", "rotations")  # tasks of judge.py


class Preset(NamedTuple):
    """The scale of all runs of one table."""

    image_size: int
    flags: str
    iterations: int
    matched: str  # gives one U-Net the parameters and operations of Cas-DM's two, to some 4 %
    samples: int  # a score
    reference: int  # training images that they are scored against
    dims: int = 768  # of fid.py
    precision: str = "bf16"  # of sampling


SMALL = "--channels 32 --res-blocks 1 --batch-size 32 --lr 5e-4"
PRESETS = {
    # in bf16 a CPU without instructions for it takes thirty times as long
    "cpu": Preset(16, SMALL, 2500, "--res-blocks 3", 2048, 10_000, precision="fp32"),
    "gpu": Preset(32, "--precision bf16", 5000, "--res-blocks 7", 10_000, 20_000),
    "paper": Preset(32, "", 400_000, "--res-blocks 7", 50_000, 50_000, 2048),
}
METRIC_SIZE = {16: "--metric-size 64"}  # by image size; the paper's 224 for its own sizes


# ---- one run ----


class Experiment:
    """A preset's runs, in `folder`, and their lines in `results`.

    By default they are runs/table1-PRESET and experiments/table1_PRESET.jsonl.
    """

    def __init__(
        self, name, folder=None, results=None, source=None, weights=None, jobs=1, steps=STEPS
    ):
        self.preset, self.source, self.weights, self.steps = PRESETS[name], source, weights, steps
        self.folder = (folder or ROOT / "runs" / f"table1-{name}").absolute()
        self.results = (results or ROOT / "experiments" / f"table1_{name}.jsonl").absolute()
        vgg = Path(torch.hub.get_dir(), "checkpoints").glob("vgg16-*.pth")
        self.metric = "lpips" if name == "paper" or list(vgg) else "squeezenet"
        self.programs = Programs(jobs, self.folder / "output.log")
        # a checkpoint, and the statistics, are made once
        self.locks = collections.defaultdict(threading.Lock)

    def run(self, row, seed):
        """Trains, samples and scores one row with one seed, and writes its line.

        It goes on from wherever an earlier attempt got to.
        """
        how, begun = ROWS[row], time.monotonic()
        missing = self.missing(row, seed)
        tqdm.write(f"{row}, seed {seed}")
        place = self.place(row, seed)
        place.mkdir(exist_ok=True)
        line = {
            "row": row,
            "seed": seed,
            "flags": "",
            "variant": how.variant,
            "commit": commit(),
            "metric": self.metric,
            "n": self.preset.samples,
        }
        if row == REAL:
            images = place / "real.npz"
            first = self.preset.reference + seed * self.preset.samples
            self.save_real(images, first, self.preset.samples)
            score = self.score(images)
            line |= {str(steps): score for steps in missing}
        else:
            sampled = how.samples_of or row
            checkpoint = self.train(sampled, seed)
            line["flags"] = " ".join(self.flags(sampled, seed))
            for steps in missing:
                images = place / f"{steps}.npz"
                if not images.exists():
                    self.sample(checkpoint, steps, seed, images, how)
                line[str(steps)] = self.score(images)
        line["seconds"] = round(time.monotonic() - begun)
        with self.locks["results"], open(self.results, "a") as f:
            f.write(json.dumps(line) + "\n")

    def train(self, row, seed):
        """The row's finished checkpoint; the run is made, or gone on with, if it is not there.

        Where `begins_with` names a row, training goes on from a copy of that row's checkpoint: this
        equals a run in one go, and repeats nothing.
        """
        how, place = ROWS[row], self.place(row, seed)
        checkpoint = place / "checkpoint.pt"
        with self.locks[place]:
            if how.begins_with and not checkpoint.exists():
                start = self.train(how.begins_with, seed).read_bytes()
                with atomic(checkpoint) as f:
                    f.write(start)
            if checkpoint.exists():
                arguments = ["--resume", "--iterations", self.iterations(row)]
            else:
                # a log at most: it was killed before its first checkpoint
                shutil.rmtree(place, ignore_errors=True)
                arguments = [
                    *("--data", self.source, "--image-size", self.preset.image_size),
                    *("--sample-every", 0, "--save-every", self.preset.iterations // 20 or 1),
                    *self.flags(row, seed),
                ]
            self.programs.call("train.py", *arguments, "--out", place, variant=how.variant)
        return checkpoint

    def sample(self, checkpoint, steps, seed, images, how):
        """As many images as a score takes, with so many steps, in the way of the Row `how`."""
        arguments = [
            *("--n", self.preset.samples, "--steps", steps, "--seed", seed),
            *("--batch-size", 128, "--precision", self.preset.precision, "--out", images),
            *how.sampling.split(),
        ]
        self.programs.call("sample.py", checkpoint, *arguments, variant=how.variant)

    def iterations(self, row):
        """How many the row trains for."""
        return round(self.preset.iterations * ROWS[row].length)

    def flags(self, row, seed):
        """The words of the row's command line that make its run what it is.

        A frozen model that they name is trained first.
        """
        own = ROWS[row].flags.replace("MATCHED", self.preset.matched)
        flags = f"{self.preset.flags} --iterations {self.iterations(row)} {own} --seed {seed}"
        if "METRIC" in flags:
            size = METRIC_SIZE.get(self.preset.image_size, "")
            flags = f"{flags.replace('METRIC', self.metric)} {size}"
        if "FROZEN" in flags:
            frozen = os.path.relpath(self.train(FROZEN_ROW, seed), ROOT)
            flags = flags.replace("FROZEN", frozen)
        return flags.split()

    def place(self, row, seed):
        """The run's folder."""
        name = re.sub("[^a-z0-9]+", "-", row.lower()).strip("-")
        return self.folder / f"{name}-{seed}"

    def score(self, images):
        """{score: value} of an .npz, and the names of the weights that gave them."""
        found, weights = {}, []
        for name in self.networks():
            reference, flags = self.statistics(name), self.network_flags(name)
            said = self.programs.call(FID, images, reference, *flags, "--json", capture=True)
            said = json.loads(said)
            weights.append(said["weights"])
            for key, value in said.items():
                if key.removesuffix("_std") in PRINTED:
                    found[key] = value
        return found | {"weights": weights}

    def networks(self):
        """The names of what a sample is scored by."""
        tasks = [task for task in JUDGES if task != "classes" or self.training.labels is not None]
        return ["inception", *(f"judge-{task}" for task in tasks)]

    def network_flags(self, name):
        """What tells fid.py which network."""
        if name != "inception":
            return ["--judge", self.judge(name)]
        weights = ["--weights", self.weights] if self.weights else []
        return ["--dims", self.preset.dims, *weights]

    def judge(self, name):
        """The judge's file: the one in assets, or else one that is trained once."""
        size = self.preset.image_size
        kept = ASSETS / f"{name}-{size}.pt"
        if kept.exists():
            return kept
        path = self.folder / f"{name}.pt"
        with self.locks[path]:
            if not path.exists():
                task = name.removeprefix("judge-")
                arguments = ["--data", self.source, "--image-size", size, "--task", task]
                self.programs.call("experiments.judge", *arguments, "--out", path)
        return path

    def statistics(self, name):
        """A network's statistics and rows of the training images, made once."""
        path = self.folder / f"{name}-{self.preset.image_size}-{self.preset.reference}.npz"
        flags = self.network_flags(name)
        with self.locks[path]:
            if not path.exists():
                images, made = self.reference(), path.with_suffix(".partial.npz")
                self.programs.call(FID, images, *flags, "--save-stats", made)
                os.replace(made, path)
        return path

    def reference(self):
        """The training images that samples are scored against, as an .npz, made once."""
        path = self.folder / "reference.npz"
        with self.locks[path]:
            if not path.exists():
                self.save_real(path, 0, self.preset.reference)
        return path

    def save_real(self, path, first, n):
        """n training images, in an order drawn once; past the last one the first come again."""
        pixels = self.training.pixels
        order = stream(0, "reference", 0).permutation(len(pixels))
        chosen = order.take(range(first, first + n), mode="wrap")
        save_npz(pixels[np.sort(chosen)], path)

    @functools.cached_property
    def training(self):
        """The training images and their labels, from where the scripts look for them."""
        return data.load_images(self.source, self.preset.image_size, ROOT / "data")

    def lines(self):
        """The finished runs, a line each; a later line of a run adds its scores to the first."""
        if not self.results.exists():
            return []
        with self.locks["results"]:
            lines = self.results.read_text().splitlines()
        found = {}
        for line in map(json.loads, lines):
            run = line["row"], line["seed"]
            found[run] = line | found.get(run, {})
        return list(found.values())

    def missing(self, row, seed):
        """The numbers of sampling steps that the run is to be scored with, and is not yet."""
        lines = {(line["row"], line["seed"]): line for line in self.lines()}
        there = lines.get((row, seed), {})
        wanted = ROWS[row].steps or self.steps
        return [steps for steps in wanted if str(steps) not in there]

    def wanted(self, group, seeds):
        """The runs that lack a score: Table 1 first, then the rest, each seed by seed."""
        asked = [row for row, how in ROWS.items() if group in (how.group, "all")]
        first = [row for row in asked if ROWS[row].group == "table 1"]
        rest = [row for row in asked if row not in first]
        runs = [(row, seed) for rows in (first, rest) for seed in range(seeds) for row in rows]
        return [run for run in runs if self.missing(*run)]


class Programs:
    """The project's scripts, as processes of which `jobs` run at once.

    Each has its GPU, or its share of the cores.
    """

    def __init__(self, jobs, log):
        self.jobs, self.log, self.running, self.stopped = jobs, log, set(), False
        self.devices = queue.SimpleQueue()
        for job in range(jobs):
            self.devices.put(job % max(1, torch.cuda.device_count()))

    def call(self, script, *arguments, variant="", capture=False):
        """Runs a script of the project, or one of its modules by its dotted name.

        variant : of variants.py, that it runs under
        returns : what it printed, if captured
        KeyboardInterrupt where it was interrupted, ValueError where it failed.
        """
        if self.stopped:
            raise KeyboardInterrupt
        script_or_module = [ROOT / script] if Path(script).suffix == ".py" else ["-m", script]
        command = [*script_or_module, *arguments]
        if variant:
            command = ["-m", "experiments.variants", variant, *command]
        device = self.devices.get()
        with open(self.log, "a") as log:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=ROOT,
                text=True,
                env=os.environ | self.environment(device),
                stdout=subprocess.PIPE if capture else log,
                stderr=log,
                start_new_session=True,  # so that a Ctrl-C reaches it by `stop` alone, once
                preexec_fn=die_with_parent,
            )
            self.running.add(process)
            if self.stopped:  # since it was asked above: `stop` may not have seen this one
                process.terminate()
            said = process.communicate()[0]
        self.running.discard(process)
        self.devices.put(device)
        if process.returncode in (130, -signal.SIGINT, -signal.SIGTERM):
            raise KeyboardInterrupt
        if process.returncode:
            line = f"{Path(script).name} {' '.join(map(str, arguments))}"
            raise ValueError(
                f"{line} ended with {process.returncode}; expected 0; "
                f"see the end of {self.log}, and start this again"
            )
        return said

    def environment(self, device):
        """What a process is to see: its device, and how glibc is to treat its memory."""
        # glibc would give freed pages back and take them again: a third of the scorer's time
        found = {
            "MALLOC_TRIM_THRESHOLD_": str(2**32),
            "MALLOC_MMAP_THRESHOLD_": str(2**30),
        }
        if torch.cuda.is_available():
            found["CUDA_VISIBLE_DEVICES"] = str(device)
        else:
            found["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // self.jobs))
        return found

    def stop(self):
        """Asks what runs to save and end, and lets nothing new begin."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def die_with_parent():
    """Has Linux send SIGTERM to this process when the one that started it is killed.

    Two must never train in one folder.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def commit():
    """The short hash of what runs, or `unknown`."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    return found.stdout.strip() or "unknown"


# ---- the script ----


def run_all(experiment, wanted):
    """Makes the runs, so many at a time; what stops one stops all, and the next call goes on."""
    experiment.folder.mkdir(parents=True, exist_ok=True)
    _ = experiment.training  # fetched and prepared once, not by every run at a time
    with ThreadPoolExecutor(experiment.programs.jobs) as pool:
        # the statistics come first: what a score lacks is found out now
        networks = experiment.networks()
        references = [pool.submit(experiment.statistics, name) for name in networks]
        runs = [pool.submit(experiment.run, row, seed) for row, seed in wanted]
        try:
            with tqdm(total=len(runs), desc="table", unit="run", file=sys.stderr) as bar:
                for done in as_completed([*references, *runs]):
                    done.result()
                    bar.update(done in runs)
        finally:
            for run in runs:
                run.cancel()
            experiment.programs.stop()


def main(argv=None):
    """The runs that are wanted and missing, then the table."""
    args = parse_args(argv)
    source = args.data if args.data in data.DATASETS else Path(args.data).absolute()
    experiment = Experiment(
        args.preset, args.work, args.results, source, args.weights, args.jobs, args.steps
    )
    wanted = experiment.wanted(args.group, args.seeds)
    if wanted and not args.print:
        if args.weights:
            existing(args.weights, "file of Inception weights")
        run_all(experiment, wanted)
    if not experiment.lines():
        raise ValueError(
            f"{experiment.results} has no line; expected finished runs; leave --print out"
        )
    table(experiment.lines(), args.steps)


def parse_args(argv):
    """The arguments; SystemExit 2, one line, for whatever they alone show to be wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    groups = [*dict.fromkeys(how.group for how in ROWS.values()), "all"]
    parser.add_argument("--group", choices=groups, default="table 1", help="of rows")
    parser.add_argument("--seeds", type=cli.whole(1), default=3, help="runs a row")
    text = "of sampling, of every row that has none of its own"
    parser.add_argument("--steps", type=cli.whole(1), nargs="+", default=STEPS, help=text)
    text = "CIFAR-10 by name, or its images as an .npz"
    parser.add_argument("--data", default="cifar10", help=text)
    text = "where the runs lie (default: runs/table1-PRESET)"
    parser.add_argument("--work", type=Path, help=text)
    text = "a JSON line a run (default: experiments/table1_PRESET.jsonl)"
    parser.add_argument("--results", type=Path, help=text)
    text = "runs side by side, each on its GPU or its share of the cores"
    parser.add_argument("--jobs", type=cli.whole(1), default=1, help=text)
    text = "of Inception, as fid.py takes them (default: downloaded once)"
    parser.add_argument("--weights", type=Path, help=text)
    parser.add_argument("--print", action="store_true", help="the table alone")
    args = parser.parse_args(argv)
    args.weights = args.weights and args.weights.absolute()
    return args


if __name__ == "__main__":
    sys.exit(cli.run(main))
