r"""Trains Cas-DM, Dual Diffusion or a DDPM: Sec. 4.1 and figure 3 of the paper are `train`.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models

    python train.py                                          a small Cas-DM on the embedded shapes
    python train.py --model casdm --lpips 0.1 --data cifar10             the paper's run
    python train.py --model ddpm --predict x0 --metric squeezenet=0.1 --data images.npz
    torchrun --nproc_per_node=8 -- train.py --data cifar10   8 devices, 16 of the 128 images each
    python train.py --resume --out runs/casdm-cifar10        goes on, bit for bit on a CPU

A run's folder holds checkpoint.pt (the last), log.jsonl (a row every 10 steps), curves.png and
samples_STEP.png (from the moving average).  With --eval-every or --eval-at it also holds FID, sFID
and IS in the log, and best.pt, since the paper reports the best of its evaluated checkpoints.

All randomness of step k follows from (seed, k) and the data order from (seed, epoch), so a
checkpoint holds no random state.  Ctrl-C or SIGTERM finishes the step, saves, prints the command
that goes on, and exits with 130; another, a second later or more, exits at once.
"""

import sys
from pathlib import Path

from diffusion import q_sample
from features import reference_features
from losses import Batch, objective, training_losses
from support import cli, parallel
from support.run import Run, pending
from support.settings import check_data, load_inputs, parse_args, refuse_taken, reopen


def train(run):
    """Draw, noise, predict, losses, backward, step, average  (Cas-DM Sec. 4.1, figure 3).

    Returns whether the run reached its end; wherever it stops, its last step is saved.
    """
    while run.goes_on():
        run.optimizer.zero_grad()
        for x0, t, eps, rest in run.draw():  # the batch, in parts where memory is short
            x_t = q_sample(x0, t, eps, run.schedule)  # Cas-DM Eq. 3
            batch = Batch(x0, t, eps, x_t, **rest)
            losses = training_losses(run.model, batch, run.metrics)  # Cas-DM Eqs. 12, 13
            terms = objective(losses, run.lambdas, batch)  # Cas-DM Eqs. 14, 15
            run.backward(terms, losses)  # in Cas-DM L_theta reaches theta alone, L_phi phi
        run.optimizer.step()
        run.average()  # the moving average of the weights, from which all samples come
        run.after_step()
    return run.finish()


# ---- the script ----


def main(argv=None):
    """Trains a new run or goes on with one; returns the exit code."""
    settings, args = parse_args(__doc__, argv)
    device = parallel.begin(cli.open_device(args.device))
    name = f"{settings['model']}-{Path(settings['data']).stem}"
    folder = (args.out or Path("runs") / name).absolute()
    state = reopen(folder, args.typed) if args.resume else None
    if state:
        settings = state["settings"]
        done = state["step"] >= settings["iterations"]
        if done and not any(pending(settings, folder, state["step"])):
            print(
                f"{folder} is finished: {state['step']} of {settings['iterations']} steps; "
                "--iterations N goes on to N"
            )
            return 0
    elif parallel.rank() == 0:
        refuse_taken(folder)
    images, metrics, inception = parallel.first(lambda: load_inputs(settings))
    if state:
        check_data(state, settings, images)
    if inception:
        inception.to(device)
        # before the first step: it takes minutes, and can fail
        reference_features(images, inception)
    with cli.Stop() as stop:
        run = Run(settings, folder, device, images, metrics, stop, inception, state)
        state = None  # as large as the run itself
        folder.mkdir(parents=True, exist_ok=True)
        run.introduce()
        run.show()  # what an earlier attempt left undone
        finished = train(run)
    return run.conclude(finished)


if __name__ == "__main__":
    sys.exit(cli.run(main))
