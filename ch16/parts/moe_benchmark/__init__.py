"""What `ch16/moe_benchmark.py` is made of: experts and their dispatch, routing patterns, ranks, and the planner."""
