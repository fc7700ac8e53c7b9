import base64
import re
from html.parser import HTMLParser

import pytest

from ch16.parts.report import page as reporting
from ch16.parts.report.gather import ScriptRun
from ch16.parts.report.page import duration, words
from common.results import CLAIMS

PNG = b"\x89PNG not really"
CPU = {
    "device": "cpu",
    "name": "A <fast> CPU",
    "count": 1,
    "memory_bytes": 8 << 30,
    "cores": 2,
    "capability": None,
    "native_bf16": True,
    "native_fp8": False,
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
    "peak": {"bf16_flops": None, "fp8_flops": None, "bytes_per_s": None},
}
GPU = CPU | {
    "device": "cuda",
    "name": "A GPU",
    "count": 2,
    "capability": [9, 0],
    "native_fp8": True,
    "peak": {"bf16_flops": 989e12, "fp8_flops": None, "bytes_per_s": 3.35e12},
}
TABLE = {
    "title": "Rates & <latencies>",
    "columns": [{"key": "what", "title": "load", "format": ""}, {"key": "rate", "title": "req/s", "format": ",.1f"}],
    "rows": [{"what": "<b>steady</b>", "rate": 1234.56}, {"what": "bursty", "rate": None}],
}


def verdict(claim, verdict, measured="1 < 2", reason=""):
    return {
        "claim": claim,
        "verdict": verdict,
        "measured": measured,
        "reason": reason,
        "text": "as it was written then",
    }


def outcome(name, *claims, script="", machine=CPU, picture=None, seconds=None, error="", tables=None):
    content = {
        "script": f"ch16/{script or name}.py",
        "date": "2026-01-02",
        "machine": machine,
        "settings": {"seed": 0},
        "tables": tables or {},
        "claims": list(claims),
    }
    return ScriptRun(name, script or name, None if error else content, picture, seconds, error)


def html(outcomes):
    return reporting.html(outcomes, "a <test>")


class Page(HTMLParser):
    """Tags with their attributes, text by the element with an id around it, and whether tags are closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.text, self._open = [], [], {}, []
        self.feed(text)
        assert not self._open, "tags stay open"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in self.VOID:
            self._open.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, name in self._open:
            if name:
                self.text[name] = self.text.get(name, "") + " " + " ".join(data.split())

    def attributes(self, name):
        return [value for _, attributes in self.tags for key, value in attributes.items() if key == name]


def test_every_claim_has_a_verdict_or_the_script_that_would_find_it():
    page = Page(
        html(
            [
                outcome("load_test", verdict("W1", "fails")),
                outcome("fp8_quant", verdict("F1", "holds"), verdict("F2", "n/a", "nothing", "no FP8 units")),
                outcome("moe_benchmark", seconds=3.0, error="it is <broken>"),
            ]
        )
    )
    assert [name for name in page.ids if name in CLAIMS] == list(CLAIMS)
    assert "✗ fails" in page.text["W1"] and "1 < 2" in page.text["W1"] and CLAIMS["W1"] in page.text["W1"]
    assert "✓ holds" in page.text["F1"] and "no FP8 units" in page.text["F2"]
    assert "not measured" in page.text["F3"] and "python3 ch16/fp8_quant.py" in page.text["F3"]
    assert "not measured" in page.text["Q1"] and "python3 ch16/request_scheduler.py" in page.text["Q1"]
    assert "the script failed: it is <broken>" in page.text["M1"] and "it is <broken>" in page.text["moe_benchmark"]


def test_a_verdict_that_decides_goes_first_then_the_scripts_own_file():
    runs = [
        outcome("fp8_quant_4096", verdict("F2", "fails", "1.4x"), script="fp8_quant"),
        outcome("serving_layouts", verdict("F2", "holds", "2.2x"), verdict("S1", "holds", "30,000 tok/s")),
        outcome("fp8_quant", verdict("F2", "holds", "1.9x")),
        outcome("a_fp8", verdict("F2", "n/a", "1.7x"), script="fp8_quant"),
        outcome("inference_serving", verdict("S1", "n/a", "7,000 tok/s")),
    ]
    page = Page(html(runs))
    order = [page.text["F2"].index(measured) for measured in ("1.9x", "1.4x", "2.2x", "1.7x")]
    assert order == sorted(order) and page.text["F2"].index("✓ holds") < page.text["F2"].index("✗ fails")
    assert "in fp8_quant_4096:" in page.text["F2"] and "in fp8_quant:" not in page.text["F2"]
    assert page.text["S1"].index("30,000") < page.text["S1"].index("7,000")


def test_it_needs_nothing_but_itself_and_its_links_resolve():
    page = Page(html([outcome("load_test", verdict("W1", "holds"), picture=PNG, seconds=4.0, tables={"rates": TABLE})]))
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.attributes("href")} <= set(page.ids)
    assert page.attributes("src") == [f"data:image/png;base64,{base64.b64encode(PNG).decode()}"]
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe"} == set()
    assert not re.search(r"url\(|@import|https?:", html([]))


def test_what_was_measured_is_text_and_numbers_align():
    page = html([outcome("load_test", tables={"rates": TABLE})])
    assert "<b>steady</b>" not in page and "&lt;b&gt;steady&lt;/b&gt;" in page and "A &lt;fast&gt; CPU" in page
    assert '<td class="number">1,234.6</td>' in page and '<td class="number">-</td>' in page
    assert "Rates &amp; &lt;latencies&gt;" in page
    assert "<details open>" in page, "without a picture the first table is shown"
    assert "<details open>" not in html([outcome("load_test", picture=PNG, tables={"rates": TABLE})])


def test_a_card_for_each_machine():
    later = GPU | {"versions": {"python": "3.12.3", "torch": "2.11.0"}}
    text = html([outcome("load_test"), outcome("fp8_quant", machine=GPU), outcome("moe_benchmark", machine=later)])
    assert text.count('<dl class="card machine">') == 2
    assert "2 x A GPU" in text and "8 GiB each" in text and "compute capability 9.0" in text
    assert "up to 989 TFLOP/s" in text and "native" in text and "emulated" in text and "up to 3.35 TB/s" in text
    assert "python 3.11.7 and 3.12.3" in text
    assert "FP32" not in text
    assert "models are computed in FP32" in html([outcome("load_test", machine=CPU | {"native_bf16": False})])


def test_times():
    page = Page(
        html([outcome("load_test", seconds=30.0), outcome("fp8_quant", seconds=90.4), outcome("moe_benchmark")])
    )
    assert "times" not in Page(html([outcome("load_test")])).ids
    assert page.attributes("style") == ["width: 100.0%", "width: 33.2%"], "in the chapter's order"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (7, "7 s")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_settings_are_words():
    assert words({"seed": 0, "load": {"users": [1, 2], "presets": []}, "limit": 901371484614.0388, "model": "a"}) == (
        "seed 0, load users 1/2, presets none, limit 9.014e+11, model a"
    )


def test_nothing_at_all_is_still_a_page():
    assert Page(html([])).ids.count("claims") == 1
