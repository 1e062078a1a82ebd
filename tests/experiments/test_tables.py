"""tables.py: the table is the arithmetic of the lines."""

import pytest

from experiments import tables


def line(row, seed=0, **scores):
    return {"row": row, "seed": seed, "metric": "lpips", "n": 4, "commit": "c"} | scores


def test_the_tables_means_errors_and_differences_are_those_of_equal_seeds(capsys):
    def scored(row, seed, value):
        ten = {"fid_768": 0.0, "sfid": 0.0}
        return line(row, seed, **{"100": {"fid_768": value, "sfid": 1.0}, "10": ten})

    tables.table(
        [
            scored("Dual", 0, 1.0),
            scored("Dual", 1, 3.0),
            scored("Dual + metric", 1, 2.5),
            scored("Dual + metric", 2, 9.0),
        ],
        (100, 10),
    )
    said = capsys.readouterr().out.splitlines()
    row = "| Dual | 2 | 2.000 ± 1.000 | 1.00 ± 0.00 | 0.000 ± 0.000 | 0.00 ± 0.00 | 6.52, 4.60 |"
    assert row in said
    difference = "| Dual + metric - Dual | 1 | -0.500 | +0.00 | +0.000 | +0.00 | -0.87, +0.29 |"
    assert difference in said


def test_a_table_of_some_steps_takes_every_line_that_has_them(capsys):
    ten = {"fid_768": 1.0, "sfid": 2.0}
    lines = [line("Dual", 0, **{"10": ten}), line("Dual", 1, **{"10": ten, "100": ten})]
    tables.table(lines, (10,))
    assert "| Dual | 2 | 1.000 ± 0.000 | 2.00 ± 0.00 | 6.52, 4.60 |" in capsys.readouterr().out
    tables.table(lines, (100, 10))
    assert "| Dual | 1 | 1.000 | 2.00 | 1.000 | 2.00 | 6.52, 4.60 |" in capsys.readouterr().out


def test_a_table_of_steps_that_no_line_has_is_refused():
    lines = [line("Dual", 0, **{"10": {"fid_768": 1.0, "sfid": 2.0}})]
    with pytest.raises(ValueError, match="all of 100 and 10 steps; the lines have 10; name some"):
        tables.table(lines, (100, 10))


def test_the_curves_are_of_all_that_was_sampled_from_a_row_and_of_nothing_else(capsys):
    """Other steps, and other iterations of equal flags; nothing under a variant."""

    def scored(row, value, *steps, seed=0):
        return line(row, seed, **{str(n): {"fid_768": value + n, "sfid": 0.0} for n in steps})

    tables.table(
        [
            scored("Cas-DM", 0.25, 100, 10),
            scored("Cas-DM", 0.75, 100, 10, seed=1),
            scored("Cas-DM", 0.25, 50, 10),  # the same run, scored again
            scored("Cas-DM, other steps", 0, 50, 20, 5),
            scored("Cas-DM, 0.5 x the iterations", 0.125, 10),
            scored("Cas-DM + metric", 0.5, 100, 10),
            scored("r_t = 1 in sampling", 9, 100, 10),
            scored("moving average without ramp", 9, 100, 10),
            scored("Dual", 9, 100, 10),
        ],
        (100, 10),
    )
    *_, by_steps, by_iterations, of_sfid = capsys.readouterr().out.split("\n\n")
    assert by_steps.splitlines() == [
        "| FID-768 | 5 steps | 10 steps | 20 steps | 50 steps | 100 steps |",
        "| --- | --- | --- | --- | --- | --- |",
        "| Cas-DM | 5.000 | 10.500 ± 0.250 | 20.000 | 50.000 | 100.500 ± 0.250 |",
        "| Cas-DM + metric |  | 10.500 |  |  | 100.500 |",
    ]
    assert by_iterations.splitlines() == [
        "| FID-768, 10 steps | 0.5 x the iterations | 1 x the iterations |",
        "| --- | --- | --- |",
        "| Cas-DM | 10.125 | 10.500 ± 0.250 |",
    ]
    assert of_sfid.splitlines()[-1] == "| Cas-DM | 0.00 | 0.00 ± 0.00 |"


def test_the_gains_are_percents_of_each_seed_that_both_have_at_each_length(capsys):
    def scored(row, fid, seed=0):
        return line(row, seed, **{"10": {"fid_768": fid, "sfid": 1.0}})

    lines = [
        scored("Dual", 1.0),
        scored("Dual", 3.0, seed=1),
        scored("Dual", 99.0, seed=2),
        scored("Dual + metric", 0.5),
        scored("Dual + metric", 2.5, seed=1),
        scored("Dual, 2 x the iterations", 1.0),
        scored("Dual + metric, 2 x the iterations", 1.5),
    ]
    tables.table(lines, (10,))
    said = capsys.readouterr().out
    assert "| Dual + metric - Dual, 10 steps | 1 x the iterations | 2 x the iterations |" in said
    assert said.endswith("| FID-768 | -50, -17 % | +50 % |\n| sFID | +0, +0 % | +0 % |\n")
    assert "| Dual, 2 x the iterations |" not in said  # it has the tables of lengths alone


def test_the_longest_runs_are_one_table_of_all_scores_and_of_all_ways_to_sample(capsys):
    """A row that lacks a score is left out."""
    scores = {"fid_768": 1.0, "sfid": 2.0}
    lines = [
        line("Dual, 8 x the iterations", seed, **{"10": scores | {"kid": 0.001 + seed / 500}})
        for seed in (0, 1)
    ]
    lines.append(line("Cas-DM, 8 x the iterations", **{"10": scores}))
    solver = {"fid_768": 3.0, "sfid": 4.0, "kid": 0.005}
    lines.append(line("Dual, 8 x the iterations, DPM-Solver++", **{"10": solver}))
    tables.table(lines, (10,))
    said = capsys.readouterr().out
    assert said.endswith(
        "| 8 x the iterations, 10 steps | seeds | FID-768 | sFID | KID x 1000 |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| Dual | 2 | 1.000 ± 0.000 | 2.00 ± 0.00 | 2.00 ± 1.00 |\n"
        "| Dual, DPM-Solver++ | 1 | 3.000 | 4.00 | 5.00 |\n"
    )
    assert "FID-768, 10 steps" not in said  # one length is no curve


def test_other_scores_have_a_table_of_the_lines_that_hold_them(capsys):
    """KID in thousandths; a line from before they were taken is in no other table's way."""
    scores = {"fid_768": 1.0, "sfid": 1.0}
    every = {key: 0.002 for key in tables.PRINTED if key not in tables.MAIN}
    lines = [line("Dual", seed, **{"100": scores, "10": scores}) for seed in (0, 1)]
    lines.append(line("Dual", 2, **{"100": scores | every, "10": scores | every}))
    tables.table(lines, (100, 10))
    said = capsys.readouterr().out.splitlines()
    every = " 2.00 | 0.002 | 0.002 | 0.002 | 2.00 | 0.002 | 2.00 |"  # KID, precision, recall, ...
    assert said[-1] == "| Dual | 1 |" + 2 * every


def test_lines_of_two_networks_are_not_one_table():
    lines = [line("Dual", **{"100": {score: 1.0, "sfid": 1.0}}) for score in ("fid", "fid_768")]
    with pytest.raises(ValueError, match="fid, sfid and fid_768, sfid; expected one network's"):
        tables.scores_of(lines)
