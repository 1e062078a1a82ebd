r"""The whole of Cas-DM on one page, in plain torch; the project computes the same.

    Cas-DM   arXiv:2401.02414v1   Bring Metric Functions into Diffusion Models

Read from top to bottom: the schedule, figure 1, the losses, a training step (figure 3), the sampler
(figure 2).  theta and phi are any two networks: theta(x_t, time) says eps', phi(x0*, time) says x0'
and, in one channel more, the logit of r_t.  Every t below is an index 1..T, shared by the batch or
[B, 1, 1, 1]; index 0 of a table is the clean image.
"""

import copy
import math

import torch

T = 4000


# ---- the schedule: cosine, as in Improved DDPM ----

u = torch.arange(T + 1, dtype=torch.float64) / T
f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
beta = torch.cat([torch.zeros(1), (1 - f[1:] / f[:-1]).clamp(max=0.999)])  # Eq. 1
alpha = 1 - beta
alpha_bar = alpha.cumprod(0)  # Eq. 2


def noised(x0, t, eps):
    return alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * eps  # Eq. 3


# ---- figure 1: theta, Eq. 8, phi ----


def predict(theta, phi, x_t, t):
    """eps', x0* and, with no gradient from here to theta, x0' and r_t."""
    time = ((t - 1) * 1000 / T).expand(len(x_t), 1, 1, 1).flatten().to(x_t.dtype)
    eps_hat = theta(x_t, time)
    x0_star = (x_t - (1 - alpha_bar[t]).sqrt() * eps_hat.detach()) / alpha_bar[t].sqrt()  # Eq. 8
    x0_hat, logit = phi(x0_star.clamp(-1, 1), time).split([3, 1], dim=1)
    return eps_hat, x0_star, x0_hat, logit.sigmoid()


# ---- the losses ----


def norm(x):
    return x.square().mean()


def losses(theta, phi, metric, x0, t, eps):
    """L_theta and L_phi of one batch."""
    x_t = noised(x0, t, eps)
    eps_hat, _, x0_hat, r_t = predict(theta, phi, x_t, t)

    def mu(x0):  # Eq. 7; at x0' it is Eq. 10
        of_x0 = alpha_bar[t - 1].sqrt() * beta[t] / (1 - alpha_bar[t])
        of_x_t = alpha[t].sqrt() * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        return of_x0 * x0 + of_x_t * x_t

    scale = (1 - alpha[t]) / ((1 - alpha_bar[t]).sqrt() * alpha[t].sqrt())
    mu_eps = x_t / alpha[t].sqrt() - scale * eps_hat  # Eq. 9
    mixed = r_t * mu(x0_hat).detach() + (1 - r_t) * mu_eps.detach()  # Eq. 11

    L_eps = norm(eps - eps_hat)  # Eq. 12
    L_x0 = norm(x0 - x0_hat)
    L_mu = norm(mu(x0) - mixed)
    L_metric = metric(x0_hat, x0).mean()  # Eq. 13
    return 1.0 * L_eps, 1.0 * L_x0 + 1.0 * L_mu + 0.1 * L_metric  # Eqs. 14, 15


# ---- figure 3: a training step ----


def training_step(theta, phi, metric, optimizer, averages, decay, x0, t, eps):
    """L_theta trains theta, L_phi trains phi; then the moving average of the weights."""
    L_theta, L_phi = losses(theta, phi, metric, x0, t, eps)
    optimizer.zero_grad()
    (L_theta + L_phi).backward()
    optimizer.step()
    with torch.no_grad():
        for average, p in zip(averages, [*theta.parameters(), *phi.parameters()], strict=True):
            average.mul_(decay).add_((1 - decay) * p)


# ---- figure 2: DDIM on a re-spaced chain ----


