r"""FID's network: TensorFlow's Inception of 2015-12-05, as guided-diffusion's evaluator has it.

pool_3         2048 features, for FID, precision and recall
mixed_6/conv   its first 7 channels, 7 x 17 x 17 = 2023 features, for sFID
logits         1008 classes, without bias, for the Inception Score
"""

import hashlib

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


class InceptionFeatures(inception.Inception3):
    """1008 classes, four patched blocks; batch norms folded into the convolutions, channels last.

    weights : None, pytorch-fid's published file, downloaded once; a path to any file that fits;
              "random", fixed numbers
    images  : [N, 3, H, W] uint8 0..255, of any size
    returns : pool [N, 2048], spatial [N, 2023] flattened height, width, channel, logits [N, 1008]
              without bias; float32 or better

    `.to(device)` and `.bfloat16()` work as on any module.
    ValueError, one line, where the file does not fit.
    """

    def __init__(self, weights=None):
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
        state, kind = _read_weights(
            weights,
            {
                k: v.shape
                for k, v in self.state_dict().items()
                if not k.endswith("num_batches_tracked")
            },
        )
        self.load_state_dict(state, strict=False, assign=True)
        numbers = b"".join(state[k].numpy().tobytes() for k in sorted(state))
        self.name = f"{kind}-{hashlib.sha256(numbers).hexdigest()[:8]}"
        self.eval().requires_grad_(False)
        for block in [m for m in self.modules() if isinstance(m, inception.BasicConv2d)]:
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:2] == (3,), (
            f"expected uint8 [N, 3, H, W], got {images.dtype} {list(images.shape)}"
        )
        weight = self.fc.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        x = (tf1_resize(images.to(weight.device, exact), 299) - 128) / 128
        x = x.to(weight.dtype, memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 means fp32
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [N, 64, 147, 147]
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))  # [N, 192, 71, 71]
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))  # [N, 288, 35, 35]
            x = self.Mixed_6d(
                self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
            )  # [N, 768, 17, 17], TensorFlow's mixed_6
            spatial = (
                x[:, :7].permute(0, 2, 3, 1).flatten(1).to(exact)
            )  # its 1x1 branch, mixed_6/conv, comes first
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # [N, 2048, 8, 8]
        pool = x.mean((2, 3), dtype=exact)
        return pool, spatial, F.linear(pool, weight.to(exact))

    def precision(self):
        """The dtype that it computes in, by name."""
        return str(self.fc.weight.dtype).removeprefix("torch.")


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


def _read_weights(weights, shapes):
    # state dict of float32 or better, and what it is called
    if weights == "random":
        g = torch.Generator().manual_seed(0)
        state = {
            k: torch.full(s, float(k.endswith(("bn.weight", "running_var"))))
            for k, s in shapes.items()
        }
        for k in (k for k, s in shapes.items() if len(s) > 1):
            state[k] = (
                torch.randn(shapes[k], generator=g) * (2 / shapes[k][1:].numel()) ** 0.5
            )  # He: keeps the scale
        return state, "random"
    path = weights or download(WEIGHTS, 95, "FID", "give a copy by --weights PATH", "6726825d")
    state = read_tensors(path, "file of Inception weights")
    state = (
        {k: v for k, v in state.items() if k in shapes and torch.is_tensor(v)}
        if isinstance(state, dict)
        else {}
    )
    wrong = [k for k, s in shapes.items() if k not in state or state[k].shape != s]
    if wrong:
        raise ValueError(
            f"{path} lacks {len(wrong)} of FID-Inception's {len(shapes)} tensors or has them in "
            f"other shapes ({wrong[0]}, ...); expected {WEIGHTS.rsplit('/')[-1]} or a file with "
            "its keys; leave --weights out to download it"
        )
    return {
        k: v.to(torch.promote_types(v.dtype, torch.float32)) for k, v in state.items()
    }, "inception"
