"""Parallelism within a step: clips split over groups of ranks (sequence.py), replicas of sharded weights (mesh.py)."""
