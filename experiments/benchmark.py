"""How fast the code is, against plain references and the hardware, all measured in one run.

    python -m experiments.benchmark               every row
    python -m experiments.benchmark step lpips    some of them
    python -m experiments.benchmark gpu           on a GPU: a training step in absolute numbers

A figure is the median of interleaved repeats.  "ratio" is what the target bounds: how many times
faster than the reference (">= 2 x"), our time over the reference's ("<= 1.02"), or our seconds
("<= 2 s").  "of peak" is the work's FLOP/s over the best of large 3 x 3 convolutions, forward and
backward, in the same repeats.  Where both sides compute the same numbers, "differ" is their largest
relative difference.  Networks have the paper's size at 32 x 32 (128 channels, 3 blocks); a training
step has batch 8 on a CPU, 128 on a GPU; data and metric weights are random.

rows:
"""

import contextlib
import gc
import io
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import scipy.linalg
import torch
from torch import nn
from torch.utils.data import DataLoader

import inception
import metrics
import scores
import train
from data import Images, from_pixels
from experiments.measuring import (
    SIZE,
    Peak,
    Row,
    batch_size,
    flops,
    in_turn,
    interleaved,
    print_cells,
    print_line,
    randomised,
)
from experiments.plain import Cifar, lpips_pair, network_step, published_inception
from features import features_of
from refiner import build_model
from sample import Sampler, load_model, open_sampler, sampler_defaults
from support import cli
from support.draws import batch_indices
from support.run import LOG_EVERY, Run
from support.settings import defaults

CIFAR10 = Path(__file__).resolve().parents[2] / "shared/data/cifar10_train.npz"
SHAPES = Path(__file__).resolve().parents[1] / "assets/casdm-shapes.pt"
FP32, BF16 = torch.float32, torch.bfloat16


# ---- training ----


def step(device, folder, precision="fp32", target=">= 1.08 x"):
    """theta's training step; the same network written plainly"""
    run = Steps(device, folder, model="ddpm", precision=precision)
    plain = network_step(run.raw_model.theta, device, plain=True)
    peak = Peak(flops(plain), FP32, 0.72)
    if precision == "bf16":
        peak = Peak(flops(plain), BF16)
    return Row(run, plain, target, peak=peak)


def step_bf16(device, folder):
    """theta's step in bf16; the same fp32 reference"""
    return step(device, folder, "bf16", ">= 1.7 x")


def cascade(device, folder):
    """the full Cas-DM step; theta's step and phi's step"""
    run = Steps(device, folder)
    theta, phi = (network_step(net, device) for net in run.raw_model.children())
    return Row(run, in_turn(theta, phi), "<= 1.02")


def casdm_lpips(device, folder, precision="fp32", target="<= 0.95"):
    """the full Cas-DM step with LPIPS; two plain network steps and piq's LPIPS"""
    ours, piqs = lpips_pair(device, folder)
    if precision == "bf16":
        in_bf16(ours)
    metric = {"lpips": (0.1, metrics.OnX0(ours))}
    run = Steps(device, folder, metric, precision=precision)
    theta, phi = (network_step(net, device, plain=True) for net in run.raw_model.children())
    piqs = forward_backward(piqs, device, batch_size(device))
    return Row(run, in_turn(theta, phi, piqs), target)


def casdm_lpips_bf16(device, folder):
    """the same step in bf16, LPIPS's network included; the same fp32 reference"""
    return casdm_lpips(device, folder, "bf16", "<= 0.60")


def optimiser(device, folder):
    """AdamW with its guard, and the moving average; a memory copy of the bytes they must touch"""
    run = Steps(device, folder, model="ddpm")
    for p in run.weights:
        p.grad = torch.randn_like(p)
    here = torch.cat([p.detach().flatten() for p in run.weights])
    there = torch.empty_like(here)

    def work():
        run.optimizer.step()
        run.average()

    def copies():
        # AdamW reads w, g, m, v and writes w, m, v; the average reads w, ema and writes ema: ten
        # tensors, and a copy touches two
        for _ in range(5):
            there.copy_(here)

    return Row(work, copies, "<= 1.3")


class Steps(Run):
    """Called, it lets the real loop, train.train, through `burst` steps.

    It leaves no file but the log.
    """

    burst = 1

    def __init__(self, device, folder, metrics=None, **settings):
        n = batch_size(device)
        pixels = np.random.default_rng(0).integers(0, 256, (4 * n, SIZE, SIZE, 3), np.uint8)
        images = Images(pixels, None, "noise", "0")
        fixed = {
            "image_size": SIZE,
            "batch_size": n,
            "iterations": 10**9,
            "sample_every": 0,
            "save_every": 0,
        }
        settings = defaults() | fixed | settings
        stop = SimpleNamespace(asked=False)
        super().__init__(settings, folder, device, images, metrics or {}, stop)
        randomised(self.raw_model)

    def __call__(self):
        self.stop.asked = False
        with contextlib.redirect_stderr(io.StringIO()):
            train.train(self)

    def after_step(self):
        super().after_step()
        self.stop.asked = self.step % self.burst == 0

    def save(self):
        self.saved = self.step


