"""Costs of buckets: latents, against those of the policy's own size."""

from dataclasses import replace
from fractions import Fraction

from latte_scale.data.buckets import bucket_costs, num_latents
from latte_scale.data.samples import open_dataset
from tests.data.making import BUCKET, OTHER_BUCKET, VIDEO, make_latents, make_videos


def test_costs_are_latents_against_those_of_the_main_size(tmp_path):
    make_latents(tmp_path / "a", every_other_bucket=3)
    make_latents(tmp_path / "b", bucket="1x6x6")
    make_videos(tmp_path / "c", num_samples=1)
    a, b, c = (open_dataset(str(tmp_path / name)) for name in "abc")
    assert bucket_costs("tokens", VIDEO, [a]) == {BUCKET: 1, OTHER_BUCKET: 2}
    assert bucket_costs("tokens", VIDEO, [a, b]) == {BUCKET: 1, OTHER_BUCKET: 2, "1x6x6": 2}
    assert bucket_costs("tokens", replace(VIDEO, width=48), [a, b])[BUCKET] == Fraction(1, 2)
    assert bucket_costs("samples", VIDEO, [a]) is None and bucket_costs("tokens", VIDEO, [c]) is None
    assert num_latents("4x16x24") == 4 * 16 * 24
