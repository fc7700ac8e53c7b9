from ch16.parts.request_scheduler.mix import Answer, Job
from ch16.parts.request_scheduler.picture import plot
from ch16.parts.request_scheduler.tables import FCFS, PRIORITY, WAIT_COLUMNS
from common.gpu import detect
from common.results import Report


def test_a_simulation_of_few_requests_can_be_drawn(tmp_path):
    """Of one request there are no waits of the other classes."""
    answer = Answer(Job(0.0, "low", "a", 1, 1), 1.0, 1.0)
    rows = [{"policy": policy, "group": "3 low", "p99_s": 1.0} for policy in ("strict priority", "fair by tenant")]
    runs = {FCFS: [answer], PRIORITY: [answer]}
    results = Report("a test", detect("cpu"), {"model": "a model"})
    results.keep("simulated", "Waits", rows, WAIT_COLUMNS)
    plot(str(tmp_path / "waits.png"), runs, results, "A test")
    assert (tmp_path / "waits.png").read_bytes().startswith(b"\x89PNG")
