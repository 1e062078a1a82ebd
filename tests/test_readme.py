"""README and docs/ are held against the code: commands, links, names, numbers and choices."""

import ast
import functools
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import experiments.tables
import fid
import metrics
import sample
import train
from experiments import benchmark, colours, figures, judge, steps, table1, variants
from runs import ROOT

ROOMS = ("", "neighbours", "support", "experiments")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text() for page in [ROOT / "README.md", *DOCS]
}
README = PAGES["README.md"]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def code_files():
    """The Python files of every room, as paths from the root."""
    files = [path for room in ROOMS for path in (ROOT / room).glob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def tables(text):
    """Every table of a page: its rows, each a list of cells, without the line below the head."""
    found, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append(line)
        elif lines:
            rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in lines]
            found.append([rows[0], *rows[2:]])
            lines = []
    return found


def table(page, head):
    """The rows below the head of the one table whose first column is called `head`."""
    (found,) = [rows for rows in tables(PAGES[page]) if rows[0][0] == head]
    return found[1:]


def code_names(cell):
    return re.findall(r"`([\w.]+)`", cell)


# ---- size, links, files ----


def test_readme_is_read_in_ten_minutes():
    assert len(README.splitlines()) <= 160
    assert len(README.encode()) <= 12.5 * 1024


def anchor(heading):
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, place = target.partition("#")
        file = (ROOT / page).parent / path
        assert file.exists(), f"{page} links {path}"
        if place:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert place in map(anchor, headings), f"{page} links {target}"


def test_every_picture_is_shown():
    shown = {
        Path(name).name for page in PAGES.values() for name in re.findall(r"!\[.*\]\((.*)\)", page)
    }
    assert shown == {path.name for path in (ROOT / "assets").glob("*.png")}


def test_every_file_of_weights_has_its_command():
    """README samples each model, and SCORES.md scores by each judge."""
    for path in (ROOT / "assets").iterdir():
        if path.name.startswith("judge"):
            assert f"--judge assets/{path.name}" in PAGES["docs/SCORES.md"]
        elif path.suffix != ".png":
            assert f"python sample.py assets/{path.name}" in README


def test_every_page_is_linked_from_readme():
    for page in DOCS:
        assert f"(docs/{page.name})" in README


def test_the_reading_order_has_every_file_of_every_room():
    order = README.split("## The files, in reading order\n")[1].split("\n## ")[0]
    assert set(re.findall(r"\]\(([\w/]+\.py)\)", order)) == set(code_files())


# ---- commands, flags, names ----


