"""What a neighbour may plug into the scripts."""


class Neighbour:
    """Each method's default changes nothing; a neighbour overrides those that it needs.

    s : a run's settings, {key: value}          a : the arguments of sample.py
    """

    settings = {}  # keys of its flags in training, and their values without the flags
    models = {}  # --model's name -> class
    samplers = {}  # --sampler's name -> (a, settings of the model) -> (noise, y) -> step

    # ---- train.py ----

    def train_flags(self, flag):
        """Adds its flags by `flag(name, help, **how)`, as argparse takes them."""

    def implied(self, s):
        """Settings that follow from its own, unless they were typed -> {key: value}"""
        return {}

    def check(self, s):
        """ValueError, one line, for what the settings alone show to be wrong."""

    def model(self, s):
        """The class of the model that the settings describe, where it is this neighbour's."""
        return self.models.get(s["model"])

    def metrics(self, s):
        """Losses that stand beside the model's own -> {name: (lambda, (pred, batch) -> [B])}"""
        return {}

    def draws(self, s):
        """What a step draws beside t and eps: objects with `draw(rng, n) -> {field of Batch: [n]}`.

        They may have `note(t, losses)`, which gets a step's t [n] and {term: [n]}, and then
        `state_dict` and `load_state_dict`.
        """
        return []

    def start(self, model, s, metrics):
        """Gives a new run's model the weights that it begins with."""

    # ---- sample.py ----

    def sample_flags(self, p):
        """Adds its groups of flags to an argparse parser."""

    def check_sample(self, p, a):
        """p.error, one line, for what the arguments alone show to be wrong."""

    def instead(self, a, model, settings):
        """Does its own work instead of sampling, and returns True, where the arguments say so."""
        return False

    def steer(self, a, sampler, settings):
        """Changes a sample.Sampler as its flags say."""
