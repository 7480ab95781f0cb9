"""`latte-scale bench VERB`: how fast a config runs on this machine. Each verb is a module with its own manual.

`step` measures optimizer steps: of the `subjects` (this project and its rivals) on synthetic micro-batches, in
`turns`, with a time `budget` by kind of kernel, the device's own `ceiling`, and a `table` of it all. `kernels`
measures back ends, `loader` a config's data, `checkpoint` saves and resumes.
"""

import sys
from collections.abc import Sequence

from latte_scale.arguments import run_verb

VERBS = {  # verb -> (module:function, what it does)
    "step": ("latte_scale.bench.step:main", "optimizer steps on synthetic latents, beside diffusers or plain PyTorch"),
    "kernels": (
        "latte_scale.bench.kernels:main",
        "every way to compute attention, norm and gate at a config's shapes",
    ),
    "loader": ("latte_scale.bench.loader:main", "the config's own data through its loader, without training"),
    "checkpoint": ("latte_scale.bench.checkpoint:main", "stall of a save and time of a resume, beside torch.save, DCP"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb."""
    return run_verb("latte-scale bench", VERBS, sys.argv[1:] if argv is None else argv)
