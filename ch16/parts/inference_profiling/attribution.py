"""Where the time of a phase went: each moment belongs to one kind of work, so the parts sum to the whole.

On a GPU the time is the device's: kernels by kind, overlaps counted once, and the rest is idle. On a CPU it is that of
the thread that runs the operators: each operator's own time (without those it calls) by kind, and the rest is Python
and the framework between them.
"""

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch.profiler import profile

from ch16.parts.inference_profiling.trace import Event, Trace, activities, export
from common.cli import CannotRun
from common.results import Column

SUM_TOLERANCE = 0.02  # relative difference of the parts' sum and the phase's wall time
RANGE_S = 2e-4  # and seconds that it takes to enter and leave a range

PRODUCTS, ATTENTION, ELEMENTWISE = "matrix products", "attention", "norm, element-wise"
COPIES, GAPS = "memory copies", "launch gaps"
KINDS = (PRODUCTS, ATTENTION, ELEMENTWISE, COPIES, GAPS)

# The first pattern that is found in the name decides; what none knows is element-wise. Kernel names are those of
# cuBLAS, CUTLASS, cuDNN, FlashAttention, Triton and vLLM, operator names ATen's and vLLM's.
PATTERNS = (
    # Fused by torch.compile: the name lists what went into it, products among them never.
    (ELEMENTWISE, r"^triton_(poi|red|per)|cpp_fused"),
    (COPIES, r"reshape_and_cache|kv_cache_update|memcpy|memset"),
    (ATTENTION, r"flash|fmha|sdpa|scaled_dot_product|attention|paged"),
    (PRODUCTS, r"gemm|gemv|nvjet|cutlass|xmma|wgmma|split_?k"),
    (PRODUCTS, r"::(addmm|b?mm|mv|dot|baddbmm|linear|matmul|_linear\w*)$|_mm$"),
    (COPIES, r"copy|CatArray|::(cat|clone|contiguous|fill_|zero_|zeros|embedding|index_select)$"),
    # Views, allocations and reading a number back move no data: they are the framework's own work.
    (
        GAPS,
        r"::(_?unsafe_view|view|v?split\w*|reshape|slice|t|transpose|permute|as_strided|(un)?squeeze|expand|"
        r"empty\w*|new_empty|chunk|narrow|select|alias|detach|item|_local_scalar_dense|result_type|(un)?flatten|"
        r"resolve_\w+|lift_fresh|to|is_nonzero)$|^TorchDynamo|^Torch-Compiled|CompiledFxGraph",
    ),
)

OPERATION_COLUMNS = (
    Column("name", "operation"),
    Column("kind", "kind"),
    Column("calls", "calls", ",d"),
    Column("ms", "ms", ",.2f"),
    Column("percent", "of phases %", ".1f"),
)


@dataclass(frozen=True)
class Profile:
    """Named phases under the profiler."""

    trace: Trace
    spans: Mapping[str, Event]  # the phases in the trace
    seconds: Mapping[str, float]  # wall time per phase by the host's clock, the profiler running

    @staticmethod
    def of(trace: Trace, seconds: Mapping[str, float]) -> "Profile":
        """Phases that are ranges of their names; CannotRun if the trace lacks one."""
        return Profile(trace, {name: trace.span(name) for name in seconds}, seconds)

    @property
    def operations(self) -> list[dict]:
        """Rows of OPERATION_COLUMNS: the ten with the most device time."""
        return top_operations(self.trace, list(self.spans.values()))

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        """Seconds per kind of work, by phase."""
        return {name: time_by_kind(self.trace, span) for name, span in self.spans.items()}

    def checked_parts(self) -> dict[str, dict[str, float]]:
        """`parts`; CannotRun if they do not sum to the wall time, or the device worked outside the phases."""
        parts = self.parts
        for name, times in parts.items():
            whole, wall = sum(times.values()), self.seconds[name]
            if abs(whole - wall) > SUM_TOLERANCE * wall + RANGE_S:
                raise CannotRun(f"the parts of {name} sum to {whole:.4f} s, its wall time is {wall:.4f}")
        inside = sum(times[kind] for times in parts.values() for kind in KINDS if kind != GAPS)
        begin = min(span.start for span in self.spans.values())
        ends = [kernel.end for kernel in self.trace.kernels if kernel.start >= begin]
        whole = time_by_kind(self.trace, Event("all", begin, max(ends, default=begin)))
        on_device = sum(whole.values()) - whole[GAPS] if ends else 0.0
        if on_device > (1 + SUM_TOLERANCE) * inside:
            raise CannotRun(f"the device worked {on_device:.4f} s, but only {inside:.4f} s are in the phases")
        return parts


