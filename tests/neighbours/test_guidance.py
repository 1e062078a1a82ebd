"""Labels, and guidance.py: class conditioning, and a classifier that guides.

ADM   arXiv:2105.05233v4
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffusion import (
    Estimates,
    cosine_schedule,
    ddim_mu_from_x0,
    linear_schedule,
    q_sample,
    respace,
)
from losses import Batch, training_losses
from models import small as small_model
from neighbours.guidance import GuidedEstimates, classifier_gradient, guided, guided_x0
from neighbours.variance import Ancestral, log_variance
from sample import Ddim, Sampler
from support.models import set_precision

MAKERS = {  # (noise, y) -> a step
    "ddim": lambda noise, y: Ddim(),
    "eta 1": lambda noise, y: Ddim(1.0, noise),
    "ancestral": lambda noise, y: Ancestral("small", noise),
}


def small(model, **settings):
    """Of 100 steps and in eval mode; no weight is zero."""
    return small_model(model=model, T=100, **settings).eval()


def noisy(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.tensor([1, 20, 60, 100])[:n]


def guided_sampler(model, make_step, classifier, scale, label):
    """A Sampler of four steps, guided towards the label."""
    sampler = Sampler(model, 16, 4, make_step=guided(make_step, classifier, scale))
    sampler.classes, sampler.label = 3, label
    return sampler


class Logistic(nn.Module):
    """Two classes with p(1 | x) = sigmoid(w . x): grad log p(1 | x) = (1 - p) w."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x, t, y=None):
        logit = (x * self.w).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(logit), logit], 1)


class Gaussian(nn.Module):
    """p(0 | x) ~ exp(-|x - c|^2 / 2), the other class far likelier: grad log p(0 | x) = c - x."""

    def __init__(self, c):
        super().__init__()
        self.c = nn.Parameter(c)

    def forward(self, x, t, y=None):
        logit = -((x - self.c) ** 2).sum((1, 2, 3)) / 2
        return torch.stack([logit, torch.full_like(logit, 1e6)], 1)


# ---- class conditioning ----


@pytest.mark.parametrize("model", ["ddpm", "dual", "casdm"])
def test_the_label_reaches_every_network(model):
    model, (x, t) = small(model, num_classes=3), noisy()
    zero, one = model(x, t, torch.full((4,), 0)), model(x, t, torch.full((4,), 1))
    assert not torch.equal(zero.eps_hat, one.eps_hat)
    assert not torch.equal(zero.x0_hat, one.x0_hat)
    assert all(net.label_embed.weight.shape == (3, 128) for net in model.children())


def test_the_label_reaches_phi_by_itself_whatever_theta_says():
    phi, (x, t) = small("casdm", num_classes=3).phi, noisy()
    zero, one = phi(x, t.float(), torch.full((4,), 0)), phi(x, t.float(), torch.full((4,), 1))
    assert not torch.equal(zero, one)


def test_each_images_label_is_its_own():
    """No cross-talk in the batch: changing one label changes one image."""
    model, (x, t) = small("casdm", num_classes=3), noisy()
    a = model(x, t, torch.tensor([0, 1, 2, 0])).x0_hat
    b = model(x, t, torch.tensor([0, 1, 0, 0])).x0_hat
    same = [torch.allclose(a[i], b[i], atol=1e-6) for i in range(4)]
    assert same == [True, True, False, True]


def test_labels_train_their_rows_and_no_other():
    """Only the rows of the labels in the batch get a gradient, in theta and in phi."""
    model, (x0, t) = small("casdm", num_classes=4), noisy(2)
    x0, eps = x0.clamp(-1, 1), torch.randn(2, 3, 16, 16)
    x_t = q_sample(x0, t, eps, model.schedule)
    losses = training_losses(model, Batch(x0, t, eps, x_t, torch.tensor([1, 3])), {})
    sum(loss.mean() for loss in losses.values()).backward()
    for net in (model.theta, model.phi):
        assert net.label_embed.weight.grad.any(1).tolist() == [False, True, False, True]


def test_image_i_of_a_model_with_classes_has_label_i_mod_k_unless_one_is_asked_for():
    sampler = Sampler(small("ddpm", num_classes=3), 16, 4)
    assert sampler.labels(4, 5).tolist() == [1, 2, 0, 1, 2]
    whole = sampler(0, 5)
    assert_close(sampler(3, 2), whole[3:], rtol=0, atol=1e-4)
    sampler.label = 1
    chosen = sampler(0, 5)
    assert_close(chosen[1], whole[1], rtol=0, atol=1e-4)
    assert not torch.allclose(chosen[0], whole[0], atol=1e-4)


# ---- classifier guidance ----


def test_the_gradient_is_that_of_the_log_probability_times_the_scale():
    """(1 - p) w for a logistic classifier, each image's own; also inside inference mode."""
    w = torch.randn(3, 16, 16, dtype=torch.float64) * 0.05
    classifier, x = Logistic(w), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    one = torch.ones(4, dtype=torch.int64)
    p = (x * w).sum((1, 2, 3)).sigmoid().view(-1, 1, 1, 1)
    with torch.inference_mode():
        g = classifier_gradient(classifier, x.clone(), one, one, 2.5)
    assert_close(g, 2.5 * (1 - p) * w)
    assert classifier.w.grad is None


