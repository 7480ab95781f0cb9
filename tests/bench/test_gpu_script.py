"""benchmarks/gpu.sh, which no test can run: it parses, says how it is called, and names configs and rivals that are."""

import os
import re
import subprocess
import sys
from typing import get_args

from latte_scale.bench.subjects import Rival
from latte_scale.config import load_config
from tests.conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def test_it_parses_and_says_how_it_is_called() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "benchmarks/gpu.sh OUT [WHEELS]" in done.stdout and "OVERRIDES" in done.stdout


def test_every_part_is_a_config_and_settings_that_exist() -> None:
    text = SCRIPT.read_text().replace("\\\n", " ")
    kept = re.search(r'^kept="(.*)"$', text, re.MULTILINE)[1]
    parts = re.findall(r"^ +(?:bench|kernels) (\S+) (\S+) (.*)$", text, re.MULTILINE)
    assert len(parts) >= 8
    for _, config, rest in parts:
        words = (
            rest.replace("$kept", kept)
            .replace("$engine", "fsdp2")
            .replace("$norm", "triton")
            .replace("$way", "full")
            .split()
        )
        load_config(ROOT / "configs" / f"{config}.yaml", [word for word in words if "=" in word])
        rivals = re.findall(r"--against (\S+)", rest)
        assert set(rivals) <= set(get_args(Rival))


def test_parts_without_time_left_are_named(tmp_path) -> None:
    environ = {**os.environ, "LIMIT_S": "0", "PYTHON": sys.executable, "PARTS": "t2v_512 tests kernels_256"}
    done = subprocess.run(["bash", str(SCRIPT), str(tmp_path)], capture_output=True, text=True, env=environ, check=True)
    expected = [f"{name} not begun: LIMIT_S=0" for name in ("t2v_512", "tests", "kernels_256")]
    assert (tmp_path / "summary.txt").read_text().splitlines() == expected
    assert done.stdout.splitlines()[-3:] == expected
