"""What load_test.py is made of: vLLM's measuring code as a function, workloads, traces."""
