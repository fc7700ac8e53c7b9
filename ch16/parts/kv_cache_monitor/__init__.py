"""What `ch16/kv_cache_monitor.py` is made of: the engine's events and their feed, workloads, tables, a live view."""
