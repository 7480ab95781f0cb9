"""Latte as plain modules: no collective, no engine and no data set is known here.

`latte` (shaped by `latte_settings`) and `latte_t2v` are made of `blocks`, these of `layers` and `attention`; `inputs`
checks their arguments and `build` goes from settings to a model. What computes is set in a model before it is compiled:
attention by `attention_backends`, norm and gate by `norm_backends` (`kernels` are Triton's), linear layers in 8 bits by
`fp8`. `flops` counts. `transformer_folder`, `official` and `official_images` read and write published weights.
"""
