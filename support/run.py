r"""One training run: what the loop of train.py changes, and the folder that it leaves.

    checkpoint.pt       all that the run can be had back from, bit for bit on a CPU (`Run.save`, `Run.load`)
    log.jsonl           a row every LOG_EVERY steps, and one an evaluation
    curves.png, samples_STEP.png, best.pt

Nothing here waits for a GPU but what the log, a checkpoint or a picture needs: findings stay on the device until one is due.
"""
import copy
import json
import time

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from support import edges
import fid
from support import parallel
from support.curves import draw_curves, read_log
from data import stream
from refiner import build_model
from sample import save_grid, write_checkpoint
from unet import load_published
from neighbours.variance import ImportanceSampler

LOG_EVERY = 10      # steps; a row is the mean over them
GRID, GRID_STEPS = 64, 100      # images in samples_STEP.png, and their DDIM steps (T where it is smaller)


class Run:
    """What training changes, and the folder that it leaves: all of it but the pictures can be had back from checkpoint.pt."""

    def __init__(self, settings, folder, device, images, metrics, network=None, resumed=False):
        self.settings, self.folder, self.device, self.images = settings, folder, device, images
        self.network = network      # FID's
        if device.type == "cpu":
            edges.keep_memory()
        self.metrics = {name: (weight, m.to(device) if isinstance(m, torch.nn.Module) else m) for name, (weight, m) in metrics.items()}
        torch.manual_seed(int(stream(settings["seed"], "weights", 0).integers(2 ** 31)))
        self.model = build_model(settings).to(device)
        if settings["init_eps"] and not resumed:
            file = settings["init_eps"]
            weights = edges.read_tensors(file, "improved-diffusion checkpoint")
            load_published(getattr(self.model, self.model.theta), weights, file)
        if not self.model.loss_terms:       # the self-perceptual objective alone: a second stage of the model that judges it (SP)
            start_from(self.model, metrics["self-perceptual"][1].frozen)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if settings["compile"]:
            self.model.compile(mode="reduce-overhead" if device.type == "cuda" else None)      # CUDA graphs
        self.net = DistributedDataParallel(self.model) if parallel.size() > 1 else self.model
        self.net.loss_terms = self.model.loss_terms
        self.weights, self.averages = list(self.model.parameters()), list(self.ema.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=settings["lr"], weight_decay=0.0, fused=True)
        self.terms = [*self.model.loss_terms, *self.metrics, "loss"]
        self.step, self.saved = 0, None
        self.importance = ImportanceSampler(settings["T"]) if "vlb" in self.model.loss_terms else None
        # Findings stay on the device, so that no step waits for it: the losses of this step and their sums since the log's last row,
        # which of them (and the gradient) were finite so far, how many steps were applied in this process, how often a stop was asked for.
        self.values, self.sums = torch.zeros(2, len(self.terms), device=device)
        self.finite = torch.ones(len(self.terms) + 1, dtype=torch.bool, device=device)
        self.applied = torch.zeros((), dtype=torch.int64, device=device)
        self.asked = torch.zeros((), device=device)
        self.begun = self.clock = (0, time.monotonic())

    def put(self, array):
        """A numpy array on the device, without waiting for it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)

    def extras(self, draw, image):
        """What some flags need beside t and eps, for the global batch: labels, t' of a self-perceptual metric, importance-sampled t."""
        s, n, found = self.settings, len(image), {}
        if s["num_classes"]:
            found["y"] = np.where(draw.random(n) < s["label_dropout"], s["num_classes"], self.images.labels[image])
        if s["self_perceptual"]:
            found["t_other"] = draw.integers(1, s["T"] + 1, n)
        if self.importance:
            found["t"], found["t_weight"] = self.importance.draw(draw, n)
            self.seen = found["t"], torch.zeros(n, device=self.device)
        return found

    def watch(self, mine):
        """Keeps each image's term of the bound for the importance sampler."""
        return (lambda each: self.seen[1][mine].copy_(each["vlb"].detach())) if self.importance else None

    def shares(self):
        """This rank's slices of the global batch, one an accumulated part; the gradient is exchanged in the last of them."""
        parts, stride = self.settings["accumulate"], parallel.size() * self.settings["accumulate"]
        for part in range(parts):
            self.net.require_backward_grad_sync = part == parts - 1
            yield slice(parallel.rank() + part * parallel.size(), None, stride)

    def note(self, losses):
        self.values += torch.stack([losses[name].detach() for name in self.terms]) / self.settings["accumulate"]

    def guard(self, stop):
        """Keeps a step with a non-finite loss or gradient, and all after it, from being applied; nothing waits for the device."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.weights if p.grad is not None])
        found = parallel.add(torch.cat([self.values, torch.stack([norm, torch.full_like(norm, stop.asked)])])) / parallel.size()
        self.finite &= found[:-1].isfinite()
        self.optimizer.found_inf = (~self.finite.all()).float()     # the fused AdamW then leaves weights and moments alone
        self.applied += self.finite.all()
        self.sums += found[:-2]
        self.asked += found[-1]
        self.values.zero_()

    def stopped(self, stop):
        """Whether to leave the loop; several ranks leave it after the same step, looking when the log has a row."""
        return stop.asked if parallel.size() == 1 else self.step % LOG_EVERY == 0 and bool(self.asked)

    def check(self):
        """ArithmeticError, naming step and terms, once a loss or gradient was not finite."""
        if not self.finite.all():
            bad = [name for name, ok in zip([*self.terms, "gradient"], self.finite.tolist()) if not ok]
            names = [name for name in bad if name not in ("loss", "gradient")] or bad[:1]
            if parallel.rank():
                raise SystemExit(1)     # rank 0 says it
            raise ArithmeticError(f"step {self.begun[0] + int(self.applied) + 1}: {', '.join(names)} is not finite; expected numbers; the step was not applied, "
                                  f"the last checkpoint in {self.folder} is from before it; try a smaller --lr or --precision fp32")

    @torch.no_grad()        # else every average would carry the graph of all steps before it
    def update_ema(self):
        """CHOICE: decay 0.9999 as in improved-diffusion, ramped as (1 + k) / (10 + k): without a ramp 61 % of the random start is left after 5k steps."""
        decay = min(self.settings["ema"], (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    def after_step(self, bar, stop):
        """Whatever is due: the check of `guard`'s findings, a row, a checkpoint, pictures. On a GPU nothing else waits for the device."""
        s, row = self.settings, self.step % LOG_EVERY == 0
        if self.importance:     # on the CPU, where the next t is drawn
            self.importance.note(self.seen[0], parallel.add(self.seen[1]).cpu().numpy())
        pictures = due(s, "sample_every", self.step) or due(s, "eval_every", self.step)
        save = pictures or due(s, "save_every", self.step) or self.step == s["iterations"]
        if row or save or self.device.type == "cpu":
            self.check()
        if row:
            bar.set_postfix(loss=f"{self.log():.4f}")
        if save:
            self.save()
        if pictures:
            self.show(stop)

    def show(self, stop):
        """The grid and the evaluation due at this step, unless the folder has them or a signal asks to stop; --resume makes up for those."""
        try:
            grid, evaluation = parallel.first(lambda: pending(self.settings, self.folder, self.step))
            if grid:
                self.draw(stop)
            if evaluation:
                self.evaluate(stop)
        except edges.Stopped:
            pass

    def log(self):
        """One row: the mean of every term since the row before. Returns that of their sum."""
        steps, seconds = self.step - self.clock[0], time.monotonic() - self.clock[1]
        row = {"step": self.step} | dict(zip(self.terms, (self.sums / LOG_EVERY).tolist()))
        self.write(row | {"images_per_second": round(steps * self.settings["batch_size"] / seconds, 2)})
        self.sums.zero_()
        self.clock = (self.step, time.monotonic())
        return row["loss"]

    def write(self, row):
        if parallel.rank():
            return
        with open(self.folder / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def save(self, name="checkpoint.pt"):
        """Writes all that `load` needs; never a state with a non-finite step in it."""
        self.check()
        self.saved = self.step
        if parallel.rank() == 0:
            write_checkpoint(self.folder / name, self.settings, step=self.step, model=self.model.state_dict(), ema=self.ema.state_dict(),
                             optimizer=self.optimizer.state_dict(), sums=self.sums, data=self.images.fingerprint,
                             **({"importance": self.importance.state_dict()} if self.importance else {}))

    def load(self, state):
        """Goes back to a checkpoint's step; rows that the log has beyond it are cut off."""
        try:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.sums.copy_(state["sums"])
            if self.importance:
                self.importance.load_state_dict(state["importance"])
            self.step = self.saved = state["step"]
        except Exception as e:      # tensors of any wrong kind
            raise ValueError(f"{self.folder / 'checkpoint.pt'} does not fit its settings ({' '.join(str(e).split())[:160]}); expected what train.py wrote") from None
        self.begun = self.clock = (self.step, time.monotonic())
        rows = [row for row in read_log(self.folder) if row["step"] <= self.step]
        if (self.folder / "log.jsonl").exists() and parallel.rank() == 0:
            with edges.atomic(self.folder / "log.jsonl") as f:
                f.writelines(json.dumps(row).encode() + b"\n" for row in rows)

    def draw(self, stop):
        """samples_STEP.png, always from the same noise, and curves.png."""
        images = fid.sampled(self.ema, GRID, **self.sampling(stop))
        pixels = torch.cat([parallel.concat(batch) for batch in images]).permute(0, 2, 3, 1).cpu()
        if parallel.rank() == 0:
            draw_curves(read_log(self.folder), self.folder / "curves.png")
            save_grid(pixels, grid_path(self.folder, self.step), self.model.num_classes)

    def evaluate(self, stop):
        """FID, sFID and IS of samples from the EMA against the training images; best.pt is the checkpoint with the least FID so far."""
        n = self.settings["eval_samples"]
        found = fid.scores(fid.features_of(fid.sampled(self.ema, n, **self.sampling(stop)), self.network, n), fid.reference(self.images, self.network))
        distance = next(iter(found))        # fid, or its stand-in where the weights are random
        if all(found[distance] < row[distance] for row in read_log(self.folder) if distance in row):
            self.save("best.pt")
        self.write({"step": self.step} | {name: value for name, value in found.items() if name not in ("n_a", "n_b")})
        if parallel.rank() == 0:
            draw_curves(read_log(self.folder), self.folder / "curves.png")

    def sampling(self, stop):
        s, watch = self.settings, stop.check if parallel.size() == 1 else None      # one rank must not leave while the others wait for it
        return dict(image_size=s["image_size"], steps=min(GRID_STEPS, s["T"]), seed=s["seed"], batch_size=GRID, watch=watch)


def due(s, every, step):
    """Whether what happens every `every` steps does now; 0 is never, and the last step always counts."""
    return bool(s[every]) and (step % s[every] == 0 or step == s["iterations"])


def pending(s, folder, step):
    """Whether a grid, and an evaluation, are due at this step and not in the folder yet."""
    grid = due(s, "sample_every", step) and not grid_path(folder, step).exists()
    return grid, due(s, "eval_every", step) and not any(row["step"] == step and "loss" not in row for row in read_log(folder))


def grid_path(folder, step):
    return folder / f"samples_{step:06d}.png"


def start_from(model, other):
    """Copies the weights of another model of ours into a DDPM. ValueError where they do not fit, or mean something else."""
    try:
        model.load_state_dict(other.state_dict())
        if model.predicts_x0 != other.predicts_x0:      # weights of one shape
            raise RuntimeError(f"it predicts {'x0' if other.predicts_x0 else 'eps'}")
    except RuntimeError as e:
        raise ValueError(f"--self-perceptual: its model differs from the one to be trained ({' '.join(str(e).split())[:160]}); expected "
                         "a DDPM trained with the same settings; give those settings") from None
