"""Diffusion as pure functions: `schedule` (tables), `loss` (epsilon, v, flow), `contrastive`, `sampler`.

The model is a callable, and noise and timesteps are arguments, so every formula can be tested in closed form.
"""
