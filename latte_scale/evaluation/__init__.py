"""Scores of sampled videos. `evaluate.py` at the root is the command; this is what it is made of.

shapes and videos need no network: moving shapes against their prompts, and PSNR. The rest goes one way: clips (a folder
or shards -> uint8 windows) -> networks (files the user names) -> features (over the ranks, real ones cached) -> scores
(arithmetic in fp64) -> bootstrap (how far a score would move with other clips). metrics ties them together.
"""
