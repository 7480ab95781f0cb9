"""Sampling, whoever asks: the `sample` command, the demo, or validation inside training.

`requests` says what is asked for, `loading` brings a model and its encoders together, `latents` walks from noise to
latents, and `videos` writes them as files; `temporal_decoder` is an optional decoder.
"""
