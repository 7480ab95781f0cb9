"""Activation checkpointing by a memory budget: the first setting that fits, their order, and impossible budgets."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from latte_scale.config import Config, load_config
from latte_scale.estimate import budget
from latte_scale.estimate.budget import DoesNotFitError, first_that_fits, ladder, within_budget, within_memory_of
from latte_scale.estimate.estimate import checkpointing_words, estimate_of
from latte_scale.estimate.hardware import DEVICES, GIB, Cluster
from tests.conftest import ROOT

# Four pairs of blocks of the released width at 256 px: large enough for activations to decide.
SMALL = ("model.num_layers=4", "train.micro_batch=4", "train.global_batch=8", "engine.kind=single")


def small(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "t2v_256.yaml", [*SMALL, *overrides])


def automatic(gib: float, *overrides: str) -> Config:
    return small("engine.activation_checkpointing=auto", f"engine.memory_budget_gib={gib}", *overrides)


def needed_gib(config: Config) -> float:
    return estimate_of(config, Cluster(DEVICES["h100"], 1)).memory.needed / GIB


def rungs() -> list[Config]:
    config = small("engine.activation_checkpointing=none")
    return [replace(config, engine=rung) for rung in ladder(config.engine, 4)]


def test_the_ladder_goes_down_a_pair_of_blocks_at_a_time() -> None:
    words = [checkpointing_words(rung.engine) for rung in rungs()]
    assert words == [
        "no checkpointing",
        *(f"selective activation checkpointing of {share}% of the blocks" for share in (25, 50, 75)),
        "selective activation checkpointing",
        *(
            f"full activation checkpointing of {share}% of the blocks, selective of the others"
            for share in (25, 50, 75)
        ),
        "full activation checkpointing",
        "offload activation checkpointing",
    ]
    needs = [needed_gib(rung) for rung in rungs()]
    assert needs == sorted(needs, reverse=True) and needs[-1] < 0.8 * needs[0]


@pytest.mark.parametrize("number", range(10))
def test_the_first_rung_that_fits_is_taken(number) -> None:
    """With a little more than a rung needs it is that one; with a little less the next."""
    needs = [needed_gib(rung) for rung in rungs()]
    assert within_budget(automatic(needs[number] * 1.001), 1, None).engine == rungs()[number].engine
    if number + 1 < len(needs):
        assert within_budget(automatic(needs[number] * 0.999), 1, None).engine == rungs()[number + 1].engine


@pytest.mark.parametrize("count", [1, 2, 7, 57])
def test_bisecting_finds_every_place(count) -> None:
    for first in range(count):
        asked = []
        found = first_that_fits(count, lambda rung, first=first, asked=asked: asked.append(rung) or rung >= first)
        assert found == first
        assert len(asked) <= 8
    assert first_that_fits(count, lambda _: False) is None


def test_inputs_in_host_memory_that_cost_more_than_they_save_are_no_rung(monkeypatch) -> None:
    """Of small inputs two on their way back weigh more than all that stay: the rung above is the last one then."""

    class Needs:
        def __init__(self, config: Config, *_: object) -> None:
            kind, share = config.engine.activation_checkpointing, config.engine.checkpointed_share
            gib = {"none": 9.0, "selective": 8.0 - share, "full": 6.0 - share, "offload": 5.5}[kind]
            self.memory = SimpleNamespace(needed=gib * GIB)

    monkeypatch.setattr(budget, "estimate_of", Needs)
    found = within_budget(automatic(5.2), 1, None).engine
    assert (found.activation_checkpointing, found.checkpointed_share) == ("full", 1.0)
    with pytest.raises(DoesNotFitError, match=r"needs 5\.00"):
        within_budget(automatic(4.9), 1, None)


def test_other_settings_and_configs_without_auto_stay() -> None:
    found = within_budget(automatic(60, "engine.compile=true", "train.lr=3e-4"), 1, None)
    assert found.engine.compile and found.train.lr == 3e-4 and found.engine.memory_budget_gib is None
    plain = small("engine.activation_checkpointing=full")
    assert within_budget(plain, 1, None) is plain


def test_without_a_budget_the_device_is_one() -> None:
    config = small("engine.activation_checkpointing=auto")
    assert within_budget(config, 1, 200 * GIB).engine.activation_checkpointing == "none"
    with pytest.raises(ValueError, match=r"here is none: give engine.memory_budget_gib"):
        within_memory_of(torch.device("cpu"), config, 1)


def test_what_cannot_fit_says_what_it_needs_and_what_to_do() -> None:
    with pytest.raises(
        DoesNotFitError, match=r"fits into 1.00 GiB, and with .* it needs \d+\.\d+; lower train.micro_ba"
    ):
        within_budget(automatic(1.0), 1, None)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("engine.memory_budget_gib=20",), "is for engine.activation_checkpointing=auto, got full"),
        (("engine.activation_checkpointing=auto", "engine.memory_budget_gib=0"), "must be positive, got 0"),
        (("engine.activation_checkpointing=auto", "engine.checkpointed_share=0.5"), "got 0.5 and none; drop"),
        (("engine.activation_checkpointing=auto", "engine.other_blocks=selective"), "got 1.0 and selective; drop"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides, words) -> None:
    with pytest.raises(ValueError, match=words):
        small(*overrides)
