"""The rooms of autoscaling.py: the autoscaler, replicas, the fleet, traffic, the search, the manifest."""
