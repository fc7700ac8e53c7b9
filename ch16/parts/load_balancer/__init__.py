"""What load_balancer.py is made of besides its policies: the gateway with breaker and checks, and the lab."""
