"""The rows of table1.py: the paper's Tables 1 and 4, and what else a run of it can tell."""

from typing import NamedTuple

STEPS = (100, 10)  # of sampling


class Row(NamedTuple):
    """One line of a table.

    In its flags METRIC is LPIPS in the preset `paper` and where VGG's weights are at hand, else
    SqueezeNet's features; MATCHED is the preset's, and FROZEN is the checkpoint of the row that the
    constant FROZEN names.
    """

    flags: str = ""
    variant: str = ""  # of variants.py
    begins_with: str = ""  # the row from whose checkpoint its training goes on
    samples_of: str = ""  # the row whose checkpoint it samples; it trains none
    sampling: str = ""  # flags of sample.py
    length: float = 1  # times the preset's iterations
    steps: tuple | None = None  # of sampling, where they are not those of --steps


FROZEN = "DDPM (eps)"  # of the self-perceptual metric
# What a perfect model would score with as many images: training images that are not in the
# reference (0 in `paper`, whose reference has them all).
REAL = "training images"
CURVES = ("DDPM (eps)", "Cas-DM", "Cas-DM + metric")  # scored with other numbers of steps
LENGTHS = (0.5, 1, 2, 4, 8)  # times the preset's iterations, at which Table 1's rows are scored
FIXRES = "--model casdm --refiner fixres"
ROWS = {
    ("table 1", "DDPM (eps)"): Row("--model ddpm"),
    ("table 1", "DDPM (x0)"): Row("--model ddpm --predict x0"),
    ("table 1", "DDPM (x0) + metric"): Row("--model ddpm --predict x0 --metric METRIC=0.1"),
    ("table 1", "Dual"): Row("--model dual"),
    ("table 1", "Dual + metric"): Row("--model dual --metric METRIC=0.1"),
    ("table 1", "Cas-DM"): Row("--model casdm"),
    ("table 1", "Cas-DM + metric"): Row("--model casdm --metric METRIC=0.1"),
    ("table 1", REAL): Row(),
    ("size", "DDPM (eps), Cas-DM's size"): Row("--model ddpm MATCHED"),
    ("size", "Dual, Cas-DM's size"): Row("--model dual MATCHED"),
    ("choices", "L_mu / coef1^2, clamped"): Row("--model casdm", "mu-scaled"),
    ("choices", "phi's input not clamped"): Row("--model casdm", "phi-unclamped"),
    ("choices", "r_t without sigmoid"): Row("--model casdm", "r-free"),
    ("choices", "r_t = 1 in sampling"): Row(variant="r-one", samples_of="Cas-DM"),
    ("choices", "r_t = t / T in sampling"): Row(variant="r-linear", samples_of="Cas-DM"),
    ("choices", "x0 clamped after mixing"): Row(variant="clamp-mixed", samples_of="Cas-DM"),
    ("choices", "moving average without ramp"): Row("--model casdm", "no-ramp"),
    ("lambda", "metric, lambda 0.01"): Row("--model casdm --metric METRIC=0.01"),
    ("lambda", "metric, lambda 1"): Row("--model casdm --metric METRIC=1"),
    ("other metrics", "SSIM"): Row("--model casdm --metric ssim=0.1"),
    ("other metrics", "HaarPSI"): Row("--model casdm --metric haarpsi=0.1"),
    ("other metrics", "self-perceptual"): Row("--model casdm --self-perceptual FROZEN=0.1"),
    ("other metrics", "self-perceptual, eps^ derived"): Row(
        "--model casdm --self-perceptual FROZEN=0.1", "noise-derived"
    ),
    ("table 4", "Fix-Res"): Row(FIXRES),
    ("table 4", "Fix-Res + metric"): Row(f"{FIXRES} --metric METRIC=0.1"),
    ("table 4", "Fix-Res, concat"): Row(f"{FIXRES} --refiner-input x0+eps"),
}
ROWS |= {
    ("low noise", f"metric at t <= {share} T"): Row(
        f"--model casdm --metric METRIC=0.1 --metric-until {share}"
    )
    for share in (0.25, 0.5, 0.75)
}
ROWS |= {
    ("curves", f"{name}, other steps"): Row(samples_of=name, steps=(50, 20, 5)) for name in CURVES
}
TABLE1 = [row for group, row in ROWS if group == "table 1" and row != REAL]


def at_lengths(name):
    """The names of a row's run at each of LENGTHS, the shortest first."""
    longer = "{}, {} x the iterations"
    return [name if length == 1 else longer.format(name, length) for length in LENGTHS]


def lengths(name):
    """{(group, row): Row} of a row's run at every other length.

    Each of the longer ones goes on from the one before it.
    """
    flags, found, before = ROWS["table 1", name].flags, {}, ""
    for row, length in zip(at_lengths(name), LENGTHS, strict=True):
        if length != 1:
            found["lengths", row] = Row(flags, begins_with=before, length=length)
        if length >= 1:
            before = row
    return found


def sampled_otherwise(name, way, **how):
    """{(group, row): Row} of the longest run of a row, sampled in another way, with ten steps."""
    longest = at_lengths(name)[-1]
    row = Row(samples_of=longest, length=LENGTHS[-1], steps=(10,), **how)
    return {("sampling", f"{longest}, {way}"): row}


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
    *((name, "Cas-DM") for group, name in ROWS if group in ("choices", "other metrics")),
    *((name, "Cas-DM + metric") for group, name in ROWS if group in ("lambda", "low noise")),
]
