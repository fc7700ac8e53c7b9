"""Made-up measurements, by the rows of the tables."""

from ch16.continuous_batching import with_knee
from ch16.parts.continuous_batching.interference import CHUNKED, NONE, SEPARATE, WHOLE, PrefillMode, StreamRun
from ch16.parts.continuous_batching.tables import interference_rows

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def size_rows(base_ms, part_ms, batches=BATCHES):
    """A step takes base + part * batch."""
    steps = {batch: base_ms + part_ms * batch for batch in batches}
    return with_knee([{"batch": batch, "ms": ms, "tokens_per_s": 1e3 * batch / ms} for batch, ms in steps.items()])


def stream_runs(itl_ms, seconds=1.0):
    gaps = [0.010] * 90 + [itl_ms / 1e3] * 10
    return [StreamRun([gaps], [2], [0.5], seconds, 1000)]


def disturbed_rows(chunked_ms, separate_ms, chunked_s=1.0):
    return interference_rows(
        {
            PrefillMode(NONE, "2 cores"): stream_runs(10),
            PrefillMode(WHOLE, "2 cores"): stream_runs(100),
            PrefillMode(CHUNKED, "2 cores", 64): stream_runs(chunked_ms, chunked_s),
            PrefillMode(CHUNKED, "2 cores", 128): stream_runs(60),
            PrefillMode(NONE, "1 of 2 cores", half=True): stream_runs(15),
            PrefillMode(SEPARATE, "1 + 1 cores", half=True): stream_runs(separate_ms),
        }
    )
