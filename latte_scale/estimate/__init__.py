"""What a run will need and cost, before it is launched: memory by part, time of a step, traffic, GPU-hours.

`hardware` holds what devices and links can do, with sources. `buckets` makes a config of one size of each of several.
`recording` writes down what a few of the model's own blocks allocate on fake tensors, `activations` makes the log of
the whole model of it, and `memory` replays that with what the engines allocate beside it (`ledger`, `zero`, `zero3`).
`traffic` and `timing` say how long a step takes. `choice` is a config with both; `budget` fits what blocks keep into a
memory, `advice` compares settings and puts a remedy into words, for the command and for a training that ran out of
memory; `command` prints.
"""
