"""Where the time of a step goes: matrix products, attention, norms and modulation, optimizer, EMA, the rest.

In: a subject and its measured phases. Out: seconds by category that add up to the step. The decision worth knowing:
optimizer and EMA are timed as phases of the real step, and the profiler only splits forward and backward, in proportion
to the recorded kernels (on a CPU: operators), because a step under the profiler is slower than one without it. Time in
which no kernel runs is `idle`: the device waits for the host.
"""

import json
import re
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from latte_scale.bench.subjects import Subject

# First match wins. Kernel names on a GPU: nvjet, cutlass, xmma and ampere_bf16_s16816gemm are cuBLAS; fmha and
# pytorch_flash the SDPA kernels; residual_* are model/kernels/residual_triton.py.
CATEGORIES = {
    "communication": r"^nccl",
    "attention": r"flash|fmha|attention|attn|softmax|sdpa",
    "gemm": r"gemm|nvjet|cutlass|xmma|cublas|wgmma|addmm|scaled_mm|::mm\b|::bmm\b|::linear\b|mkldnn|conv",
    "norm_modulate": r"layer_?norm|welford|rms_norm|^residual_",
    "memory": r"memcpy|memset|copy|transpose|::cat\b|contiguous|CatArray",
}
# Kernels that torch.compile generates for the operations between matrix products and attention. Their names list the
# fused operators, and also neighbours that they do not compute (addmm, scaled_dot_product_attention).
FUSED = r"^triton_(poi|red|per)_"
MOVED = r"^triton_poi_fused_((_to_copy|_unsafe_view|cat|clone|expand|permute|transpose|unsqueeze|view)_)+\d+$"
NUM_NAMED = 12  # kernels listed by name under "top"


def category_of(name: str) -> str:
    """The category of a kernel or an operator by its name; "elementwise" if none is known."""
    if re.search(FUSED, name):
        moved = "memory" if re.search(MOVED, name) else "elementwise"
        return "norm_modulate" if "layer_norm" in name else moved
    for category, pattern in CATEGORIES.items():
        if re.search(pattern, name, re.IGNORECASE):
            return category
    return "elementwise"


def budget(subject: Subject, phases: dict[str, float], device: torch.device) -> dict:
    """Seconds by category, fractions of the step, and the costliest kernels, of one profiled forward and backward.

    `phases`: forward_backward_s, update_s and average_s as turns.py measured them. The subject's gradients are
    cleared by an update, which is not measured.
    """
    times_s, wall_s = profiled(subject, device)
    subject.update()
    by_category: Counter[str] = Counter()
    for name, seconds in times_s.items():
        by_category[category_of(name)] += seconds
    busy_s = sum(by_category.values())
    by_category["idle"] = max(0.0, wall_s - busy_s)
    scale = phases["forward_backward_s"] / max(wall_s, busy_s)
    seconds = {name: value * scale for name, value in by_category.items()}
    seconds |= {"optimizer": phases["update_s"], "ema": phases["average_s"]}
    total_s = sum(seconds.values())
    return {
        "seconds": seconds,
        "shares": {name: value / total_s for name, value in seconds.items()},
        "top": [[name, value * scale] for name, value in times_s.most_common(NUM_NAMED)],
    }


def profiled(subject: Subject, device: torch.device) -> tuple[Counter[str], float]:
    """Seconds by kernel (operator) name of one forward and backward, and the seconds from the first to the last."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        subject.forward_backward()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    spans = sorted(
        (event["ts"], -event["dur"], event["tid"], event["name"]) for event in events if event.get("cat") in kinds
    )
    times_s = self_times(spans)
    wall_us = max(ts - dur for ts, dur, *_ in spans) - spans[0][0]
    return times_s, wall_us / 1e6


def self_times(spans: list[tuple[float, float, object, str]]) -> Counter[str]:
    """Seconds by name, without nested operators; spans are (start us, -length us, thread, name), sorted."""
    times_us: Counter[str] = Counter()
    open_spans: dict[object, list[tuple[float, str]]] = {}  # thread -> (end, name) of what is running
    for start, minus_length, thread, name in spans:
        stack = open_spans.setdefault(thread, [])
        while stack and stack[-1][0] <= start:
            stack.pop()
        times_us[name] -= minus_length
        if stack:
            times_us[stack[-1][1]] += minus_length
        stack.append((start - minus_length, name))
    return Counter({name: value / 1e6 for name, value in times_us.items()})
