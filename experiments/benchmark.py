r"""How fast the code is, against plain references and against the hardware, all measured in one run.

    python -m experiments.benchmark                       every row
    python -m experiments.benchmark step lpips            some of them
    python -m experiments.benchmark gpu                   on a GPU: one training step in absolute numbers

A figure is the median of interleaved repeats; a ratio is the reference's over the work's time where the target is a least speed-up ("x"),
and the work's over the reference's where it is a greatest cost.  "of peak" is the work's FLOP/s over the best of large 3 x 3 convolutions,
forward and backward, in the same repeats.  Where both sides compute the same numbers, "differ" is their largest relative difference.
Networks have the paper's size at 32 x 32 (128 channels, 3 blocks); batch 8 on a CPU and 128 on a GPU; data and metric weights are random.

rows:
"""

import contextlib
import copy
import gc
import io
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple
from unittest import mock

import numpy as np
import piq
import scipy.linalg
import torch
import torch.nn.functional as F
import torchvision.models as tv
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.models import inception as blocks

ROOT = Path(__file__).resolve().parent.parent

from support import edges
import fid
import losses
import train
import unet
from data import Images, batch_indices, from_pixels
from refiner import build_model
from support.run import LOG_EVERY, Run
from sample import sample

CIFAR10 = ROOT / "../shared/data/cifar10_train.npz"
SIZE = 32


class Row(NamedTuple):
    """One line of the table."""

    work: Callable
    reference: Callable | None
    target: (
        str  # ">= 1.08 x": reference / work; "<= 1.02": work / reference; "<= 2 s": the work itself
    )
    tolerance: float | None = None  # of what the two return; None: not compared
    peak: tuple | None = (
        None  # (FLOPs of the work, dtype, what share of the convolution peak is asked for)
    )
    unit: str = "s"  # or "MB", which the two return


# ---- training ----


def step(device, folder, precision="fp32", target=">= 1.08 x"):
    """theta's training step; the same network written plainly"""
    run = Steps(device, folder, model="ddpm", precision=precision)
    plain = network_step(run.model.net, device, plain=True)
    return Row(
        run,
        plain,
        target,
        peak=(flops(plain), torch.float32, ">= 0.72")
        if precision == "fp32"
        else (flops(plain), torch.bfloat16, ""),
    )


def step_bf16(device, folder):
    """theta's step in bf16; the same fp32 reference"""
    return step(device, folder, "bf16", ">= 1.7 x")


def cascade(device, folder):
    """the full Cas-DM step; theta's step and phi's step"""
    run = Steps(device, folder)
    return Row(
        run,
        both(network_step(run.model.eps_net, device), network_step(run.model.refiner, device)),
        "<= 1.02",
    )


def casdm_lpips(device, folder, precision="fp32", target="<= 0.95"):
    """the full Cas-DM step with LPIPS; two plain network steps and piq's LPIPS"""
    ours, piqs = lpips_pair(device, folder, precision == "bf16")
    run = Steps(device, folder, {"lpips": (0.1, ours)}, precision=precision)
    networks = [
        network_step(net, device, plain=True) for net in (run.model.eps_net, run.model.refiner)
    ]
    return Row(run, both(*networks, forward_backward(piqs, device, batch(device))), target)


def casdm_lpips_bf16(device, folder):
    """the same step in bf16, LPIPS's network included; the same fp32 reference"""
    return casdm_lpips(device, folder, "bf16", "<= 0.60")


def optimiser(device, folder):
    """AdamW and EMA; a memory copy of the bytes they must touch"""
    run = Steps(device, folder, model="ddpm")
    for p in run.weights:
        p.grad = torch.randn_like(p)
    here = torch.cat([p.detach().flatten() for p in run.weights])
    there = torch.empty_like(here)

    def work():
        run.optimizer.step()
        run.update_ema()

    def copies():  # AdamW reads w, g, m, v and writes w, m, v; the EMA reads w, ema and writes ema: 10 tensors, and a copy touches 2
        for _ in range(5):
            there.copy_(here)

    return Row(work, copies, "<= 1.3")


