"""The Triton kernels without a GPU: run in Triton's interpreter, and built for real GPUs by Triton's compiler.

Triton reads TRITON_INTERPRET when it is imported, and a CPU build of torch comes without it: so the tests in kernels/
run in processes of their own, with the package that `make` puts into a folder of its own. tests/gpu/test_kernels.py
runs the same ones on a GPU.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDER = Path(os.environ.get("LATTE_TRITON", Path(sys.prefix) / "triton"))
HERE = "tests/model/kernels"
pytestmark = pytest.mark.skipif(
    not (FOLDER / "triton").is_dir() and importlib.util.find_spec("triton") is None,
    reason=f"no triton at {FOLDER} and none installed; run `make venv` or set LATTE_TRITON",
)


def passes(name: str, tmp_path: Path, **environ: str) -> None:
    """pytest on one file of kernels/; none of its tests may be skipped."""
    environ = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONUNBUFFERED": "1"} | environ
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path[1:], str(FOLDER)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "python_files=*.py"]
    done = subprocess.run(
        [*command, f"{HERE}/{name}.py"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280
    )
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0 and "passed" in last[0] and "skipped" not in last[0], done.stdout[-6000:] + done.stderr


@pytest.mark.parametrize("name", ["residual", "small_attention"])
def test_in_the_interpreter(name, tmp_path) -> None:
    passes(name, tmp_path, TRITON_INTERPRET="1")


def test_they_compile_for_real_gpus(tmp_path) -> None:
    passes("compiling", tmp_path, TRITON_INTERPRET="0")
