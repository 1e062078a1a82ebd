"""variants.py: each variant differs from our choice by what its name says, and by nothing else."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffusion import (
    Estimates,
    Prediction,
    clean_estimates,
    cosine_schedule,
    eps_from_x0,
    mix,
    mu_from_x0,
    q_sample,
    respace,
)
from experiments import variants
from losses import Batch, mu_loss
from models import SMALL, without_zeros
from neighbours.perceptual import SelfPerceptual
from refiner import DEFAULTS, CasDM
from runs import error_of, exit_code
from sample import Ddim
from support.checkpoint import read_checkpoint

SCHEDULE = cosine_schedule()


def small(kind):
    """A Cas-DM of the given class; its random weights are always the same, none of them zero."""
    torch.manual_seed(0)
    return without_zeros(kind(DEFAULTS | SMALL)).eval()


def says(kind):
    """What a model of the class says about two noisy images."""
    x_t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return small(kind)(x_t, torch.tensor([3, 3900]))


def normal(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64)


def gate(n):
    generator = torch.Generator().manual_seed(9)
    return torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64)


def batch_of(n, t):
    """n images of a training step, -1..1."""
    x0, eps = normal(n, 0).clamp(-1, 1), normal(n, 1)
    return Batch(x0, t, eps, q_sample(x0, t, eps, SCHEDULE))


# ---- figure 1 ----


def test_casdm_in_parts_as_it_stands_is_casdms_own():
    ours, theirs = says(CasDM), says(variants.CasDMInParts)
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))


def test_unclamped_phi_says_something_else_of_the_same_eps():
    ours, theirs = says(CasDM), says(variants.PhiUnclamped)
    assert torch.equal(theirs.eps_hat, ours.eps_hat)
    assert not torch.equal(theirs.x0_hat, ours.x0_hat)


def test_a_free_gate_is_the_logit_of_ours():
    ours, theirs = says(CasDM), says(variants.FreeGate)
    assert torch.equal(theirs.x0_hat, ours.x0_hat)
    assert_close(theirs.r_t.sigmoid(), ours.r_t)


def test_a_gate_of_one_is_one_everywhere():
    ours, theirs = says(CasDM), says(variants.GateOfOne)
    assert torch.equal(theirs.x0_hat, ours.x0_hat)
    assert torch.equal(theirs.r_t, torch.ones_like(ours.r_t))


def test_a_linear_gate_grows_with_t_from_0_to_1():
    """It is given t = 3 and 3,900 of 4,000."""
    ours, theirs = says(CasDM), says(variants.LinearGate)
    assert torch.equal(theirs.x0_hat, ours.x0_hat)
    assert theirs.r_t.shape == ours.r_t.shape
    assert_close(theirs.r_t[:, 0, 5, 5], torch.tensor([3 / 4000, 3900 / 4000]))


# ---- sampling ----


def test_clamping_the_mix_is_ours_where_nothing_is_clamped():
    chain, t, x_t = respace(SCHEDULE, 100), torch.arange(1, 101), normal(100, 0)
    x0_star, x0_hat = (0.2 * normal(100, seed).clamp(-1, 1) for seed in (1, 2))
    estimates = Estimates(x0_star, x0_hat, gate(100))
    theirs = variants.clamp_mixed(None, x_t, t, estimates, chain)
    assert_close(theirs, Ddim()(x_t, t, estimates, chain), rtol=1e-9, atol=1e-9)


def test_the_mix_of_unclamped_estimates_ends_in_range():
    """At t = 1 a step is its clean image."""
    chain, t, x_t = respace(SCHEDULE, 100), torch.ones(100, dtype=torch.int64), normal(100, 0)
    pred = Prediction(normal(100, 1), normal(100, 2), gate(100))
    wide = variants.unclamped(x_t, t, pred, chain)
    found = variants.clamp_mixed(None, x_t, t, wide, chain)
    assert_close(found, mix(wide.x0_hat, wide.x0_star, wide.r_t).clamp(-1, 1))
    ours = clean_estimates(x_t, t, pred, chain)
    assert torch.equal(ours.x0_star, wide.x0_star.clamp(-1, 1))
    assert torch.equal(ours.x0_hat, wide.x0_hat.clamp(-1, 1))


# ---- training ----


def test_scaled_mu_loss_is_l_mu_over_coef1_squared_where_nothing_is_clamped():
    """At every t; coef1 is x0's in mu~_t (Cas-DM Eqs. 7, 12)."""
    t = torch.arange(1, 4001, 100)
    batch = batch_of(40, t)
    x0_star, x0_hat = (0.2 * normal(40, seed).clamp(-1, 1) for seed in (2, 3))
    pred = Prediction(eps_from_x0(batch.x_t, t, x0_star, SCHEDULE), x0_hat, gate(40))
    zero, one = torch.zeros_like(batch.x0), torch.ones_like(batch.x0)
    coef1 = mu_from_x0(zero, t, one, SCHEDULE)[:, 0, 0, 0]
    expected = mu_loss(pred, batch, SCHEDULE) / coef1**2
    assert_close(variants.scaled_mu_loss(pred, batch, SCHEDULE), expected, rtol=1e-6, atol=0)


