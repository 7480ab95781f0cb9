"""Diffusion as pure functions: `schedule` (tables), `loss` (epsilon, v, flow), `contrastive`, `sampler`.

The model is a callable, and noise and timesteps are arguments: every formula is tested in closed form.
"""
