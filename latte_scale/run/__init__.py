"""One attempt of a run: its folder and who may write there, what it writes each step, and what ends it.

`folder` and `lease` are the run folder and the right to write into it, `facts` records how the run was started;
`journal` makes the lines of `metrics.jsonl` from what `readback` and `throughput` give it, `metrics` keeps them, and
`tracking` copies them to wandb and TensorBoard; `profile` traces some steps; `stopping` listens for requests to save
and stop, and `watchdog` ends a process that hangs. Nothing is imported here: scripts ask `python -m latte_scale.run`
for a folder's name, which must not take the time of importing torch.
"""
