r"""A judge: a small network of one data set, whose features are compared instead of Inception's.

    python -m experiments.judge --data cifar10                   trains one, and checks it
    python fid.py A B --judge runs/judge-cifar10-classes.pt      fd_judge, kid_judge

    ResNet   arXiv:1603.05027   Identity Mappings in Deep Residual Networks
    FD       arXiv:1706.08500   the distance, of other features here

Inception, VGG and SqueezeNet all learned ImageNet's classes, so what a metric of the one gains by
the other's score may be shared taste.  A judge knows nothing of ImageNet.
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import nn

from data import from_pixels
from inception import Rows
from neighbours.plug import Neighbour
from support.cli import one_line
from support.files import atomic, read_tensors

KIND = "cas-dm judge"


class Judge(nn.Module):
    """Residual blocks that halve the image twice, from 16 x 16 or near it.

    The mean over the last one's positions is what it knows of an image.

    settings : image_size, classes, channels; and task, which is part of its name
    images   : [N, 3, S, S] uint8 0..255, S = image_size
    returns  : Rows of [N, 4 channels]
    """

    convention = "a judge of experiments/judge.py, at the images' own size"

    def __init__(self, settings):
        super().__init__()
        self.settings, self.dims = settings, 4 * settings["channels"]
        c, stride = settings["channels"], max(1, settings["image_size"] // 16)
        self.stem = nn.Conv2d(3, c, 2 * stride + 1, stride, stride, bias=False)
        self.blocks = nn.Sequential(Block(c, c, 1), Block(c, 2 * c, 2), Block(2 * c, 4 * c, 2))
        self.norm = nn.BatchNorm2d(4 * c)
        self.head = nn.Linear(4 * c, settings["classes"])
        self.to(memory_format=torch.channels_last)

    def features(self, x):
        """x [N, 3, S, S] in [-1, 1] -> [N, 4 channels]"""
        x = x.contiguous(memory_format=torch.channels_last)
        h = self.blocks(self.stem(x))
        return F.relu(self.norm(h)).mean((2, 3))

    def logits(self, x):
        return self.head(self.features(x))

    def forward(self, images):
        size = self.settings["image_size"]
        if images.shape[1:] != (3, size, size):
            height, width = images.shape[2:]
            raise ValueError(
                f"images of {height} x {width} for a judge of {size} x {size}; "
                "expected its own size; train one by --image-size"
            )
        weight = self.head.weight
        x = from_pixels(images.permute(0, 2, 3, 1).to(weight.device))
        return Rows(self.features(x.to(weight.dtype)).float())

    def precision(self):
        """The dtype that it computes in, by name."""
        return str(self.head.weight.dtype).removeprefix("torch.")


class Block(nn.Module):
    """Two 3 x 3 convolutions beside the identity, norm and ReLU before each       (ResNet)"""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.skip = nn.Identity()
        if c_in != c_out:
            self.skip = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x):
        h = F.relu(self.norm1(x))
        return self.skip(h) + self.conv2(F.relu(self.norm2(self.conv1(h))))


def save_judge(path, judge, accuracy):
    """Its settings, its weights and its held-out accuracy."""
    with atomic(path) as f:
        torch.save(
            {
                "kind": KIND,
                "settings": judge.settings,
                "weights": judge.state_dict(),
                "accuracy": accuracy,
            },
            f,
        )


def load_judge(path):
    """The Judge of a file, named KIND-HASH, in eval mode; ValueError, one line, for other files."""
    state = read_tensors(path, "judge")
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise ValueError(
            f"{path} holds no judge; expected what `python -m experiments.judge` wrote; "
            "check the path"
        )
    reason = None
    try:
        judge = Judge(state["settings"])
        judge.load_state_dict(state["weights"])
    except Exception as e:  # settings or tensors of any wrong kind: it is ours only by its label
        reason = one_line(e)[:160]
    else:
        if not all(p.isfinite().all() for p in judge.parameters()):
            reason = "weights that are not finite"
    if reason:
        raise ValueError(
            f"{path} does not fit its settings ({reason}); expected what "
            "`python -m experiments.judge` wrote; train it again"
        )
    judge.name = name_of(judge)
    return judge.eval().requires_grad_(False)


def name_of(judge):
    """judge-HASH of the weights; of other tasks than the classes judge_TASK-HASH."""
    numbers = hashlib.sha256()
    for tensor in judge.state_dict().values():
        numbers.update(tensor.float().cpu().numpy().tobytes())
    task = judge.settings["task"]
    kind = "judge" if task == "classes" else f"judge_{task}"
    return f"{kind}-{numbers.hexdigest()[:8]}"


class Judges(Neighbour):
    def score_flags(self, parser):
        text = "score by a judge of experiments/judge.py instead of Inception: fd_judge, kid_judge"
        parser.add_argument("--judge", metavar="FILE.pt", help=text)

    def check_score(self, parser, args):
        """parser.error for --judge beside the flags of Inception."""
        if args.judge and (args.weights or args.dims != parser.get_default("dims")):
            parser.error(
                "--judge scores by its own features, and --weights and --dims are Inception's; "
                "leave one of them out"
            )

    def score_network(self, args):
        return load_judge(args.judge) if args.judge else None
