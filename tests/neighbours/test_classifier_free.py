"""classifier_free.py: guidance by the difference that a label makes to the model itself.

CFG   arXiv:2207.12598v1
"""

import pytest
import torch
from torch.testing import assert_close

from diffusion import x0_from_eps
from models import small as small_model
from neighbours.classifier_free import ClassifierFree, guide_theta

KINDS = {
    "ddpm": {"model": "ddpm"},
    "ddpm-x0": {"model": "ddpm", "predict": "x0"},
    "sigma": {"model": "ddpm", "learn_sigma": True, "objective": "hybrid"},
    "dual": {"model": "dual"},
    "casdm": {"model": "casdm"},
}
NO_LABEL = torch.full((4,), 3)


def small(kind, label_dropout=0.1):
    """A model with three labels and, where they were dropped, none; no weight is zero."""
    labels = {"num_classes": 3, "label_dropout": label_dropout}
    return small_model(**KINDS[kind], T=100, **labels).eval()


def guided(kind, w):
    model = small(kind)
    guide_theta(model, w)
    return model


def noisy():
    """x_t, t and y of four images of 8 x 8, which is enough for convolutions."""
    x_t = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([1, 20, 60, 100]), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("w", [0.0, -1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_eps_is_linear_in_w_from_the_unconditional_to_the_conditional_model(kind, w):
    """(1 + w) eps_label - w eps_null (CFG Eq. 6); a gate and a variance stay those of the label."""
    x_t, t, y = noisy()
    plain = small(kind)
    with_label, without = plain(x_t, t, y), plain(x_t, t, NO_LABEL)
    pred = guided(kind, w)(x_t, t, y)
    expected = (1 + w) * with_label.eps_hat - w * without.eps_hat
    assert_close(pred.eps_hat, expected, rtol=1e-3, atol=1e-3)
    if kind == "sigma":
        assert_close(pred.v, with_label.v, rtol=1e-4, atol=1e-5)
    if kind != "casdm":  # whose gate is phi's, which sees the x0* of the guided eps'
        assert_close(pred.r_t, with_label.r_t, rtol=1e-4, atol=1e-5)


def test_in_casdm_phi_sees_the_x0_star_of_the_guided_eps_and_the_label():
    x_t, t, y = noisy()
    plain = small("casdm")
    time = plain.time(t, x_t)
    eps = 3 * plain.theta(x_t, time, y) - 2 * plain.theta(x_t, time, NO_LABEL)
    x0_star = x0_from_eps(x_t, t, eps, plain.schedule).clamp(-1, 1)
    x0_hat = plain.phi(x0_star, time, y)[:, :3]
    pred = guided("casdm", 2.0)(x_t, t, y)
    assert_close(pred.eps_hat, eps, rtol=1e-3, atol=1e-4)
    assert_close(pred.x0_hat, x0_hat, rtol=1e-3, atol=1e-3)


def test_it_needs_a_model_that_knows_images_without_a_label():
    with pytest.raises(ValueError, match=r"^--cfg: .*--label-dropout"):
        guide_theta(small("ddpm", label_dropout=0.0), 1.0)


def test_it_asks_the_network_once_with_both_halves():
    calls = []

    def net(x, t, y):
        calls.append(y.tolist())
        return x + y.view(-1, 1, 1, 1)

    x, t, y = torch.zeros(2, 4, 2, 2), torch.zeros(2), torch.tensor([1, 2])
    out = ClassifierFree(net, null_label=9, guided=3, w=1.0)(x, t, y)
    assert calls == [[1, 2, 9, 9]]
    assert out[:, 0, 0, 0].tolist() == [2 * 1 - 9, 2 * 2 - 9]
    assert out[:, 3, 0, 0].tolist() == [1, 2]  # a channel that is not guided
