"""Parts of continuous_batching.py: sizes, workload, bounds, the prefill engine, tables, claims, the picture."""
