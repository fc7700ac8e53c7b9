import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from ch16.parts.kv_cache_monitor.watch import line, read_metrics, watch
from common.cli import CannotRun

METRICS = """# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.2
vllm:kv_cache_usage_perc{engine="1"} 0.4
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0"} 100.0
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0"} 25.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} 3.0
"""


@pytest.fixture
def server():
    """Serves `answer`: a status and a text."""

    class Handler(BaseHTTPRequestHandler):
        answer = (200, METRICS)

        def do_GET(self):
            self.send_response(self.answer[0])
            self.end_headers()
            self.wfile.write(self.answer[1].encode())

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever).start()
    yield Handler, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_figures(server):
    figures = read_metrics(server[1])
    assert figures["usage"] == pytest.approx(0.3) and figures["queries"] == 100 and figures["hits"] == 25
    assert figures["running"] == 3 and figures["preemptions"] == 0


def test_a_line():
    before = {"usage": 0.0, "running": 0, "waiting": 0, "queries": 100, "hits": 10, "preemptions": 0}
    now = {"usage": 0.5, "running": 4, "waiting": 2, "queries": 300, "hits": 110, "preemptions": 1}
    text = line(now, before, width=120)
    bar = text[1 : text.index("]")]
    assert abs(bar.count("#") - bar.count(".")) <= 1 and len(text) <= 120
    assert " 50.0%  hit rate  50.0%  running 4  waiting 2  preempted 1" in text
    assert "hit rate     -" in line(now, now)


def test_readings_until_the_time_is_over(server, capsys):
    readings = watch(server[1].removeprefix("http://"), seconds=0.2, interval_s=0.01)
    assert len(readings) >= 2 and capsys.readouterr().out.count("hit rate") == len(readings) - 1


@pytest.mark.parametrize("answer", [(500, ""), (200, "no metrics {"), (200, "up 1\n")])
def test_no_vllm_server(server, answer):
    handler, url = server
    handler.answer = answer
    with pytest.raises(CannotRun, match=r"no metrics from|is no vLLM server"):
        read_metrics(url)
