"""The rows of table1.py: the paper's Tables 1 and 4, and what else a run of it can tell."""

from typing import NamedTuple

STEPS = (100, 10)  # of sampling


class Row(NamedTuple):
    """One line of a table.

    In its flags METRIC is LPIPS in the preset `paper` and where VGG's weights are at hand, else
    SqueezeNet's features; MATCHED is the preset's, and FROZEN is the checkpoint of FROZEN_ROW.
    """

    group: str  # of --group
    flags: str = ""
    variant: str = ""  # of variants.py
    begins_with: str = ""  # the row from whose checkpoint its training goes on
    samples_of: str = ""  # the row whose checkpoint it samples; it trains none
    sampling: str = ""  # flags of sample.py
    length: float = 1  # times the preset's iterations
    steps: tuple | None = None  # of sampling, where they are not those of --steps


FROZEN_ROW = "DDPM (eps)"  # the frozen model of the self-perceptual metric
# What a perfect model would score with as many images: training images that are not in the
# reference (0 in `paper`, whose reference has them all).
REAL = "training images"
CURVES = ("DDPM (eps)", "Cas-DM", "Cas-DM + metric")  # scored with other numbers of steps
LENGTHS = (0.5, 1, 2, 4, 8)  # times the preset's iterations, at which Table 1's rows are scored
FIXRES = "--model casdm --refiner fixres"
ROWS = {
    "DDPM (eps)": Row("table 1", "--model ddpm"),
    "DDPM (x0)": Row("table 1", "--model ddpm --predict x0"),
    "DDPM (x0) + metric": Row("table 1", "--model ddpm --predict x0 --metric METRIC=0.1"),
    "Dual": Row("table 1", "--model dual"),
    "Dual + metric": Row("table 1", "--model dual --metric METRIC=0.1"),
    "Cas-DM": Row("table 1", "--model casdm"),
    "Cas-DM + metric": Row("table 1", "--model casdm --metric METRIC=0.1"),
    REAL: Row("table 1"),
    "DDPM (eps), Cas-DM's size": Row("size", "--model ddpm MATCHED"),
    "Dual, Cas-DM's size": Row("size", "--model dual MATCHED"),
    "L_mu / coef1^2, clamped": Row("choices", "--model casdm", "mu-scaled"),
    "phi's input not clamped": Row("choices", "--model casdm", "phi-unclamped"),
    "r_t without sigmoid": Row("choices", "--model casdm", "r-free"),
    "r_t = 1 in sampling": Row("choices", variant="r-one", samples_of="Cas-DM"),
    "r_t = t / T in sampling": Row("choices", variant="r-linear", samples_of="Cas-DM"),
    "x0 clamped after mixing": Row("choices", variant="clamp-mixed", samples_of="Cas-DM"),
    "moving average without ramp": Row("choices", "--model casdm", "no-ramp"),
    "metric, lambda 0.01": Row("lambda", "--model casdm --metric METRIC=0.01"),
    "metric, lambda 1": Row("lambda", "--model casdm --metric METRIC=1"),
    "SSIM": Row("other metrics", "--model casdm --metric ssim=0.1"),
    "HaarPSI": Row("other metrics", "--model casdm --metric haarpsi=0.1"),
    "self-perceptual": Row("other metrics", "--model casdm --self-perceptual FROZEN=0.1"),
    "self-perceptual, eps^ derived": Row(
        "other metrics", "--model casdm --self-perceptual FROZEN=0.1", "noise-derived"
    ),
    "Fix-Res": Row("table 4", FIXRES),
    "Fix-Res + metric": Row("table 4", f"{FIXRES} --metric METRIC=0.1"),
    "Fix-Res, concat": Row("table 4", f"{FIXRES} --refiner-input x0+eps"),
}
TABLE1 = [name for name, how in ROWS.items() if how.group == "table 1" and name != REAL]


def at_lengths(name):
    """The names of a row's run at each of LENGTHS, the shortest first."""
    named = "{}, {} x the iterations"
    return [name if length == 1 else named.format(name, length) for length in LENGTHS]


def with_other_steps(name):
    """The name of a row that samples another row's run with other numbers of steps."""
    return f"{name}, other steps"


def runs_of(name):
    """{row: length} of a row and of the same run at every other length and with other steps."""
    return dict(zip(at_lengths(name), LENGTHS, strict=True)) | {with_other_steps(name): 1}


def lengths(name):
    """{name: Row} of a row's run at every other length.

    Each of the longer ones goes on from the one before it.
    """
    found, before = {}, ""
    for row, length in zip(at_lengths(name), LENGTHS, strict=True):
        if length != 1:
            found[row] = Row("lengths", ROWS[name].flags, begins_with=before, length=length)
        if length >= 1:
            before = row
    return found


def sampled_otherwise(name, way, **how):
    """{name: Row} of the longest run of a row, sampled in another way, with ten steps."""
    run = at_lengths(name)[-1]
    row = Row("sampling", samples_of=run, length=LENGTHS[-1], steps=(10,), **how)
    return {f"{run}, {way}": row}


for share in (0.25, 0.5, 0.75):
    flags = f"--model casdm --metric METRIC=0.1 --metric-until {share}"
    ROWS[f"metric at t <= {share} T"] = Row("low noise", flags)
for name in CURVES:
    ROWS[with_other_steps(name)] = Row("curves", samples_of=name, steps=(50, 20, 5))
for name in TABLE1:
    ROWS |= lengths(name)
for name in TABLE1:
    ROWS |= sampled_otherwise(name, "DPM-Solver++", sampling="--sampler dpm++")
for name in ("Cas-DM", "Cas-DM + metric"):
    ROWS |= sampled_otherwise(name, "r_t = t / T", variant="r-linear")

# FID and sFID on CIFAR-10, 100 steps (Cas-DM Table 1), and FID with Fix-Res (Cas-DM Table 4)
PAPER = {
    "DDPM (eps)": (6.79, 4.97),
    "DDPM (x0)": (17.78, 6.69),
    "DDPM (x0) + metric": (9.34, 6.94),
    "Dual": (6.52, 4.60),
    "Dual + metric": (5.65, 4.89),
    "Cas-DM": (6.80, 5.03),
    "Cas-DM + metric": (6.40, 4.87),
    "Fix-Res": (6.40, None),
    "Fix-Res + metric": (6.28, None),
    "Fix-Res, concat": (7.08, None),
}


def pairs(reference, *groups):
    """[(row, reference)] of every row of some groups."""
    return [(name, reference) for name, how in ROWS.items() if how.group in groups]


# The differences that are printed.
PAIRS = [
    ("DDPM (x0) + metric", "DDPM (x0)"),
    ("Dual + metric", "Dual"),
    ("Cas-DM + metric", "Cas-DM"),
    ("Fix-Res + metric", "Fix-Res"),
    ("Fix-Res", "Cas-DM"),
    ("Fix-Res, concat", "Fix-Res"),
    ("Cas-DM", "DDPM (eps)"),
    ("Cas-DM", "DDPM (eps), Cas-DM's size"),
    ("Cas-DM", "Dual, Cas-DM's size"),
    *pairs("Cas-DM", "choices", "other metrics"),
    *pairs("Cas-DM + metric", "lambda", "low noise"),
]
