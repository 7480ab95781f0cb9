"""What is loaded with a model: encoders and clip size from its folder."""

import shutil

import pytest
import torch

from latte_scale.diffusion.loss import DiffusionSettings
from latte_scale.model.latte_t2v import LatteT2VSettings
from latte_scale.sampling.loading import Loaded, surroundings
from tests.conftest import ROOT


def test_a_pipelines_clip_size_follows_from_its_vae(tmp_path):
    architecture = LatteT2VSettings(num_layers=1, sample_size=8, num_frames=4)
    loaded = Loaded(torch.nn.Identity(), architecture, DiffusionSettings(), str(tmp_path), None)
    with pytest.raises(ValueError, match="is no run and no whole pipeline"):
        surroundings(loaded, str(tmp_path))
    shutil.copytree(ROOT / "latte_scale" / "assets" / "tiny_vae", tmp_path / "vae")
    encoders, video = surroundings(loaded, str(tmp_path))
    assert encoders.vae == str(tmp_path) and (video.frames, video.height, video.width) == (4, 16, 16)
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"vae/config.json"):
        surroundings(loaded, str(tmp_path))
