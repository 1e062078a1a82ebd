r"""What Cas-DM stands on or is compared with; each is reached by its own flags.

All are off by default, but for the solver, by which a run on `shapes` is sampled.

A neighbour is one file and its rows below.  Delete them, and everything else works as before.
What it may plug into the scripts is `plug.Neighbour`; earlier rows come first.
"""

from neighbours.classifier_free import ClassifierFreeGuidance
from neighbours.guidance import Guidance
from neighbours.judge import Judges
from neighbours.low_noise import Until
from neighbours.perceptual import Perceptual
from neighbours.published import Published
from neighbours.solvers import Solvers
from neighbours.variance import Variance

NEIGHBOURS = (
    Variance(),
    ClassifierFreeGuidance(),
    Guidance(),
    Perceptual(),
    Until(),
    Published(),
    Solvers(),
    Judges(),
)
