from ch16.parts.kv_cache_monitor.feed import CacheSample
from ch16.parts.kv_cache_monitor.picture import plot
from ch16.parts.kv_cache_monitor.workloads import sizes_for
from common.gpu import detect


def test_a_picture(tmp_path):
    machine = detect("cpu")
    samples = [CacheSample(0.1 * i, i, 2 * i, 32 * i, 64, i, 1) for i in range(1, 20)]
    plot(str(tmp_path / "kv.png"), samples, sizes_for(machine, quick=True), "a model", machine)
    assert (tmp_path / "kv.png").read_bytes().startswith(b"\x89PNG")
