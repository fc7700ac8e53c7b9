"""The house of docs/architecture.md: arrows go down, each script has its part and its lesson, tables fit a slide."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from ch16.parts.report.gather import CHAPTER
from common.results import Column, format_table

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "ch16").glob("*.py"))
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for folder in ("ch16", "common")
    for file in sorted((ROOT / folder).rglob("*.py"))
}
SECTIONS = ["configuration", "mechanism", "measurement", "main"]
LEAST_SHARE = 0.4  # of a script's lines, in mechanism and measurement


def imported(file):
    """Modules of this repository that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in FILES)


ARROWS = {name: set(imported(file)) - {name} for name, file in FILES.items()}


def part_of(module):
    """The script whose part a module belongs to."""
    found = re.match(r"ch16\.parts\.(\w+)", module)
    return found and found[1]


def is_script(module):
    return re.fullmatch(r"ch16\.\w+", module) is not None


def test_there_are_no_circles():
    """Rooms without an arrow are taken away until none is left; what stays is in a circle, or above one."""
    rest = dict(ARROWS)
    while free := [name for name, arrows in rest.items() if not arrows & rest.keys()]:
        for name in free:
            del rest[name]
    assert not rest


def test_arrows_go_down():
    for name, arrows in ARROWS.items():
        for target in arrows:
            assert not is_script(target), f"{name} imports the script {target}"
            if name.startswith("common"):
                assert target.startswith("common"), f"{name} imports {target}"
            elif part_of(target):
                own = part_of(name) or name.removeprefix("ch16.")
                assert part_of(target) == own, f"{name} imports another script's part, {target}"


def test_each_script_has_a_part_and_each_part_a_script():
    parts = {folder.name for folder in (ROOT / "ch16" / "parts").iterdir() if folder.name != "__pycache__"}
    assert parts == {script.stem for script in SCRIPTS} == {*CHAPTER, "report"}


def test_what_is_in_common_is_shared():
    """By at least two scripts, themselves or through their parts; or by what is shared."""
    for name in FILES:
        if name.startswith("common.") and not name.endswith("__init__"):
            users = {user for user, arrows in ARROWS.items() if name in arrows}
            scripts = {part_of(user) or user for user in users if user.startswith("ch16")}
            by_path = name in ("common.environment", "common.standin")  # they are started as files as well
            assert len(scripts) >= 2 or any(user.startswith("common.") for user in users) or by_path, name


def test_no_two_classes_have_one_name():
    names = Counter(
        node.name
        for file in FILES.values()
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_the_architecture_has_a_line_for_each_module():
    """The first sentence of its docstring, under the heading of its folder."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    for name, file in FILES.items():
        if not name.endswith("__init__"):
            text = ast.get_docstring(ast.parse(file.read_text())).split("\n\n")[0].replace("\n", " ")
            block = page.partition(f"### {file.parent.relative_to(ROOT)}/\n")[2].partition("\n### ")[0]
            assert f"- `{file.name}`: {text}\n" in block + "\n", f"docs/architecture.md lacks {name}: {text}"


def sections(script):
    """The section of each line, by the comments that begin them."""
    found = [""]
    for line in script.read_text().splitlines():
        heading = re.fullmatch(r"# ---- (.+) ----", line)
        found.append(heading[1] if heading else found[-1])
    return found[1:]


@pytest.mark.parametrize("script", CHAPTER)
def test_the_lesson_is_in_the_script(script):
    lines = sections(ROOT / "ch16" / f"{script}.py")
    assert [name for name in dict.fromkeys(lines) if name] == SECTIONS
    share = sum(name in ("mechanism", "measurement") for name in lines) / len(lines)
    assert share >= LEAST_SHARE, f"{100 * share:.0f}%"
    assert len(lines) <= 500


def test_the_formatter_decides():
    for file in [*FILES.values(), *(ROOT / "tests").rglob("*.py")]:
        assert "# fmt: " + "skip" not in file.read_text(), file


@pytest.mark.slow
@pytest.mark.parametrize("script", CHAPTER)
def test_tables_and_lines_fit_a_projector(script, quick_run):
    done = quick_run("python3", f"ch16/{script}.py", "--quick")
    assert done.status == 0, done.err[-2000:]
    for name, table in done.json["tables"].items():
        columns = [Column(**column) for column in table["columns"]]
        lines = format_table(table["rows"], columns).splitlines()
        assert max(map(len, lines), default=0) <= 98, f"{name}: {max(map(len, lines))}"  # it is indented by two
        assert len([line for line in lines if line.strip()]) - len(table["rows"]) in (1, 2), "headings of two lines"
