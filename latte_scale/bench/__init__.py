"""`latte-scale bench VERB`: how fast a config runs on this machine. Each verb is a module with its own manual.

`step` measures optimizer steps: of the `subjects` (this project and its rivals) on synthetic micro-batches, in
`turns`, with a time `budget` by kind of kernel, the device's own `ceiling`, and a `table` of it all. `kernels`
measures back ends, `loader` a config's data, `checkpoint` saves and resumes.
"""

import importlib
import sys
from collections.abc import Sequence

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
    """Run one verb; a wrong one is answered on stderr with code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    usage = "\n".join(
        ["usage: latte-scale bench VERB [options]", "", *(f"  {v:<12}{w}" for v, (_, w) in VERBS.items())]
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    verb, *rest = argv
    if verb not in VERBS:
        print(f"latte-scale bench: no verb {verb!r}\n\n{usage}", file=sys.stderr)
        return 2
    module, function = VERBS[verb][0].split(":")
    return getattr(importlib.import_module(module), function)(rest)
