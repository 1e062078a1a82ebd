"""From settings to a model, a neighbour's or one of figure 1's, and back from a checkpoint."""

from refiner import DEFAULTS, model_class
from support.checkpoint import read_checkpoint
from support.cli import flag_of, one_line
from unet import UNet

WEIGHTS = {"ema": "the moving average", "model": "the trained weights"}  # of a checkpoint


def neighbours():
    """The table of neighbours.  It is imported here and not above: neighbours import this file."""
    from neighbours import NEIGHBOURS

    return NEIGHBOURS


def class_of(settings):
    """The class of the model that the settings describe: a neighbour's, or one of figure 1's."""
    for neighbour in neighbours():
        found = neighbour.model(neighbour.settings | settings)
        if found:
            return found
    return model_class(settings)


def build(settings):
    """The model that `settings` describe; absent keys take the defaults."""
    settings = DEFAULTS | settings
    return class_of(settings)(settings)


def load_model(path, device="cpu", raw=False, classifier=False):
    """(model, schedule, settings) of a checkpoint, in eval mode.

    The weights are the moving average's, or the trained ones if `raw`, in float32.
    classifier : True: it must be a classifier; False: a model of images; None: it may be either
    ValueError, one line, where it is the other kind, where it holds only the other weights, and
    where the weights do not fit the settings or are not finite.
    """
    state = read_checkpoint(path)
    part, other = ("model", "ema") if raw else ("ema", "model")
    if part not in state and other in state:
        remedy = "leave --raw out" if raw else "give --raw"
        raise ValueError(
            f"{path} holds {WEIGHTS[other]} alone; expected {WEIGHTS[part]}; "
            f"{remedy}, or name the run's checkpoint"
        )
    try:
        model = build(state["settings"])
        model.load_state_dict(state[part])
    except Exception as e:  # settings or tensors of any wrong kind: it is ours only by its label
        raise ValueError(
            f"{path}: its tensors do not fit its settings ({one_line(e)[:160]}); "
            "expected what train.py wrote; use another checkpoint"
        ) from None
    if classifier is not None and model.makes_images == classifier:
        kinds = ("classifier", "model of images")
        if classifier:
            kinds = ("model of images", "classifier")
        flag = "with" if classifier else "without"
        raise ValueError(
            f"{path} is a {kinds[0]}; expected a {kinds[1]}; train one {flag} --model classifier"
        )
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError(
            f"{path} holds weights that are not finite; expected numbers; use an earlier checkpoint"
        )
    model = model.to(device).eval()
    return model, model.schedule, state["settings"]


def check_same_noise(path, theirs, settings):
    """ValueError where the model at `path` knows other noisy images than `settings` describe."""
    for key in ("schedule", "T", "image_size"):
        if settings[key] not in (None, theirs[key]):
            raise ValueError(
                f"{path} has {key} {theirs[key]} where the other model has {settings[key]}; "
                f"expected the same noisy images; train with the same {flag_of(key)}"
            )


def set_precision(model, precision):
    """Has the model's networks compute in `fp32` or `bf16`; all else stays in float32."""
    for module in model.modules():
        if isinstance(module, UNet):
            module.bf16 = precision == "bf16"
