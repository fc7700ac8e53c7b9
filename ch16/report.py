"""The report: what the chapter claims and what this machine measured, on one page to show to a class.

It runs every script of the chapter in its --quick form, one after the other, and writes a page with the machine, a
verdict on each claim, every picture and table, and how long each took. The page is one file: it needs no network, and
fits a projector, a phone and paper. A script that fails is named on it with its error.
On a CPU all start from one process that has imported vLLM once: to import it takes longer than many scripts measure.

With --results it runs nothing and reads the JSON files of a folder, and the pictures beside them: runs of full size, of
a GPU for example, saved by --json FOLDER/SCRIPT.json --plot FOLDER/SCRIPT.png.

    python3 ch16/report.py                           # all scripts, then report.html
    python3 ch16/report.py --results results/h100    # the GPU edition, from what was measured before

How to read it: `holds` and `fails` were measured, `n/a` says why this machine cannot decide, and a claim that nobody
measured says which script would. Exit status 1 if a script failed; the page is written all the same.
"""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "common" / "environment.py"))

import argparse

from ch16.parts.report.gather import CHAPTER, read, run_all
from ch16.parts.report.page import html
from common import cli
from common.results import ROOT

SCRIPTS = [ROOT / "ch16" / f"{name}.py" for name in CHAPTER]
WORK = ROOT / ".cache" / "report"


def main() -> int:
    """Gather, write the page, name what failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="read this folder instead of running scripts")
    parser.add_argument(
        "--output", type=cli.output_file, default="report.html", metavar="FILE", help="default: report.html"
    )
    args = parser.parse_args()
    if args.results:
        outcomes, source = read(args.results), f"the runs in {args.results}"
    else:
        outcomes, source = list(run_all(SCRIPTS, WORK)), "every script in its --quick form"
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(html(outcomes, source))
    print(f"written: {args.output}")
    failed = [outcome.name for outcome in outcomes if outcome.error]
    if failed:
        raise cli.CannotRun(f"{len(failed)} of {len(outcomes)} failed: {', '.join(failed)}; their output is in {WORK}")
    return 0


if __name__ == "__main__":
    cli.run(main)
