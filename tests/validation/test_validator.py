"""Which weights are validated; what is done with them is in test_engines.py."""

import pytest

from latte_scale.validation.validator import weights_name


def test_the_tree_that_a_setting_means():
    assert weights_name("ema", (0.999, 0.9999)) == "ema/0.999"  # the first
    assert weights_name("ema/0.9999", (0.999, 0.9999)) == "ema/0.9999"
    assert weights_name("raw", ()) == weights_name("model", (0.9,)) == "model"


@pytest.mark.parametrize(("wanted", "decays", "kept"), [("ema", (), "none"), ("ema/0.5", (0.9,), "ema/0.9")])
def test_an_average_that_is_not_kept_is_refused(wanted, decays, kept):
    with pytest.raises(ValueError, match=rf"validation.weights={wanted}: expected raw or an average .*\({kept} kept\)"):
        weights_name(wanted, decays)
