"""latte_scale: training Latte, the latent diffusion Transformer for text-to-video, on any number of ranks.

`train.py` is the training loop; CONTRIBUTING.md follows one batch through it. This module imports nothing, so that
`--help` needs no torch.
"""