def test_scaled_mu_loss_never_explodes_and_trains_r_t_alone():
    pred = Prediction(normal(40, 2), normal(40, 3), gate(40))
    for part in pred[:3]:
        part.requires_grad_()
    loss = variants.scaled_mu_loss(pred, batch_of(40, torch.arange(1, 4001, 100)), SCHEDULE)
    assert loss.max() <= 4  # (1 - -1)^2
    loss.sum().backward()
    assert pred.r_t.grad.any()
    assert pred.eps_hat.grad is None
    assert pred.x0_hat.grad is None


def test_without_a_ramp_the_first_average_is_nearly_the_start():
    class Run:
        settings = {"ema": 0.9999}
        averages, weights = [torch.zeros(2)], [torch.ones(2, requires_grad=True)]

    variants.constant_decay(Run)
    assert_close(Run.averages[0], torch.full((2,), 1e-4))
    assert not Run.averages[0].requires_grad


def test_derived_noise_makes_the_self_perceptual_metric_zero_at_the_same_t():
    model, t = small(CasDM), torch.tensor([3, 3900])
    x0, eps = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = Batch(x0, t, eps, q_sample(x0, t, eps, SCHEDULE), t_other=t)
    pred = model(batch.x_t, batch.t)
    ours = SelfPerceptual(small(CasDM))(pred, batch).mean()
    derived = variants.DerivedNoise(small(CasDM))(pred, batch).mean()
    assert derived < 1e-6 < 1e-3 * ours


# ---- the script ----


@pytest.fixture
def put_back(monkeypatch):
    """Everything that a variant replaces stands there again when the test ends."""
    for places in variants.VARIANTS.values():
        for where, name, _ in places:
            monkeypatch.setattr(where, name, getattr(where, name))


@pytest.mark.parametrize(
    "line, code",
    [
        ("r-square train.py", 2),
        ("r-free fid.py", 2),
        ("r-free", 2),
        ("r-free sample.py nowhere.pt", 1),
    ],
)
def test_what_is_no_variant_script_or_checkpoint_is_one_line(line, code, capsys, put_back):
    assert exit_code(variants.main, *line.split()) == code
    assert error_of(capsys)


def trained_and_sampled(folder, flags, variant=None):
    """(weights, their average, images) of a tiny run."""
    small = "--channels 32 --T 10 --iterations 2 --batch-size 2 --sample-every 0"
    checkpoint, images = folder / "checkpoint.pt", folder / "images.npz"
    lines = {
        "train.py": [*small.split(), *flags, "--out", folder],
        "sample.py": [checkpoint, "--n", 2, "--steps", 10, "--out", images],
    }
    for script, argv in lines.items():
        if variant:
            assert exit_code(variants.main, variant, script, *argv) == 0
        else:
            assert exit_code(variants.SCRIPTS[script].main, *argv) == 0
    state = read_checkpoint(checkpoint)
    return state["model"], state["ema"], {"images": torch.from_numpy(np.load(images)["arr_0"])}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(folder, what came out) of our own choices."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, trained_and_sampled(folder, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_trains_and_samples_and_something_else_comes_out(name, plain, tmp_path, put_back):
    (folder, ours), flags = plain, []
    if name == "noise-derived":
        flags = ["--self-perceptual", f"{folder / 'checkpoint.pt'}=0.1"]
        ours = trained_and_sampled(tmp_path / "ours", flags)
    theirs = trained_and_sampled(tmp_path / "theirs", flags, name)
    same = []
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        same.append(all(torch.equal(a[key], b[key]) for key in a))
    assert not all(same)
