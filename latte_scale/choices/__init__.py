"""Choices made by measurement: measured once, written to RUN/choices.json, and reused on resume.

In: a Config, the ranks and the file. Out: the back end of attention at each site, and of norm, modulation and gate. The
decision worth knowing: a choice affects a run's numbers (back ends round differently), so a resumed run takes the
recorded one. It measures again only if that no longer applies: on another kind of device, at other shapes or precision,
or without the recorded back end. `attention` and `norm` choose; `record` is what they share, the file among it.
"""

from latte_scale.choices.attention import attention_backends
from latte_scale.choices.norm import norm_backend

__all__ = ["attention_backends", "norm_backend"]
