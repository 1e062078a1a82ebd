r"""guidance.py and the labels: class conditioning, classifier guidance, classifier-free guidance.

    ADM      arXiv:2105.05233v4     CFG      arXiv:2207.12598v1
"""
import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from data import stream
from diffusion import Prediction, cosine_schedule, linear_schedule, q_sample, respace, x0_from_eps
from neighbours.guidance import ClassifierFree, classifier_free, classifier_gradient, guided_x0
from losses import training_losses
from refiner import build_model
from sample import labels, p_sample, sample
from neighbours.variance import log_variance

SMALL = dict(image_size=16, channels=32, res_blocks=1, T=100)
KINDS = {"ddpm": {}, "ddpm-x0": dict(model="ddpm", predict="x0"), "sigma": dict(model="ddpm", learn_sigma=True, objective="hybrid"), "dual": {}, "casdm": {}}


def build(kind, **settings):
    torch.manual_seed(0)
    model = build_model(SMALL | dict(model=kind) | KINDS.get(kind, {}) | settings)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return model.eval()


def noisy(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 16, 16, generator=g), torch.tensor([1, 20, 60, 100])[:n]


def networks(model):
    return [net for net in model.children()]


class Linear(nn.Module):
    """Two classes with p(y=1 | x) = sigmoid(w . x): grad log p(1 | x) = (1 - p) w."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x, t, y=None):
        logit = (x * self.w).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(logit), logit], 1)


class Gaussian(nn.Module):
    """p(0 | x) ~ exp(-|x - c|^2 / 2), as long as the other class is far likelier: grad log p(0 | x) = c - x."""

    def __init__(self, c):
        super().__init__()
        self.c = nn.Parameter(c)

    def forward(self, x, t, y=None):
        return torch.stack([-((x - self.c) ** 2).sum((1, 2, 3)) / 2, torch.full_like(x[:, 0, 0, 0], 1e6)], 1)


# ---- class conditioning ----

@pytest.mark.parametrize("kind", ["ddpm", "dual", "casdm"])
def test_the_label_reaches_every_network_and_both_of_casdm(kind):
    model = build(kind, num_classes=3)
    x, t = noisy()
    zero, one = (model(x, t, torch.full((4,), y)) for y in (0, 1))
    assert not torch.equal(zero.eps_hat, one.eps_hat) and not torch.equal(zero.x0_hat, one.x0_hat)
    assert all(net.label_embed.weight.shape == (3, 128) for net in networks(model))
    if kind == "casdm":     # phi by itself, whatever theta says
        seen = torch.zeros(4, 3, 16, 16)
        assert not torch.equal(model.refiner(seen, t.float(), torch.zeros(4).long()), model.refiner(seen, t.float(), torch.ones(4).long()))


def test_each_images_label_is_its_own():
    """No cross-talk in the batch: changing one label changes one image."""
    model, (x, t) = build("casdm", num_classes=3), noisy()
    a, b = model(x, t, torch.tensor([0, 1, 2, 0])).x0_hat, model(x, t, torch.tensor([0, 1, 0, 0])).x0_hat
    assert [torch.allclose(a[i], b[i], atol=1e-6) for i in range(4)] == [True, True, False, True]


def test_adagn_with_a_zero_embedding_is_a_plain_group_norm():
    """GroupNorm(h)(1 + scale) + shift with scale = shift = 0 (ADM Sec. 3.1)."""
    block = build("ddpm").net.input_blocks[1][0]
    nn.init.zeros_(block.emb.weight), nn.init.zeros_(block.emb.bias)
    x, emb = torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    plain = block.skip(x) + block.conv2(nn.functional.silu(block.norm2(block.conv1(nn.functional.silu(block.norm1(x))))))
    assert_close(block(x, emb), plain)


def test_labels_train_their_rows_and_no_other():
    """Only the rows of the labels in the batch get a gradient, in theta and in phi."""
    model = build("casdm", num_classes=4)
    x0, t = noisy(2)
    training_losses(model, x0.clamp(-1, 1), t, torch.randn(2, 3, 16, 16), model.schedule, y=torch.tensor([1, 3]))["loss"].backward()
    for net in networks(model):
        assert net.label_embed.weight.grad.any(1).tolist() == [False, True, False, True]


def test_image_i_of_a_model_with_classes_has_label_i_mod_k():
    assert labels(4, 5, 3).tolist() == [1, 2, 0, 1, 2]
    model = build("ddpm", num_classes=3)
    whole = sample(model, model.schedule, (5, 3, 16, 16), 0, 5)
    assert_close(sample(model, model.schedule, (2, 3, 16, 16), 0, 5, first=3), whole[3:], rtol=0, atol=1e-4)
    chosen = sample(model, model.schedule, (5, 3, 16, 16), 0, 5, y=torch.full((5,), 1))
    assert_close(chosen[1], whole[1], rtol=0, atol=1e-4)
    assert not torch.allclose(chosen[0], whole[0], atol=1e-4)


# ---- classifier guidance ----

def test_the_gradient_is_that_of_the_log_probability_times_the_scale():
    """(1 - p) w for a logistic classifier, each image's own; also inside inference mode."""
    w = torch.randn(3, 16, 16, dtype=torch.float64) * 0.05
    classifier, x = Linear(w), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    p = ((x * w).sum((1, 2, 3))).sigmoid().view(-1, 1, 1, 1).detach()
    with torch.inference_mode():
        g = classifier_gradient(classifier, x.clone(), torch.ones(4).long(), torch.ones(4).long(), 2.5)
    assert_close(g, 2.5 * (1 - p) * w)
    assert classifier.w.grad is None


