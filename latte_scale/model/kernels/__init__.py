"""Triton kernels: `residual` (gated residual, modulated norm) and `small_attention`, each with its kernels in *_triton.

latte_scale/choices selects them by measurement where `availability` finds that they can run. Eager torch is the
reference; tests compare with it in fp32 and fp64.
"""
