"""`latte-scale VERB ...`: the command line of every entry point. A verb's module is imported only when it is called."""

import sys
from importlib.metadata import version

from latte_scale.arguments import run_verb
from latte_scale.broken_pipe import until_reader_leaves

VERBS = {  # verb -> (module:function, what it does)
    "quickstart": ("latte_scale.quickstart:main", "run the whole path, from clips to sampled videos and a report"),
    "estimate": ("latte_scale.estimate.command:main", "predict memory, time and cost of a run before the launch"),
    "coverage": ("latte_scale.coverage:main", "count which clips a run would use and leave over"),
    "keys": ("latte_scale.keys:main", "list every setting: type, default, meaning"),
    "train": ("latte_scale.train:command", "train, or resume a run"),
    "doctor": ("latte_scale.doctor.command:command", "check machine, network, data and disks before a launch"),
    "sample": ("latte_scale.sample:main", "generate videos for prompts or classes, from a run or a folder of weights"),
    "evaluate": ("latte_scale.evaluate:main", "score sampled videos"),
    "serve": ("latte_scale.serve:main", "serve a demo web page: prompt in, video out"),
    "report": ("latte_scale.report:main", "write one HTML page about a run"),
    "import": ("latte_scale.import_weights:main", "convert released weights to a folder that model.init takes"),
    "export": ("latte_scale.export:main", "write a folder that diffusers' LattePipeline loads, or an official .pt"),
    "ckpt": ("latte_scale.ckpt:main", "list, verify, compare and convert checkpoints"),
    "bench": ("latte_scale.bench:main", "measure steps, kernels, loader and checkpoints on this machine"),
    "table": ("latte_scale.table:main", "list parameters and FLOPs of every size and variant"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb, until the reader of its output is gone (`| head`), and return its exit code.

    Each verb's --help explains its codes; 2 is an unknown verb, 130 is Ctrl-C.
    """
    return until_reader_leaves(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    """`main` with its arguments."""
    if argv[:1] == ["--version"]:
        print(f"latte-scale {version('latte_scale')}")
        return 0
    try:
        return run_verb("latte-scale", VERBS, argv, "Data sets are made by a separate command, latte-data.")
    except KeyboardInterrupt:
        print(f"latte-scale {argv[0]}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
