"""Prints what table1.py found: means over seeds, differences of equal seeds, and curves."""

import statistics
from typing import NamedTuple

from experiments.rows import CURVES, LENGTHS, PAIRS, PAPER, ROWS, TABLE1, runs_of


class Score(NamedTuple):
    """How a score of fid.py is printed."""

    name: str
    digits: int  # behind the point
    factor: int = 1


# MAIN's are printed beside the paper's numbers, the rest in a table of their own.
PRINTED = {
    "fid": Score("FID", 2),
    "fid_768": Score("FID-768", 3),
    "sfid": Score("sFID", 2),
    "kid": Score("KID x 1000", 2, 1000),
    "precision": Score("precision", 3),
    "recall": Score("recall", 3),
    "fd_judge": Score("FD of classes", 3),
    "kid_judge": Score("KID of classes x 1000", 2, 1000),
    "fd_judge_rotations": Score("FD of rotations", 3),
    "kid_judge_rotations": Score("KID of rotations x 1000", 2, 1000),
}
MAIN = ("fid", "fid_768", "sfid")


def table(lines, steps):
    """Prints the rows' means over seeds, the differences of equal seeds, the curves, other scores.

    A column is one score with one of these numbers of sampling steps.  Every table but the curves
    (over steps, over iterations) leaves out a line that lacks one of its columns, and a table
    without a row is not printed.
    ValueError where no table has a row.
    """
    by_row = {}  # {row: {seed: line}}
    for line in lines:
        by_row.setdefault(line["row"], {})[line["seed"]] = line
    columns = [(str(n), score) for n in steps for score in scores_of(lines)]
    others = [(str(n), score) for n in steps for score in PRINTED if score not in MAIN]
    tables = [
        rows_table(by_row, columns),
        differences_table(by_row, columns),
        steps_table(lines),
        *lengths_tables(lines, steps),
        *longest_tables(by_row, steps),
        *gains_tables(lines, steps),
        others_table(by_row, others),
    ]
    if not any(rows for _, rows in tables):
        has = sorted({int(key) for line in lines for key in line if key.isdigit()}, reverse=True)
        raise ValueError(
            f"no line has scores with all of {' and '.join(map(str, steps))} steps; "
            f"the lines have {', '.join(map(str, has))}; name some of these by --steps"
        )
    print(f"metric: {all_of(lines, 'metric')}; ", end="")
    print(f"{all_of(lines, 'n')} images a score; commits {all_of(lines, 'commit')}")
    for header, rows in tables:
        if rows:
            print()
            print(markdown_header(*header))
            for cells in rows:
                print(markdown(*cells))


def all_of(lines, key):
    """Every value that the lines have under a key, in one text."""
    return ", ".join(sorted({str(line[key]) for line in lines}))


# A table is (header, rows), each a list of cells.


def rows_table(by_row, columns):
    """The means of each row, beside the paper's numbers."""
    rows = []
    for row, *cells in means(by_row, columns, own_rows()):
        paper = [f"{value:.2f}" for value in PAPER.get(row, ()) if value]
        rows.append([row, *cells, ", ".join(paper)])
    return ["row", "seeds", *titles(columns), "paper's FID, sFID, 100 steps"], rows


def differences_table(by_row, columns):
    """The differences of PAIRS, of the seeds that both have, beside the paper's."""
    rows = []
    for a, b in PAIRS:
        lines, others = with_all(by_row, a, columns), with_all(by_row, b, columns)
        seeds = sorted(lines.keys() & others.keys())
        if not seeds:
            continue
        cells = []
        for steps, score in columns:
            values = [lines[s][steps][score] - others[s][steps][score] for s in seeds]
            cells.append(spread(values, score, "+"))
        both = zip(PAPER.get(a, ()), PAPER.get(b, ()), strict=False)  # a row may have none
        paper = [f"{x - y:+.2f}" for x, y in both if x and y]
        rows.append([f"{a} - {b}", len(seeds), *cells, ", ".join(paper)])
    return ["difference", "seeds", *titles(columns), "paper, 100 steps"], rows


def steps_table(lines):
    """FID (or FID-768) of the rows in CURVES against sampling steps."""
    score = scores_of(lines)[0]
    curves = {row: by_steps(lines, row, score) for row in CURVES}
    every = sorted({steps for found in curves.values() for steps in found})
    header = [PRINTED[score].name, *(f"{steps} steps" for steps in every)]
    return header, curve_rows(curves, every, score)


def lengths_tables(lines, steps):
    """Table 1's rows against iterations: a table for each score with each number of steps.

    Where only the longest runs have a score, longest_tables says all.
    """
    tables = []
    for n in steps:
        for score in PRINTED:
            curves = {row: by_iterations(lines, row, score, n) for row in TABLE1}
            curves = {row: found for row, found in curves.items() if found.keys() - {1}}
            lengths = lengths_in(curves.values())
            if lengths != [LENGTHS[-1]]:
                header = [*titles([(n, score)]), *length_titles(lengths)]
                tables.append((header, curve_rows(curves, lengths, score)))
    return tables


def longest_tables(by_row, steps):
    """Every score of Table 1's rows after the most iterations, and sampled in other ways.

    A row that lacks one of the scores that others have is left out.
    """
    [title] = length_titles([LENGTHS[-1]])
    names = [row for row, how in ROWS.items() if how.length == LENGTHS[-1]]
    longest = [line for name in names for line in by_row.get(name, {}).values()]
    tables = []
    for n in map(str, steps):
        taken = {score for line in longest for score in line.get(n, {})}
        columns = [(n, score) for score in PRINTED if score in taken]
        rows = []
        if columns:
            for name, *cells in means(by_row, columns, names):
                rows.append([name.replace(f", {title}", ""), *cells])
        scores = [PRINTED[score].name for _, score in columns]
        tables.append(([f"{title}, {n} steps", "seeds", *scores], rows))
    return tables


