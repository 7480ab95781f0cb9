"""Validation during training: the loss on held-out samples, and videos for fixed prompts.

`settings` is the section of the config, `heldout` the loss, `prompts` the videos, and `validator` the object that the
train loop calls. Training is unaffected: no random number, weight or moment differs from those of a run without it.
"""
