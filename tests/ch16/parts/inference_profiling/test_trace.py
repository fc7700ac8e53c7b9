"""Traces read and written: hand-made ones, broken ones, and what torch.profiler really writes."""

import gzip
import json
from collections import defaultdict

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ch16.parts.inference_profiling.trace import add_memory_track, read_trace, save_plain
from common.cli import CannotRun


def written(path, events):
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_events_by_what_they_are(tmp_path):
    def event(name, cat, ts, dur):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": 7}

    path = written(
        tmp_path / "t.json",
        [
            event("gemm", "kernel", 30, 5),
            event("Memcpy", "gpu_memcpy", 20, 5),
            event("aten::mm", "cpu_op", 10, 2.5),
            event("prefill", "user_annotation", 5, 100),
            event("prefill", "gpu_user_annotation", 20, 15),
            event("f.py(1)", "python_function", 0, 200),
            {"ph": "M", "name": "process_name", "pid": 1},
        ],
    )
    trace = read_trace(path)
    assert [kernel.name for kernel in trace.kernels] == ["Memcpy", "gemm"]
    (op,) = trace.ops
    assert (op.name, op.thread) == ("aten::mm", 7) and op.seconds == pytest.approx(2.5e-6)
    assert trace.span("prefill").start == pytest.approx(5e-6) and len(trace.device_ranges) == 1
    with pytest.raises(CannotRun, match="0 ranges named 'decode'"):
        trace.span("decode")


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "cannot read the trace"), (b"[]", "is no trace"), (b"{}", "is no trace")]
)
def test_no_trace(tmp_path, content, message):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(CannotRun, match=message):
        read_trace(tmp_path / "t.json")


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"{}" * 99, mtime=0)[:20]], ids=["no archive", "half an archive"]
)
def test_a_broken_archive(tmp_path, content):
    (tmp_path / "t.json.gz").write_bytes(content)
    with pytest.raises(CannotRun, match="cannot read the trace"):
        read_trace(tmp_path / "t.json.gz")


def test_archives_are_unpacked(tmp_path):
    content = json.dumps({"traceEvents": []}).encode()
    (tmp_path / "t.json.gz").write_bytes(gzip.compress(content))
    save_plain(tmp_path / "t.json.gz", tmp_path / "new" / "t.json")
    assert (tmp_path / "new" / "t.json").read_bytes() == content
    with pytest.raises(CannotRun, match="cannot write the trace"):
        save_plain(tmp_path / "t.json.gz", tmp_path)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A trace of torch.profiler with everything on but stacks, whose frames overlap the ranges they open."""
    path = tmp_path_factory.mktemp("trace") / "t.json"
    details = {"record_shapes": True, "profile_memory": True}
    with profile(activities=[ProfilerActivity.CPU], **details) as profiler, record_function("prefill"):
        held = [torch.randn(64, 64) @ torch.randn(64, 64) for _ in range(5)]
    del held
    profiler.export_chrome_trace(str(path))
    return path, add_memory_track(path)


def test_perfetto_can_open_it(real):
    """What its importer of JSON traces asks for: phases it knows, numbers in microseconds, slices that nest."""
    events = json.loads(real[0].read_text())["traceEvents"]
    slices = defaultdict(list)
    for event in events:
        assert event["ph"] in {"X", "M", "i", "s", "f", "C"} and "name" in event
        assert event["ph"] == "M" or isinstance(event["ts"], int | float)
        if event["ph"] == "X":
            assert event["dur"] >= 0 and {"pid", "tid"} <= event.keys()
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
    assert sum(map(len, slices.values())) > 20
    for track in slices.values():
        around = []
        for start, end in sorted(track, key=lambda span: (span[0], -span[1])):
            while around and around[-1] <= start:
                around.pop()
            assert not around or end <= around[-1] + 0.01  # microseconds: times are rounded
            around.append(end)


def test_memory_is_a_track(real):
    events = json.loads(real[0].read_text())["traceEvents"]
    counters = [e for e in events if e["ph"] == "C"]
    changes = [(e["ts"], e["args"]["Total Allocated"]) for e in events if e["name"] == "[memory]"]
    assert [round(c["args"]["bytes"]) for c in counters] == [allocated for _, allocated in changes]
    assert max(allocated for _, allocated in changes) >= 5 * 64 * 64 * 4
    assert all(c["name"] == "CPU memory allocated" for c in counters)
    assert [when for when, _ in changes] == sorted(when for when, _ in changes)


def test_the_real_one_reads_alike(real):
    path, trace = real
    again = read_trace(path)
    assert again == trace and sum(op.name == "aten::mm" for op in trace.ops) == 5
    span = trace.span("prefill")
    assert all(span.start <= op.start and op.end <= span.end for op in trace.ops if op.name == "aten::mm")
