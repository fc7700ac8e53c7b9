import pytest

from ch16.parts.kv_cache_monitor.tables import bytes_rows
from common.models import SHAPES, Model


def test_bytes():
    rows = bytes_rows(Model("p", "tiny-llama", SHAPES["tiny-llama"]))
    llama = next(row for row in rows if row["model"] == "llama-3-8b" and row["dtype"] == "bfloat16")
    assert llama["kb_per_token"] == pytest.approx(2 * 32 * 8 * 128 * 2 / 1e3)  # 131 kB, as published
    assert llama["gb_at_4k"] == pytest.approx(4096 * llama["kb_per_token"] / 1e6)
