"""Settings of either kind build the right class."""

import dataclasses

import torch

from latte_scale.model.blocks import LatteBlock, T2VBlock
from latte_scale.model.build import build_model
from latte_scale.model.latte import Latte, LatteSettings
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings

LATTE = LatteSettings(depth=2, width=16, num_heads=2)
T2V = LatteT2VSettings(num_layers=1, num_heads=2, head_dim=8, caption_channels=8, sample_size=8)


@dataclasses.dataclass(frozen=True)
class Section(LatteSettings):
    """As a configuration has it: the settings and where the weights come from."""

    init: str | None = None


def test_each_kind_builds_its_model_from_the_generator() -> None:
    for settings, cls in ((LATTE, Latte), (T2V, LatteT2V), (Section(depth=2, width=16, num_heads=2), Latte)):
        model = build_model(settings, torch.Generator().manual_seed(3))
        assert type(model) is cls and model.settings is settings
        again = cls(settings, torch.Generator().manual_seed(3)).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
        blocks = [module for module in model.modules() if isinstance(module, (LatteBlock, T2VBlock))]
        assert {id(block) for block in blocks} == {id(block) for block in model.repeated_blocks()}


def test_kinds_are_the_first_fields_and_tell_the_settings_apart() -> None:
    assert [dataclasses.fields(cls)[0].name for cls in (LatteSettings, LatteT2VSettings)] == ["kind", "kind"]
    assert (LATTE.kind, T2V.kind) == ("latte", "latte_t2v")