def gains_tables(lines, steps):
    """By how many percent the metric changes each score, seed by seed, against iterations.

    A table for each number of sampling steps and each row of Table 1 that has its metric beside it.
    """
    tables = []
    for n in steps:
        for row in TABLE1:
            if f"{row} + metric" not in TABLE1:
                continue
            gains = {score: gain(lines, row, score, n) for score in PRINTED}
            lengths = lengths_in(gains.values())
            header = [f"{row} + metric - {row}, {n} steps", *length_titles(lengths)]
            rows = []
            for score, found in gains.items():
                if found.keys() - {1}:
                    cells = [percents(found.get(length, [])) for length in lengths]
                    rows.append([PRINTED[score].name, *cells])
            tables.append((header, rows))
    return tables


def gain(lines, row, score, n):
    """{length: [by how many percent the metric changes the row's score, of each seed of both]}."""
    plain = by_iterations(lines, row, score, n)
    metric = by_iterations(lines, f"{row} + metric", score, n)
    found = {}
    for length in plain.keys() & metric.keys():
        before, after = plain[length], metric[length]
        seeds = sorted(seed for seed in before.keys() & after.keys() if before[seed])
        if seeds:
            found[length] = [100 * (after[seed] / before[seed] - 1) for seed in seeds]
    return found


def percents(values):
    """The cell of some percents: -23, -18 %; empty for none."""
    if not values:
        return ""
    return ", ".join(f"{value:+.0f}" for value in values) + " %"


def lengths_in(curves):
    """Every length that one of the curves has."""
    return sorted({length for found in curves for length in found})


def length_titles(lengths):
    """The headers of lengths: 2 x the iterations."""
    return [f"{length} x the iterations" for length in lengths]


def curve_rows(curves, points, score):
    """[row, score at each point] of each curve {point: {seed: value}}."""
    rows = []
    for row, found in curves.items():
        if found:
            values = [[*found.get(point, {}).values()] for point in points]
            rows.append([row, *(spread(v, score) if v else "" for v in values)])
    return rows


def others_table(by_row, columns):
    """The means of the scores beside FID and sFID, of the lines that have them."""
    return ["row", "seeds", *titles(columns)], means(by_row, columns, own_rows())


def means(by_row, columns, names):
    """[row, number of seeds, mean of each column] of each named row whose lines have all."""
    rows = []
    for row in names:
        lines = with_all(by_row, row, columns).values()
        if lines:
            values = [[line[steps][score] for line in lines] for steps, score in columns]
            cells = [spread(v, score) for v, (_, score) in zip(values, columns, strict=True)]
            rows.append([row, len(lines), *cells])
    return rows


def own_rows():
    """The rows of the preset's own iterations that have no sampling steps of their own."""
    return [row for row, how in ROWS.items() if not how.steps and how.length == 1]


def titles(columns):
    """The headers of columns: FID-768, 100 steps."""
    return [f"{PRINTED[score].name}, {steps} steps" for steps, score in columns]


def with_all(by_row, row, columns):
    """{seed: line} of the row's lines that have every column."""
    return {
        seed: line
        for seed, line in by_row.get(row, {}).items()
        if all(score in line.get(steps, {}) for steps, score in columns)
    }


def by_steps(lines, row, score):
    """{sampling steps: {seed: score}} of a row's own runs."""
    found = curve(lines, row, score)
    return {steps: values for (length, steps), values in found.items() if length == 1}


def by_iterations(lines, row, score, n):
    """{length: {seed: score}} of a row, with n sampling steps."""
    found = curve(lines, row, score)
    return {length: values for (length, steps), values in found.items() if steps == n}


def curve(lines, row, score):
    """{(length, sampling steps): {seed: score}} of a row.

    Of the row's own run, of that trained longer or shorter, and with other steps.  A length is
    times the preset's iterations.
    """
    runs = runs_of(row)
    found = {}
    for line in lines:
        if line["row"] not in runs:
            continue
        length = runs[line["row"]]
        for steps in filter(str.isdigit, line):
            if score in line[steps]:
                of_point = found.setdefault((length, int(steps)), {})
                of_point[line["seed"]] = line[steps][score]
    return found


def scores_of(lines):
    """Which of MAIN the lines hold, FID's first; ValueError where not all hold the same."""
    kinds = set()
    for line in lines:
        for key, found in line.items():
            if key.isdigit():  # a number of steps
                kinds.add(tuple(score for score in MAIN if score in found))
    if len(kinds) > 1:
        names = " and ".join(", ".join(kind) for kind in sorted(kinds))
        raise ValueError(
            f"lines with the scores {names}; expected one network's; "
            "keep each network's lines in a file of its own (--results)"
        )
    return kinds.pop()


def spread(values, score, sign=""):
    """The mean, and its standard error where there is more than one value."""
    _, digits, factor = PRINTED[score]
    mean = f"{factor * statistics.mean(values):{sign}.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {factor * standard_error(values):.{digits}f}"


def standard_error(values):
    """Of their mean; 0 for a single one."""
    if len(values) == 1:
        return 0
    return statistics.stdev(values) / len(values) ** 0.5


def markdown_header(*cells):
    """The first two lines of a table."""
    return "\n".join([markdown(*cells), markdown(*["---"] * len(cells))])


def markdown(*cells):
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"
