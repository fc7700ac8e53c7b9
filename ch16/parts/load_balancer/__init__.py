"""What load_balancer.py is made of, beside its policies: the gateway, its breaker and checks, and the lab."""
