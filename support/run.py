r"""One training run: what the loop of train.py changes, and the folder that it leaves.

    checkpoint.pt       all that the run can be had back from, bit for bit on a CPU
    log.jsonl           a row every LOG_EVERY steps, and one an evaluation
    best.pt             the checkpoint of the best evaluation
    curves.png, samples_STEP.png

Only the log, checkpoints, pictures and importance sampling wait for the GPU.
"""

import collections
import copy
import json
import shlex
import time
from pathlib import Path

import torch

import fid
from data import from_pixels
from features import features_of, reference_features
from losses import LAMBDAS
from sample import open_sampler, sampler_defaults
from support import cli, parallel, pictures
from support.checkpoint import write_checkpoint
from support.draws import StepDraws, stream
from support.files import atomic
from support.guard import Guard
from support.models import build, neighbours, set_precision

LOG_EVERY = 10  # steps; a row is the mean over them
BEST_BY = "fid"  # the score whose least value makes best.pt
GRID = 64  # images in samples_STEP.png


class Run:
    """What training changes, all of which is in checkpoint.pt, and the run's folder.

    metrics   : {name: (lambda, (pred, batch) -> [B])}
    inception : FID's network, if the run evaluates
    state     : the checkpoint to go on from; None: a new run
    """

    def __init__(self, settings, folder, device, images, metrics, stop, inception=None, state=None):
        self.settings = settings
        self.folder, self.device, self.images, self.stop = folder, device, images, stop
        self.inception = inception
        if device.type == "cpu":
            cli.keep_memory()
        lambdas = {name: settings[f"lambda_{name}"] for name in LAMBDAS}
        lambdas |= {name: weight for name, (weight, _) in metrics.items()}
        self.lambdas = collections.defaultdict(lambda: 1.0, lambdas)  # a term without a flag: 1
        self.metrics = {name: metric.to(device) for name, (_, metric) in metrics.items()}

        torch.manual_seed(int(stream(settings["seed"], "weights", 0).integers(2**31)))
        self.raw_model = build(settings).to(device)
        self.schedule = self.raw_model.schedule
        if not state:
            for neighbour in neighbours():
                neighbour.start(self.raw_model, settings, self.metrics)
        self.ema = copy.deepcopy(self.raw_model).eval().requires_grad_(False)
        self.weights = list(self.raw_model.parameters())
        self.averages = list(self.ema.parameters())
        for model in (self.raw_model, self.ema):
            set_precision(model, settings["precision"])
        if settings["compile"]:
            self.raw_model.compile(mode=compile_mode(device, settings["accumulate"]))
        self.model = parallel.wrap(self.raw_model)
        # CHOICE: the paper names no optimiser; AdamW without decay is improved-diffusion's
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=settings["lr"], weight_decay=0.0, fused=True
        )

        self.extras = [extra for neighbour in neighbours() for extra in neighbour.draws(settings)]
        self.noting = [extra for extra in self.extras if hasattr(extra, "note")]
        self.terms = [*self.raw_model.terms, *self.metrics, "loss"]
        self.step, self.saved, self.bar = 0, None, None
        self.guard = Guard(self.optimizer, self.terms, stop)
        if state:
            self.load(state)
        self.guard.begun = self.step
        draws = StepDraws(settings, images.pixels, images.labels, self.extras)
        self.draws = draws(range(self.step, settings["iterations"]))

    # ---- what the loop of train.py calls, in its order ----

    def goes_on(self):
        """Whether another step is due.  The first call starts the progress bar and the clock.

        Several ranks leave after the same step: they look for a stop when the log has a row.
        """
        if self.bar is None:
            total = self.settings["iterations"]
            self.bar = cli.progress(total, "training", "it", initial=self.step)
            self.start_clock()
        asked = self.stop.asked
        if parallel.size() > 1:
            asked = self.step % LOG_EVERY == 0 and self.guard.stopped()
        return self.step < self.settings["iterations"] and not asked

    def draw(self):
        """This rank's share of the step's batch: x0, t, eps and the rest, {field of Batch: ...}.

        In as many parts as --accumulate says; the gradient is exchanged in the last of them.
        """
        indices, self.drawn, dropout_seed = next(self.draws)
        torch.manual_seed(dropout_seed + parallel.rank())
        n, parts = len(indices), self.settings["accumulate"]
        if self.noting:
            terms = self.raw_model.terms
            self.noted = {term: torch.zeros(n, device=self.device) for term in terms}
        for part in range(parts):
            first, stride = parallel.rank() + part * parallel.size(), parallel.size() * parts
            self.mine = slice(first, None, stride)
            self.model.require_backward_grad_sync = part == parts - 1
            rest = {name: self.put(values[self.mine]) for name, values in self.drawn.items()}
            x0 = from_pixels(self.put(self.images.pixels[indices[self.mine]]))
            yield x0, rest.pop("t"), rest.pop("eps"), rest

    def put(self, array):
        """A numpy array on the device, without waiting for it."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def backward(self, terms, losses):
        """Adds the gradient of a part, and keeps its losses for the log.

        terms : {name: scalar} of `losses.objective`         losses : {name: [B]}, before the mean
        """
        parts = self.settings["accumulate"]
        (terms["loss"] / parts).backward()
        self.guard.note(terms, parts)
        if self.noting:
            for name, noted in self.noted.items():
                noted[self.mine] = losses[name].detach()

    @torch.no_grad()  # else every average would carry the graph of all steps before it
    def average(self):
        """ema <- d ema + (1 - d) weights, with d = min(--ema, (1 + k) / (10 + k)) at step k.

        CHOICE: 0.9999 as in improved-diffusion, and a ramp: without it 61 % of the random start
        is left after 5k steps.
        """
        decay = min(self.settings["ema"], (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    def after_step(self):
        """Checks, logs, saves and draws, where their interval has come."""
        self.step += 1
        self.bar.update()
        if self.noting:  # on the CPU, where the next t is drawn
            noted = {name: parallel.add(v).cpu().numpy() for name, v in self.noted.items()}
            for extra in self.noting:
                extra.note(self.drawn["t"], noted)
        settings = self.settings
        row_due = self.step % LOG_EVERY == 0
        pictures_due = due(settings, "sample_every", self.step)
        pictures_due = pictures_due or evaluation_due(settings, self.step)
        last = self.step == settings["iterations"]
        save_due = pictures_due or last or due(settings, "save_every", self.step)
        if row_due or save_due or self.device.type == "cpu":
            self.guard.check()
        if row_due:
            self.bar.set_postfix(loss=f"{self.log():.4f}")
        if save_due:
            self.save()
        if pictures_due:
            self.show()
        if save_due:
            self.start_clock()

    def finish(self):
        """Saves the last step; returns whether the run is at its end, its pictures drawn."""
        self.bar.close()
        if self.saved != self.step:
            self.save()
        parallel.meet()  # a rank that left now would have torchrun end rank 0, which may be writing
        return self.step == self.settings["iterations"] and not any(self.pending())

    def pending(self):
        """`pending` as rank 0 sees the folder, which decides for all."""
        found = None
        if parallel.rank() == 0:
            found = pending(self.settings, self.folder, self.step)
        return parallel.same(found)

    # ---- the folder ----

    def start_clock(self):
        """images_per_second counts training alone, from here on."""
        self.clock = self.step, time.monotonic()

    def log(self):
        """One row: the mean of every term since the row before. Returns that of their sum."""
        since, begun = self.clock
        row = {"step": self.step} | self.guard.means(LOG_EVERY)
        images = (self.step - since) * self.settings["batch_size"]
        row["images_per_second"] = round(images / (time.monotonic() - begun), 2)
        self.write(row)
        self.start_clock()
        return row["loss"]

    def write(self, row):
        """Appends a row to log.jsonl; rank 0 alone does."""
        if parallel.rank():
            return
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def save(self, name="checkpoint.pt"):
        """Writes all that `load` needs; never a state with a non-finite step in it."""
        self.guard.check()
        self.saved = self.step
        if parallel.rank():
            return
        write_checkpoint(
            self.folder / name,
            self.settings,
            step=self.step,
            model=self.raw_model.state_dict(),
            ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            sums=self.guard.sums,
            data=self.images.fingerprint,
            **{extra.name: extra.state_dict() for extra in self.noting},
        )

    def load(self, state):
        """Goes back to a checkpoint's step; rows that the log has beyond it are cut off."""
        try:
            self.raw_model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.guard.sums.copy_(state["sums"])
            for extra in self.noting:
                extra.load_state_dict(state[extra.name])
            self.step = self.saved = state["step"]
        except Exception as e:  # tensors of any wrong kind
            raise ValueError(
                f"{self.folder / 'checkpoint.pt'} does not fit its settings "
                f"({cli.one_line(e)[:160]}); expected what train.py wrote; "
                "go on from another copy of it, or start another run"
            ) from None
        log = self.folder / "log.jsonl"
        if log.exists() and parallel.rank() == 0:
            rows = [row for row in pictures.read_log(self.folder) if row["step"] <= self.step]
            with atomic(log) as f:
                f.writelines(json.dumps(row).encode() + b"\n" for row in rows)

    # ---- pictures and scores ----

    def show(self):
        """The grid and the evaluation due at this step, unless the folder has them.

        Where a signal asks to stop they are left undone, and --resume makes up for them.
        """
        try:
            grid, evaluation = self.pending()
            if grid:
                self.draw_grid()
            if evaluation:
                self.evaluate()
        except cli.Stopped:
            pass

    def samples(self, n):
        """n images of the moving average, always from the same noise, as fid.sampled's batches."""
        args = sampler_defaults()
        args.seed = self.settings["seed"]
        sampler = open_sampler(args, self.ema, self.settings)
        watch = None  # one rank must not leave while the others wait for it
        if parallel.size() == 1:
            watch = self.stop.check
        batch_size = batch_size_of_samples(self.device, self.settings)
        return fid.sampled(sampler, n, batch_size, watch)

    def draw_grid(self):
        """samples_STEP.png and curves.png."""
        batches = [parallel.concat(batch) for batch in self.samples(GRID)]
        pixels = torch.cat(batches).permute(0, 2, 3, 1).cpu()
        if parallel.rank() == 0:
            path = grid_path(self.folder, self.step)
            pictures.draw_curves(pictures.read_log(self.folder), self.folder / "curves.png")
            pictures.save_grid(pixels, path, self.raw_model.num_classes)

    def evaluate(self):
        """Scores samples against the training images; best.pt is the best so far of its kind.

        Of one kind are evaluations of equal n, drawn by one sampler in as many steps.
        """
        n = self.settings["eval_samples"]
        kind = {"n": n} | {key: self.settings[key] for key in ("sampler", "sample_steps")}
        reference = reference_features(self.images, self.inception)
        found = fid.compare(features_of(self.samples(n), self.inception, n), reference)
        rows = [row for row in pictures.read_log(self.folder) if BEST_BY in row]
        rivals = [row for row in rows if same_kind(row, kind)]
        if all(found[BEST_BY] < row[BEST_BY] for row in rivals):
            self.save("best.pt")
        scores = {key: value for key, value in found.items() if key not in ("n_a", "n_b")}
        self.write({"step": self.step} | kind | scores)
        if parallel.rank() == 0:
            pictures.draw_curves(pictures.read_log(self.folder), self.folder / "curves.png")

    # ---- what is said ----

    def introduce(self):
        """The first lines: every setting, the sizes, and where the run is written."""
        settings = self.settings
        print(", ".join(f"{key} {v}" for key, v in settings.items() if not cli.is_unset(v)))
        print(
            f"{sum(p.numel() for p in self.weights):,} parameters on {self.device}; "
            f"{len(self.images.pixels):,} images of {self.images.name}; "
            f"step {self.step} of {settings['iterations']}"
        )
        if settings["sample_every"] or settings["eval_every"] or settings["eval_at"]:
            size = batch_size_of_samples(self.device, settings)
            print(f"samples are drawn in {settings['precision']}, {size} at a time")
        print(f"writing to {self.folder}")

    def conclude(self, finished):
        """The last lines: what to do next. Returns the exit code."""
        here = Path.cwd()
        place = self.folder
        if place.is_relative_to(here):
            place = place.relative_to(here)
        if not finished:
            again = f"{parallel.launcher()} train.py --resume --out {shlex.quote(str(place))}"
            if parallel.size() == 1 and self.device != cli.open_device("auto"):
                again += f" --device {self.device}"
            print(f"stopped at step {self.step}, which is saved; to go on: {again}")
            return 130
        names = ", ".join(sorted(path.name for path in self.folder.iterdir()))
        print(f"{self.step} steps done; {self.folder} holds {names}\nnext:")
        checkpoint = shlex.quote(str(place / "checkpoint.pt"))
        if self.raw_model.makes_images:
            print(f"  python sample.py {checkpoint} --n 64 --out samples.png")
            print(f"  python sample.py {checkpoint} --trace trace.png")
        else:
            guided = f"--classifier {checkpoint} --guidance 1 --label 0"
            print(f"  python sample.py CHECKPOINT {guided}")
        return 0


