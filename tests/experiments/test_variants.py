"""variants.py: each variant differs from our choice by what its name says, and by nothing else."""
import pytest
import torch
from torch.testing import assert_close

from support import edges
import refiner
from experiments import variants
from diffusion import Prediction, clean_estimates, cosine_schedule, eps_from_x0, mix, mu_from_x0, respace
from losses import SelfPerceptual, mu_loss, training_losses
from sample import p_sample
from test_sample import small_casdm

SCHEDULE = cosine_schedule()


def drawn(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, x_t, eps_hat, x0_hat = torch.randn(4, n, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x0, x_t, Prediction(eps_hat, x0_hat, torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64))


def test_the_cascade_without_arguments_is_casdms_own():
    model, x_t, t = small_casdm(), torch.randn(2, 3, 16, 16), torch.tensor([3, 3900])
    for got, expected in zip(variants.cascade()(model, x_t, t)[:3], model(x_t, t)):
        assert torch.equal(got, expected)


def test_each_cascade_changes_its_part_alone():
    """Unclamped: x0' and r_t where x0* leaves [-1, 1]; free: r_t is the logit of ours, x0' is ours."""
    model, x_t, t = small_casdm(), torch.randn(2, 3, 16, 16), torch.tensor([3, 3900])
    ours = model(x_t, t)
    open_, free = (variants.VARIANTS[name][0][2](model, x_t, t) for name in ("phi-unclamped", "r-free"))
    assert torch.equal(open_.eps_hat, ours.eps_hat) and not torch.equal(open_.x0_hat, ours.x0_hat)
    assert torch.equal(free.x0_hat, ours.x0_hat)
    assert_close(free.r_t.sigmoid(), ours.r_t)
    one = variants.VARIANTS["r-one"][0][2](model, x_t, t)
    assert torch.equal(one.x0_hat, ours.x0_hat) and (one.r_t == 1).all() and one.r_t.shape == ours.r_t.shape


def test_clamping_the_mix_is_ours_where_nothing_is_clamped_and_ends_in_range():
    chain = respace(SCHEDULE, 100)
    x0, x_t, pred = drawn(100)
    t = torch.arange(1, 101)
    small = [0.2 * x.clamp(-1, 1) for x in (x0, pred.x0_hat)]
    assert_close(variants.clamp_mixed(x_t, t, *small, pred.r_t, chain), p_sample(x_t, t, *small, pred.r_t, chain), rtol=1e-9, atol=1e-9)
    first = torch.ones(100, dtype=torch.int64)
    wide = variants.unclamped(x_t, first, pred, chain)
    assert_close(variants.clamp_mixed(x_t, first, *wide, pred.r_t, chain), mix(wide[1], wide[0], pred.r_t).clamp(-1, 1))
    assert torch.equal(clean_estimates(x_t, first, pred, chain)[1], wide[1].clamp(-1, 1))


def test_scaled_mu_loss_is_l_mu_over_coef1_squared_where_nothing_is_clamped_and_never_explodes():
    """|| x0 - (r_t x0' + (1 - r_t) x0*) ||^2 at every t; r_t alone has a gradient (Cas-DM Eqs. 7, 11, 12)."""
    x0, x_t, pred = drawn(40)
    t = torch.arange(1, 4001, 100)
    small = [0.2 * x.clamp(-1, 1) for x in (pred.eps_hat, pred.x0_hat)]
    inside = Prediction(eps_from_x0(x_t, t, small[0], SCHEDULE), small[1], pred.r_t)
    coef1 = mu_from_x0(torch.zeros_like(x0), t, torch.ones_like(x0), SCHEDULE)[:, 0, 0, 0]
    assert_close(variants.scaled_mu_loss(inside, x0, x_t, t, SCHEDULE), mu_loss(inside, x0, x_t, t, SCHEDULE) / coef1 ** 2, rtol=1e-6, atol=0)
    leaves = [p.requires_grad_() for p in pred[:3]]
    loss = variants.scaled_mu_loss(pred, x0.clamp(-1, 1), x_t, t, SCHEDULE)
    assert loss.max() <= 4
    loss.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [False, False, True]


def test_without_a_ramp_the_first_average_is_nearly_the_start():
    class Run:
        settings, averages, weights = {"ema": 0.9999}, [torch.zeros(2)], [torch.ones(2, requires_grad=True)]
    variants.constant_decay(Run)
    assert not Run.averages[0].requires_grad
    assert_close(Run.averages[0], torch.full((2,), 1e-4))


def test_derived_noise_makes_the_self_perceptual_metric_zero_at_the_same_t_and_changes_no_other_loss():
    model, judge = small_casdm(), SelfPerceptual(small_casdm())
    x0, eps = torch.randn(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t, how = torch.tensor([3, 3900]), {"metrics": {"self-perceptual": (1.0, judge)}, "t_other": torch.tensor([3, 3900])}
    ours, derived = (training(model, x0, t, eps, SCHEDULE, **how) for training in (training_losses, variants.derived_noise))
    assert derived["self-perceptual"] < 1e-6 < 1e-3 * ours["self-perceptual"]
    assert all(derived[name] == ours[name] for name in ("eps", "x0", "mu"))


@pytest.mark.parametrize("line, says", [("r-square train.py", "r-square"), ("r-free fid.py", "fid.py"), ("r-free", "script"), ("r-free sample.py nowhere.pt", "nowhere.pt")])
def test_what_is_no_variant_or_script_is_one_line(line, says, capsys, monkeypatch):
    monkeypatch.setattr(refiner.CasDM, "forward", refiner.CasDM.forward)        # put back at the end
    try:
        assert edges.run(variants.main, line.split()) == 1
    except SystemExit as end:
        assert end.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error


@pytest.mark.slow
@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_trains_and_samples(name, tmp_path, monkeypatch):
    for place, function, _ in variants.VARIANTS[name]:
        monkeypatch.setattr(place, function, getattr(place, function))      # put back at the end
    small = ["--channels", "32", "--T", "10", "--iterations", "2", "--batch-size", "2", "--sample-every", "0"]
    assert edges.run(variants.main, [name, "train.py", *small, "--out", str(tmp_path / "run")]) == 0
    assert edges.run(variants.main, [name, "sample.py", str(tmp_path / "run/checkpoint.pt"), "--n", "2", "--steps", "10", "--out", str(tmp_path / "x.npz")]) == 0
    assert (name in ("phi-unclamped", "r-free", "r-one")) == (refiner.CasDM.forward.__qualname__ != "CasDM.forward")
