"""Chance: draws follow from (seed, purpose, index) alone, and the data order from (seed, epoch)."""

import threading

import numpy as np
import pytest
import torch

from support.draws import Noise, StepDraws, ahead, batch_indices, stream

# ---- streams ----


def test_draws_follow_from_seed_purpose_and_index_alone():
    """Equal keys draw equally; a change of any part draws something else."""
    keys = [(0, "order", 0), (1, "order", 0), (0, "step", 0), (0, "order", 1)]
    draws = [stream(*key).standard_normal(4).tolist() for key in keys]
    assert draws == [stream(*key).standard_normal(4).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)


def test_an_images_noise_does_not_depend_on_its_batch():
    """Bitwise, in each draw of a chain."""
    whole = Noise(3, "sample", range(5), (3, 4, 4))
    part = Noise(3, "sample", range(2, 4), (3, 4, 4))
    for _ in range(3):
        torch.testing.assert_close(whole()[2:4], part(), rtol=0, atol=0)


# ---- the data order ----


@pytest.mark.parametrize("n, batch_size", [(10, 3), (3, 10), (1, 4), (7, 7), (64, 8)])
def test_every_epoch_holds_each_image_once(n, batch_size):
    """The batches, joined, are one permutation after another, also where one spans epochs."""
    batches = [batch_indices(n, batch_size, step, seed=5) for step in range(6 * n)]
    order = np.concatenate(batches)
    epochs = order[: len(order) // n * n].reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (len(epochs), 1)))
    if n > 1:
        assert len({tuple(epoch) for epoch in epochs}) > 1, "every epoch has the same order"


def test_data_order_does_not_depend_on_the_batch_size():
    """It is one sequence that batches cut into pieces, whichever step is asked for first."""
    in_fives = [batch_indices(11, 5, step, seed=2) for step in reversed(range(22))][::-1]
    in_elevens = [batch_indices(11, 11, step, seed=2) for step in range(10)]
    np.testing.assert_array_equal(np.concatenate(in_fives), np.concatenate(in_elevens))
    assert in_fives[0].dtype == np.int64
    assert not np.array_equal(in_elevens[0], batch_indices(11, 11, 0, seed=3))


# ---- a step's draws ----


class Remembering:
    """A neighbour's draw that depends on what earlier steps found."""

    def __init__(self):
        self.found = []

    def draw(self, rng, n):
        return {"weight": np.full(n, float(len(self.found)), np.float32)}


def drawn(steps, num_classes=3, extra=None):
    settings = {
        "batch_size": 4,
        "seed": 1,
        "T": 50,
        "num_classes": num_classes,
        "label_dropout": 0.5,
    }
    pixels, labels = np.zeros((10, 8, 8, 3), np.uint8), np.arange(10) % 3
    return StepDraws(settings, pixels, labels, [extra] if extra else [])(steps)


def test_a_step_draws_the_same_wherever_a_run_begins():
    for one, two in zip(list(drawn(range(6)))[4:], drawn(range(4, 6)), strict=True):
        assert one[0].tolist() == two[0].tolist() and one[2] == two[2]
        for name, values in one[1].items():
            np.testing.assert_array_equal(values, two[1][name])


def test_a_step_draws_t_eps_and_labels_of_its_own_images():
    """Half of the labels are dropped here: K stands for none."""
    seen = set()
    for image, fields, _ in drawn(range(50)):
        assert fields["eps"].shape == (4, 3, 8, 8) and fields["eps"].dtype == np.float32
        assert fields["t"].min() >= 1 and fields["t"].max() <= 50
        dropped = fields["y"] == 3
        np.testing.assert_array_equal(fields["y"][~dropped], image[~dropped] % 3)
        seen |= set(dropped)
    assert seen == {True, False}
    [(_, fields, _)] = drawn(range(1), num_classes=None)
    assert fields.keys() == {"t", "eps"}


def test_a_neighbours_draw_sees_what_the_step_before_found():
    """Though t and eps of the next step are drawn ahead."""
    extra, weights = Remembering(), []
    for _, fields, _ in drawn(range(3), extra=extra):
        weights.append(fields["weight"][0])
        extra.found.append(1)
    assert weights == [0, 1, 2]


def test_the_next_item_is_made_while_the_one_before_is_in_use():
    """And all of them come, in their order."""
    made = [threading.Event() for _ in range(3)]

    def items():
        for i, event in enumerate(made):
            event.set()
            yield i

    for i, item in enumerate(ahead(items())):
        assert item == i
        if i < 2:
            assert made[i + 1].wait(10), "it waits to be asked"


def test_an_error_in_a_draw_reaches_the_step():
    with pytest.raises(ZeroDivisionError):
        list(ahead(1 // n for n in (1, 0)))