# ---- LPIPS ----


def lpips(device, folder):
    """LPIPS at 224 x 224, forward and backward; piq's class"""
    return lpips_row(lpips_pair(device, folder), device, ">= 1.03 x", 1e-5)


def lpips_bf16(device, folder):
    """LPIPS with its network in bf16; piq's class in fp32"""
    ours, piqs = lpips_pair(device, folder)
    in_bf16(ours)
    return lpips_row((ours, piqs), device, ">= 1.75 x", 1e-2)


def lpips_row(pair, device, target, tolerance):
    """A row of the two metrics on half a batch."""
    n = batch_size(device) // 2
    ours, piqs = (forward_backward(metric, device, n) for metric in pair)
    return Row(ours, piqs, target, tolerance)


def in_bf16(metric):
    """Puts the network of a FeatureDistance under bfloat16's autocast; the rest stays float32."""
    metric.extractor = Bf16(metric.extractor)


class Bf16(nn.Module):
    """An extractor under autocast; its features come out in float32."""

    def __init__(self, extractor):
        super().__init__()
        self.extractor = extractor

    def forward(self, x):
        with torch.autocast(x.device.type, BF16):
            features = self.extractor(x)
        return {name: f.float() for name, f in features.items()}


def forward_backward(metric, device, n):
    """A call of the metric and its gradient, on n fixed pairs of images."""
    generator = torch.Generator().manual_seed(1)
    pairs = torch.rand(2, n, 3, SIZE, SIZE, generator=generator) * 2 - 1
    x0_hat, x0 = pairs.to(device)
    x0_hat.requires_grad_()

    def call():
        distance = metric(x0_hat, x0)
        torch.autograd.grad(distance.sum(), x0_hat)
        return distance.detach()

    return call


# ---- sampling, input, start ----


def ddim(device, folder):
    """the DDIM loop, 100 steps; the bare network's forwards"""
    model = randomised(build_model({"model": "ddpm"})).to(device).eval()
    sampler, n = Sampler(model, SIZE, steps=100), batch_size(device) // 8
    x = torch.randn(n, 3, SIZE, SIZE, device=device)
    t = torch.linspace(0, 1000, n, device=device)

    @torch.inference_mode()
    def forwards():
        for _ in range(100):
            model.theta(x, t)

    return Row(lambda: sampler(0, n), forwards, "<= 1.01")


def few_steps(device, folder):
    """64 images of the default run's weights in its own ten steps; in DDIM's hundred"""
    model, _, settings = load_model(SHAPES, device)

    def sampler(name, steps):
        args = sampler_defaults()
        args.sampler, args.steps = name, steps
        return open_sampler(args, model, settings)

    ten, hundred = sampler(None, None), sampler("ddim", 100)
    return Row(lambda: ten(0, 64), lambda: hundred(0, 64), ">= 9 x")


def epoch_of_input(device, folder):
    """an epoch of CIFAR-10's size as batches in [-1, 1]; a torchvision DataLoader, 2 workers"""
    n, size = 50_000, 128
    pixels = np.random.default_rng(0).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)
    data = Cifar(pixels)
    loader = DataLoader(data, size, shuffle=True, num_workers=2, persistent_workers=True)
    epochs = iter(range(10**9))

    def work():
        seed = next(epochs)
        for i in range(math.ceil(n / size)):
            from_pixels(pixels[batch_indices(n, size, i, seed)])

    def load():
        for _ in loader:
            pass

    return Row(work, load, ">= 20 x")


