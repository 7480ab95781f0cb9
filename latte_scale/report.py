"""One self-contained HTML page about runs: `latte-scale report runs/NAME [runs/OTHER ...] --out page.html`.

    latte-scale report runs/t2v_256 --samples samples --scores scores.json --out report.html
    latte-scale report runs/ablation-a runs/ablation-b --out both.html

In: run folders with metrics.jsonl and, if present, config.yaml, facts.json, exit.json, validation.jsonl, samples/,
evaluation/ and logs/restarts.jsonl; optionally a folder of sampled videos with prompts.jsonl, and files written by
`latte-scale evaluate`. Out: a page that needs no network and no other file; script and videos are embedded. Several
runs are shown side by side.
"""

import argparse
import sys

from latte_scale.arguments import disk_path, output_file, verb_parser
from latte_scale.atomic import write_text
from latte_scale.reporting.page import render
from latte_scale.reporting.runs import read_evaluation, read_runs


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = verb_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", required=True, type=output_file, help="the HTML page to write")
    parser.add_argument("--samples", type=disk_path, help="folder of videos with prompts.jsonl (latte-scale sample)")
    parser.add_argument(
        "--scores",
        type=disk_path,
        action="append",
        default=[],
        help="file written by latte-scale evaluate; repeatable",
    )
    parser.add_argument("--title", default="latte_scale run", help="title of the page")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Read, render, write. Raises ValueError or OSError naming the invalid folder."""
    for path in args.scores:
        if not path.is_file():
            raise ValueError(f"--scores {path}: expected a file that `latte-scale evaluate` wrote; there is none")
    if args.samples is not None and not (args.samples / "prompts.jsonl").is_file():
        raise ValueError(
            f"--samples {args.samples}: expected a folder with prompts.jsonl, as `latte-scale sample` writes"
        )
    evaluations = [read_evaluation(path) for path in args.scores]
    page = render(read_runs(args.runs), args.title, args.samples, evaluations)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.out, page)
    print(f"wrote {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Write the page; exit code 2 and one line if a folder is invalid."""
    args = parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
