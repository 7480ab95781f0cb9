"""One self-contained HTML page about a run: `latte-scale report runs/NAME --samples DIR --out page.html`.

In: run folders (config.yaml, metrics.jsonl, logs/restarts.jsonl) and, if given, a folder of sampled videos with
prompts.jsonl and a scores.json. Out: a page that needs no network: charts are inline SVG, videos are embedded.
"""

import argparse
import base64
import html
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latte_scale.run.metrics import read_metrics

COLOURS = ("#2f6fde", "#d9622b", "#2e9e6b", "#8a4fbf", "#b58900", "#c2347b")
CHARTS = (  # metrics.jsonl key, title, log scale
    ("loss", "Loss", True),
    ("grad_norm", "Gradient norm", True),
    ("samples_per_s", "Samples per second", False),
    ("data_wait_share", "Share of time spent waiting for data", False),
)

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mute: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
.clips { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .6rem; overflow: hidden; }
figcaption { font-size: .85rem; color: var(--mute); overflow-wrap: anywhere; }
video, img { width: 100%; image-rendering: pixelated; border-radius: 4px; background: #000; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--mute); }
table { border-collapse: collapse; } 
td, th { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
pre { overflow-x: auto; font-size: .8rem; border: 1px solid var(--line); border-radius: 8px; padding: .6rem; }
.pair { display: flex; gap: .4rem; } .pair > * { flex: 1; min-width: 0; } 
.ok { color: #2e9e6b; } .no { color: #d9462b; }
"""


@dataclass(frozen=True)
class Run:
    """What a page shows of one run folder."""

    name: str
    config: str
    metrics: list[dict[str, Any]]
    restarts: list[dict[str, Any]]
    rewound: list[dict[str, Any]]
    exit: dict[str, Any]


def read_run(path: str | Path) -> Run:
    """Read a run folder; ValueError if it holds no metrics."""
    path = Path(path)
    metrics = read_metrics(path / "metrics.jsonl")
    if not metrics:
        raise ValueError(f"{path}: expected a run folder with metrics.jsonl; it has none, has the run logged a step?")
    exit_path = path / "exit.json"
    return Run(
        name=path.name,
        config=(path / "config.yaml").read_text() if (path / "config.yaml").exists() else "",
        metrics=metrics,
        restarts=read_metrics(path / "logs" / "restarts.jsonl"),
        rewound=read_metrics(path / "logs" / "rewound.jsonl"),
        exit=json.loads(exit_path.read_text()) if exit_path.exists() else {},
    )


def line_chart(title: str, series: dict[str, list[tuple[float, float]]], marks: Iterable[float], log_y: bool) -> str:
    """An SVG line chart: series by name as (x, y) points, vertical dashed lines at `marks`."""
    import math

    width, height, left, top, bottom = 460, 240, 56, 14, 28
    points = [point for line in series.values() for point in line if not log_y or point[1] > 0]
    if not points:
        return ""
    xs = [x for x, _ in points]
    ys = [math.log10(y) if log_y else y for _, y in points]
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = (min(ys), max(ys)) if log_y else (min(0.0, *ys), max(ys))
    y1 = y1 if y1 > y0 else y0 + 1

    def place(x: float, y: float) -> str:
        y = math.log10(y) if log_y else y
        px = left + (x - x0) / (x1 - x0) * (width - left - 10)
        return f"{px:.1f},{height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom):.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        py = height - bottom - i / 4 * (height - top - bottom)
        label = f"{10**y:.3g}" if log_y else f"{y:.3g}"
        parts.append(f'<line x1="{left}" x2="{width - 10}" y1="{py:.1f}" y2="{py:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{label}</text>')
        x = x0 + (x1 - x0) * i / 4
        px = left + i / 4 * (width - left - 10)
        parts.append(f'<text x="{px:.1f}" y="{height - 8}" text-anchor="middle">{x:.0f}</text>')
    for mark in marks:
        px = place(mark, 10**y0 if log_y else y0).split(",")[0]
        parts.append(
            f'<line x1="{px}" x2="{px}" y1="{top}" y2="{height - bottom}" stroke="#d9462b" '
            f'stroke-dasharray="4 3"><title>resumed at step {mark:.0f}</title></line>'
        )
    for colour, (name, line) in zip(COLOURS, series.items(), strict=False):
        path = " ".join(place(x, y) for x, y in line if not log_y or y > 0)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6">'
            f"<title>{html.escape(name)}</title></polyline>"
        )
    return "".join([*parts, "</svg>"])


def _charts(runs: Sequence[Run]) -> str:
    marks = [restart["step"] for run in runs for restart in run.restarts]
    figures = []
    for key, title, log_y in CHARTS:
        series = {run.name: [(r["step"], r[key]) for r in run.metrics if r.get(key) is not None] for run in runs}
        chart = line_chart(title, series, marks, log_y)
        if chart:
            figures.append(f"<figure>{chart}<figcaption>{title} over steps</figcaption></figure>")
    legend = " ".join(
        f'<span style="color:{c}">&#9644; {html.escape(run.name)}</span>' for c, run in zip(COLOURS, runs, strict=False)
    )
    return f'<p>{legend}</p><div class="grid">{"".join(figures)}</div>'


def replay_verdict(run: Run) -> str:
    """What became of the steps that were run twice: were the second losses, bit for bit, the first ones?"""
    first = {record["step"]: record["loss"] for record in run.rewound}
    second = {record["step"]: record["loss"] for record in run.metrics}
    both = sorted(first.keys() & second.keys())
    if not both:
        return "no logged step was run twice"
    equal = sum(first[step] == second[step] for step in both)
    return (
        f"steps {both[0]} to {both[-1]} were run twice ({len(both)} logged): {equal} of {len(both)} losses are "
        "equal bit for bit"
    )


def _restarts(run: Run) -> str:
    if not run.restarts:
        return "<p>No restart.</p>"
    rows = "".join(
        f"<tr><td>{restart['step']}</td><td>{html.escape(restart['checkpoint'])}</td>"
        f"<td>{_ranges(restart['replayed_steps'])}</td>"
        f"<td>{html.escape('; '.join(restart['problems']) or 'none')}</td></tr>"
        for restart in run.restarts
    )
    return (
        f"<table><tr><th>resumed at step</th><th>checkpoint</th><th>logged steps run again</th>"
        f"<th>problems found</th></tr>{rows}</table><p>{replay_verdict(run)}.</p>"
    )


def _ranges(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]} ({len(steps)})" if steps else "none"


def _video(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<video src="data:video/mp4;base64,{data}" autoplay loop muted playsinline controls></video>'


def _clips(samples: Path, scores: dict[str, Any]) -> str:
    """Videos beside their prompts (and beside the original where one is named), with what the scorer said."""
    verdicts = {clip["file"]: clip for clip in scores.get("clips", [])}
    figures = []
    for record in read_metrics(samples / "prompts.jsonl"):
        video = _video(samples / record["file"])
        if record.get("original"):
            video = f'<div class="pair">{_video(samples / record["original"])}{video}</div>'
        verdict = verdicts.get(record["file"], {})
        words = " ".join(
            f'<span class="{"ok" if verdict[key] else "no"}">{key}</span>'
            for key in ("colour", "shape", "direction")
            if isinstance(verdict.get(key), bool)
        )
        if "psnr_db" in verdict:
            words = f"{verdict['psnr_db']:.1f} dB"
        tag = " (held out)" if record.get("held_out") else ""
        figures.append(
            f"<figure>{video}<figcaption>{html.escape(record['text'])}{tag}<br>{words}</figcaption></figure>"
        )
    return f'<div class="clips">{"".join(figures)}</div>'


def _scores(scores: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{value:.4g}</td></tr>"
        for key, value in scores.items()
        if isinstance(value, int | float)
    )
    return f"<table><tr><th>score</th><th>value</th></tr>{rows}</table>"


def _summary(run: Run) -> str:
    last = run.metrics[-1]
    keys = (
        "step",
        "samples_seen",
        "epoch",
        "loss",
        "grad_norm",
        "lr",
        "samples_per_s",
        "tflops_per_s",
        "mfu",
        "data_wait_share",
        "memory_gib",
    )
    rows = "".join(f"<tr><td>{key}</td><td>{last[key]:.6g}</td></tr>" for key in keys if last.get(key) is not None)
    ended = f"{run.exit['code']}: {run.exit['reason']}" if run.exit else "not yet, or killed"
    return f"<table>{rows}<tr><td>ended</td><td>{html.escape(ended)}</td></tr></table>"


def write_report(runs: Sequence[Run], out: Path, samples: Path | None, scores: dict[str, Any], title: str) -> None:
    """Write the page."""
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
    ]
    if samples is not None:
        parts.append(f"<h2>Videos</h2>{_clips(samples, scores)}")
    if scores:
        parts.append(f"<h2>Scores</h2>{_scores(scores)}")
    parts.append(f"<h2>Curves</h2>{_charts(runs)}")
    for run in runs:
        parts.append(
            f"<h2>{html.escape(run.name)}</h2>{_summary(run)}<h3>Restarts</h3>{_restarts(run)}"
            f"<details><summary>config</summary><pre>{html.escape(run.config)}</pre></details>"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(parts) + "</html>\n")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="latte-scale report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", required=True, type=Path, help="the HTML page to write")
    parser.add_argument("--samples", type=Path, help="folder of videos with prompts.jsonl (latte-scale sample)")
    parser.add_argument("--scores", type=Path, help="scores.json (latte-scale evaluate)")
    parser.add_argument("--title", default="latte_scale run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the page; exit code 2 and one line if a folder is not what it should be."""
    args = parse_args(argv)
    try:
        scores = json.loads(args.scores.read_text()) if args.scores else {}
        write_report([read_run(path) for path in args.runs], args.out, args.samples, scores, args.title)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
