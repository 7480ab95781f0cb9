"""What the guides name exists: paths, and in CONTRIBUTING's walk the names inside them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ["README.md", "CONTRIBUTING.md", "data_tools/README.md", "slurm/README.md", "docker/README.md"]
PATH = re.compile(r"\b(?:latte_scale|data_tools|tests|benchmarks|configs|slurm|docker)/[\w./-]*\w")
NAMED = re.compile(r"`(latte_scale/[\w/]+\.py)` `([\w.]+)`")


@pytest.mark.parametrize("guide", GUIDES)
def test_every_path_that_a_guide_names_is_there(guide: str) -> None:
    named = set(PATH.findall((ROOT / guide).read_text()))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_name_of_the_walk_is_where_it_says() -> None:
    named = NAMED.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 15
    missing = []
    for path, name in named:
        body: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
        for part in name.split("."):
            found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part]
            body = found[0].body if found else []
            missing += [] if found else [f"{path}: {name}"]
    assert missing == []


def test_every_link_into_the_results_leads_to_a_section() -> None:
    text = (ROOT / "benchmarks/RESULTS.md").read_text()
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}  # as GitHub makes them
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert len(links) > 40 and sorted(set(links) - anchors) == []


PACKAGES = sorted(path for path in (ROOT / "latte_scale").rglob("__init__.py") if path.parent.name != "latte_scale")


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.parent.name)
def test_the_docstring_of_a_package_names_its_files(path: Path) -> None:
    """As README promises; a kernel's *_triton.py goes with the file of its operator."""
    words = set(re.findall(r"\w+", ast.get_docstring(ast.parse(path.read_text()))))
    files = {file.stem.removesuffix("_triton") for file in path.parent.glob("*.py") if not file.name.startswith("__")}
    assert sorted(files - words) == []