@torch.no_grad()
def sample(theta, phi, x_T, steps):
    """x_T ~ N(0, I) to images in [-1, 1]."""
    chain = [0, *range(1, T + 1, T // steps)]  # 0, 1, 41, 81, ... for 100 of 4000
    x = x_T
    for t, t_prev in zip(chain[:0:-1], chain[-2::-1], strict=True):
        abar, abar_prev = alpha_bar[t], alpha_bar[t_prev]
        _, x0_star, x0_hat, r_t = predict(theta, phi, x, torch.tensor(t))
        x0_star, x0_hat = x0_star.clamp(-1, 1), x0_hat.clamp(-1, 1)
        eps_of_x0 = (x - abar.sqrt() * x0_hat) / (1 - abar).sqrt()
        eps_hat = (x - abar.sqrt() * x0_star) / (1 - abar).sqrt()  # eps' of the clamped x0*
        mu_x0 = abar_prev.sqrt() * x0_hat + (1 - abar_prev).sqrt() * eps_of_x0  # Eq. 16
        from_x_t = (x - (1 - abar).sqrt() * eps_hat) / (abar / abar_prev).sqrt()
        mu_eps = from_x_t + (1 - abar_prev).sqrt() * eps_hat  # Eq. 17
        x = r_t * mu_x0 + (1 - r_t) * mu_eps  # the line after Eq. 17
    return x


# ---- the project computes the same ----


def local_differences(x0_hat, x0):
    """Stands for LPIPS."""
    return (x0_hat - x0).diff(dim=-1).abs().mean((1, 2, 3))


def without_zeros(model):
    """The model, its zeros made random: at first they let no gradient pass."""
    torch.manual_seed(0)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model


def small_casdm():
    """A Cas-DM of random float64 weights, and three numbers a pixel of three 8 x 8 images."""
    from refiner import build_model

    torch.manual_seed(1)
    model = build_model({"image_size": 16, "channels": 32, "res_blocks": 1})
    return without_zeros(model.double()), torch.randn(3, 3, 3, 8, 8, dtype=torch.float64)


def test_losses_and_gradients_are_the_pages():
    """L_theta + L_phi at t = 1, 1700 and T, with a metric whose lambda is 0.1."""
    from diffusion import q_sample
    from losses import LAMBDAS, Batch, objective, training_losses
    from metrics import OnX0

    model, (x0, eps, _) = small_casdm()
    x0, t = x0.clamp(-1, 1), torch.tensor([1, 1700, T])
    weights = list(model.parameters())
    L_theta, L_phi = losses(model.theta, model.phi, local_differences, x0, t.view(3, 1, 1, 1), eps)
    expected = torch.autograd.grad(L_theta + L_phi, weights)

    batch = Batch(x0, t, eps, q_sample(x0, t, eps, model.schedule))
    found = training_losses(model, batch, {"metric": OnX0(local_differences)})
    loss = objective(found, LAMBDAS | {"metric": 0.1}, batch)["loss"]
    torch.testing.assert_close(loss, L_theta + L_phi)
    for ours, theirs in zip(torch.autograd.grad(loss, weights), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


def test_samples_are_the_pages():
    """Ten steps of DDIM from the same noise."""
    from diffusion import respace
    from sample import Ddim
    from sample import sample as project_sample

    model, (_, _, x_T) = small_casdm()
    expected = sample(model.theta, model.phi, x_T, 10)
    got = project_sample(model, x_T, respace(model.schedule, 10), Ddim())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_a_step_of_training_is_the_pages(tmp_path):
    """The weights and their moving average after a step of train.py, and after one of the page's.

    The page computes in float64.  AdamW's eps is 1 in both: where it is tiny the first step is the
    sign of the gradient, which rounding may turn.
    """
    from metrics import OnX0
    from support import cli
    from support.run import Run
    from support.settings import load_inputs, parse_args
    from train import train

    small = "--T 4000 --channels 32 --batch-size 4 --iterations 1 --sample-every 0"
    settings, _ = parse_args("", small.split())
    images, _, _ = load_inputs(settings)
    metric, seen = OnX0(local_differences), []
    metric.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    metrics = {"metric": (0.1, metric)}
    run = Run(settings, tmp_path, torch.device("cpu"), images, metrics, cli.Stop())
    without_zeros(run.raw_model)
    run.optimizer.param_groups[0].update(lr=0.1, eps=1.0)
    page = copy.deepcopy(run.raw_model).double()
    averages = [average.double() for average in run.averages]
    for p in run.weights:
        p.grad = torch.ones_like(p)  # as an earlier step would leave one

    train(run)
    optimizer = torch.optim.AdamW(page.parameters(), lr=0.1, eps=1.0, weight_decay=0.0)
    theirs = page.theta, page.phi, local_differences, optimizer, averages
    (batch,) = seen  # what the step drew
    t = batch.t.view(4, 1, 1, 1)
    training_step(*theirs, 0.1, batch.x0.double(), t, batch.eps.double())
    close = {"rtol": 1e-4, "atol": 1e-6}
    for ours, expected in zip(run.weights, page.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), expected, **close)
    for ours, expected in zip(run.averages, averages, strict=True):
        torch.testing.assert_close(ours.double(), expected, **close)
