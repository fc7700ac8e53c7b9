"""The picture of the KV cache monitor: the cache over time."""

from collections.abc import Sequence

from ch16.parts.kv_cache_monitor.feed import CacheSample
from ch16.parts.kv_cache_monitor.workloads import CacheSizes
from common.gpu import Machine
from common.plots import COLOURS, draw, legend_below, save_plot


def plot(path: str, samples: Sequence[CacheSample], sizes: CacheSizes, model: str, machine: Machine) -> None:
    """Blocks held and cached over time, beside blocks found, not found and evicted so far."""
    figure, (blocks, totals) = draw(2)
    seconds = [sample.seconds for sample in samples]
    curves = (
        (blocks, "held by requests", "baseline", [sample.held_blocks for sample in samples]),
        (blocks, "cached (reusable)", "good", [sample.cached_blocks for sample in samples]),
        (totals, "found in the cache", "good", [sample.hits / sizes.block_size for sample in samples]),
        (totals, "not found", "quiet", [sample.misses / sizes.block_size for sample in samples]),
        (totals, "evicted", "bad", [sample.evictions for sample in samples]),
    )
    for axis, label, colour, values in curves:
        axis.step(seconds, values, where="post", color=COLOURS[colour], label=label)
    blocks.axhline(sizes.blocks - 1, color=COLOURS["limit"], linestyle=":", label="all blocks")
    blocks.set(title="Blocks of the cache", xlabel="seconds", ylabel="blocks", ylim=(0, None))
    totals.set(title="Since the start", xlabel="seconds", ylabel="blocks", ylim=(0, None))
    for axis in (blocks, totals):
        legend_below(axis)
    last = samples[-1]
    rate = 100 * last.hits / (last.hits + last.misses)
    message = f"{rate:.0f}% of prompt tokens came from the cache; {last.evictions:,} blocks were evicted"
    save_plot(figure, path, message, model, machine)