class Steps(Run):
    """Called, it lets the real loop, train.train, through `burst` steps; it leaves no file but the log."""

    burst = 1

    def __init__(self, device, folder, metrics={}, **settings):
        n = batch(device)
        pixels = np.random.default_rng(0).integers(0, 256, (4 * n, SIZE, SIZE, 3), np.uint8)
        fixed = dict(image_size=SIZE, batch_size=n, iterations=10**9, sample_every=0, save_every=0)
        super().__init__(
            train.PAPER | fixed | settings,
            folder,
            device,
            Images(pixels, None, "noise", "0"),
            metrics,
        )
        randomised(self.model)

    def __call__(self):
        with contextlib.redirect_stderr(io.StringIO()):
            train.train(self, SimpleNamespace(asked=False))

    def after_step(self, bar, stop):
        super().after_step(bar, stop)
        stop.asked = self.step % self.burst == 0

    def save(self):
        self.saved = self.step


def network_step(net, device, plain=False):
    """One training step of a copy of `net` on fixed data, under its squared error; `plain` as one writes it at first."""
    net = copy.deepcopy(net)
    x = torch.randn(batch(device), net.input_blocks[0][0].in_channels, SIZE, SIZE, device=device)
    t = torch.linspace(0, 1000, len(x), device=device)
    if plain:
        expected = net(x, t)
        torch.testing.assert_close(plainly(net)(x, t), expected, rtol=1e-3, atol=1e-4)
    weights, optimizer = (
        list(net.parameters()),
        torch.optim.AdamW(
            net.parameters(), lr=1e-4, weight_decay=0.0, fused=None if plain else True
        ),
    )
    averages = [p.detach().clone() for p in weights]
    target = torch.randn_like(net(x, t))

    def call():
        loss = F.mse_loss(net(x, t), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            if plain:
                for average, w in zip(averages, weights):
                    average.mul_(0.9999).add_(w, alpha=0.0001)
            else:
                torch._foreach_lerp_(averages, weights, 0.0001)

    return call


def randomised(net):
    """The same weights each time, none of them zero: what starts at zero would compare as equal, and has gradients that no later step has."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
    return net


def plainly(net):
    """The same U-Net from plain operations, its modules changed in place."""
    for module in net.modules():
        module.__class__ = {
            unet.ResBlock: PlainResBlock,
            unet.Attention: PlainAttention,
            nn.SiLU: PlainSiLU,
        }.get(type(module), type(module))
    return net


class PlainSiLU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class PlainResBlock(unet.ResBlock):
    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm1(x)
        h = self.norm2(self.conv1(h * torch.sigmoid(h))) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(h * torch.sigmoid(h)))


class PlainAttention(unet.Attention):
    def forward(self, x):
        B, C, H, W = x.shape
        q, k, v = (
            self.qkv(self.norm(x).flatten(2))
            .view(B * self.heads, 3 * C // self.heads, H * W)
            .chunk(3, dim=1)
        )
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(C // self.heads), dim=-1)
        return x + self.proj((v @ weight.transpose(1, 2)).reshape(B, C, H * W)).view(B, C, H, W)


def both(*calls):
    def call():
        for c in calls:
            c()

    return call


# ---- LPIPS ----


def lpips(device, folder, bf16=False, target=">= 1.03 x", tolerance=1e-5):
    """LPIPS at 224 x 224, forward and backward; piq's class"""
    n = batch(device) // 2
    ours, piqs = (
        forward_backward(metric, device, n) for metric in lpips_pair(device, folder, bf16)
    )
    return Row(ours, piqs, target, tolerance)


def lpips_bf16(device, folder):
    """LPIPS with its network in bf16; piq's class in fp32"""
    return lpips(device, folder, True, ">= 1.75 x", 1e-2)


def lpips_pair(device, folder, bf16):
    """(ours, piq's) with the same random weights, both of x0_hat and x0 in [-1, 1]."""
    torch.manual_seed(0)
    with torch.device("meta"):  # the classifier, 494 of 528 MB, is never used
        vgg = tv.vgg16()
    vgg.features = tv.vgg.make_layers(tv.vgg.cfgs["D"])
    for conv in (m for m in vgg.features if isinstance(m, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight)
    hub = folder / "hub/checkpoints"
    hub.mkdir(parents=True, exist_ok=True)
    torch.save(
        {f"features.{k}": v for k, v in vgg.features.state_dict().items()},
        hub / "vgg16-397923af.pth",
    )
    torch.save([torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)], hub / "lpips_weights.pt")
    with (
        mock.patch.dict(os.environ, TORCH_HOME=str(folder)),
        mock.patch("piq.perceptual.vgg16", lambda **how: vgg),
    ):
        ours, theirs = (
            losses.lpips(bf16).to(device),
            piq.LPIPS(replace_pooling=True, reduction="none"),
        )

    def T(x):
        return (F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False) + 1) / 2

    return ours, lambda x0_hat, x0: theirs(T(x0_hat), T(x0))


