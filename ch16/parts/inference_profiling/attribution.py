"""Where the time of a phase went: each moment of it belongs to one kind of work, so the parts sum to the whole.

On a GPU the phase is seen from the device: its kernels by kind, overlaps counted once, and the rest is idle. On a CPU
it is seen from the thread that runs the operators: each operator's own time (without those it calls) by kind, and the
rest is the interpreter and the framework between them.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from ch16.parts.inference_profiling.trace import Event, Trace
from common.results import Column

PRODUCTS, ATTENTION, ELEMENTWISE = "matrix products", "attention", "normalisation, element-wise"
COPIES, GAPS = "memory copies", "launch gaps"
KINDS = (PRODUCTS, ATTENTION, ELEMENTWISE, COPIES, GAPS)

# The first pattern that is found in the name decides; what none knows is element-wise. Kernel names are those of
# cuBLAS, CUTLASS, cuDNN, FlashAttention, Triton and vLLM, operator names ATen's and vLLM's.
PATTERNS = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        # Fused by torch.compile: the name lists what went into it, products among them never.
        (ELEMENTWISE, r"^triton_(poi|red|per)|cpp_fused"),
        (COPIES, r"reshape_and_cache|kv_cache_update|memcpy|memset"),
        (ATTENTION, r"flash|fmha|sdpa|scaled_dot_product|attention|paged"),
        (
            PRODUCTS,
            r"gemm|gemv|nvjet|cutlass|xmma|wgmma|split_?k|"
            r"::(addmm|b?mm|mv|dot|baddbmm|linear|matmul|_linear\w*)$|_mm$",
        ),
        (COPIES, r"copy|CatArray|::(cat|clone|contiguous|fill_|zero_|zeros|embedding|index_select)$"),
        # Views, allocations and reading a number back move no data: they are the framework's own work.
        (
            GAPS,
            r"::(_?unsafe_view|view|v?split\w*|reshape|slice|t|transpose|permute|as_strided|(un)?squeeze|expand|"
            r"empty\w*|new_empty|chunk|narrow|select|alias|detach|item|_local_scalar_dense|result_type|(un)?flatten|"
            r"resolve_\w+|lift_fresh|to|is_nonzero)$|^TorchDynamo|^Torch-Compiled|CompiledFxGraph",
        ),
    )
)

OPERATION_COLUMNS = (
    Column("name", "operation"),
    Column("kind", "kind"),
    Column("calls", "calls", ",d"),
    Column("ms", "ms", ",.2f"),
    Column("percent", "of the phases %", ".1f"),
)


def kind_of(name: str) -> str:
    """The kind of work that an operator or a kernel of this name does."""
    return next((kind for kind, pattern in PATTERNS if pattern.search(name)), ELEMENTWISE)


def time_by_kind(trace: Trace, span: Event) -> dict[str, float]:
    """Seconds of each of KINDS within `span`; from the device where the trace has kernels, else from span's thread."""
    times, busy = dict.fromkeys(KINDS, 0.0), 0.0
    for event, seconds in _shares(trace, span):
        times[kind_of(event.name)] += seconds
        busy += seconds
    times[GAPS] += span.seconds - busy
    return times


def top_operations(trace: Trace, spans: Sequence[Event], count: int = 10) -> list[dict]:
    """Rows of OPERATION_COLUMNS: the operations with the most device time (on a CPU: time of their own) in `spans`."""
    seconds, calls = defaultdict(float), defaultdict(int)
    for span in spans:
        for event, share in _shares(trace, span):
            seconds[event.name] += share
            calls[event.name] += 1
    whole = sum(span.seconds for span in spans)
    names = sorted(seconds, key=seconds.__getitem__, reverse=True)[:count]
    return [
        {
            "name": _short(name),
            "kind": kind_of(name),
            "calls": calls[name],
            "ms": 1e3 * seconds[name],
            "percent": 100 * seconds[name] / whole,
        }
        for name in names
    ]


def _short(name: str, limit: int = 60) -> str:
    """A kernel's name in one line: without its return type, and of ATen's templates what they compute."""
    name = name.removeprefix("void ")
    if template := re.match(r"at::native::(?:\(anonymous namespace\)::)?(\w+)<", name):
        computes = re.findall(r"\w+(?:Functor\w*|Ops|_cuda)\b", name)
        name = f"{template[1]}{f' of {computes[-1]}' if computes else ''}"
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _shares(trace: Trace, span: Event) -> Iterator[tuple[Event, float]]:
    """Each event that had a part of `span`, with its seconds; no moment belongs to two."""
    if trace.kernels:
        return _turns([event for event in trace.kernels if event.end > span.start and event.start < span.end], span)
    same_thread = [event for event in trace.ops if event.thread == span.thread]
    return _own_times([event for event in same_thread if span.start <= event.start < span.end], span)


def _turns(events: Sequence[Event], span: Event) -> Iterator[tuple[Event, float]]:
    """Where kernels overlap, the one that started first has the time; `events` by start."""
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
