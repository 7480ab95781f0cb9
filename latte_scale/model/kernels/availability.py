"""Whether Triton's kernels can run here. Checks without importing Triton."""

import importlib.util
import os

import torch


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run with this device, as a message; None if they can."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on NVIDIA GPUs only (and, to be tested, on a CPU with TRITON_INTERPRET=1 in the environment)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; it comes with a CUDA build of torch"
    return None