def profiled(phases: Callable[[], Mapping[str, float]], on_gpu: bool, memory: bool = False) -> Profile:
    """Profile `phases`, which returns the seconds of each, and keep no file."""
    with profile(activities=activities(on_gpu), profile_memory=memory) as profiler:
        seconds = phases()
    with tempfile.TemporaryDirectory() as folder:
        return Profile.of(export(profiler, f"{folder}/trace.json", memory), seconds)


@cache
def kind_of(name: str) -> str:
    """The kind of work that an operator or a kernel of this name does."""
    return next((kind for kind, pattern in PATTERNS if re.search(pattern, name, re.IGNORECASE)), ELEMENTWISE)


def time_by_kind(trace: Trace, span: Event) -> dict[str, float]:
    """Seconds per kind within `span`, of the device if the trace has kernels, otherwise of the span's thread."""
    times, busy = dict.fromkeys(KINDS, 0.0), 0.0
    for event, seconds in _shares(trace, span):
        times[kind_of(event.name)] += seconds
        busy += seconds
    times[GAPS] += span.seconds - busy
    return times


def top_operations(trace: Trace, spans: Sequence[Event], count: int = 10) -> list[dict]:
    """Rows of OPERATION_COLUMNS: the operations with the most device time (on a CPU: own time) in `spans`."""
    seconds, calls = defaultdict(float), defaultdict(int)
    for span in spans:
        for event, share in _shares(trace, span):
            seconds[event.name] += share
            calls[event.name] += 1
    whole = sum(span.seconds for span in spans)

    def row(name: str) -> dict:
        times = {"ms": 1e3 * seconds[name], "percent": 100 * seconds[name] / whole}
        return {"name": _short(name), "kind": kind_of(name), "calls": calls[name], **times}

    return [row(name) for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:count]]


def _short(name: str, limit: int = 50) -> str:
    """A kernel's name without its return type; of ATen's templates, what they compute."""
    name = name.removeprefix("void ")
    if template := re.match(r"at::native::(?:\(anonymous namespace\)::)?(\w+)<", name):
        computes = re.findall(r"\w+(?:Functor\w*|Ops|_cuda)\b", name)
        name = f"{template[1]}{f' of {computes[-1]}' if computes else ''}"
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _shares(trace: Trace, span: Event) -> Iterator[tuple[Event, float]]:
    """Each event within `span`, with its seconds; no moment is counted twice."""
    if trace.kernels:
        return _turns([event for event in trace.kernels if event.end > span.start and event.start < span.end], span)
    same_thread = [event for event in trace.ops if event.thread == span.thread]
    return _own_times([event for event in same_thread if span.start <= event.start < span.end], span)


def _turns(events: Sequence[Event], span: Event) -> Iterator[tuple[Event, float]]:
    """Where kernels overlap, the time belongs to the kernel that started first; `events` by start."""
    at = span.start
    for event in events:
        end = min(event.end, span.end)
        yield event, max(0.0, end - max(event.start, at))
        at = max(at, end)


def _own_times(events: Sequence[Event], span: Event) -> Iterator[tuple[Event, float]]:
    """Nested events of one thread, each without those inside it."""
    events = sorted(events, key=lambda event: (event.start, -event.end))
    own: list[float] = []
    around: list[int] = []  # indices of the events that are open, from outside in
    for i, event in enumerate(events):
        while around and events[around[-1]].end <= event.start:
            around.pop()
        own.append(min(event.end, events[around[-1]].end if around else span.end) - event.start)
        if around:
            own[around[-1]] -= own[i]
        around.append(i)
    return zip(events, own, strict=True)
