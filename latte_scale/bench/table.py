"""Results of `bench step` as a Markdown table, for the console and for benchmarks/RESULTS.md.

    python -m latte_scale.bench.table a.json b.json

In: results as step.py writes them. Out: a row for each subject of each result, and the budgets below; with the names of
the files, since two results can differ in a setting that no column shows.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("config", "who", "step s (quartiles)", "samples/s", "TFLOP/s", "MFU", "HFU", "peak GiB", "x")


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table of steps, then one line per subject with its time by kind of kernel, then the device's ceiling."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | --- " + "| ---: " * (len(COLUMNS) - 2) + "|"]
    for result in results:
        lines += [f"| {' | '.join(row)} |" for row in _rows(result)]
    lines.append("")
    for result in results:
        lines += _budgets(result)
        lines.append(_ceiling(result) if result["device"] else f"- {title(result)}: ended before its budget was known")
    return "\n".join(lines)


def title(result: dict[str, Any]) -> str:
    """The name, if it has one; model, shape of a clip, batch, and settings of the run."""
    config, work = result["config"], result["work"]
    engine, train = config["engine"], config["train"]
    compiled = ", compile" if engine["compile"] else ""
    shape = "x".join(map(str, work["latents"][1:]))
    captions = ", captions of all lengths" if result["settings"]["captions"] == "mixed" else ""
    precision = train["precision"] + (", residual bf16" if train["residual"] == "bf16" else "")
    batch = f"{work['samples']} in {work['micro_batches']}, {precision}{captions}"
    how = f"{engine['kind']}, checkpointing {engine['activation_checkpointing']}{compiled}"
    return f"{_prefix(result)}{config['model']['kind']} {shape}, {batch}, {how}"


def _prefix(result: dict[str, Any]) -> str:
    return f"{result['name']}: " if "name" in result else ""


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows, against = [], result["ratio"]
    for name, subject in result["subjects"].items():
        if "error" in subject:
            rows.append([title(result), name, subject["error"], *[""] * (len(COLUMNS) - 3)])
            continue
        low, high = subject["step_s_quartiles"]
        times = "" if against is None or name != "latte_scale" else f"{against['samples_per_s']:.2f}"
        rows.append(
            [
                title(result),
                name,
                f"{subject['step_s']:.4g} ({low:.4g} to {high:.4g})",
                f"{subject['samples_per_s']:.4g}",
                f"{subject['tflops_per_s']:.4g}",
                _percent(subject["mfu"]),
                _percent(subject["hfu"]),
                "" if subject["peak_bytes"] is None else f"{subject['peak_bytes'] / 2**30:.1f}",
                times,
            ]
        )
    return rows


def _budgets(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, subject in result["subjects"].items():
        if "budget" in subject:
            shares = sorted(subject["budget"]["shares"].items(), key=lambda item: -item[1])
            who = f"- {_prefix(result)}{name}: "
            lines.append(who + ", ".join(f"{kind} {share:.0%}" for kind, share in shares if share >= 0.005))
    return lines


def _ceiling(result: dict[str, Any]) -> str:
    device, environment, compiled = result["device"], result["environment"], result["compile"]
    share = "" if device["gemm_mfu"] is None else f", {device['gemm_mfu']:.1%} of the peak"
    return (
        f"- {_prefix(result)}{environment['device']}: its matrix products at the model's shapes "
        f"{device['gemm']['tflops_per_s']:.4g} TFLOP/s{share}; copies {device['copy_bytes_per_s'] / 1e9:.4g} GB/s; "
        f"torch {environment['torch']}, commit {environment['commit']}; graphs compiled: {compiled['graphs']}, "
        f"while measured: {compiled['graphs_while_measured']}"
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of the named files."""
    paths = [Path(path) for path in (sys.argv[1:] if argv is None else argv)]
    print(markdown([json.loads(path.read_text()) | {"name": path.stem} for path in paths]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
