"""Predicts what a run needs and costs before the launch: memory by part, step time, communication, GPU-hours.

`hardware` has the specifications of devices and links, with sources. `buckets` splits a config of several clip sizes
into one config per size. `recording` logs what a few of the model's own blocks allocate on fake tensors. `activations`
extends that log to the whole model, and `memory` replays it with what the engine does with the `weights` (`ledger`,
`zero`, `zero3`). `traffic` and `timing` predict the step time. `estimate` combines memory and time of a config.
`budget` chooses the activation checkpointing that fits a memory budget. `advice` compares settings and suggests
remedies, for the command and for a training run that ran out of memory. `command` prints.
"""
