r"""FID's network: TensorFlow's Inception of 2015-12-05, as guided-diffusion's evaluator has it.

pool       2048 features of pool_3, for FID, KID, precision and recall; or, as in pytorch-fid's
           --dims, the 64, 192 or 768 channels of an earlier layer, averaged over positions
spatial    the first 7 channels of mixed_6/conv, 7 x 17 x 17 = 2023 features, for sFID
logits     1008 classes, without bias, for the Inception Score
"""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import inception

from support.files import download, read_tensors

WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid"
    "/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
# Channels of a layer, and the modules from the layer before to it.
LAYERS = {
    64: ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"],  # 73 x 73
    192: ["Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"],  # 35 x 35
    768: [*("Mixed_5b", "Mixed_5c", "Mixed_5d"), *(f"Mixed_6{x}" for x in "abcde")],  # 17 x 17
    2048: ["Mixed_7a", "Mixed_7b", "Mixed_7c"],  # 8 x 8
}
SPATIAL = "Mixed_6d"  # TensorFlow's mixed_6, whose 1x1 branch, mixed_6/conv, comes first


class Rows(NamedTuple):
    """What a network says of N images; None where it has no such layer."""

    pool: torch.Tensor  # [N, D]
    spatial: torch.Tensor | None = None  # [N, 2023], flattened height, width, channel
    logits: torch.Tensor | None = None  # [N, 1008]


class InceptionFeatures(inception.Inception3):
    """FID's Inception: uint8 images -> Rows.

    Four blocks are patched, batch norms are folded into the convolutions, channels are last.

    weights : None, pytorch-fid's published file, downloaded once; "random", fixed numbers; or a
              path to a file with pytorch-fid's keys, or to one with folded batch norms (a weight
              and a bias a convolution); layers that `dims` does not need may be missing
    dims    : of pool: 64, 192, 768 or 2048
    images  : [N, 3, H, W] uint8 0..255, of any size
    returns : Rows, in float32 or better; spatial from 768 on, logits with 2048 alone

    `.to(device)` and `.bfloat16()` work as on any module.
    ValueError, one line, where the file does not fit.
    """

    convention = "TF1 bilinear resize to 299, (v - 128) / 128"  # what is said beside its scores

    def __init__(self, weights=None, dims=2048):
        blocks = [
            inception.BasicConv2d,
            InceptionA,
            inception.InceptionB,
            InceptionC,
            inception.InceptionD,
            InceptionE,
            None,
        ]
        with torch.device("meta"):  # every number comes from the file
            super().__init__(
                num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=blocks
            )
            self.Mixed_7c = InceptionE(2048)
        self.Mixed_7c.pool = F.max_pool2d
        self.dims = dims
        self.layers = layers_up_to(dims)
        self.drop_the_rest()
        state, kind = _read_weights(self, weights)
        self.load_state_dict(state, strict=False, assign=True)
        numbers = b"".join(state[k].numpy().tobytes() for k in sorted(state))
        self.name = f"{kind}-{hashlib.sha256(numbers).hexdigest()[:8]}"
        self.eval().requires_grad_(False)
        for block in _convolutions(self):
            if not isinstance(block.bn, nn.Identity):
                block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
        self.to(memory_format=torch.channels_last)

    def drop_the_rest(self):
        """Leaves the layers that it needs."""
        needed = set(self.layers)
        if self.dims == 2048:
            needed.add("fc")
        for name, _ in list(self.named_children()):
            if name not in needed:
                delattr(self, name)

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:2] == (3,), (
            f"expected uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}"
        )
        weight = self.Conv2d_1a_3x3.conv.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        x = (tf1_resize(images.to(weight.device, exact), 299) - 128) / 128
        x = x.to(weight.dtype, memory_format=torch.channels_last)
        spatial = logits = None
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 means fp32
            for name in self.layers:
                x = self.get_submodule(name)(x)
                if name == SPATIAL:
                    spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1).to(exact)
        pool = x.mean((2, 3), dtype=exact)
        if self.dims == 2048:
            logits = F.linear(pool, self.fc.weight.to(exact))
        return Rows(pool, spatial, logits)

    def precision(self):
        """The dtype that it computes in, by name."""
        return str(self.Conv2d_1a_3x3.conv.weight.dtype).removeprefix("torch.")


