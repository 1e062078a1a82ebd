"""run.py: what lives through a run, what its log says, and how it samples and compiles."""
import argparse

import pytest
import torch

from support import parallel
from support import run
import train
from test_train import SMALL

NEVER_ASKED = argparse.Namespace(asked=False)
CPU = torch.device("cpu")


def begun(folder, *flags):
    """A small run, before its first step."""
    s, _ = train.parse_args([*SMALL, "--T", "4", *flags])
    images, metrics, _ = train.load_inputs(s)
    s |= {"image_size": images.pixels.shape[1], "num_classes": train.classes(s, images)}
    return run.Run(s, folder, CPU, images, metrics)


# ---- memory ----

def tensors(value):
    """Every tensor inside tensors, modules, optimizers, and their containers."""
    if isinstance(value, torch.Tensor):
        yield value
        yield from tensors(value.grad) if value.is_leaf else ()
    elif isinstance(value, torch.nn.Module):
        yield from tensors([*value.parameters(), *value.buffers()])
    elif isinstance(value, torch.optim.Optimizer):
        yield from tensors([value.param_groups, *value.state.values()])
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)
    elif hasattr(value, "__dict__") and not callable(value):
        yield from tensors(vars(value))


@pytest.mark.parametrize("flags", [
    "--model casdm --metric ssim=0.1", "--model ddpm --learn-sigma --objective vlb",
    "--model classifier",
])
def test_nothing_that_lives_through_a_run_carries_a_graph(flags, tmp_path):
    """After two steps only the trained weights require a gradient, and they come from no operation."""
    r = begun(tmp_path, *flags.split(), "--iterations", "2")
    train.train(r, NEVER_ASKED)
    weights = {id(p) for p in r.weights}
    assert len(weights) == len(r.averages) > 0
    for name, value in vars(r).items():
        for tensor in tensors(value):
            assert tensor.grad_fn is None, f"{name} carries a graph"
            assert not tensor.requires_grad or id(tensor) in weights, f"{name} asks for a gradient"
