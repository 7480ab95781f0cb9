"""What may change when a run resumes; loading itself is in tests/engine/test_resume.py and tests/integration."""

import logging

import pytest

from latte_scale.config import load_config
from latte_scale.resume import check_changes, counters_of
from latte_scale.run.folder import StopRunError
from latte_scale.run.journal import Progress
from latte_scale.settings import to_mapping
from tests.conftest import ROOT


def config(*overrides: str) -> dict:
    return to_mapping(load_config(ROOT / "configs" / "tiny_cpu.yaml", overrides))


ONE_PLAN = ("plan-of-both", "plan-of-both")
URL = "runs/x/checkpoints/step-00000010"


def test_every_changed_key_is_named_with_both_values_and_what_lets_it_through() -> None:
    with pytest.raises(StopRunError) as refused:
        check_changes(config(), config("train.lr=0.5", "optim.eps=1e-6", "engine.kind=fsdp2"), [], ONE_PLAN, URL)
    message = str(refused.value)
    assert "train.lr: was 0.001, now 0.5" in message and "optim.eps: was 1e-08, now 1e-06" in message
    assert "engine.kind" not in message  # free to change
    assert URL in message and "another checkpoint.dir" in message  # where another run.dir alone finds the same again
    assert message.endswith("pass --allow-change optim.eps --allow-change train.lr")


def test_a_change_that_is_let_through_is_logged_and_the_others_are_refused(caplog) -> None:
    changed = config("train.lr=0.5", "run.seed=9")
    with caplog.at_level(logging.WARNING), pytest.raises(StopRunError, match="seed: was") as refused:
        check_changes(config(), changed, ["train.lr"], ONE_PLAN, URL)
    assert "train.lr" not in str(refused.value)
    assert "config key train.lr changed from 0.001 to 0.5 (--allow-change)" in caplog.text
    check_changes(config(), changed, ["train.lr", "run.seed", "data"], ONE_PLAN, URL)


def test_a_key_that_no_config_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(StopRunError, match=r"got 'train\.l'; is it train\.lr"):
        check_changes(config(), config(), ["train.l"], ONE_PLAN, URL)


def test_another_plan_is_refused_alone_or_with_the_keys_that_change_it(caplog) -> None:
    plans = ("saved-plan", "other-plan")
    with pytest.raises(StopRunError, match=f"{URL} was trained on other data.* pass --allow-change data to go on"):
        check_changes(config(), config(), [], plans, URL)
    other = config("data.url=elsewhere")
    with pytest.raises(StopRunError, match="was plan saved-plan, now other-plan") as refused:
        check_changes(config(), other, [], plans, URL)
    assert "data.url: was" in str(refused.value)
    assert str(refused.value).endswith("pass --allow-change data.url --allow-change data")
    with caplog.at_level(logging.WARNING):
        check_changes(config(), other, ["data.url", "data"], plans, URL)
    assert "data plan changed from saved-plan to other-plan" in caplog.text


def test_counters_count_applied_updates() -> None:
    assert counters_of(Progress(10, (3, 7))) == {"skipped_steps": [3, 7], "updates": 8}
