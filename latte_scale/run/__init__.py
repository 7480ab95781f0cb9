"""One attempt of a run: its folder and lease, what it logs per step, and what ends it.

`folder` and `lease` are the run folder and the right to write to it, `claim` is the right to save to checkpoint.dir;
`facts` records how the run was started. `journal` makes the lines of `metrics.jsonl` from `readback` and `throughput`,
`metrics` stores them, and `tracking` copies them to wandb and TensorBoard. `profile` traces some steps. `stopping`
listens for requests to save and stop, and `watchdog` ends a hanging process. This module imports nothing, because
scripts ask `python -m latte_scale.run` for a folder's name and must not wait for torch to be imported.
"""
