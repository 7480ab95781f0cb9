"""Back ends chosen by measurement: measured once, recorded in RUN/choices.json, and reused on resume.

In: a Config, the ranks and the file. Out: the back end of attention at each site, and of norm, modulation and gate.
Back ends round differently, so a choice affects a run's numbers, and a resumed run uses the recorded one. It measures
again only if the record no longer applies: on another kind of device, at other shapes or precision, or without the
recorded back end. `attention` and `norm` choose; `record` has the file and what else they share.
"""

from latte_scale.choices.attention import attention_backends
from latte_scale.choices.norm import norm_backend

__all__ = ["attention_backends", "norm_backend"]
