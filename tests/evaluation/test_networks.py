"""Feature networks: called as the published ones are, CLIP as transformers computes it, URLs fetched once."""

import hashlib
import http.server
import threading
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from latte_scale.evaluation.networks import find_network, load_network
from tests.evaluation.networks import SmallI3D, SmallInception, write_clip, write_script

CPU = torch.device("cpu")
PIXELS_BFCHW = torch.randint(0, 256, (2, 3, 3, 40, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_i3d_sees_clips_rescaled_and_resized_and_gives_features(tmp_path: Path) -> None:
    path = write_script(SmallI3D, tmp_path / "i3d.pt")
    network, module = load_network("i3d", path, CPU), torch.jit.load(str(path))
    wanted = module(PIXELS_BFCHW.transpose(1, 2).float(), rescale=True, resize=True, return_features=True)
    assert torch.equal(network.features(PIXELS_BFCHW, []), wanted[:, None])
    assert network.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_inception_sees_frames_and_gives_features_or_classes_without_a_bias(tmp_path: Path) -> None:
    path = write_script(SmallInception, tmp_path / "inception.pt")
    network, module = load_network("inception", path, CPU), torch.jit.load(str(path))
    frames = PIXELS_BFCHW.flatten(0, 1)
    assert torch.equal(network.features(PIXELS_BFCHW, []).flatten(0, 1), module(frames, return_features=True))
    assert torch.equal(network.classes(PIXELS_BFCHW, []).flatten(0, 1), module(frames, no_output_bias=True))


@pytest.mark.parametrize("name", ["i3d", "inception", "clip"])
def test_networks_compute_without_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As the published tools do: torch's default for convolutions on a GPU keeps 10 bits."""
    seen = []

    def look(*_: object) -> None:
        seen.append(torch.backends.cudnn.allow_tf32)

    if name == "clip":
        path, model = write_clip(tmp_path), CLIPModel.from_pretrained(write_clip(tmp_path))
        model.vision_model.register_forward_pre_hook(look)
        monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *_, **__: model)
    else:
        module = SmallI3D() if name == "i3d" else SmallInception()
        path = write_script(type(module), tmp_path / "network.pt")
        module.register_forward_pre_hook(look)
        monkeypatch.setattr(torch.jit, "load", lambda *_, **__: module)
    load_network(name, path, CPU).features(PIXELS_BFCHW, ["a red circle", "up"])
    assert seen == [False] and torch.backends.cudnn.allow_tf32


def test_clip_embeds_frames_and_captions_as_transformers_does(tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    model, captions = CLIPModel.from_pretrained(folder), ["a red circle", "up"]
    rows_BKD = load_network("clip", folder, CPU).features(PIXELS_BFCHW, captions)
    assert rows_BKD.shape == (2, 4, 8)
    images = list(PIXELS_BFCHW.flatten(0, 1).numpy().transpose(0, 2, 3, 1))
    inputs = CLIPProcessor.from_pretrained(folder)(text=captions, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = model(**inputs)  # embeddings of length one
    ours = torch.nn.functional.normalize(rows_BKD, dim=2)
    assert torch.allclose(ours[:, :3].flatten(0, 1), theirs.image_embeds, atol=1e-5)
    assert torch.allclose(ours[:, 3], theirs.text_embeds, atol=1e-5)


def test_a_url_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTE_CACHE", str(tmp_path / "cache"))
    write_script(SmallI3D, tmp_path / "i3d.pt")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    def handler(*arguments: object) -> Handler:
        return Handler(*arguments, directory=str(tmp_path))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/i3d.pt"
        path = find_network("i3d", url)
        assert path.read_bytes() == (tmp_path / "i3d.pt").read_bytes() and find_network("i3d", url) == path
        with pytest.raises(ValueError, match=r"cannot be fetched .*404"):
            find_network("i3d", url + "x")
        server.shutdown()
    assert asked == ["/i3d.pt", "/i3d.ptx"]


def test_a_module_that_gives_something_else_is_named(tmp_path: Path) -> None:
    class Wrong(torch.nn.Module):
        def forward(self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
            return x.float().mean()

    network = load_network("inception", write_script(Wrong, tmp_path / "wrong.pt"), CPU)
    with pytest.raises(ValueError, match=r"expected features \[6, D\] of input \[6, 3, 40, 32\], got \[\]"):
        network.features(PIXELS_BFCHW, [])
