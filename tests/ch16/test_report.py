"""The report on what was measured, as a browser shows it, and when scripts fail."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest

from ch16 import report
from common import cli, plots
from common.gpu import detect
from common.results import CLAIMS
from tests.conftest import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# What the page looks like from inside, as the title of a page around it, which --dump-dom prints.
PROBE = """<!doctype html><title></title>
<iframe style="border: 0" width="{width}" height="800" srcdoc="{page}"></iframe>
<script>onload = () => {{
  const page = frames[0].document, style = frames[0].getComputedStyle(page.body)
  document.title = JSON.stringify({{
    claims: [...page.querySelectorAll(".claims > li")].map(claim => claim.id),
    verdicts: page.querySelectorAll(".claims .verdict").length,
    picture: page.querySelector("img").naturalWidth,
    tables: page.querySelectorAll("details table").length,
    open: page.querySelectorAll("details[open]").length,
    too_wide_px: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    letters_px: parseFloat(style.fontSize),
    ink: style.color, paper: style.backgroundColor,
    fetched: frames[0].performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length,
  }})
}}</script>"""


def run(*flags):
    command = [sys.executable, str(ROOT / "ch16" / "report.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)


def seen(page, folder, width, dark):
    """What a browser with a window of that width makes of the page."""
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=width, page=html.escape(page)))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--window-size=2000,1000",
        "--dump-dom",
        probe.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))


def luminance(color):
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2.2 defines it."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report on the results of two CPU cores, with one picture."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(ROOT / "results" / "cpu", folder / "results")
    figure, (axis,) = plots.draw(1)
    axis.plot([1, 2])
    plots.save_plot(figure, str(folder / "results" / "request_scheduler.png"), "It grows", "a model", detect("cpu"))
    done = run("--results", folder / "results", "--output", folder / "report.html")
    assert done.returncode == 0 and done.stdout == f"written: {folder / 'report.html'}\n" and not done.stderr
    return (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1920, False)])
def test_a_browser_shows_it_on_a_phone_and_on_a_projector(page, tmp_path, width, dark):
    saw = seen(page, tmp_path, width, dark)
    assert saw["claims"] == list(CLAIMS) and saw["verdicts"] >= len(CLAIMS)
    assert saw["picture"] > 500 and saw["tables"] > saw["open"] > 0
    assert saw["too_wide_px"] == 0
    assert saw["letters_px"] >= (16 if width < 1000 else 20)
    ink, paper = luminance(saw["ink"]), luminance(saw["paper"])
    assert (ink > paper) == dark
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 7  # WCAG's enhanced contrast
    assert saw["fetched"] == 0


@pytest.mark.slow
def test_a_script_that_fails_is_on_the_page(tmp_path, monkeypatch, capsys):
    bad = tmp_path / "load_test.py"
    bad.write_text("raise SystemExit('error: it is too late')")
    monkeypatch.setattr(report, "SCRIPTS", [bad])
    monkeypatch.setattr(report, "WORK", tmp_path / "work")
    monkeypatch.setattr(sys, "argv", ["report.py", "--output", str(tmp_path / "report.html")])
    with pytest.raises(SystemExit) as stopped:
        cli.run(report.main)
    assert stopped.value.code == 1
    assert "error: 1 of 1 failed: load_test; their output is in " in capsys.readouterr().err
    assert "the script failed: it is too late" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--results", "common", "--output", "x.html"], 1, "error: no results in common: scripts write them"),
        (["--output", "/dev/null/x.html"], 2, "cannot write to /dev/null/x.html"),
    ],
)
def test_errors_are_one_line(flags, status, message):
    done = run(*flags)
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr
