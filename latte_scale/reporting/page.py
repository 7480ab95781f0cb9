"""From runs to one HTML file: the content of each section, rendered with assets/report; the page fetches nothing.

The template escapes every text, except the style sheet, the script and the charts' numbers.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from latte_scale.evaluation.videos import read_prompts
from latte_scale.reporting.charts import all_charts
from latte_scale.reporting.media import Medium, embed
from latte_scale.reporting.runs import Evaluation, Run, SampledStep, replay_verdict
from latte_scale.settings import flatten

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "report"
MAX_STEPS = 6  # of the steps at which a run sampled: evenly chosen, first and last included
LAST_LINES = 20  # logged lines over which the last loss is averaged
ASPECTS = ("colour", "shape", "direction")
STATES = {0: "finished", 75: "stopped and saved", 78: "stopped for good", 1: "failed"}


def render(
    runs: Sequence[Run],
    title: str,
    samples: Path | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> str:
    """The whole page. samples: a folder of videos with prompts.jsonl; evaluations: besides those in the run folders."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=title,
        made=time.strftime("%Y-%m-%d %H:%M"),
        style=(ASSETS / "page.css").read_text(),
        script=(ASSETS / "page.js").read_text(),
        runs=runs,
        overview=overview(runs),
        charts=all_charts(runs),
        scores=score_table(runs, evaluations),
        clips=[] if samples is None else given_clips(samples, evaluations),
        sampled=sampled_videos(runs),
        max_steps=MAX_STEPS,
        replays=[replay_verdict(run) for run in runs],
        differences=config_differences(runs),
        surroundings=surroundings(runs),
    )


# ----------------------------------------------------------------------------------------------------------- overview


