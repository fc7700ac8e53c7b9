"""What `ch16/moe_benchmark.py` is made of: experts and kernels, routing patterns, ranks, planner, tables, pictures."""
