"""What a neighbour may plug into the scripts."""


class Neighbour:
    """Each method's default changes nothing; a neighbour overrides those that it needs.

    settings : a run's, {key: value}
    args     : parsed arguments, of sample.py or fid.py, or sample.sampler_defaults'.  All have the
               flags of `sampler_flags`; no other flag is certain.
    """

    settings = {}  # keys of its flags in training, and their values without the flags
    models = {}  # --model's name -> class
    samplers = {}  # --sampler's name -> (args, settings of the model) -> (noise, y) -> step

    # ---- train.py ----

    def train_flags(self, flag):
        """Adds its flags by `flag(name, help, **how)`, as argparse takes them."""

    def implied(self, settings, typed):
        """Settings that follow from others, unless they are among the `typed` -> {key: value}"""
        return {}

    def check(self, settings):
        """ValueError, one line, for what the settings alone show to be wrong."""

    def model(self, settings):
        """The class of the model that the settings describe, where it is this neighbour's."""
        return self.models.get(settings["model"])

    def metrics(self, settings):
        """Losses that stand beside the model's own -> {name: (lambda, nn.Module)}

        The module is called with (pred, batch) and returns [B].
        """
        return {}

    def adapt(self, metric, settings):
        """What takes the place of any of the run's metrics, (pred, batch) -> [B]."""
        return metric

    def draws(self, settings):
        """What a step draws beside t and eps, or in their place -> a list of objects.

        Each has `draw(rng, n) -> {field of Batch: [n]}`.  It may have `note(t, losses)`, which gets
        a step's t [n] and {term: [n]}.  Then it also has a `name`, its key in the checkpoint,
        `state_dict` and `load_state_dict`.
        """
        return []

    def start(self, model, settings, metrics):
        """Gives a new run's model the weights that it begins with."""

    # ---- sample.py, and fid.py where it samples ----

    def sampler_flags(self, parser):
        """Adds to an argparse parser its flags of how images are drawn."""

    def check_sampler(self, parser, args):
        """parser.error, one line, where these flags contradict each other."""

    def sample_flags(self, parser):
        """Adds its flags of sample.py alone."""

    def check_sample(self, parser, args):
        """parser.error, one line, for what sample.py's arguments alone show to be wrong."""

    def open(self, args, path):
        """(model, settings) of a file of its own kind, where the arguments say that it is one."""

    def instead(self, args, model, settings):
        """Does its own work instead of sampling, and returns True, where the arguments say so."""
        return False

    def steer(self, args, sampler, settings):
        """Changes a sample.Sampler as its flags say."""

    # ---- fid.py ----

    def score_flags(self, parser):
        """Adds its flags of which features are compared."""

    def check_score(self, parser, args):
        """parser.error, one line, where these flags contradict others."""

    def score_network(self, args):
        """The network of features, as inception.InceptionFeatures is one, that `args` names.

        Its name is KIND-HASH: the distance of its features is called fd_KIND.
        """
