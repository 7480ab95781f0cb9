"""What a run will need and cost, before it is launched: memory by part, time of a step, traffic, GPU-hours.

`hardware` holds what devices and links can do, with sources. `buckets` splits a config of several clip sizes into one
config for each. `recording` logs what a few of the model's own blocks allocate on fake tensors, `activations` extends
that log to the whole model, and `memory` replays it together with what the engine does with the `weights` (`ledger`,
`zero`, `zero3`). `traffic` and `timing` say how long a step takes. `estimate` puts memory and time of a config
together; `budget` chooses how much is checkpointed so that a config fits a memory, `advice` compares settings and words
remedies, for the command and for a training run that ran out of memory; `command` prints.
"""