def overview(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(what, its value in every run), without rows that are empty everywhere."""
    columns = [_summary(run) for run in runs]
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    return [(label, cells) for label, cells in rows if any(cells)]


def _summary(run: Run) -> dict[str, str]:
    last, train = run.metrics[-1], run.config.get("train", {})
    losses = [r["loss"] for r in run.metrics[-LAST_LINES:] if r.get("loss") is not None]
    checked = [r["loss"] for r in run.validation if r.get("loss") is not None]
    stalls, replaced = _values(run, "checkpoint_stall_s"), _values(run, "samples_replaced")
    return {
        "state": _state(run),
        "steps": f"{last['step'] + 1:,}" + (f" of {train['steps']:,}" if "steps" in train else ""),
        "samples seen": _number(last.get("samples_seen"), ",.0f"),
        "epochs": _number(last.get("epoch"), ".2f"),
        f"loss, mean of the last {LAST_LINES} lines": _number(statistics.fmean(losses) if losses else None, ".4f"),
        "validation loss, last": _number(checked[-1] if checked else None, ".4f"),
        "validation loss, best": _number(min(checked, default=None), ".4f"),
        "validation took": _number(sum(r.get("seconds", 0) for r in run.validation) or None, ".1f", " s in all"),
        "samples per second": _median(run, "samples_per_s", 1, ".1f"),
        "MFU": _median(run, "mfu", 100, ".1f", " %"),
        "waiting for data": _median(run, "data_wait_share", 100, ".1f", " %"),
        "stalled by checkpoints": _number(sum(stalls) if stalls else None, ".1f", " s in all"),
        "peak memory": _number(max(_values(run, "memory_gib"), default=None), ".2f", " GiB"),
        "restarts": str(len(run.restarts)),
        "skipped updates": _number(last.get("num_skipped"), ".0f"),
        "samples replaced": _number(sum(replaced) if replaced else None, ",.0f"),
    }


def _state(run: Run) -> str:
    if not run.exit:
        return "running, or killed"
    code = run.exit.get("code")
    return f"{STATES.get(code, f'exit code {code}')}: {run.exit.get('reason', '')}".removesuffix(": finished")


def _values(run: Run, key: str) -> list[float]:
    return [record[key] for record in run.metrics if record.get(key) is not None]


def _median(run: Run, key: str, scale: float, form: str, unit: str = "") -> str:
    values = _values(run, key)
    return _number(statistics.median(values) * scale if values else None, form, unit)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


# ------------------------------------------------------------------------------------------------------------- scores


def score_table(runs: Sequence[Run], given: Sequence[Evaluation]) -> dict[str, Any]:
    """{"columns": names of evaluations, "rows": [(metric, cells)], "intervals": are there any}.

    A cell is (value, interval or "").
    """
    several = len(runs) > 1
    named = [(f"{run.name}: {e.name}" if several else e.name, e.scores) for run in runs for e in run.evaluations]
    named += [(evaluation.name, evaluation.scores) for evaluation in given]
    metrics = list(dict.fromkeys(key for _, scores in named for key, value in scores.items() if _is_score(value)))
    rows = [(metric, [_score_cell(scores, metric) for _, scores in named]) for metric in metrics]
    intervals = any(interval for _, cells in rows for _, interval in cells)
    return {"columns": [name for name, _ in named], "rows": rows, "intervals": intervals}


def _score_cell(scores: dict[str, Any], metric: str) -> tuple[str, str]:
    if metric not in scores or not _is_score(scores[metric]):
        return "", ""
    if scores[metric] is None:
        return ("identical" if metric == "psnr_db" else "not finite"), ""
    record = scores.get("metrics", {}).get(metric, {})
    interval = "" if record.get("low") is None else f"{record['low']:.4g} to {record['high']:.4g}"
    return f"{scores[metric]:.4g}", interval


def _is_score(value: object) -> bool:
    """A number, or None for one that was not finite."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


# ------------------------------------------------------------------------------------------------------------- videos


def given_clips(samples: Path, evaluations: Iterable[Evaluation]) -> list[dict[str, Any]]:
    """Each video with its prompt, the original clip if there is one, and the verdict of the scorer."""
    verdicts: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        for clip in evaluation.scores.get("clips", []):
            verdicts.setdefault(clip["file"], {}).update(clip)  # one file has the shapes, another the PSNR
    clips = []
    for record in read_prompts(samples, with_text=False):
        verdict = verdicts.get(record["file"], {})
        clips.append(
            {
                "media": [embed(samples / record[key]) for key in ("original", "file") if record.get(key)],
                "text": record.get("text", f"class {record['label']}" if "label" in record else ""),
                "held_out": bool(record.get("held_out")),
                "aspects": [(key, verdict[key]) for key in ASPECTS if isinstance(verdict.get(key), bool)],
                "nearness": _nearness(verdict),
            }
        )
    return clips


def _nearness(verdict: dict[str, Any]) -> str:
    """The PSNR of a video to its clip, as text; "" if it was not computed."""
    if verdict.get("identical"):
        return "identical"
    return _number(verdict.get("psnr_db"), ".1f", " dB")


def sampled_videos(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For every prompt one strip per run: [{"prompt", "strips": [(run, about, [(step, Medium)])]}]."""
    strips: dict[str, list[tuple[str, str, list[tuple[int, Medium]]]]] = {}
    for run in runs:
        of_prompt: dict[str, list[tuple[int, Medium]]] = {}
        for sampled in chosen_steps(run.samples):
            for prompt, path in sampled.videos:
                of_prompt.setdefault(prompt, []).append((sampled.step, embed(path)))
        for prompt, media in of_prompt.items():
            strips.setdefault(prompt, []).append((run.name, run.samples[-1].about, media))
    return [{"prompt": prompt, "strips": of_runs} for prompt, of_runs in strips.items()]


def chosen_steps(samples: Sequence[SampledStep]) -> list[SampledStep]:
    """At most MAX_STEPS of them, evenly, with the first and the last."""
    if len(samples) <= MAX_STEPS:
        return list(samples)
    return [samples[place * (len(samples) - 1) // (MAX_STEPS - 1)] for place in range(MAX_STEPS)]


# ---------------------------------------------------------------------------------------------------- config and facts


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, value in every run) of the settings in which the runs differ."""
    flat = [flatten(run.config) for run in runs]
    keys = sorted({key for mapping in flat for key in mapping})
    rows = [(key, [str(mapping.get(key, "")) for mapping in flat]) for key in keys]
    return [(key, cells) for key, cells in rows if len(set(cells)) > 1]


def surroundings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(what, its value in every run) of facts.json, the longest lists at the end."""
    columns = [_surroundings(run.facts) for run in runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    rows = [(key, [column.get(key, "") for column in columns]) for key in keys]
    return [(key, cells) for key, cells in rows if any(cells)]


def _surroundings(facts: dict[str, Any]) -> dict[str, str]:
    versions, ranks = facts.get("versions", {}), facts.get("ranks", [])
    devices = sorted({str(rank.get("device")) for rank in ranks})
    return {
        "command": " ".join(facts.get("command", [])),
        "commit": facts.get("git_commit") or "",
        "data fingerprint": facts.get("data_fingerprint") or "",
        "hosts": ", ".join(facts.get("hosts", [])),
        "ranks": f"{len(ranks)} on {', '.join(devices)}" if ranks else "",
        "python": facts.get("python", ""),
        "platform": facts.get("platform", ""),
        "main packages": ", ".join(
            f"{name} {versions[name]}"
            for name in ("torch", "deepspeed", "diffusers", "transformers")
            if name in versions
        ),
        "environment": "\n".join(f"{name}={value}" for name, value in facts.get("environment", {}).items()),
        "all packages": "\n".join(f"{name} {version}" for name, version in versions.items()),
    }
