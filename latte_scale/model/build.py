"""Builds a model from settings: the one place that maps settings to a model class."""

import torch

from latte_scale.model.latte import Latte, LatteSettings
from latte_scale.model.latte_t2v import LatteT2V, LatteT2VSettings


def build_model(
    settings: LatteSettings | LatteT2VSettings, generator: torch.Generator | None = None
) -> Latte | LatteT2V:
    """The model of these settings, its weights drawn from the generator (None: torch's global one)."""
    model = Latte if isinstance(settings, LatteSettings) else LatteT2V
    return model(settings, generator)
