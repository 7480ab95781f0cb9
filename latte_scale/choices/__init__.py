"""Choices made by measurement: made once, written to RUN/choices.json, and made again as they were on resume.

In: a Config, the ranks and the file. Out: who computes attention at each site, and norm, modulation and gate. The
decision worth knowing: a choice is part of a run's numbers (back ends round differently), so a resumed run takes the
recorded one, and measures again only where that cannot hold: on another kind of device, at other shapes or precision,
or without the recorded back end.
"""

from latte_scale.choices.attention import attention_backends
from latte_scale.choices.norm import norm_backend

__all__ = ["attention_backends", "norm_backend"]
