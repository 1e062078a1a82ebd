"""low_noise.py: metrics that act at low noise alone.

PixelGen   arXiv:2602.02493     pMF   arXiv:2601.22158
"""

import pytest
import torch
from torch.testing import assert_close

import train
from diffusion import Prediction, cosine_schedule, linear_schedule, q_sample
from losses import Batch, objective, squared_norm, training_losses
from metrics import METRICS, OnX0
from models import small
from neighbours.low_noise import LowNoise
from neighbours.perceptual import SelfPerceptual
from runs import new_run, same, settings_of, usage_error
from support.checkpoint import read_checkpoint
from support.settings import load_inputs, reopen

TIMES = torch.tensor([30, 3, 50, 20, 21])  # of T = 50; of them 3 and 20 are at most 20
LOW = [1, 3]


def batch_of(model, times=TIMES, **how):
    """A training step's batch of five images."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(5, 3, 16, 16, generator=generator) * 2 - 1
    eps = torch.randn(5, 3, 16, 16, generator=generator)
    return Batch(x0, times, eps, q_sample(x0, times, eps, model.schedule), **how)


class Watched:
    """A mean squared error that keeps what it was asked."""

    def __init__(self):
        self.seen = []

    def __call__(self, x0_hat, x0):
        self.seen.append((x0_hat.detach(), x0))
        return squared_norm(x0_hat - x0)


@pytest.fixture
def watched(monkeypatch):
    """The same, as --metric ssim."""
    metric = Watched()
    monkeypatch.setitem(METRICS, "ssim", lambda: metric)
    return metric


# ---- what it is ----


def test_it_is_the_metric_of_the_low_images_and_zero_for_the_others():
    """And the metric sees those images alone."""
    model, metric = small(T=50), Watched()
    batch = batch_of(model)
    pred = model(batch.x_t, batch.t)
    found = LowNoise(OnX0(metric), 20)(pred, batch)
    ((x0_hat, x0),) = metric.seen
    assert torch.equal(x0_hat, pred.x0_hat[LOW]) and torch.equal(x0, batch.x0[LOW])
    expected = squared_norm(pred.x0_hat - batch.x0)
    assert torch.equal(found[LOW], expected[LOW]) and found[LOW].all()
    assert not found[[0, 2, 4]].any()


def test_its_gradient_reaches_the_clean_images_of_the_low_ones_alone():
    batch = batch_of(small(T=50))
    x0_hat = batch.x0.mul(0.5).requires_grad_()
    pred = Prediction(batch.eps, x0_hat, torch.zeros(5, 1, 16, 16))
    LowNoise(OnX0(Watched()), 20)(pred, batch).mean().backward()
    reached = x0_hat.grad.flatten(1).any(1)
    assert reached.nonzero().flatten().tolist() == LOW


def test_in_casdm_it_trains_phi_by_the_low_images_as_their_own_batch_would():
    """Two of five images: 2/5 of the gradient of the mean over these two; theta has none."""
    model, metric = small(T=50), OnX0(Watched())
    batch = batch_of(model)
    pred = model(batch.x_t, batch.t)
    phi = list(model.phi.parameters())
    whole = LowNoise(metric, 20)(pred, batch).mean()
    found = torch.autograd.grad(whole, [*model.theta.parameters(), *phi], allow_unused=True)
    theirs = model(batch.x_t[LOW], batch.t[LOW])
    alone = metric(theirs, batch_of(model)._replace(x0=batch.x0[LOW])).mean()
    expected = torch.autograd.grad(alone, phi, allow_unused=True)
    n = len(list(model.theta.parameters()))
    assert all(gradient is None for gradient in found[:n])
    assert expected[0].any()
    for got, wanted in zip(found[n:], expected, strict=True):
        assert_close(got, wanted * 2 / 5, rtol=1e-3, atol=1e-5)


def test_a_batch_without_low_noise_does_not_ask_the_metric_and_trains_all_the_same():
    model, metric = small(T=50), Watched()
    batch = batch_of(model)
    losses = training_losses(model, batch, {"metric": LowNoise(OnX0(metric), 2)})
    terms = objective(losses, {"eps": 1, "x0": 1, "mu": 1, "metric": 1}, batch)
    terms["loss"].backward()
    assert not metric.seen
    assert losses["metric"].shape == (5,) and not losses["metric"].any()
    assert model.phi.input_blocks[0][0].weight.grad.any()


def test_the_self_perceptual_metric_gets_the_labels_and_other_t_of_the_low_images():
    """Each image's distance is that of the whole batch's; the weight may be a number."""
    labelled = {"T": 50, "num_classes": 3}
    model, metric = small(**labelled), SelfPerceptual(small(model="ddpm", **labelled))
    y, t_other = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 10, 20, 30, 40])
    batch = batch_of(model, y=y, t_other=t_other)
    pred = model(batch.x_t, batch.t, y)
    found, whole = LowNoise(metric, 20)(pred, batch), metric(pred, batch)
    assert whole.all()
    assert_close(found[LOW], whole[LOW], rtol=1e-4, atol=1e-6)
    assert not found[[0, 2, 4]].any()


@pytest.mark.parametrize(
    "image, cosine, linear",
    [(0.3, 0.74, 0.43), (0.4, 0.62, 0.34), (0.2, 0.84, 0.53)],
    ids=["PixelGen", "pMF, 0.6", "pMF, 0.8"],
)
def test_the_published_thresholds_are_these_shares_of_T(image, cosine, linear):
    """Where sqrt(1 - abar_t) / sqrt(abar_t) is that of their x_t = image x0 + (1 - image) eps."""
    for schedule, share in ((cosine_schedule(), cosine), (linear_schedule(), linear)):
        abar = schedule.alpha_bar[1:]
        low = (1 - abar).sqrt() / abar.sqrt() <= (1 - image) / image
        assert round(low.double().mean().item(), 2) == share


# ---- runs ----


def trained(folder, *flags):
    """A Cas-DM run of three steps of four images, T = 20, and the sums of its terms."""
    r = new_run(folder, *flags, "--iterations", 3)
    train.train(r)
    return r, dict(zip(r.terms, r.guard.sums.tolist(), strict=True))


def assert_same_weights(a, b):
    for part in ("raw_model", "ema", "optimizer"):
        assert same(getattr(a, part).state_dict(), getattr(b, part).state_dict())


def test_a_run_that_lets_everything_through_is_bitwise_the_run_without_it(tmp_path):
    """0.99 of T = 20 rounds to t <= 20, all of them; the metric is still wrapped."""
    plain, sums = trained(tmp_path, "--metric", "ssim=0.1")
    until, same_sums = trained(tmp_path, "--metric", "ssim=0.1", "--metric-until", 0.99)
    assert [type(r.metrics["ssim"]) for r in (plain, until)] == [OnX0, LowNoise]
    assert_same_weights(plain, until)
    assert sums == same_sums and sums["ssim"] > 0


def test_a_run_that_lets_nothing_through_is_bitwise_the_run_without_a_metric(tmp_path, watched):
    plain, _ = trained(tmp_path)
    until, sums = trained(tmp_path, "--metric", "ssim=0.1", "--metric-until", 0)
    assert_same_weights(plain, until)
    assert sums["ssim"] == 0 and not watched.seen


@pytest.mark.parametrize("parts", [1, 4])
def test_the_metric_of_a_run_sees_the_drawn_images_of_low_t_alone(parts, tmp_path, watched):
    """Also where the batch comes in parts, of which some have none; the term is the same mean."""
    flags = ["--metric", "ssim=0.1", "--metric-until", 0.3]
    drawn = [step[1]["t"] for step in new_run(tmp_path, *flags, "--iterations", 3).draws]
    counts = [int((t <= 6).sum()) for t in drawn]
    _, sums = trained(tmp_path, *flags, "--accumulate", parts)
    images = sum(counts)
    assert 0 < images < 12
    seen = [len(x0) for _, x0 in watched.seen]
    assert seen == ([n for n in counts if n] if parts == 1 else [1] * images)
    distances = sum(squared_norm(a - b).sum().item() for a, b in watched.seen)
    assert sums["ssim"] == pytest.approx(0.1 * distances / 4, rel=1e-5)


def test_a_share_becomes_the_last_step_of_every_metric(watched, monkeypatch, tmp_path):
    """0.29 of 100 is 29, though 0.29 * 100 < 29 in floating point."""
    monkeypatch.setattr("neighbours.perceptual.frozen_model", lambda *_: small(model="ddpm"))
    flags = ["--metric", "ssim=0.1", "--metric", "haarpsi=0.1", "--self-perceptual", "a.pt=1"]
    settings = settings_of(*flags, "--T", 100, "--metric-until", 0.29)
    _, metrics, _ = load_inputs(settings)
    assert metrics.keys() == {"ssim", "haarpsi", "self-perceptual"}
    assert [type(metric) for _, metric in metrics.values()] == [LowNoise] * 3
    assert {metric.last for _, metric in metrics.values()} == {29}


def test_a_run_from_before_the_flag_goes_on_with_every_t(tmp_path):
    """And no run changes it."""
    new_run(tmp_path, "--metric", "ssim=0.1").save()
    state = read_checkpoint(tmp_path / "checkpoint.pt")
    assert state["settings"].pop("metric_until") == 1
    torch.save(state, tmp_path / "checkpoint.pt")
    assert reopen(tmp_path, {})["settings"]["metric_until"] == 1
    with pytest.raises(ValueError, match=r"^--metric-until 0.5: the run in .* has 1.0; expected"):
        reopen(tmp_path, {"metric_until": 0.5})


@pytest.mark.parametrize(
    "line, says",
    [
        ("--metric-until 0.5", "--metric-until 0.5: the run has no metric"),
        ("--metric ssim=1 --metric-until 1.5", "'1.5'"),
        ("--metric ssim=1 --metric-until -1", "'-1'"),
        (
            "--model ddpm --self-perceptual a.pt=1 --metric-until 0.5",
            "a DDPM's whole objective",
        ),
    ],
)
def test_a_share_that_means_nothing_is_one_line_and_exit_2(line, says, capsys):
    assert says in usage_error(capsys, *line.split())
