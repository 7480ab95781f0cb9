"""Latte as plain PyTorch modules, independent of collectives, engines and data sets.

`latte` (configured by `latte_settings`) and `latte_t2v` are built from `blocks`, and these from `residual`, `layers`
and `attention`. `inputs` checks their arguments; `build` makes a model from settings. Back ends are set in a model
before it is compiled: `attention_backends` for attention, `residual` for norm and gate (`kernels` has those in Triton),
`fp8` for linear layers. `flops` counts FLOPs. `transformer_folder`, `official` and `official_images` read and write
published weights.
"""
