"""Validation during training: the loss on held-out samples, and videos for fixed prompts.

`settings` is the config section, `heldout` computes the loss, `prompts` the videos, and the train loop calls
`validator`. Training is unaffected: every random number, weight and moment is the same as in a run without validation.
"""
