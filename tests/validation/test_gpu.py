"""On a GPU: the same validation as on a CPU, without an effect on training. Skips itself where there is none."""

import pytest
import torch

from latte_scale.engine import Ranks
from tests.validation.running import Parts, config_of, equal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


def test_validation_on_a_gpu(data_sets, tmp_path):
    cpu, gpu = (Ranks(0, 1, 0, torch.device(name)) for name in ("cpu", "cuda"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        parts = {
            name: Parts(config_of(str(data_sets.latents), str(tmp_path / name)), ranks)
            for name, ranks in {"cpu": cpu, "gpu": gpu, "alone": gpu}.items()
        }
        for each in parts.values():
            each.validator._held_out.read()
            each.validator._videos.load_decoder()
        losses = {name: parts[name].validator._held_out.loss(parts[name].engine.model).loss for name in ("cpu", "gpu")}
        assert losses["gpu"] == pytest.approx(losses["cpu"], rel=1e-4)
        drawn = {name: parts[name].validator._videos.draw(parts[name].engine.model) for name in ("cpu", "gpu")}
        for number, row in drawn["cpu"].items():
            assert (drawn["gpu"][number].cpu() - row).abs().max() < 1e-3 * row.abs().max()
        parts["gpu"].train(range(2))
        parts["gpu"].validate(2)
        assert parts["gpu"].train(range(2, 4)) == parts["alone"].train(range(4))[2:]
        assert equal(parts["gpu"].state(), parts["alone"].state())
    finally:
        torch.use_deterministic_algorithms(False)