@pytest.mark.parametrize("model", ["ddpm", "dual", "casdm"])
@pytest.mark.parametrize("make_step", MAKERS.values(), ids=MAKERS)
def test_scale_zero_is_the_unguided_sampler_bit_for_bit(model, make_step):
    model, classifier = small(model), small("classifier", num_classes=3)
    plain = Sampler(model, 16, 4, make_step=make_step)(0, 1)
    assert torch.equal(guided_sampler(model, make_step, classifier, 0.0, 1)(0, 1), plain)


def test_the_ancestral_mean_moves_by_s_sigma_g():
    """One step of a Gaussian classifier, in closed form: mu + s Sigma (c - x_t) (ADM Alg. 1)."""
    model, c = small("ddpm"), torch.full((3, 16, 16), 0.5)
    plain, moved = [], []
    sampler = Sampler(model, 16, 4, make_step=MAKERS["ancestral"])
    sampler(0, 1, lambda t, x_t, estimates: plain.append(x_t))
    sampler = guided_sampler(model, MAKERS["ancestral"], Gaussian(c), 3.0, 0)
    sampler(0, 1, lambda t, x_t, estimates: moved.append(x_t))
    sigma2 = log_variance(torch.tensor([4]), sampler.chain, "small", c[None]).exp()
    assert torch.equal(moved[0], plain[0])
    assert_close(moved[1], plain[1] + 3.0 * sigma2 * (c - moved[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_ddims_eps_moves_by_minus_s_root_of_one_minus_abar_g(r):
    """Guiding x0* and x0' is guiding the eps of their mix, whatever r_t is (ADM Alg. 2)."""
    chain, t = respace(cosine_schedule(), 100), torch.tensor([7, 100])
    x_t, star, hat, g = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(4))
    r_t = torch.full((2, 1, 4, 4), r, dtype=torch.float64)
    abar = chain.alpha_bar[t].view(-1, 1, 1, 1)
    previous = chain.alpha_bar[t - 1].view(-1, 1, 1, 1)
    mixed = r * hat + (1 - r) * star
    eps = (x_t - abar.sqrt() * mixed) / (1 - abar).sqrt() - (1 - abar).sqrt() * g
    x0 = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    expected = previous.sqrt() * x0 + (1 - previous).sqrt() * eps
    step = GuidedEstimates(Ddim(), lambda x_t, t: g)
    found = step(x_t, t, Estimates(star, hat, r_t), chain)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_in_casdm_phi_sees_the_unguided_x0_star():
    """The classifier guides x0* and x0' after the model: phi's input is an unguided step's."""
    model, classifier = small("casdm"), Gaussian(torch.full((3, 16, 16), 5.0))
    seen = []
    model.phi.register_forward_hook(lambda phi, inputs, output: seen.append(inputs[0]))
    Sampler(model, 16, 4)(0, 1)
    guided_sampler(model, MAKERS["ddim"], classifier, 1.0, 0)(0, 1)
    plain, moved = seen[:4], seen[4:]
    assert torch.equal(plain[0], moved[0])
    assert not torch.equal(plain[1], moved[1])


def test_both_forms_agree_for_small_steps():
    """Where beta_t is small, eta = 1 DDIM moves by Sigma g too, as Alg. 1 does (ADM Sec. 4.2)."""
    schedule, t = linear_schedule(10_000), torch.tensor([5000])
    x_t, x0, g = (torch.randn(1, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    moved = ddim_mu_from_x0(x_t, t, guided_x0(x0, t, g, schedule), schedule, eta=1.0)
    plain = ddim_mu_from_x0(x_t, t, x0, schedule, eta=1.0)
    assert_close(moved - plain, schedule.beta[t].view(-1, 1, 1, 1) * g, rtol=1e-3, atol=0)


# ---- the classifier ----


def labelled(classifier):
    """Four noisy images with their labels."""
    x0, t = noisy()
    eps, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 4, 2, 2])
    return Batch(x0, t, eps, q_sample(x0, t, eps, classifier.schedule), y)


def test_the_classifier_learns_labels_by_cross_entropy_at_every_t():
    """Logits [B, K], not zero at initialisation; the encoder alone, no way up."""
    classifier = small("classifier", num_classes=5)
    batch = labelled(classifier)
    logits = classifier(batch.x_t, batch.t)
    assert logits.shape == (4, 5)
    assert logits.std() > 0
    losses = training_losses(classifier, batch, {})
    assert list(losses) == ["label"]
    assert_close(losses["label"].mean(), nn.functional.cross_entropy(logits, batch.y))
    losses["label"].mean().backward()
    assert all(p.grad is not None for p in classifier.parameters())
    assert not hasattr(classifier.theta, "output_blocks")


def test_the_classifiers_loss_is_float32_under_bf16():
    """Only the network is under autocast, as with every other loss."""
    classifier = small("classifier", num_classes=5)
    batch = labelled(classifier)
    exact = training_losses(classifier, batch, {})["label"]
    set_precision(classifier, "bf16")
    rounded = training_losses(classifier, batch, {})["label"]
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
