"""latte_scale: training Latte, the latent diffusion Transformer for text-to-video, on any number of ranks.

`train.py` is the loop; one batch walked through it is in CONTRIBUTING.md. Nothing is imported here, so that a command
answers `--help` without torch.
"""
