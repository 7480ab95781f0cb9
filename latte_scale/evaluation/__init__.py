"""Scores of sampled videos, for the command `evaluate.py`.

`shapes` (moving shapes against their prompts) and `videos` (PSNR) need no network. The other scores are a pipeline:
`clips` (a folder or shards -> uint8 windows), `networks` (files that the user names), `features` (distributed over the
ranks; real ones are cached), `scores` (in fp64), `bootstrap` (confidence intervals). `metrics` runs it.
"""
