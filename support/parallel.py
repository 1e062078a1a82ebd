r"""Many processes that do what one does: torchrun's ranks share each batch by index.

    torchrun --nproc_per_node=8 -- train.py --data cifar10 --lpips 0.1     the paper's 8 x 16 images
    torchrun --nproc_per_node=8 -- sample.py CHECKPOINT --n 50000 --out samples.npz
    torchrun --nproc_per_node=8 -- fid.py CHECKPOINT cifar10 --n 50000

`--` keeps torchrun from taking our --n for one of its own flags.  Every random draw belongs to the
global batch or to one image, never to a rank (but dropout's), so one process and N give the same
result to rounding.  Rank 0 alone writes, prints and warns.  Without torchrun no function here does
anything special.
"""

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_patient = None  # the group in which ranks meet after work that takes long; None: the usual one


def processes():
    """How many processes torchrun started, this one among them; 1 without torchrun.

    A batch system may set any of these names alone: only all of them together are torchrun's.
    """
    whole = all(name in os.environ for name in TORCHRUN)
    return int(os.environ["WORLD_SIZE"]) if whole else 1


def begin(device):
    """Joins the group, if torchrun started this process; returns this rank's own device.

    From here on the first rank alone prints and warns.
    """
    global _patient
    if processes() == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = own_gpu(device)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        warnings.simplefilter("ignore")
    return device


def own_gpu(device):
    """The GPU of this process; ValueError where one was named for all, or there are too few."""
    if device.index is not None:
        raise ValueError(
            f"--device {device} for {processes()} processes; expected a GPU for each; leave it out"
        )
    here, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if here >= gpus:
        raise ValueError(
            f"process {here + 1} on a machine of {gpus} GPUs; expected at most one each; "
            f"use --nproc_per_node={gpus}"
        )
    return torch.device("cuda", here)


def rank():
    """This process's number; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def meet():
    """Waits for every rank: up to a day, where the exchange of gradients gives up after minutes."""
    if size() > 1:
        dist.barrier(_patient)


def first(work):
    """work() by rank 0 before the others, so that a download or a prepared file is made once."""
    if rank():
        meet()
        return work()
    result = work()
    meet()
    return result


def wrap(model):
    """The model as the ranks train it together: its gradients are the mean over them."""
    if size() == 1:
        return model
    shared = DistributedDataParallel(model)
    shared.losses = model.losses  # of figure 1's models each owns its losses
    return shared


def lost_another(error):
    """Whether a RuntimeError says that another process of the group is gone."""
    words = ("peer", "onnection", "NCCL")
    return dist.is_initialized() and any(word in str(error) for word in words)


def launcher():
    """What a command line begins with that starts as many processes as there are now."""
    if size() == 1:
        return "python"
    here = os.environ.get("LOCAL_WORLD_SIZE", size())  # of this node
    return f"torchrun --nproc_per_node={here} --"


def add(tensor):
    """The sum of every rank's `tensor`, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def same(value):
    """Rank 0's `value`, on every rank: what it found decides for all."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def share(n, batch_size):
    """This rank's part of 0 .. n-1 as (first, count), a batch a round.

    Where the last round has none for it, count is 0.
    """
    for start in range(rank() * batch_size, rank() * batch_size + n, size() * batch_size):
        yield min(start, n), max(0, min(batch_size, n - start))


def concat(rows):
    """Every rank's rows [n_r, ...] in the order of ranks -> [sum n_r, ...].

    Each rank must call it equally often.
    """
    if size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    padded = rows.new_zeros((int(max(counts)), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
