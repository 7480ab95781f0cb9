"""`latte-data VERB ...`: the command line that makes data sets. A verb's module is imported only when it is called."""

import argparse
import importlib
import sys
from importlib.metadata import version

from latte_scale.arguments import answer_without_verb
from latte_scale.broken_pipe import until_reader_leaves

VERBS = {
    "shapes": "generate short captioned clips of moving shapes, to train on a laptop",
    "shard": "captioned clips -> tar shards with indices and a manifest",
    "index": "add indices and a manifest to tars or MDS shards of another tool",
    "verify": "reread a data set and verify every checksum",
    "stats": "show distributions of a data set, as a page with plots",
    "preview": "write a page of playable clips with their captions",
    "encode": "shards of clips -> shards of VAE latents and text embeddings",
    "convert": "tar shards -> MDS shards of mosaicml-streaming, or back",
}
MORE = "Order: shapes (or your own clips), shard (or index), encode.\nSee data_tools/README.md."
WRONG_INPUT = 2  # exit code for invalid input; a verb returns 1 when nothing at all could be done


def main(argv: list[str] | None = None) -> int:
    """Run one verb; it stops when its output is closed (`| head`).

    Invalid input (ValueError, OSError) gives one message on stderr and exit code 2.
    """
    return until_reader_leaves(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    """`main` with its arguments."""
    if argv[:1] == ["--version"]:
        print(f"latte-data {version('latte_scale')}")
        return 0
    code = answer_without_verb("latte-data", VERBS, argv, MORE)
    if code is not None:
        return code
    verb, *rest = argv
    try:
        module = importlib.import_module(f"data_tools.{verb}")
        parser = argparse.ArgumentParser(
            prog=f"latte-data {verb}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        return module.main(parser.parse_args(rest))
    except (ValueError, OSError) as error:
        print(f"latte-data {verb}: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print(f"latte-data {verb}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
