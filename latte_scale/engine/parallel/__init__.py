"""Ways to spread a step over ranks: clips over a group (sequence.py), copies of the sharded weights (mesh.py)."""
