"""One attempt of a run: its folder and who holds it, what it writes there each step, and what ends it.

`folder` and `lease` are the run folder and the right to write into it, `facts` says how the run was made; `journal` and
`metrics` make the lines of `metrics.jsonl`, which `tracking` copies to wandb and TensorBoard; `stopping` hears whoever
asks for an orderly stop and `watchdog` ends what hangs. Nothing is imported here: scripts ask `python -m
latte_scale.run` for a folder's name, and that must not take the time of importing torch.
"""
