"""Chrome traces of torch.profiler (which vLLM uses as well): written, read, with memory as a track of its own.

Format: "Trace Event Format" of the Chromium project; Perfetto (ui.perfetto.dev) opens it.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from common.cli import CannotRun, first_line

DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
RANGE_CATEGORIES = ("user_annotation", "gpu_user_annotation")
DEVICE_NAMES = {0: "CPU", 1: "GPU"}  # c10::DeviceType


@dataclass(frozen=True)
class Event:
    """Something that took time; all events of a trace count seconds from the same zero."""

    name: str
    start: float
    end: float
    thread: object = None  # host: the thread; device: the stream

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """What a trace says about time, each list by start."""

    ops: Sequence[Event]  # operators on the host; an operator contains those that it calls
    kernels: Sequence[Event]  # kernels and copies on the device
    ranges: Sequence[Event]  # named ranges on the host
    device_ranges: Sequence[Event]  # the same ranges as the device worked on them

    def span(self, name: str) -> Event:
        """The only range of that name; CannotRun if there is none, or more than one."""
        found = [event for event in self.ranges if event.name == name]
        if len(found) != 1:
            raise CannotRun(f"the trace has {len(found)} ranges named '{name}', not one")
        return found[0]


def activities(on_gpu: bool) -> list[ProfilerActivity]:
    """What torch.profiler records: the host and, on a GPU, its kernels."""
    return [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu


def export(profiler: profile, path: str, memory: bool = True) -> Trace:
    """Write a profile as a trace, and read it; `memory`: with a track of allocated bytes. CannotRun if it fails."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(path)
    except (OSError, RuntimeError) as error:
        raise CannotRun(f"cannot write the trace to {path}: {first_line(error)}") from None
    return add_memory_track(path) if memory else read_trace(path)


def read_trace(path: str | Path) -> Trace:
    """Read a trace, plain or gzipped; CannotRun if that fails, or it is no trace."""
    return _trace(_load(Path(path)))


def add_memory_track(path: str | Path) -> Trace:
    """Give a trace file (torch.profiler's, with `profile_memory`) a counter track of allocated bytes per device.

    The profiler notes each allocation as an event without length; a viewer draws a counter as a timeline.
    """
    content = _load(Path(path))
    events = content["traceEvents"]
    for event in list(events):
        noted = event.get("args", {})
        if event.get("name") == "[memory]" and "Total Allocated" in noted:
            kind = noted.get("Device Type")
            name = f"{DEVICE_NAMES.get(kind, f'device type {kind}')} memory allocated"
            track = {"ph": "C", "name": name, "pid": event["pid"], "ts": event["ts"]}
            events.append(track | {"args": {"bytes": noted["Total Allocated"]}})
    Path(path).write_text(json.dumps(content))
    return _trace(content)


def save_plain(source: Path, target: str | Path) -> None:
    """Copy a trace, unpacked where it is gzipped; CannotRun if `target` cannot be written."""
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_bytes(_unpacked(source))
    except OSError as error:
        raise CannotRun(f"cannot write the trace to {target}: {first_line(error)}") from None


def _unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _load(path: Path) -> dict:
    try:
        content = json.loads(_unpacked(path))
    except (OSError, EOFError, ValueError) as error:
        raise CannotRun(f"cannot read the trace {path}: {first_line(error)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("traceEvents"), list):
        raise CannotRun(f"{path} is no trace: it has no traceEvents")
    return content


def _trace(content: dict) -> Trace:
    by_category: dict[str, list[Event]] = defaultdict(list)
    for event in content["traceEvents"]:
        if event.get("ph") == "X" and "dur" in event:
            start = event["ts"] / 1e6  # microseconds
            found = Event(event["name"], start, start + event["dur"] / 1e6, event.get("tid"))
            by_category[event.get("cat")].append(found)
    for events in by_category.values():
        events.sort(key=lambda event: event.start)
    kernels = sorted((e for c in DEVICE_CATEGORIES for e in by_category[c]), key=lambda event: event.start)
    on_host, on_device = (by_category[category] for category in RANGE_CATEGORIES)
    return Trace(by_category["cpu_op"], kernels, on_host, on_device)