def layers_up_to(dims):
    """The names of the modules from the image to the layer with so many channels, in order."""
    return [name for channels, names in LAYERS.items() if channels <= dims for name in names]


def tf1_resize(x, size):
    """TensorFlow 1's bilinear resize: source = target * in / out, clamped at the edge.

    align_corners=False, and no half-pixel shift.

    x : [N, C, H, W] float          returns : [N, C, size, size]
    """
    for axis in (3, 2):
        length = x.shape[axis]
        source = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
        low = source.long()
        shape = (-1, 1) if axis == 2 else (-1,)
        start, end = (
            x.index_select(axis, low),
            x.index_select(axis, (low + 1).clamp(max=length - 1)),
        )
        x = start + (end - start) * (source - low).to(x.dtype).view(shape)
    return x


# torchvision's blocks with nothing but the pooling branch changed: an average that leaves the
# padding out, and in Mixed_7c a maximum.


class InceptionA(inception.InceptionA):
    def forward(self, x):
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                self.branch_pool(_mean_pool(x, 3, 1, 1)),
            ],
            1,
        )


class InceptionC(inception.InceptionC):
    def forward(self, x):
        deep = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                self.branch7x7dbl_5(self.branch7x7dbl_4(deep)),
                self.branch_pool(_mean_pool(x, 3, 1, 1)),
            ],
            1,
        )


def _mean_pool(x, *window):
    return F.avg_pool2d(x, *window, count_include_pad=False)


class InceptionE(inception.InceptionE):
    pool = staticmethod(_mean_pool)

    def forward(self, x):
        wide, deep = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(wide),
                self.branch3x3_2b(wide),
                self.branch3x3dbl_3a(deep),
                self.branch3x3dbl_3b(deep),
                self.branch_pool(self.pool(x, 3, 1, 1)),
            ],
            1,
        )


def _convolutions(network):
    return [m for m in network.modules() if isinstance(m, inception.BasicConv2d)]


def _shapes(network):
    # of every tensor that the network needs
    state = network.state_dict()
    return {k: v.shape for k, v in state.items() if not k.endswith("num_batches_tracked")}


def _read_weights(network, weights):
    # a state dict of float32 or better that fits the network, and what it is called
    if weights == "random":
        return _random(_shapes(network)), "random"
    path = weights or download(WEIGHTS, 95, "FID", "give a copy by --weights PATH", "6726825d")
    state = read_tensors(path, "file of Inception weights")
    if not isinstance(state, dict):
        state = {}
    if "Conv2d_1a_3x3.bias" in state:
        state = _folded(network, state)
    shapes = _shapes(network)
    fits = {}
    for key, shape in shapes.items():
        tensor = state.get(key)
        if torch.is_tensor(tensor) and tensor.shape == shape:
            fits[key] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    wrong = [key for key in shapes if key not in fits]
    if wrong:
        raise ValueError(
            f"{path} lacks {len(wrong)} of FID-Inception's {len(shapes)} tensors or has them in "
            f"other shapes ({wrong[0]}, ...); expected {WEIGHTS.rsplit('/')[-1]} or a file with "
            f"its keys; {_remedy(wrong)}"
        )
    return fits, "inception"


def _folded(network, state):
    # of a file whose batch norms are in its convolutions; the network takes its form
    for block in _convolutions(network):
        bias = torch.empty(block.conv.out_channels, device="meta")
        block.conv.bias, block.bn = nn.Parameter(bias), nn.Identity()
    found = {}
    for key, tensor in state.items():
        layer, _, name = key.rpartition(".")
        found[key if layer == "fc" else f"{layer}.conv.{name}"] = tensor
    return found


def _remedy(wrong):
    # --dims, where the file holds an earlier layer and all before it
    for dims in (768, 192, 64):
        if not any(key.split(".")[0] in layers_up_to(dims) for key in wrong):
            return f"--dims {dims} needs no more than it holds"
    return "leave --weights out to download it"


def _random(shapes):
    # He: keeps the scale
    g = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        ones = key.endswith(("bn.weight", "running_var"))
        if len(shape) > 1:
            state[key] = torch.randn(shape, generator=g) * (2 / shape[1:].numel()) ** 0.5
        else:
            state[key] = torch.full(shape, float(ones))
    return state
