"""The guard: no step with a number that is not finite, and which it was."""

import types

import pytest
import torch

from support.guard import Guard

NEVER = types.SimpleNamespace(asked=False)


def guarded(gradient, device="cpu"):
    """A fused AdamW of one weight with this gradient, its guard and the weight."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor(gradient)
    adamw = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = Guard(adamw, ("eps", "mu", "loss"), NEVER, begun=7)
    guard.device = torch.device(device)
    return adamw, guard, weight


def note(guard, **terms):
    guard.note({name: torch.tensor(value) for name, value in terms.items()}, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_of_finite_losses_is_caught(bad):
    """Weights and moments stay untouched, then and in later steps; the check names the gradient."""
    adamw, guard, weight = guarded([1.0, 1.0])
    note(guard, eps=1.0, mu=1.0, loss=2.0)
    adamw.step()
    guard.check()
    after_one = weight.detach().clone()
    for gradient in ([1.0, bad], [1.0, 1.0]):
        weight.grad = torch.tensor(gradient)
        note(guard, eps=1.0, mu=1.0, loss=2.0)
        adamw.step()
    torch.testing.assert_close(weight.detach(), after_one, rtol=0, atol=0)
    assert adamw.state[weight]["exp_avg"].isfinite().all()
    with pytest.raises(ArithmeticError, match="step 9: gradient is not finite; expected numbers"):
        guard.check()


def test_the_term_that_is_not_finite_is_named_and_not_their_sum():
    adamw, guard, _ = guarded([1.0, 1.0])
    note(guard, eps=1.0, mu=float("inf"), loss=float("inf"))
    adamw.step()
    with pytest.raises(ArithmeticError, match="step 8: mu is not finite"):
        guard.check()


def test_on_mps_the_optimiser_is_not_called_for_a_step_that_is_not_finite():
    """Its fused kernel may ignore found_inf: there `optimizer.step` itself ends with the error."""
    adamw, guard, weight = guarded([1.0, float("nan")], device="mps")
    note(guard, eps=1.0, mu=1.0, loss=2.0)
    with pytest.raises(ArithmeticError, match="step 8: gradient is not finite"):
        adamw.step()
    assert not adamw.state[weight]


def test_a_mean_is_that_of_the_steps_since_the_last():
    """Of a step in two parts the losses are their mean."""
    adamw, guard, _ = guarded([1.0, 1.0])
    for eps in (1.0, 3.0):
        for part in (eps - 0.5, eps + 0.5):
            guard.note({name: torch.tensor(part) for name in guard.terms}, 2)
        adamw.step()
    assert guard.means(2) == {"eps": 2.0, "mu": 2.0, "loss": 2.0}
    note(guard, eps=5.0, mu=6.0, loss=7.0)
    adamw.step()
    assert guard.means(1) == {"eps": 5.0, "mu": 6.0, "loss": 7.0}


def test_a_stop_is_seen_at_the_next_step():
    adamw, guard, _ = guarded([1.0, 1.0])
    guard.stop = types.SimpleNamespace(asked=True)
    assert not guard.stopped()
    note(guard, eps=1.0, mu=1.0, loss=2.0)
    adamw.step()
    assert guard.stopped()