def forward_backward(metric, device, n):
    x0_hat, x0 = (
        torch.rand(2, n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).to(device) * 2
        - 1
    )
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
    shape = (batch(device) // 8, 3, SIZE, SIZE)
    x, t = torch.randn(shape, device=device), torch.linspace(0, 1000, shape[0], device=device)

    @torch.inference_mode()
    def forwards():
        for _ in range(100):
            model.net(x, t)

    return Row(lambda: sample(model, model.schedule, shape, seed=0, steps=100), forwards, "<= 1.01")


def input_(device, folder):
    """an epoch of CIFAR-10's size as batches in [-1, 1]; a torchvision DataLoader with 2 workers"""
    n, size = 50_000, 128
    pixels = np.random.default_rng(0).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)
    loader = DataLoader(Cifar(pixels), size, shuffle=True, num_workers=2, persistent_workers=True)
    epochs = iter(range(10**9))

    def work():
        seed = next(epochs)
        for i in range(-(-n // size)):
            from_pixels(pixels[batch_indices(n, size, i, seed)])

    def load():
        for _ in loader:
            pass

    return Row(work, load, ">= 20 x")


class Cifar(Dataset):
    """torchvision's CIFAR10 as one uses it: a Pillow image through transforms."""

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    )

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i]))


def start(device, folder, data="shapes", target="<= 2 s"):
    """python train.py on shapes, imports excluded: to its first step"""

    class Begun(Exception):
        pass

    def work():
        arguments = ["--data", data, "--out", tempfile.mkdtemp(dir=folder), "--device", str(device)]
        with (
            mock.patch("train.training_losses", side_effect=Begun),
            contextlib.suppress(Begun),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            train.main(arguments)

    return Row(work, None, target)


def start_cifar10(device, folder):
    """the paper's Cas-DM on CIFAR-10's 49,923 images in an .npz: to its first step"""
    if not CIFAR10.exists():
        raise FileNotFoundError(f"{os.path.relpath(CIFAR10)} does not exist")
    return start(device, folder, str(CIFAR10), "<= 5 s")


# ---- evaluation ----


def inception(device, folder, dtype=torch.float32, target=">= 1.4 x", tolerance=1e-4):
    """Inception features of images; torchvision's blocks with their batch norms"""
    torch.manual_seed(0)
    kinds = [
        blocks.BasicConv2d,
        fid.InceptionA,
        blocks.InceptionB,
        fid.InceptionC,
        blocks.InceptionD,
        fid.InceptionE,
        None,
    ]
    plain = blocks.Inception3(
        num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=kinds
    )
    plain.Mixed_7c.pool = F.max_pool2d
    for m in plain.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    plain.fc.bias.data.zero_()
    torch.save(plain.state_dict(), folder / "inception.pth")
    ours, plain = (
        fid.InceptionFeatures(folder / "inception.pth").to(device, dtype),
        plain.to(device).eval(),
    )
    images = torch.randint(
        0, 256, (2 * batch(device), 3, SIZE, SIZE), dtype=torch.uint8, device=device
    )
    published = torch.inference_mode()(
        lambda: plain((fid.tf1_resize(images.float(), 299) - 128) / 128)
    )
    return Row(torch.inference_mode()(lambda: ours(images)[2]), published, target, tolerance)


def inception_bf16(device, folder):
    """Inception features in bf16; the same fp32 reference"""
    return inception(device, folder, torch.bfloat16, ">= 2.5 x", 0.2)


def frechet(device, folder):
    """the Frechet distance at 2048 dimensions; scipy's sqrtm of the product"""
    draw = np.random.default_rng(0)
    rows = [
        draw.standard_normal((5000, 2048)) * np.linspace(0.1, 1, 2048) * scale for scale in (1, 1.1)
    ]
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in rows)

    def published():
        return np.sum((m1 - m2) ** 2) + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)

    return Row(lambda: fid.frechet_distance(m1, s1, m2, s2), published, ">= 10 x", 1e-8)


