"""`latte-scale bench VERB`: how fast a config runs on this machine. Each verb is a module with its own --help.

`step` measures optimizer steps of the `subjects` (this project and its baselines) on synthetic micro-batches, in
alternating `turns`. It adds a time `budget` by kind of kernel, the device's `ceiling`, and a `table` of the results.
`kernels` measures back ends, `loader` the loading of a config's data, `checkpoint` saves and resumes.
"""

import sys
from collections.abc import Sequence

from latte_scale.arguments import run_verb

VERBS = {  # verb -> (module:function, what it does)
    "step": ("latte_scale.bench.step:main", "optimizer steps on synthetic latents, against diffusers or plain PyTorch"),
    "kernels": (
        "latte_scale.bench.kernels:main",
        "every back end of attention, norms, gates and linear layers, at a config's shapes",
    ),
    "loader": ("latte_scale.bench.loader:main", "loader throughput on the config's own data, without training"),
    "checkpoint": ("latte_scale.bench.checkpoint:main", "stall of a save, time of a resume; against torch.save, DCP"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb."""
    return run_verb("latte-scale bench", VERBS, sys.argv[1:] if argv is None else argv)
