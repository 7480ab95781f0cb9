"""Score sampled videos.

    latte-scale evaluate --metrics fvd,clip --real shards --fake samples --out scores.json

In: --fake, a folder of videos (with `prompts.jsonl`, as `latte-scale sample` writes it) or shards; --real, a folder of
videos or shards; either may be in s3://. Out: a JSON file with one number per metric and, under "metrics", its 95 %
confidence interval, counts, frame policy and the sha256 of the network. On several GPUs, run `torchrun --nproc_per_node
8 -m latte_scale.evaluate ...`; the scores do not depend on their number.

fvd, fid and kid compare with real clips. is, clip (frames with their prompt) and clip_consistency (consecutive frames)
need only the samples. Their networks are files, named by --i3d, --inception, --clip or in their default place; if one
is missing, the command says what to fetch and where to put it. Features of real clips are cached in $LATTE_CACHE.
shapes checks whether moving shapes follow their prompts (--real: the clips with shapes.json). psnr compares overfitted
videos with their clips. Neither needs a network.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from latte_scale.arguments import output_file, verb_parser
from latte_scale.engine.dist import Ranks, init_distributed, shutdown
from latte_scale.evaluation.clips import open_clips
from latte_scale.evaluation.metrics import NEEDS_REAL, NETWORK_OF, Protocol, Scorer, Show
from latte_scale.evaluation.networks import TO_FETCH
from latte_scale.evaluation.shapes import score_shapes
from latte_scale.evaluation.videos import score_psnr
from latte_scale.plain_json import write_json

FOLDER_METRICS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"shapes": score_shapes, "psnr": score_psnr}
METRICS = (*FOLDER_METRICS, *NETWORK_OF)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = verb_parser("evaluate", __doc__)
    default = Protocol()
    parser.add_argument("--metrics", default="shapes", help=f"comma-separated list of: {', '.join(METRICS)}")
    parser.add_argument("--real", help="real clips: a folder, or shards with pixels")
    parser.add_argument("--fake", required=True, help="sampled videos: a folder, or shards with pixels")
    parser.add_argument("--out", required=True, type=output_file, help="JSON file for the scores")
    for name, (usual, _) in TO_FETCH.items():
        parser.add_argument(
            f"--{name}", help=f"the {name} network: path or URL (default: networks/{usual} in the cache)"
        )
    parser.add_argument("--frames", type=int, help="frames per clip (default: as the samples, else 16)")
    parser.add_argument("--frame-interval", type=int, help="of the real clips (default: as the samples, else 3)")
    parser.add_argument("--size", type=int, help="side in pixels (default: that of the first sampled clip)")
    parser.add_argument("--num-clips", type=int, default=default.num_clips, help="clips per set")
    parser.add_argument(
        "--resamples", type=int, default=default.num_resamples, help="bootstrap resamples for the intervals; 0: none"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="of the choice of clips, windows and resamples")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help="clips embedded at a time")
    return parser.parse_args(argv)


def metric_names(text: str) -> list[str]:
    """The requested metrics. Raises ValueError for an unknown one."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise ValueError(f"no metric {name!r}; expected one of {', '.join(METRICS)}")
    return names


def score_with_networks(args: argparse.Namespace, names: list[str], ranks: Ranks, show: Show) -> dict[str, Any]:
    """The scores of the metrics that use a network. A collective."""
    protocol = Protocol(
        args.frames, args.frame_interval, args.size, args.num_clips, args.resamples, args.seed, args.batch_size
    )
    real = open_clips(args.real) if args.real and set(names) & set(NEEDS_REAL) else None
    scorer = Scorer(
        real, open_clips(args.fake), {name: getattr(args, name) for name in TO_FETCH}, protocol, ranks, show
    )
    for name in names:
        scorer.check(name)  # all of them before the first long computation
    records = {name: scorer.score(name) for name in names}
    return {**{name: record["value"] for name, record in records.items()}, "metrics": records}


@contextlib.contextmanager
def progress_bars(visible: bool) -> Iterator[Show]:
    """A callback that shows the progress of each stage as its own bar."""
    from rich.progress import Progress

    with Progress(disable=not visible) as bars:

        def show(what: str) -> Callable[[int, int], None]:
            task = None

            def update(done: int, total: int) -> None:
                nonlocal task
                task = bars.add_task(what) if task is None else task
                bars.update(task, completed=done, total=total)

            return update

        yield show


def run(args: argparse.Namespace) -> int:
    """Compute every metric and write the scores. Raises ValueError with what to do."""
    names = metric_names(args.metrics)
    in_folders = [name for name in names if name in FOLDER_METRICS]
    with_networks = [name for name in names if name not in FOLDER_METRICS]
    if in_folders and args.real is None:
        raise ValueError(f"{in_folders[0]} compares with the clips: pass --real FOLDER")
    scores: dict[str, Any] = {}
    ranks = init_distributed()
    try:
        if ranks.rank == 0:
            for name in in_folders:
                found = FOLDER_METRICS[name](Path(args.real), Path(args.fake))
                clips = zip(scores.get("clips", found["clips"]), found["clips"], strict=True)  # lines of prompts.jsonl
                scores |= found | {"clips": [before | now for before, now in clips]}
        if with_networks:
            with progress_bars(ranks.rank == 0) as show:
                scores |= score_with_networks(args, with_networks, ranks, show)
    finally:
        shutdown()
    if ranks.rank == 0:
        write_json(args.out, scores)
        print("  ".join(f"{key} {value:.4g}" for key, value in scores.items() if isinstance(value, int | float)))
        for name, record in scores.get("metrics", {}).items():
            if record["low"] is not None:
                print(f"  {name}: {record['level']:.0%} between {record['low']:.4g} and {record['high']:.4g}")
            elif record["num_resamples"] > 1:
                print(f"  {name}: no interval, too few clips: a resample has no score")
        print(f"scores: {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; a user error is one line on stderr and exit code 2."""
    try:
        return run(parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