@pytest.mark.parametrize("kind", ["ddpm", "dual", "casdm"])
@pytest.mark.parametrize("how", [{}, dict(variance="small"), dict(eta=1.0)], ids=["ddim", "ddpm", "eta1"])
def test_scale_zero_is_the_unguided_sampler_bit_for_bit(kind, how):
    model, classifier = build(kind), build("classifier", num_classes=3)
    y = torch.tensor([0, 2])

    def gradient(x_t, t, y):
        return classifier_gradient(classifier, x_t, t, y, 0.0)
    assert torch.equal(sample(model, model.schedule, (2, 3, 16, 16), 0, 10, y=y, gradient=gradient, **how),
                       sample(model, model.schedule, (2, 3, 16, 16), 0, 10, y=y, **how))


def test_the_ancestral_mean_moves_by_s_sigma_g():
    """One step of a Gaussian classifier, in closed form: mu + s Sigma (c - x_t) (ADM Algorithm 1)."""
    model, c = build("ddpm"), torch.full((3, 16, 16), 0.5)
    classifier, seen = Gaussian(c), []

    def gradient(x_t, t, y):
        seen.append((x_t.clone(), int(t[0])))
        return classifier_gradient(classifier, x_t, t, y, 3.0)
    y = torch.zeros(1).long()
    sample(model, model.schedule, (1, 3, 16, 16), 0, 10, y=y, variance="small", gradient=gradient)
    chain, after = respace(model.schedule, 10), []
    sample(model, model.schedule, (1, 3, 16, 16), 0, 10, y=y, variance="small", watch=lambda t, x_t, *_: after.append(x_t.clone()))
    sigma2 = log_variance(torch.tensor([10]), chain, "small", c[None]).exp()
    assert_close(seen[1][0], after[1] + 3.0 * sigma2 * (c - seen[0][0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("r", [0.0, 0.3, 1.0])
def test_ddims_eps_moves_by_minus_s_root_of_one_minus_abar_g(r):
    """Guiding both estimates of the clean image is guiding eps of their mix, whatever r_t is (ADM Algorithm 2)."""
    chain = respace(cosine_schedule(), 100)
    x_t, star, hat, g = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(4))
    t, r_t = torch.tensor([7, 100]), torch.full((2, 1, 4, 4), r, dtype=torch.float64)
    abar = chain.alpha_bar[t].view(-1, 1, 1, 1)
    previous = chain.alpha_bar[t - 1].view(-1, 1, 1, 1)
    mixed = r * hat + (1 - r) * star
    eps = (x_t - abar.sqrt() * mixed) / (1 - abar).sqrt() - (1 - abar).sqrt() * g
    expected = previous.sqrt() * (x_t - (1 - abar).sqrt() * eps) / abar.sqrt() + (1 - previous).sqrt() * eps
    assert_close(p_sample(x_t, t, guided_x0(star, t, g, chain), guided_x0(hat, t, g, chain), r_t, chain), expected, rtol=1e-9, atol=1e-9)


def test_in_casdm_phi_sees_the_unguided_x0_star():
    """The classifier guides both estimates, x0* and x0', after the model: phi's input is that of an unguided step."""
    model, x = build("casdm"), noisy(1)[0]
    seen = []
    model.refiner.register_forward_hook(lambda net, args, out: seen.append(args[0].clone()))
    for gradient in (None, lambda x_t, t, y: torch.full_like(x_t, 5.0)):
        sample(model, model.schedule, x.shape, 0, 10, y=torch.zeros(1).long(), gradient=gradient)
    assert torch.equal(seen[0], seen[10]) and not torch.equal(seen[1], seen[11])


def test_both_forms_agree_for_small_steps():
    """Ancestral and eta = 1 DDIM guidance shift the mean alike where beta_t is small: Sigma g against its DDIM form (ADM Sec. 4.2)."""
    schedule = linear_schedule(10_000)
    x_t, x0, g = (torch.randn(1, 3, 4, 4, dtype=torch.float64) for _ in range(3))
    t, one = torch.tensor([5000]), torch.ones(1, 1, 4, 4, dtype=torch.float64)
    ddim = p_sample(x_t, t, x0, guided_x0(x0, t, g, schedule), one, schedule, 1.0) - p_sample(x_t, t, x0, x0, one, schedule, 1.0)
    assert_close(ddim, schedule.beta[t].view(-1, 1, 1, 1) * g, rtol=1e-3, atol=0)


def test_the_classifier_learns_labels_by_cross_entropy_at_every_t():
    """Logits [B, K], not zero at initialisation; the loss is that of torch; the encoder alone, no way up."""
    classifier = build("classifier", num_classes=5)
    x0, t = noisy()
    y, eps = torch.tensor([0, 4, 2, 2]), torch.randn(4, 3, 16, 16)
    logits = classifier(q_sample(x0, t, eps, classifier.schedule), t)
    assert logits.shape == (4, 5) and logits.std() > 0
    losses = training_losses(classifier, x0, t, eps, classifier.schedule, y=y)
    assert set(losses) == {"label", "loss"}
    assert_close(losses["loss"], nn.functional.cross_entropy(logits, y))
    losses["loss"].backward()
    assert all(p.grad is not None for p in classifier.parameters()) and not hasattr(classifier.net, "output_blocks")


def test_the_classifiers_loss_is_float32_under_bf16():
    """Only the network is under autocast, as with every other loss."""
    classifier = build("classifier", num_classes=5)
    x0, t = noisy()
    y, eps = torch.tensor([0, 4, 2, 2]), torch.randn(4, 3, 16, 16)
    losses = training_losses(classifier, x0, t, eps, classifier.schedule, y=y, bf16=True)
    assert losses["label"].dtype == torch.float32


# ---- classifier-free guidance ----

@pytest.mark.parametrize("kind", KINDS)
def test_cfg_is_linear_in_w_between_the_conditional_and_the_unconditional_model(kind):
    """eps = (1 + w) eps_label - w eps_null: w = 0 conditional, w = -1 unconditional (CFG Eq. 6); a gate and v stay those of the label."""
    (x, t), y = noisy(), torch.tensor([0, 1, 2, 0])
    plain = build(kind, num_classes=3, label_dropout=0.1)
    null = torch.full((4,), 3)
    with_label, without = plain(x, t, y), plain(x, t, null)
    for w in (0.0, -1.0, 2.5):
        model = build(kind, num_classes=3, label_dropout=0.1)
        classifier_free(model, w)
        pred = model(x, t, y)
        assert_close(pred.eps_hat, (1 + w) * with_label.eps_hat - w * without.eps_hat, rtol=1e-3, atol=1e-3)
        if kind == "sigma":
            assert_close(pred.v, with_label.v, rtol=1e-4, atol=1e-5)
        if kind != "casdm":
            assert_close(pred.r_t, with_label.r_t, rtol=1e-4, atol=1e-5)


def test_cfg_in_casdm_gives_phi_the_x0_star_of_the_guided_eps_and_the_label():
    (x, t), y = noisy(), torch.tensor([0, 1, 2, 0])
    plain, model = (build("casdm", num_classes=3, label_dropout=0.1) for _ in range(2))
    classifier_free(model, 2.0)
    eps = 3 * plain.eps_net(x, plain.time(t, x), y) - 2 * plain.eps_net(x, plain.time(t, x), torch.full((4,), 3))
    star = x0_from_eps(x, t, eps, plain.schedule).clamp(-1, 1)
    expected = plain.refiner(star, plain.time(t, x), y)
    pred = model(x, t, y)
    assert_close(pred.eps_hat, eps, rtol=1e-3, atol=1e-4)
    assert_close(pred.x0_hat, expected[:, :3], rtol=1e-3, atol=1e-3)


def test_cfg_needs_a_model_that_knows_images_without_a_label():
    with pytest.raises(ValueError, match="^--cfg: .*--label-dropout"):
        classifier_free(build("ddpm", num_classes=3), 1.0)


def test_cfg_asks_the_network_once_with_both_halves():
    calls = []

    def net(x, t, y):
        calls.append((len(x), y.tolist()))
        return x + y.view(-1, 1, 1, 1)
    x = torch.zeros(2, 4, 2, 2)
    out = ClassifierFree(net, 9, 3, 1.0)(x, torch.zeros(2), torch.tensor([1, 2]))
    assert calls == [(4, [1, 2, 9, 9])]
    assert out[:, 0, 0, 0].tolist() == [2 * 1 - 9, 2 * 2 - 9] and out[:, 3, 0, 0].tolist() == [1, 2]
