"""README's tables are held against the code: every name exists, and cites what the table says."""
import importlib
import json
import re
from pathlib import Path

import pytest

import losses
from experiments import table1
import train
from refiner import DEFAULTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TESTS = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


def table(heading):
    """The rows of the first table below `heading`, cells stripped."""
    lines = README.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return rows[2:]


def names(cell):
    return re.findall(r"`([\w.]+)`", cell)


@pytest.mark.parametrize("row", table("Paper and code"), ids=lambda row: f"{row[0]} {row[2]}")
def test_every_row_of_the_map_names_code_that_cites_it_and_a_test_that_exists(row):
    paper, _, code, test = row
    for name in names(code):
        module, attribute = name.split(".")
        assert hasattr(importlib.import_module(module), attribute), name
    number = re.fullmatch(r"Eq\. (\d+)", paper)
    if number:
        text = "\n".join((ROOT / f"{name.split('.')[0]}.py").read_text() for name in names(code))
        cited = [range(int(a), int(b or a) + 1) for a, b in re.findall(r"(?<![\w.])(\d+)(?:-(\d+))?(?=[ ,:;.)\n])", "".join(re.findall(r"Eqs?\.[^\n]*", text)))]
        assert any(int(number[1]) in span for span in cited), f"{code} does not cite {paper}"
    assert names(test) and all(f"def {name}(" in TESTS for name in names(test)), test


def test_the_map_has_every_equation():
    assert {row[0] for row in table("Paper and code")} >= {f"Eq. {n}" for n in range(1, 18)}


@pytest.mark.parametrize("row", table("What is promised, and which test shows it"), ids=lambda row: row[0][:40])
def test_every_promise_has_its_test(row):
    assert names(row[1]) and all(f"def {name}(" in TESTS for name in names(row[1]))


@pytest.mark.parametrize("row", table("The paper's tables as commands"), ids=lambda row: row[1])
def test_every_command_of_the_tables_is_accepted(row):
    for command in re.findall(r"`(--[^`]*)`", row[2]):
        if "--steps" not in command:
            s, _ = train.parse_args(["--data", "cifar10", "--eval-every", "20000", *command.split()])
            assert s["channels"] == DEFAULTS["channels"]


def test_the_results_are_those_of_the_lines(capsys):
    """Every row of README's results is printed by `python -m experiments.table1 --print`, and none is left out."""
    for path in (ROOT / "experiments").glob("table1_*.jsonl"):
        table1.table([json.loads(line) for line in path.read_text().splitlines()])
    results = README.split("## Results\n")[1].split("\n## ")[0].splitlines()
    assert [line for line in results if line.startswith("|")] == [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


def test_every_file_is_in_the_reading_order_and_every_choice_in_the_table():
    rooms = ("*.py", "support/[!_]*.py", "neighbours/[!_]*.py")
    files = {path.relative_to(ROOT).as_posix() for room in rooms for path in ROOT.glob(room)}
    assert set(re.findall(r"^\d+\. `([\w/]+\.py)`", README, re.M)) == files
    listed = " ".join(row[2] for row in table("Differences from the paper"))
    for path in files:
        if "CHOICE:" in (ROOT / path).read_text():
            name = path.removesuffix(".py")
            assert name in listed or name.replace("/", ".") in listed, f"a CHOICE in {path} is not listed"


def test_every_metric_and_flag_that_readme_names_exists():
    known = set(re.findall(r"--[\w-]+", "".join((ROOT / f"{f}.py").read_text() for f in ("train", "sample", "fid", "experiments/benchmark", "experiments/table1"))))
    flags = {flag for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", README)}
    added = {f"--{name.replace('_', '-')}" for name in train.PAPER}
    assert flags <= known | added | {"--help", "--nproc_per_node"}, flags - known - added
    assert set(re.findall(r"--metric (\w+)=", README)) <= set(losses.METRICS)
