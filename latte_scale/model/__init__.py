"""Latte as plain modules: no collective, no engine and no data set is known here.

`latte` (shaped by `latte_settings`) and `latte_t2v` are made of `blocks`, these of `layers` and `attention`; `inputs`
checks what they are called with and `build` goes from settings to a model. Who computes is told to a model before it is
compiled: softmax by `attention_backends`, norm and gate by `norm_backends` (`kernels` are Triton's), linear layers in 8
bits by `fp8`. `flops` counts. `transformer_folder`, `official` and `official_images` read and write published weights.
"""