def same_kind(row, kind):
    """Whether a row of the log is of that kind; what an older row does not say counts as equal."""
    return all(row.get(key, value) == value for key, value in kind.items())


def due(settings, every, step):
    """Whether the work that settings[every] repeats is due at this step.

    0: never.  The last step always counts.
    """
    if not settings[every] or step == 0:
        return False
    return step % settings[every] == 0 or step == settings["iterations"]


def evaluation_due(settings, step):
    """Whether --eval-every or --eval-at asks for an evaluation at this step."""
    return due(settings, "eval_every", step) or step in settings["eval_at"]


def pending(settings, folder, step):
    """Whether a grid, and an evaluation, are due at this step and not in the folder yet."""
    grid = due(settings, "sample_every", step) and not grid_path(folder, step).exists()
    rows = pictures.read_log(folder)
    evaluated = any(row["step"] == step and "loss" not in row for row in rows)
    return grid, evaluation_due(settings, step) and not evaluated


def grid_path(folder, step):
    """Where the grid of samples at this step is."""
    return folder / f"samples_{step:06d}.png"


def batch_size_of_samples(device, settings):
    """Twice what a GPU trains at once, within 64 and 256; image i is the same for any batch."""
    if device.type == "cpu":
        return 64
    at_once = settings["batch_size"] // (parallel.size() * settings["accumulate"])
    return min(256, max(64, 2 * at_once))


def compile_mode(device, parts):
    """CUDA graphs on a GPU, but not for several parts a step.

    There they are wrong or an error in torch (github.com/pytorch/pytorch/issues/169545).
    """
    return "reduce-overhead" if device.type == "cuda" and parts == 1 else None
