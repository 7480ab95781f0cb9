"""The demo: a real request to the running app gives the video that `latte-scale sample` gives for the same seed."""

import json
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from latte_scale import sample, serve
from latte_scale.evaluation.videos import read_frames
from latte_scale.model.build import build_model
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.settings import to_mapping
from tests.conftest import ROOT
from tests.sampling.about import read_about
from tests.weight_files import randomise, save_run

pytest.importorskip("gradio", reason="gradio is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint with random weights and the shipped encoders."""
    folder = tmp_path_factory.mktemp("serve") / "run"
    model = LatteT2VSettings(
        num_layers=2, num_heads=2, head_dim=8, caption_channels=64, sample_size=16, num_frames=4, patch_size=4,
        in_channels=4, out_channels=4,
    )  # fmt: skip
    tiny = yaml.safe_load((ROOT / "configs" / "tiny_cpu.yaml").read_text())
    config = {key: tiny[key] for key in ("video", "encoders", "diffusion")} | {"model": to_mapping(model)}
    save_run(folder, config, randomise(build_model(model)).state_dict())
    return folder


@pytest.fixture(scope="module")
def address(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The running app."""
    args = serve.parse_args(["--checkpoint", str(run)])
    page = serve.build_page(serve.load_demo(args, tmp_path_factory.mktemp("videos")))
    yield serve.open_page(page, args.host, None)
    page.close()


def ask(address: str, *data: Any) -> tuple[str, Any]:
    """(event, its data) of a call of the API: what the browser does, without one."""
    request = urllib.request.Request(
        f"{address}gradio_api/call/sample",
        json.dumps({"data": data}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        event_id = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}gradio_api/call/sample/{event_id}", timeout=60) as stream:
        lines = stream.read().decode().splitlines()
    event = next(line for line in reversed(lines) if line.startswith("event: "))
    content = next(line for line in reversed(lines) if line.startswith("data: "))
    return event.removeprefix("event: "), json.loads(content.removeprefix("data: "))


def test_it_listens_on_this_machine_only(address: str) -> None:
    assert address.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(address, timeout=30) as answer:
        page = answer.read().decode()
    assert "Prompt" in page and "Negative prompt" in page


def test_a_prompt_gives_the_video_of_the_sample_command(address: str, run: Path, tmp_path: Path) -> None:
    event, data = ask(address, "a red circle moves left", "blurred", 0, 5, 3, 4.0)
    assert event == "complete"
    with urllib.request.urlopen(data[0]["url"], timeout=30) as answer:
        (tmp_path / "served.mp4").write_bytes(answer.read())
    command = ["--checkpoint", str(run), "--prompt", "a red circle moves left", "--negative", "blurred"]
    assert sample.main([*command, "--seed", "5", "--steps", "3", "--guidance", "4", "--out", str(tmp_path)]) == 0
    served, sampled = read_frames(tmp_path / "served.mp4"), read_frames(tmp_path / "00000.mp4")
    assert served.shape == (4, 32, 32, 3) and np.array_equal(served, sampled)
    about = read_about(tmp_path / "served.mp4")
    assert (about["text"], about["seed"], about["steps"]) == ("a red circle moves left", 5, 3)


def test_what_cannot_be_sampled_is_an_answer_and_the_app_goes_on(address: str) -> None:
    assert ask(address, "  ", "", 0, 0, 2, 1.0)[0] == "error"
    event, said = ask(address, "a red circle", "", 0, None, 2, 1.0)
    assert event == "error" and "the seed is empty" in json.dumps(said)
    assert ask(address, "a red circle", "", 0, 0, 2, 1.0)[0] == "complete"


def test_mistakes_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--checkpoint", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert serve.main(["--checkpoint", str(run), "--port", str(taken.getsockname()[1])]) == 2
    assert "got one that is taken, or an address of another; pass another --port or --host" in capsys.readouterr().err
    assert serve.main(["--checkpoint", str(run), "--port", "70000"]) == 2
    assert "--port: expected 1 to 65535, got 70000" in capsys.readouterr().err
    assert serve.main(["--checkpoint", str(run), "--fps", "0"]) == 2
    assert "--fps: expected 1 or more, got 0" in capsys.readouterr().err


def test_a_record_is_held_to_the_model(run: Path, tmp_path: Path) -> None:
    demo = serve.load_demo(serve.parse_args(["--checkpoint", str(run)]), tmp_path)
    with pytest.raises(ValueError, match="expected text in every record"):
        demo.sample({"seed": 0, "label": 1}, 2, 1.0)
    with pytest.raises(ValueError, match="steps: expected 1 to 250, got 0"):
        demo.sample({"seed": 0, "text": "a"}, 0, 1.0)
    with pytest.raises(ValueError, match="negative prompt 'b': nothing reads it at guidance 1"):
        demo.sample({"seed": 0, "text": "a", "negative": "b"}, 2, 1.0)
