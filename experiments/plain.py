"""What benchmark.py measures against: networks, a metric, a data set, plain or as published."""

import copy
import math
import os
from unittest import mock

import piq
import torch
import torch.nn.functional as F
import torchvision.models as tv
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.models import inception as blocks

import inception
import metrics
import unet
from experiments.measuring import SIZE, batch_size


def network_step(net, device, plain=False):
    """One training step of a copy of `net` on fixed data, in fp32, under its squared error.

    plain : from torch's basic operations, nothing fused
    """
    net = copy.deepcopy(net)
    net.bf16 = False
    channels = net.input_blocks[0][0].in_channels
    x = torch.randn(batch_size(device), channels, SIZE, SIZE, device=device)
    t = torch.linspace(0, 1000, len(x), device=device)
    if plain:
        expected = net(x, t)
        torch.testing.assert_close(plainly(net)(x, t), expected, rtol=1e-3, atol=1e-4)
    target = torch.randn_like(net(x, t))
    weights = list(net.parameters())
    averages = [p.detach().clone() for p in weights]
    fused = None if plain else True
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.0, fused=fused)

    def call():
        """One training step."""
        loss = F.mse_loss(net(x, t), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average()

    @torch.no_grad()
    def average():
        """The moving average of the weights, after the step."""
        if not plain:
            torch._foreach_lerp_(averages, weights, 0.0001)
            return
        for mean, w in zip(averages, weights, strict=True):
            mean.mul_(0.9999).add_(w, alpha=0.0001)

    return call


def plainly(net):
    """The same U-Net from plain operations, its modules changed in place."""
    plain = {
        unet.ResBlock: PlainResBlock,
        unet.Attention: PlainAttention,
        nn.SiLU: PlainSiLU,
    }
    for module in net.modules():
        module.__class__ = plain.get(type(module), type(module))
    return net


class PlainSiLU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class PlainResBlock(unet.ResBlock):
    def forward(self, x, emb):
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm1(x)
        h = self.conv1(h * torch.sigmoid(h))
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(h * torch.sigmoid(h)))


class PlainAttention(unet.Attention):
    def forward(self, x):
        B, C, H, W = x.shape
        d = C // self.heads
        qkv = self.qkv(self.norm(x).flatten(2))
        q, k, v = qkv.view(B * self.heads, 3 * d, H * W).chunk(3, dim=1)
        weight = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(d), dim=-1)
        h = (v @ weight.transpose(1, 2)).reshape(B, C, H * W)
        return x + self.proj(h).view(B, C, H, W)


def lpips_pair(device, folder):
    """(ours, piq's) with the same random weights, both of x0_hat and x0 in [-1, 1]."""
    torch.manual_seed(0)
    vgg = random_vgg()
    hub = folder / "hub/checkpoints"
    hub.mkdir(parents=True, exist_ok=True)
    state = {f"features.{key}": value for key, value in vgg.features.state_dict().items()}
    torch.save(state, hub / "vgg16-397923af.pth")
    weights = [torch.rand(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    torch.save(weights, hub / "lpips_weights.pt")
    with mock.patch.dict(os.environ, TORCH_HOME=str(folder)):
        ours = metrics.lpips().to(device)
        with mock.patch("piq.perceptual.vgg16", lambda **how: vgg):
            theirs = piq.LPIPS(replace_pooling=True, reduction="none")

    def piqs(x0_hat, x0):
        return theirs(metrics.T(x0_hat), metrics.T(x0))

    return ours, piqs


def random_vgg():
    """VGG-16's features of random weights, without its classifier."""
    with torch.device("meta"):  # the classifier, 494 of 528 MB, is never used
        vgg = tv.vgg16()
    vgg.features = tv.vgg.make_layers(tv.vgg.cfgs["D"])
    for module in vgg.features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return vgg


def published_inception():
    """FID's network as torchvision and pytorch-fid have it, of random weights without a bias."""
    kinds = [
        blocks.BasicConv2d,
        inception.InceptionA,
        blocks.InceptionB,
        inception.InceptionC,
        blocks.InceptionD,
        inception.InceptionE,
        None,
    ]
    network = blocks.Inception3(
        num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=kinds
    )
    network.Mixed_7c.pool = F.max_pool2d
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    network.fc.bias.data.zero_()
    return network


class Cifar(Dataset):
    """torchvision's CIFAR10 as one uses it: a Pillow image through transforms."""

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
    )

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.pixels[i]))
