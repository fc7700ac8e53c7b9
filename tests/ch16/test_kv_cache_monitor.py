"""The chapter's monitor by property, the command line, and the whole script on the real engine."""

import subprocess
import sys
import threading
from types import ModuleType

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prometheus_client import CollectorRegistry, generate_latest

from ch16 import kv_cache_monitor
from ch16.kv_cache_monitor import CacheMonitor
from common.cli import CannotRun
from common.gpu import detect

SCRIPT = kv_cache_monitor.__file__


# ---- the monitor ----


class AgainstADictionary(RuleBasedStateMachine):
    """Any order of calls, right or wrong: the same as a plain dictionary of blocks and a number of bytes."""

    def __init__(self):
        super().__init__()
        self.monitor, self.blocks, self.loose = CacheMonitor(), {}, 0
        self.allocated = self.freed = self.hits = self.misses = self.evictions = 0

    @rule(size=st.integers(-3, 50))
    def allocate(self, size):
        if size < 0:
            with pytest.raises(ValueError):
                self.monitor.record_allocation(size)
        else:
            self.monitor.record_allocation(size)
            self.loose += size
            self.allocated += size

    @rule(size=st.integers(-3, 50))
    def free(self, size):
        if 0 <= size <= self.loose:
            self.monitor.record_free(size)
            self.loose -= size
            self.freed += size
        else:
            with pytest.raises(ValueError):
                self.monitor.record_free(size)

    @rule(size=st.integers(0, 9), block=st.integers(0, 4))
    def allocate_block(self, size, block):
        if block in self.blocks:
            with pytest.raises(ValueError, match="in use already"):
                self.monitor.record_allocation(size, block)
        else:
            self.monitor.record_allocation(size, block)
            self.blocks[block] = size
            self.allocated += size

    @rule(block=st.integers(0, 4), size=st.none() | st.integers(0, 9))
    def free_block(self, block, size):
        if block in self.blocks and size in (None, self.blocks[block]):
            self.monitor.record_free(size, block)
            self.freed += self.blocks.pop(block)
        else:
            with pytest.raises(ValueError, match="block"):
                self.monitor.record_free(size, block)

    @rule(hits=st.integers(0, 5), misses=st.integers(0, 5), evictions=st.integers(0, 5))
    def count(self, hits, misses, evictions):
        self.monitor.record_hit(hits)
        self.monitor.record_miss(misses)
        self.monitor.record_eviction(evictions)
        self.hits, self.misses, self.evictions = self.hits + hits, self.misses + misses, self.evictions + evictions

    @invariant()
    def the_same(self):
        in_use = sum(self.blocks.values()) + self.loose
        assert self.monitor.stats == {
            "total_allocated": self.allocated,
            "total_freed": self.freed,
            "current_usage": in_use,
            "cache_hits": self.hits,
            "cache_misses": self.misses,
            "evictions": self.evictions,
        }
        assert in_use >= 0
        total = self.hits + self.misses
        assert self.monitor.get_hit_rate() == (self.hits / total if total else 0.0)


TestAgainstADictionary = AgainstADictionary.TestCase


def test_the_chapters_calls(capsys):
    monitor = CacheMonitor()
    monitor.record_allocation(3_000_000_000)
    monitor.record_free(500_000_000)
    for _ in range(3):
        monitor.record_hit()
    monitor.record_miss()
    monitor.record_eviction()
    monitor.print_stats()
    expected = "KV Cache Statistics:\n  Current usage: 2.50 GB\n  Hit rate: 75.0%\n  Evictions: 1\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("method", ["record_hit", "record_miss", "record_eviction"])
def test_nothing_counts_backwards(method):
    with pytest.raises(ValueError, match="a count of -1"):
        getattr(CacheMonitor(), method)(-1)


def test_free_needs_to_know_what():
    with pytest.raises(ValueError, match="a size or a block"):
        CacheMonitor().record_free()


def test_eight_threads_lose_nothing():
    monitor, calls = CacheMonitor(), 5_000
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns within the additions

    def work(thread):
        for i in range(calls):
            monitor.record_allocation(2, (thread, i))
            monitor.record_hit()
            monitor.record_miss()
            if i % 2:
                monitor.record_free(block=(thread, i))
                monitor.record_eviction()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert monitor.stats == {
        "total_allocated": 16 * calls,
        "total_freed": 8 * calls,
        "current_usage": 8 * calls,
        "cache_hits": 8 * calls,
        "cache_misses": 8 * calls,
        "evictions": 4 * calls,
    }


def test_prometheus_sees_what_is_there_when_it_looks():
    monitor, registry = CacheMonitor(), CollectorRegistry(auto_describe=True)
    monitor.export(registry)
    monitor.record_allocation(10)
    monitor.record_free(3)
    monitor.record_hit(4)
    text = generate_latest(registry).decode()
    assert "# TYPE kv_cache_usage_bytes gauge\nkv_cache_usage_bytes 7.0" in text
    assert "# TYPE kv_cache_hits_total counter\nkv_cache_hits_total 4.0" in text
    assert "kv_cache_allocated_bytes_total 10.0" in text and "kv_cache_freed_bytes_total 3.0" in text
    with pytest.raises(ValueError):
        CacheMonitor().export(registry)


# ---- the command line ----


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--watch", "http://127.0.0.1:9"], 1, "no metrics from http://127.0.0.1:9"),
        (["--seconds", "0"], 2, "must be above 0"),
        (["--seconds", "5"], 2, "--seconds belongs to --watch"),
        (["--watch", "http://127.0.0.1:9", "--json", "x.json"], 2, "--json and --plot belong to the workloads"),
        (["--watch", "http://127.0.0.1:9", "--plot", "x.png"], 2, "--json and --plot belong to the workloads"),
        (["--model", "/does/not/exist"], 1, "no model '/does/not/exist'"),
        (["--dummy-weights", "gpt-9"], 1, "no shape 'gpt-9'"),
        (["--device", "cuda"], 1, "no GPU found"),
    ],
)
def test_bad_input_is_one_line(flags, status, message):
    if "cuda" in flags and detect().device == "cuda":
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status and message in done.stderr
    assert status == 2 or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "cannot import name 'KVEventsConfig'"),  # a vLLM from before there were events
        ({"KVEventsConfig": lambda enable_kv_cache_events: None}, "unexpected keyword argument"),
    ],
)
def test_a_vllm_without_events_is_one_line(monkeypatch, tmp_path, config, reason):
    older = ModuleType("vllm.config")
    vars(older).update(config)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.config", older)
    with pytest.raises(CannotRun, match=f"vLLM did not start with KV cache events: .*{reason}") as refusal:
        kv_cache_monitor.monitored_engine({}, str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_the_script_agrees_with_the_real_engine(quick_run):
    """Every comparison with the engine's metrics is made by the script itself, and a difference is an error."""
    done = quick_run("python3", "ch16/kv_cache_monitor.py", "--quick")
    assert done.status == 0, done.err[-3000:]
    tables = done.json["tables"]
    unrelated, shared, overload = tables["workloads"]["rows"]
    assert unrelated["hit_percent"] == 0 and unrelated["checked"] == unrelated["steps"]
    assert shared["hit_percent"] > 80 and shared["checked"] == shared["steps"]
    assert overload["evictions"] > 0 and overload["preemptions"] > 0 and overload["checked"] > 0
    reserved, paged = tables["fits"]["rows"]
    assert paged["fit"] > 10 * reserved["fit"]
