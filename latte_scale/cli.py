"""`latte-scale VERB ...`: one door to every entry point. Each verb's module is imported only when it is called."""

import sys
from importlib.metadata import version

from latte_scale.arguments import run_verb
from latte_scale.broken_pipe import until_reader_leaves

VERBS = {  # verb -> (module:function, what it does)
    "quickstart": ("latte_scale.quickstart:main", "clips to a sampled video and a report, on this machine"),
    "estimate": ("latte_scale.estimate.command:main", "memory, time and cost of a run, before it is launched"),
    "coverage": ("latte_scale.coverage:main", "what a run would see of its data: clips used and left over"),
    "keys": ("latte_scale.keys:main", "every setting of a run: type, default, meaning"),
    "train": ("latte_scale.train:command", "train, or go on where the run stopped"),
    "doctor": ("latte_scale.doctor.command:command", "look at machine, network, data and disks before a launch"),
    "sample": ("latte_scale.sample:main", "videos for prompts or classes, from a run or a folder of weights"),
    "evaluate": ("latte_scale.evaluate:main", "score sampled videos"),
    "serve": ("latte_scale.serve:main", "a page in the browser: prompt in, video out"),
    "report": ("latte_scale.report:main", "one HTML page about a run"),
    "import": ("latte_scale.import_weights:main", "read released weights into a folder that model.init takes"),
    "export": ("latte_scale.export:main", "write a folder that diffusers' LattePipeline loads, or an official .pt"),
    "ckpt": ("latte_scale.ckpt:main", "list, verify, compare and convert checkpoints"),
    "bench": ("latte_scale.bench:main", "how fast steps run here, beside diffusers or plain PyTorch, and why"),
    "table": ("latte_scale.table:main", "parameters and FLOPs of every size and variant"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb, as long as somebody reads its output (`| head`), and return its exit code.

    Each verb's manual says what its codes mean; 2 is a verb that there is not, 130 is Ctrl-C.
    """
    return until_reader_leaves(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    """`main` with its arguments."""
    if argv[:1] == ["--version"]:
        print(f"latte-scale {version('latte_scale')}")
        return 0
    try:
        return run_verb("latte-scale", VERBS, argv, "Data sets are made by the other command, latte-data.")
    except KeyboardInterrupt:
        print(f"latte-scale {argv[0]}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
