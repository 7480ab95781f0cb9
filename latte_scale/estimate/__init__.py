"""What a run will need and cost, before it is launched: memory by part, time of a step, traffic, GPU-hours.

`hardware` holds what devices and links can do, with sources; `activations` counts what autograd keeps by running a few
of the model's own blocks on fake tensors; `memory`, `traffic` and `timing` put the parts together; `advice` compares
settings and puts a remedy into words, for the command and for a training that ran out of memory; `command` prints.
"""
