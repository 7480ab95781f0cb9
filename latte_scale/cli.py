"""`latte-scale VERB ...`: one door to every entry point. Each verb's module is imported only when it is called."""

import importlib
import sys

VERBS = {
    "quickstart": ("latte_scale.quickstart", "clips to a sampled video and a report, on this machine"),
    "train": ("latte_scale.train", "train, or go on where the run stopped"),
    "sample": ("latte_scale.sample", "videos for prompts, from a checkpoint or a diffusers folder"),
    "evaluate": ("latte_scale.evaluate", "score sampled videos"),
    "report": ("latte_scale.report", "one HTML page about a run"),
    "import": ("latte_scale.export", "read released weights into a folder that model.init takes"),
    "export": ("latte_scale.export", "write a folder that diffusers' LattePipeline loads"),
    "ckpt": ("latte_scale.ckpt", "list and verify checkpoints"),
}


def usage() -> str:
    """The help text: one line a verb."""
    lines = ["usage: latte-scale VERB [options]     (latte-scale VERB --help for its options)", ""]
    lines += [f"  {verb:<12}{what}" for verb, (_, what) in VERBS.items()]
    return "\n".join([*lines, "", "Data sets are made by the other command, latte-data."])


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a user's mistake is one line on stderr and exit code 78 (train) or 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        print(f"latte-scale: no verb {verb!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module = importlib.import_module(VERBS[verb][0])
    entry = module.import_main if verb == "import" else module.main
    return entry(rest)


if __name__ == "__main__":
    sys.exit(main())
