"""Sampling, for the `sample` command, the demo, and validation inside training.

`requests` describes the videos to sample, `loading` loads a model and its encoders, `latents` denoises, and `videos`
writes the files; `temporal_decoder` is an optional decoder.
"""