def commands(text):
    """The command lines of a page, in blocks and in sentences."""
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.S)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    without_blocks = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`([^`]+)`", without_blocks)
    for line in lines:
        for command in line.split("#")[0].split("&&"):
            if re.match(r"(python|torchrun) ", command.strip()):
                yield command.strip()


def parse_variant(argv):
    """The arguments of the script that runs under a variant."""
    args = variants.parse_args(argv)
    return PARSERS[args.script](args.arguments)


COMMANDS = sorted({command for page in PAGES.values() for command in commands(page)})
PARSERS = {
    "train.py": lambda argv: train.parse_args(train.__doc__, argv),
    "sample.py": sample.parse_args,
    "steps.py": steps.parse_args,
    "fid.py": fid.parse_args,
    "experiments.table1": table1.parse_args,
    "experiments.colours": colours.parse_args,
    "experiments.judge": judge.parse_args,
    "experiments.steps": steps.parse_args,
    "experiments.benchmark": benchmark.parse_args,
    "experiments.figures": figures.parse_args,
    "experiments.variants": parse_variant,
}


def parse(command):
    """Parses the arguments of a script; a usage error is SystemExit."""
    words = shlex.split(re.sub(r"\bROW( \.\.\.)?", "", command))
    script = next(i for i, word in enumerate(words) if word in PARSERS)
    return PARSERS[words[script]](words[script + 1 :])


PARSED = [command for command in COMMANDS if PARSERS.keys() & command.split()]


@pytest.mark.parametrize("command", PARSED)
def test_every_command_line_is_accepted(command):
    assert parse(command)  # a usage error is SystemExit


@pytest.mark.parametrize("row", table("docs/TABLES.md", "table"), ids=lambda row: row[1])
def test_every_row_of_the_papers_tables_is_a_command_line(row):
    flags = re.findall(r"`(--[^`]*)`", row[2])
    settings, _ = parse(f"python train.py --data cifar10 --eval-at 20000,40000 {flags[0]}")
    assert settings["T"] == 4000
    for how in flags[1:]:
        parse(f"python fid.py RUN/best.pt cifar10 --n 50000 {how}")


def test_every_documented_evaluation_is_the_papers():
    """Every 20,000 iterations up to 100,000, then every 100,000 to 400,000   (Cas-DM Sec. 4.1)."""
    paper = [*range(20_000, 100_001, 20_000), 200_000, 300_000, 400_000]
    evaluating = [command for command in PARSED if "--eval-at" in command]
    assert evaluating
    for command in evaluating:
        settings, _ = parse(command)
        assert settings["eval_at"] == paper, command


def help_of(main, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    return capsys.readouterr().out


def test_every_flag_and_metric_and_module_exists(capsys):
    known = {"--help", "--nproc_per_node", "--check"}  # torchrun's and ruff's
    scripts = (train, sample, fid, table1, judge, steps, colours)
    for script in scripts:
        known |= set(re.findall(r"--[\w-]+", help_of(script.main, capsys)))
    for page, text in PAGES.items():
        text = re.sub(r"\]\([^)]*\)", "", text)
        flags = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))
        assert flags <= known, f"{page}: {flags - known}"
        named = set(re.findall(r"--metric (\w+)=", text)) - {"NAME"}
        assert named <= set(metrics.METRICS), page
        for module in re.findall(r"python -m (experiments\.\w+)", text):
            assert importlib.util.find_spec(module), f"{page}: {module}"


@pytest.mark.parametrize("row", table("README.md", "paper"), ids=lambda row: row[1])
def test_every_function_of_the_map_exists(row):
    for name in code_names(row[2]):
        module, attribute = name.split(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_map_has_every_equation():
    numbers = set()
    for row in table("README.md", "paper"):
        label = row[0].split("]")[0]  # "[Eqs. 1-3" or "[Eqs. 4, 5"
        if "Eq" in label:
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", label):
                numbers |= set(range(int(first), int(last or first) + 1))
    assert numbers == set(range(1, 18))


# ---- promises ----


@functools.cache
def where_tests_run():
    """{test: the words of PROMISES.md's last column}, by the marks that stand above it."""
    found = {}
    for path in TESTS:
        tree = ast.parse(path.read_text())
        named = {
            n.targets[0].id: n.value
            for n in tree.body
            if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
        }
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = words_of(
                    [named.get(getattr(d, "id", ""), d) for d in node.decorator_list]
                )
    return found


def words_of(decorators):
    for decorator in decorators:
        if ast.unparse(decorator) in ("pytest.mark.slow", "pytest.mark.soak"):
            return {ast.unparse(decorator).removeprefix("pytest.mark.")}
    for decorator in decorators:
        text = ast.unparse(decorator)
        if "mark.slow" in text or "mark.soak" in text:
            cases = decorator.args[1].elts
            return {case_word(ast.unparse(case)) for case in cases}
    return {"default"}


def case_word(case):
    for word in ("slow", "soak"):
        if f"mark.{word}" in case:
            return word
    return "default"


@pytest.mark.parametrize("row", table("docs/PROMISES.md", "promise"), ids=lambda row: row[0][:40])
def test_every_promise_has_its_test_and_says_where_it_runs(row):
    (test,) = code_names(row[1])
    assert where_tests_run()[test] == set(row[2].split(", "))


def test_every_test_that_a_page_names_exists():
    exist = where_tests_run()
    for page, text in PAGES.items():
        for name in re.findall(r"`(test_\w+)`", text):
            assert name in exist, f"{page} names {name}"


# ---- results ----


def test_the_results_are_those_of_the_lines(capsys):
    """RESULTS.md has the tables that `table1 --print` prints; README's rows are of the first."""
    lines = table1.Experiment("cpu").lines()
    experiments.tables.table(lines, (100, 10))
    printed = tables(capsys.readouterr().out)
    shown = tables(PAGES["docs/RESULTS.md"])
    assert len(printed) == 6
    assert all(rows in shown for rows in printed)

    scores = {row[0]: row for row in printed[0]}
    rows = table("README.md", "model")
    assert len(rows) == 7
    for model, ours, _, paper in rows:
        assert ours == scores[model][2]
        assert paper == scores[model][-1].split(",")[0]

    difference = {row[0]: row[2] for row in printed[1]}["Cas-DM + metric - Cas-DM"]
    for page in (README, PAGES["docs/RESULTS.md"]):
        sentence = " ".join(page.split())
        before, after = (scores[model][2].split()[0] for model in ("Cas-DM", "Cas-DM + metric"))
        assert f"from {before} to {after}, by {difference.removeprefix('-')} over" in sentence


def test_the_results_of_ten_steps_are_those_of_their_lines(capsys):
    """RESULTS.md has the differences and the other scores that `table1 --steps 10` prints."""
    path = ROOT / "experiments/table1_cpu_10.jsonl"
    experiments.tables.table(table1.Experiment("cpu", results=path).lines(), (10,))
    _, differences, _, others = tables(capsys.readouterr().out)
    shown = tables(PAGES["docs/RESULTS.md"])
    assert differences in shown
    assert others in shown


def test_the_results_of_longer_runs_are_those_of_their_lines(capsys):
    """RESULTS.md has every score against iterations, and what the metric changes.

    README has FID-768 of the longest with 100 steps.
    """
    path = ROOT / "experiments/table1_cpu_long.jsonl"
    experiments.tables.table(table1.Experiment("cpu", results=path).lines(), (10,))
    printed = tables(capsys.readouterr().out)
    against_iterations = [rows for rows in printed if rows[0][1].endswith("iterations")]
    assert len(against_iterations) == 12  # nine scores, and the metric's effect on three models
    shown = tables(PAGES["docs/RESULTS.md"])
    assert all(rows in shown for rows in [*against_iterations, printed[-1]])
    [longest] = [rows[1:] for rows in printed if rows[0][0] == "8 x the iterations, 10 steps"]
    assert len(longest) > 7  # Table 1's rows, and what is sampled in other ways
    shown_rows = [row for rows in shown for row in rows[1:]]
    assert all(row in shown_rows for row in longest)

    experiments.tables.table(table1.Experiment("cpu", results=path).lines(), (100,))
    printed = {rows[0][0]: rows[1:] for rows in tables(capsys.readouterr().out)}
    for model in ("DDPM (x0)", "Dual", "Cas-DM"):
        gains = printed[f"{model} + metric - {model}, 100 steps"]
        assert any(rows[1:] == gains for rows in shown)
    scores = printed["8 x the iterations, 100 steps"]
    assert any(rows[1:] == scores for rows in shown)
    longest = {row[0]: row[2] for row in scores}
    assert {row[0]: row[2] for row in table("README.md", "model")} == longest


def test_the_few_step_scores_are_those_of_the_lines():
    """RESULTS.md has the table that `experiments.steps` prints."""
    lines = (ROOT / "experiments/steps.jsonl").read_text().splitlines()
    [printed] = tables(steps.table([json.loads(line) for line in lines]))
    assert printed in tables(PAGES["docs/RESULTS.md"])


@pytest.mark.slow
def test_the_operations_of_the_speed_page_are_what_its_code_prints(capsys):
    [code] = re.findall(r"```python\n(.*?)```", PAGES["docs/SPEED.md"], re.DOTALL)
    exec(code, {})
    network, lpips = map(float, capsys.readouterr().out.split())
    assert f"{network:.1f} GFLOP an image" in PAGES["docs/SPEED.md"]
    assert f"{lpips:.0f} GFLOP an image" in PAGES["docs/SPEED.md"]


# ---- choices ----


def marked(word):
    """The names of what holds a mark: module, module.function or module.Class.method."""
    found = set()
    for path in code_files():
        module = path.removesuffix(".py").replace("/", ".")
        text = (ROOT / path).read_text()
        scopes = [(1, len(text.splitlines()), module), *scopes_of(ast.parse(text), module)]
        for number, line in enumerate(text.splitlines(), 1):
            if f"{word}:" in line:
                around = [name for first, last, name in scopes if first <= number <= last]
                found.add(around[-1])  # the innermost
    return found


def scopes_of(node, name):
    """(first line, last line, name) of every class and function, the outer before the inner."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            inner = f"{name}.{child.name}"
            yield child.lineno, child.end_lineno, inner
            yield from scopes_of(child, inner)


@pytest.mark.parametrize("word, head", [("CHOICE", "open point"), ("DEVIATION", "from")])
def test_every_choice_and_deviation_of_the_code_has_its_row(word, head):
    listed = {name for row in table("docs/CHOICES.md", head) for name in code_names(row[2])}
    assert listed == marked(word)
