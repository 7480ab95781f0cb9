"""Ways to spread a step over ranks beside cutting the batch: a clip over several ranks (sequence.py)."""