def start(device, folder, data="shapes", target="<= 2 s"):
    """python train.py on shapes, imports excluded: to its first step"""

    class BegunError(Exception):
        pass

    def work():
        """One start of train.py, up to its first loss."""
        out = tempfile.mkdtemp(dir=folder)
        arguments = ["--data", data, "--out", out, "--device", str(device)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(contextlib.suppress(BegunError))
            stack.enter_context(mock.patch("train.training_losses", side_effect=BegunError))
            train.main(arguments)

    return Row(work, None, target)


def start_cifar10(device, folder):
    """the paper's Cas-DM on CIFAR-10's 49,923 images in an .npz: to its first step"""
    if not CIFAR10.exists():
        raise FileNotFoundError(f"{os.path.relpath(CIFAR10)} does not exist")
    return start(device, folder, str(CIFAR10), "<= 5 s")


# ---- evaluation ----


def inception_features(device, folder, dtype=FP32, target=">= 1.4 x", tolerance=1e-4):
    """Inception features of images; torchvision's blocks with their batch norms"""
    torch.manual_seed(0)
    published = published_inception()
    torch.save(published.state_dict(), folder / "inception.pth")
    ours = inception.InceptionFeatures(folder / "inception.pth").to(device, dtype)
    published = published.to(device).eval()
    shape = (2 * batch_size(device), 3, SIZE, SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def work():
        _, _, logits = ours(images)
        return logits

    @torch.inference_mode()
    def reference():
        return published((inception.tf1_resize(images.float(), 299) - 128) / 128)

    return Row(work, reference, target, tolerance)


def inception_bf16(device, folder):
    """Inception features in bf16; the same fp32 reference"""
    return inception_features(device, folder, BF16, ">= 2.5 x", 0.2)


def frechet(device, folder):
    """the Frechet distance at 2048 dimensions; scipy's sqrtm of the product"""
    draw = np.random.default_rng(0)
    gaussians = []
    for scale in (1, 1.1):
        rows = draw.standard_normal((5000, 2048)) * np.linspace(0.1, 1, 2048) * scale
        gaussians += [rows.mean(0), np.cov(rows, rowvar=False)]
    m1, s1, m2, s2 = gaussians

    def published():
        root = scipy.linalg.sqrtm(s1 @ s2).real
        return np.sum((m1 - m2) ** 2) + np.trace(s1 + s2 - 2 * root)

    return Row(lambda: scores.frechet_distance(m1, s1, m2, s2), published, ">= 10 x", 1e-8)


def features(device, folder, n=10_000, batch=50):
    """all of fid.py's features of 10,000 images but the forwards; the forwards of 200 images"""
    network = inception.InceptionFeatures("random").to(device)
    images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8)

    @torch.inference_mode()
    def forwards():
        for _ in range(200 // batch):
            network(images)

    def work():
        features_of([images] * (n // batch), NoNetwork(device), n, keep_pool=True)

    return Row(work, forwards, "<= 1", warm=1)  # that is 0.02 of all forwards


def kid(device, folder):
    """seconds of KID, 10,000 images against 10,000"""
    a, b = two_sides(device)
    return Row(lambda: scores.kernel_distance(a, b), None, "<= 60 s")


def precision_recall(device, folder):
    """seconds of precision and recall, 10,000 images against 10,000"""
    a, b = two_sides(device)
    return Row(lambda: scores.precision_recall(a, b), None, "<= 60 s")


def two_sides(device, n=10_000, d=2048):
    """Rows as fid.py keeps them, [n, d] float16, twice."""
    g = torch.Generator().manual_seed(0)
    return [torch.rand(n, d, generator=g).half().to(device) for _ in range(2)]


def memory(device, folder):
    """the peak memory of features of 50,000 images; of 10,000"""

    def peak_of(n):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(peak_memory, n).result()

    return Row(lambda: peak_of(50_000), lambda: peak_of(10_000), "<= 1.05", unit="MB", warm=0)


def peak_memory(n, batch_size=250):
    """MB that this process took at most for the features of n images, by a network of no size."""
    images = torch.zeros(batch_size, 3, SIZE, SIZE, dtype=torch.uint8)
    features_of((images for _ in range(n // batch_size)), NoNetwork())
    status = Path("/proc/self/status").read_text()  # Linux's; getrusage counts the parent's too
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


class NoNetwork:
    """Random rows of Inception's sizes, at no cost."""

    name = "random-0"

    def __init__(self, device="cpu"):
        self.device = device

    def __call__(self, images):
        sizes = (2048, 2023, 1008)  # pool, spatial, logits
        return [torch.rand(len(images), size, device=self.device) for size in sizes]


ROWS = {
    "step": step,
    "step-bf16": step_bf16,
    "cascade": cascade,
    "lpips": lpips,
    "lpips-bf16": lpips_bf16,
    "casdm-lpips": casdm_lpips,
    "casdm-lpips-bf16": casdm_lpips_bf16,
    "optimiser": optimiser,
    "ddim": ddim,
    "few-steps": few_steps,
    "input": epoch_of_input,
    "inception": inception_features,
    "inception-bf16": inception_bf16,
    "features": features,
    "fid": frechet,
    "kid": kid,
    "precision-recall": precision_recall,
    "memory": memory,
    "start": start,
    "start-cifar10": start_cifar10,
}


# ---- absolute numbers, on a GPU ----


class Variant(NamedTuple):
    """A way of taking the Cas-DM step."""

    precision: str = "fp32"
    tf32: bool = False
    compile: bool = False
    layout: torch.memory_format = torch.contiguous_format


LAST = torch.channels_last
VARIANTS = {
    "fp32": Variant(),
    "fp32, tf32": Variant(tf32=True),
    "bf16": Variant("bf16"),
    "bf16, channels-last": Variant("bf16", layout=LAST),
    "bf16, compiled": Variant("bf16", compile=True),
    "bf16, compiled, channels-last": Variant("bf16", compile=True, layout=LAST),
}


def gpu(device, folder, repeats):
    """the Cas-DM step: images/s, TFLOP/s, its share of matmul's, whether it waits for the GPU"""
    n = batch_size(device)
    title = f"Cas-DM step, batch {n}"
    print(f"\n{title:31}  images/s   TFLOP/s  of matmul  x plain   waits for the GPU")
    plain = plain_casdm(device)
    work = flops(plain)
    base, peak = seconds_a_step(plain, 1, Variant(), repeats, device)
    print_step("plain fp32", n / base, work / base, peak, 1.0)
    del plain
    for name, how in VARIANTS.items():
        run = Steps(device, folder, precision=how.precision, compile=how.compile)
        run.burst = LOG_EVERY  # steps between two clock readings, one logged row among them
        run.raw_model.to(memory_format=how.layout)
        run.ema.to(memory_format=how.layout)
        seconds, peak = seconds_a_step(run, run.burst, how, repeats, device)
        print_step(name, n / seconds, work / seconds, peak, base / seconds, waits(run))
        del run
        gc.collect()
    print("target: 4 x plain fp32, and no step that waits")


def print_step(name, images, rate, peak, speed_up, waits=""):
    """A line of the table: images/s, FLOP/s of the step and of large matrix products."""
    cells = f"{images:10.0f}{rate / 1e12:10.1f}{rate / peak:11.2f}{speed_up:9.2f}"
    print(f"{name:31}{cells}   {waits}", flush=True)


def plain_casdm(device):
    """theta's and phi's steps, both written plainly."""
    model = randomised(build_model({})).to(device)
    return in_turn(*(network_step(net, device, plain=True) for net in model.children()))


def seconds_a_step(call, steps, how, repeats, device):
    """(seconds of one of the call's steps, FLOP/s of large matrix products beside it)"""
    torch.backends.cuda.matmul.allow_tf32 = how.tf32
    torch.backends.cudnn.allow_tf32 = how.tf32
    n = 8192
    a, b = torch.randn(2, n, n, device=device, dtype=BF16 if how.precision == "bf16" else FP32)
    (calls, products), _ = interleaved([call, lambda: a @ b], repeats, device)
    return statistics.median(calls) / steps, 2 * n**3 / min(products)


def waits(run):
    """What a training step waits for; rows of the log, which do wait, are left out."""
    run.step, run.burst = 0, LOG_EVERY - 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as e:
        return str(e).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "never"


# ---- the script ----


def main(argv=None):
    """The table of the rows that are named."""
    args = parse_args(argv)
    device = cli.open_device(args.device)
    if "gpu" in args.rows and device.type != "cuda":
        raise ValueError(
            f"gpu: the device is {device}; expected a GPU that torch sees; name other rows"
        )
    rows = [name for name in args.rows or ROWS if name != "gpu"]
    with_gpu = "gpu" in args.rows or (not args.rows and device.type == "cuda")
    print(f"{machine(device)}; median of {args.repeats}")
    if rows:
        print()
        print_cells("row", "work", "reference", "ratio", "target", "of peak", "differ")
    for name in rows:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print_line(name, ROWS[name](device, Path(folder)), args.repeats, device)
            except FileNotFoundError as e:
                print(f"{name:18}skipped: {e}")
        gc.collect()
    if with_gpu:
        with tempfile.TemporaryDirectory() as folder:
            gpu(device, Path(folder), args.repeats)


def parse_args(argv):
    """The arguments; SystemExit 2, one line, for a row that is not there."""
    every = ROWS | {"gpu": gpu}
    rows = "\n".join(f"    {name:18}{row.__doc__}" for name, row in every.items())
    parser = cli.Parser(__doc__ + rows)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all of them where none is named")
    parser.add_argument("--repeats", type=cli.whole(1), default=5)
    parser.add_argument("--device", type=cli.device, default="auto")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.rows) - set(every))
    if unknown:
        parser.error(f"got {', '.join(unknown)}; expected rows of the table")
    return args


def machine(device):
    """What was measured on, in one line."""
    name = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(cli.run(main))
