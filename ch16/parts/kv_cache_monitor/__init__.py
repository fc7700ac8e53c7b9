"""The pieces of `ch16/kv_cache_monitor.py`: the engine's events, its ledger of blocks, workloads, a live view."""