def memory(device, folder):
    """the peak memory of features of 50,000 images; of 10,000"""
    return Row(
        lambda: in_new_process(peak_memory, 50_000),
        lambda: in_new_process(peak_memory, 10_000),
        "<= 1.05",
        unit="MB",
    )


def peak_memory(n, batch_size=250):
    class Stub:
        name = "random"

        def __call__(self, images):
            return [torch.rand(len(images), features) for features in (2048, 2023, 1008)]

    fid.features_of(
        (torch.zeros(batch_size, 3, SIZE, SIZE, dtype=torch.uint8) for _ in range(n // batch_size)),
        Stub(),
    )
    status = Path(
        "/proc/self/status"
    ).read_text()  # Linux's; getrusage would count the parent's memory too
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def in_new_process(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


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
    "input": input_,
    "inception": inception,
    "inception-bf16": inception_bf16,
    "fid": frechet,
    "memory": memory,
    "start": start,
    "start-cifar10": start_cifar10,
}


# ---- absolute numbers, on a GPU ----


def gpu(device, folder, repeats):
    """Images/s, TFLOP/s, share of the matrix product's peak in the same precision, and whether a step waits for the GPU: the Cas-DM step."""

    def variant(precision="fp32", tf32=False, compiled=False, layout=torch.contiguous_format):
        run = Steps(device, folder, precision=precision, compile=compiled)
        run.burst = LOG_EVERY  # so many steps between two clock readings, one logged row in them
        run.model.to(memory_format=layout), run.ema.to(memory_format=layout)
        return run, run.burst, torch.bfloat16 if precision == "bf16" else torch.float32, tf32

    def plain():
        model = randomised(build_model({})).to(device)
        return (
            both(
                *(network_step(net, device, plain=True) for net in (model.eps_net, model.refiner))
            ),
            1,
            torch.float32,
            False,
        )

    last, bf16 = torch.channels_last, "bf16"
    variants = {
        "plain fp32": plain,
        "fp32": variant,
        "fp32, tf32": lambda: variant(tf32=True),
        "bf16": lambda: variant(bf16),
        "bf16, channels-last": lambda: variant(bf16, layout=last),
        "bf16, compiled": lambda: variant(bf16, compiled=True),
        "bf16, compiled, channels-last": lambda: variant(bf16, compiled=True, layout=last),
    }
    work, base = flops(plain()[0]), None
    print(
        f"\n{'Cas-DM step, batch ' + str(batch(device)):31}{'images/s':>10}{'TFLOP/s':>10}{'of matmul':>11}{'x plain':>9}   waits for the GPU"
    )
    for name, make in variants.items():
        call, steps, dtype, tf32 = make()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        product, cost = matrix_product(device, dtype)
        times = interleaved([call, product], repeats, device)[0]
        seconds, peak = statistics.median(times[0]) / steps, cost / min(times[1])
        base = base or seconds
        print(
            f"{name:31}{batch(device) / seconds:10.0f}{work / seconds / 1e12:10.1f}{work / seconds / peak:11.2f}{base / seconds:9.2f}   "
            f"{waits(call) if isinstance(call, Steps) else ''}",
            flush=True,
        )
        del call
        gc.collect()
    print("target: 4 x plain fp32, and no step that waits")


def matrix_product(device, dtype, n=8192):
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return lambda: a @ b, 2 * n**3


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


# ---- measuring ----


def measure(row, repeats, device):
    """(figure of the work, of the reference or None, relative difference or None, share of the peak or None)"""
    calls = [row.work] + [row.reference] * (row.reference is not None)
    convolutions = peak_convolutions(device, row.peak[1]) if row.peak else []
    figures, results = interleaved(
        calls + [call for call, _ in convolutions],
        repeats,
        device,
        warm=6 if row.unit == "s" else 0,
    )
    if row.unit == "MB":
        figures = results
    work, reference = (
        statistics.median(figures[0]),
        statistics.median(figures[1]) if row.reference else None,
    )
    differ = difference(results[0][-1], results[1][-1]) if row.tolerance else None
    best = max(
        (cost / min(times) for (_, cost), times in zip(convolutions, figures[len(calls) :])),
        default=None,
    )
    return work, reference, differ, row.peak[0] / work / best if row.peak else None


def interleaved(calls, repeats, device, warm=6):
    """Each of `calls` in turn, `repeats` times after `warm` turns that do not count: (seconds, results), a list a call."""
    seconds, results = [[] for _ in calls], [[] for _ in calls]
    for repeat in range(
        -warm, repeats
    ):  # six, until a step takes no new memory from the system, page by page
        for call, times, values in zip(calls, seconds, results):
            begun = time.perf_counter()
            value = call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 0:
                times.append(time.perf_counter() - begun)
                values.append(value)
    return seconds, results


def difference(a, b):
    a, b = (np.asarray(v.cpu() if torch.is_tensor(v) else v, np.float64) for v in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())


def peak_convolutions(device, dtype):
    """[(call, FLOPs)] of large 3 x 3 convolutions, forward and backward, channels last, which is never the slower layout."""

    def one(n, c, size):
        conv = nn.Conv2d(c, c, 3, padding=1, bias=False, device=device, dtype=dtype).to(
            memory_format=torch.channels_last
        )
        x, gradient = (
            torch.randn(n, c, size, size, device=device, dtype=dtype).contiguous(
                memory_format=torch.channels_last
            )
            for _ in range(2)
        )
        x.requires_grad_()
        return lambda: torch.autograd.grad(
            conv(x), (x, conv.weight), gradient
        ), 3 * 2 * n * c * c * 9 * size * size

    return [one(32, 256, 16), one(8, 256, 64)]


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def batch(device):
    return 128 if device.type == "cuda" else 8


# ---- the script ----


def line(name, row, repeats, device):
    work, reference, differ, share = measure(row, repeats, device)
    sign, bound, *unit = row.target.split()
    ratio = work if unit == ["s"] else reference / work if unit == ["x"] else work / reference
    met = (ratio >= float(bound)) if sign == ">=" else (ratio <= float(bound))
    met &= differ is None or differ <= row.tolerance
    met &= not (share and row.peak[2]) or share >= float(row.peak[2].split()[1])
    cells = [
        f"{work:.3f} {row.unit}",
        f"{reference:.3f} {row.unit}" if reference else "",
        f"{ratio:.3f}",
        row.target,
        f"{share:.2f} {row.peak[2]}" if share else "",
        f"{differ:.0e} <= {row.tolerance:.0e}" if differ is not None else "",
        "met" if met else "MISSED",
    ]
    print(format_row(name, *cells), flush=True)


def format_row(*cells):
    return "".join(f"{cell:{width}}" for cell, width in zip(cells, (18, 13, 13, 9, 11, 15, 18, 0)))


def main(argv=None):
    p = edges.Parser(
        __doc__
        + "\n".join(f"    {name:18}{row.__doc__}" for name, row in ROWS.items())
        + f"\n    {'gpu':18}{gpu.__doc__}"
    )
    p.add_argument("rows", nargs="*", metavar="ROW", help="all of them where none is named")
    p.add_argument("--repeats", type=edges.whole(1), default=5)
    p.add_argument("--device", type=edges.device, default="auto")
    a = p.parse_args(argv)
    if unknown := set(a.rows) - {*ROWS, "gpu"}:
        p.error(f"got {', '.join(sorted(unknown))}; expected rows of the table")
    device = edges.open_device(a.device)
    if "gpu" in a.rows and device.type != "cuda":
        raise ValueError(
            f"gpu: the device is {device}; expected a GPU that torch sees; name other rows"
        )
    print(f"{machine(device)}; median of {a.repeats}\n")
    print(format_row("row", "work", "reference", "ratio", "target", "of peak", "differ"))
    for name in [name for name in a.rows or ROWS if name != "gpu"]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                line(name, ROWS[name](device, Path(folder)), a.repeats, device)
            except FileNotFoundError as e:
                print(f"{name:18}skipped: {e}")
        gc.collect()
    if device.type == "cuda" and "gpu" in (a.rows or ["gpu"]):
        with tempfile.TemporaryDirectory() as folder:
            gpu(device, Path(folder), a.repeats)


def machine(device):
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(edges.run(main))
