"""checkpoint.pt: version 1 opens as version 2 does, and nothing else opens."""

import pytest
import torch

import models
from refiner import DEFAULTS
from runs import SMALL, assert_same_run, run
from sample import load_model
from support.checkpoint import VERSION, read_checkpoint, write_checkpoint
from support.models import build
from support.settings import reopen

# What version 1 called theta and phi.
CASDM = {"theta.": "eps_net.", "phi.": "refiner."}
OTHERS = {"theta.": "net."}
NEW_SETTINGS = ("lambda_eps", "lambda_x0", "lambda_mu")  # of which version 1 knew nothing


def as_version_1(path, names):
    """Writes a checkpoint anew as version 1 had it."""
    state = torch.load(path, weights_only=True)
    for part in ("model", "ema"):
        state[part] = {old_name(name, names): w for name, w in state[part].items()}
    for key in NEW_SETTINGS:
        state["settings"].pop(key, None)
    torch.save(state | {"version": 1}, path)


def old_name(name, names):
    network, dot, rest = name.partition(".")
    return names[network + dot] + rest


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"model": "casdm"}, CASDM),
        ({"model": "dual"}, OTHERS),
        ({"model": "ddpm", "predict": "x0"}, OTHERS),
        ({"model": "ddpm", "learn_sigma": True, "objective": "hybrid"}, OTHERS),
        ({"model": "classifier", "num_classes": 3}, OTHERS),
    ],
    ids=["casdm", "dual", "ddpm", "learned variance", "classifier"],
)
def test_a_version_1_checkpoint_opens_with_the_same_weights(settings, names, tmp_path):
    settings = DEFAULTS | models.SMALL | {"T": 20} | settings
    weights = build(settings).state_dict()
    average = {name: 2 * w for name, w in weights.items()}
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, settings, step=1, data="", model=weights, ema=average)
    as_version_1(path, names)
    assert not read_checkpoint(path)["ema"].keys() ^ average.keys()
    for raw, wanted in ((True, weights), (False, average)):
        model, _, kept = load_model(path, raw=raw, classifier=settings["model"] == "classifier")
        torch.testing.assert_close(model.state_dict(), wanted, rtol=0, atol=0)
        assert kept == settings


@pytest.mark.slow
def test_a_run_begun_by_version_1_goes_on_bit_for_bit(images, tmp_path):
    """Optimiser and log too; its settings know no lambdas, which are then the paper's."""
    common = [*SMALL, "--data", images]
    assert run(*common, "--iterations", 3, "--out", tmp_path / "one") == 0
    assert run(*common, "--iterations", 2, "--out", tmp_path / "two") == 0
    as_version_1(tmp_path / "two/checkpoint.pt", CASDM)
    assert run("--resume", "--iterations", 3, "--out", tmp_path / "two", "--device", "cpu") == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
    state = read_checkpoint(tmp_path / "two/checkpoint.pt")
    assert state["version"] == VERSION and state["settings"]["lambda_mu"] == 1


@pytest.mark.parametrize("version", [0, 3, 99, None, "2", [1]])
def test_any_other_version_is_refused_in_one_line(version, tmp_path):
    write_checkpoint(tmp_path / "a.pt", {}, model={}, ema={})
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(state | {"version": version}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"format version .*; expected 2 or 1; use") as e:
        read_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("weights", [None, [1, 2], {1: torch.zeros(1)}])
def test_a_version_1_file_with_other_things_inside_is_one_line(weights, tmp_path):
    state = {"kind": "cas-dm checkpoint", "version": 1, "step": 1, "data": ""}
    state["settings"] = {"channels": 32, "res_blocks": 1}
    torch.save(state | {"model": {}, "ema": weights}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="do not fit its settings") as e:
        load_model(tmp_path / "a.pt")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("state", [{}, {"settings": None}, {"settings": [1]}])
def test_a_checkpoint_without_settings_is_one_line(state, tmp_path):
    torch.save(state | {"kind": "cas-dm checkpoint", "version": VERSION}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds no settings; expected what train\.py wrote"):
        read_checkpoint(tmp_path / "a.pt")


def test_weights_alone_are_no_run_to_go_on_with(tmp_path):
    write_checkpoint(tmp_path / "checkpoint.pt", {}, model={}, ema={})
    with pytest.raises(ValueError, match="holds no step or no data; expected a run's"):
        reopen(tmp_path, {})
