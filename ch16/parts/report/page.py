"""The page of a report: one HTML file that needs nothing else."""

import ast
import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from ch16.parts.report.gather import CHAPTER, ScriptRun
from common.gpu import named
from common.results import CLAIMS, ROOT, Column

VERDICTS = ("holds", "fails", "n/a", "not measured")


def html(outcomes: Sequence[ScriptRun], source: str) -> str:
    """The page of all that was found; `source` says by which runs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"code": code, "duration": duration, "data_uri": data_uri}
    found, shown = claims(outcomes), sections(outcomes)
    return environment.get_template("page.html").render(
        source=source,
        machines=machines(outcomes),
        claims=found,
        verdicts={v: [claim["claim"] for claim in found if claim["verdict"] == v] for v in VERDICTS},
        failures=[outcome for outcome in outcomes if outcome.error],
        sections=shown,
        timed=[run["outcome"] for part in shown for run in part["runs"] if run["outcome"].seconds is not None],
    )


# ---- what is on it ----


def machines(outcomes: Sequence[ScriptRun]) -> list[dict[str, str]]:
    """A card for each machine that measured: titles and texts."""
    groups: dict[tuple, list[Mapping]] = {}
    for outcome in outcomes:
        if outcome.content:
            machine = outcome.content["machine"]
            key = tuple(machine[name] for name in ("device", "name", "count", "cores"))
            groups.setdefault(key, []).append(outcome.content)
    return [card(contents) for contents in groups.values()]


def card(contents: Sequence[Mapping]) -> dict[str, str]:
    """One machine as its results files describe it."""
    machine = contents[0]["machine"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    versions: dict[str, set[str]] = {}
    for content in contents:
        for package, version in content["machine"]["versions"].items():
            versions.setdefault(package, set()).add(version)
    dates = sorted(content["date"] for content in contents)
    shown = {"machine": named(*(machine[key] for key in ("device", "name", "count", "cores"))), "memory": memory}
    if machine["device"] == "cuda":
        shown["memory"] += " each"
        shown["CUDA"] = "compute capability " + ".".join(map(str, machine["capability"]))
    peak = machine["peak"]
    shown["BF16"] = limit(machine["native_bf16"], peak["bf16_flops"])
    if machine["device"] == "cpu" and not machine["native_bf16"]:
        shown["BF16"] = "no units: models are computed in FP32"
    shown["FP8"] = limit(machine["native_fp8"], peak["fp8_flops"])
    if peak["bytes_per_s"]:
        shown["memory speed"] = f"up to {peak['bytes_per_s'] / 1e12:.4g} TB/s"
    shown["software"] = ", ".join(f"{package} {' and '.join(sorted(found))}" for package, found in versions.items())
    shown["measured"] = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return shown


def limit(native: bool, flops_per_s: float | None) -> str:
    """How a machine computes in a precision."""
    if not native:
        return "emulated"
    return f"up to {flops_per_s / 1e12:.4g} TFLOP/s" if flops_per_s else "native"


def claims(outcomes: Sequence[ScriptRun]) -> list[dict]:
    """Every claim of the chapter with a verdict, and what other runs say beside it.

    A verdict that decides goes before n/a, that of the claim's own script before others, and a script's own results
    file before those of its other runs.
    """
    scripts = {claim: script for script, names in CHAPTER.items() for claim in names}
    errors = {outcome.script: outcome.error for outcome in outcomes}
    found: dict[str, list[dict]] = {claim: [] for claim in CLAIMS}
    for outcome in sorted(outcomes, key=is_another_run):
        for verdict in outcome.content["claims"] if outcome.content else ():
            found[verdict["claim"]].append({**verdict, "run": outcome.name, "script": outcome.script})
    listed = []
    for claim, text in CLAIMS.items():
        script = scripts[claim]
        if not (verdicts := found[claim]):
            error = errors.get(script)
            why = f"the script failed: {error}" if error else f"`python3 ch16/{script}.py` measures it"
            verdicts = [{"verdict": "not measured", "measured": why, "reason": "", "run": script, "script": script}]
        first, *others = sorted(verdicts, key=lambda v: (v["verdict"] == "n/a", v["script"] != scripts[claim]))
        listed.append(first | {"claim": claim, "text": text, "shown": first["script"] in errors, "others": others})
    return listed


def is_another_run(outcome: ScriptRun) -> tuple[bool, str]:
    """Sorts a script's own results file before those of its other runs."""
    return outcome.name != outcome.script, outcome.name


def sections(outcomes: Sequence[ScriptRun]) -> list[dict]:
    """What each script has to show, in the chapter's order, then that of scripts beside it."""
    listed = []
    for name in dict.fromkeys([*CHAPTER, *(outcome.script for outcome in outcomes)]):
        runs = sorted((outcome for outcome in outcomes if outcome.script == name), key=is_another_run)
        if runs:
            shown = [{"outcome": run, "settings": settings(run), "tables": tables(run)} for run in runs]
            listed.append({"name": name, "runs": shown, **introduction(ROOT / "ch16" / f"{name}.py")})
    return listed


def introduction(script: Path) -> dict[str, str]:
    """The first line of a script's docstring, its first paragraph, and how to read its output."""
    text = ast.get_docstring(ast.parse(script.read_text())) or "" if script.exists() else ""
    title, *paragraphs = text.split("\n\n")
    reading = [paragraph for paragraph in paragraphs if paragraph.startswith("How to read")]
    return {"title": title, "idea": (paragraphs or [""])[0], "reading": (reading or [""])[0]}


def tables(outcome: ScriptRun) -> list[dict]:
    """The tables of a run: a title, the head and the rows as texts; which columns are numbers."""
    listed = []
    for table in outcome.content["tables"].values() if outcome.content else ():
        columns = [Column(**column) for column in table["columns"]]
        numbers = [any(isinstance(row.get(c.key), int | float) for row in table["rows"]) for c in columns]
        cells = [[column.cell(row) for column in columns] for row in table["rows"]]
        listed.append({"title": table["title"], "head": [c.title for c in columns], "rows": cells, "numbers": numbers})
    return listed


def settings(outcome: ScriptRun) -> str:
    """The settings of a run in one line."""
    return words(outcome.content["settings"]) if outcome.content else ""


# ---- how it is written ----


def code(text: str) -> Markup:
    """Text in which `words` like these are code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def duration(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def data_uri(png: bytes) -> str:
    """A picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def words(value: object) -> str:
    """A setting as a reader would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return "/".join(map(words, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
