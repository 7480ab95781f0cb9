"""Triton kernels: `norm` (modulated norm, gated residual) and `small_attention`, each with its kernels in *_triton.

Chosen by measurement (latte_scale/choices) where `availability` finds that they can run; eager torch defines what they
compute, and tests hold them to it in fp32 and fp64.
"""
