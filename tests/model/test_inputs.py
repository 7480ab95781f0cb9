"""The messages of the checks that both models share."""

import pytest
import torch

from latte_scale.model.inputs import check_contrastive, check_cut, check_frames, check_sides, check_timestep


def test_what_fits_passes() -> None:
    check_frames(1, 0, 16)
    check_frames(24, 8, 16)
    check_sides(4, 6, 2)
    check_timestep(torch.zeros(3), 3, 5)
    check_timestep(torch.zeros(3, 5), 3, 5)
    check_contrastive(False, 0)
    check_contrastive(True, 8)
    check_cut(one_condition=True, features=False)


@pytest.mark.parametrize(
    ("check", "arguments", "message"),
    [
        (check_frames, (4, 4, 16), "num_images: expected 0 .. 3 of 4 frames, got 4; the images are the last"),
        (check_frames, (20, 3, 16), "expected at most 16 frames, got 17; cut the clips or set model.num_frames=17"),
        (check_sides, (4, 5, 2), "multiples of patch_size 2, got 4 x 5; crop the clips"),
        (check_timestep, (torch.zeros(2), 3, 5), r"expected \[3\].*or \[3, 5\], one for each frame, got \[2\]"),
        (check_timestep, (torch.zeros(3, 1), 3, 5), r"got \[3, 1\]"),
        (check_contrastive, (True, 0), "features: expected a model with contrastive projections.*call without"),
        (check_cut, (False, False), "reshard: expected one timestep.*call without reshard"),
        (check_cut, (True, True), "reshard: expected one timestep"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(check, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        check(*arguments)
