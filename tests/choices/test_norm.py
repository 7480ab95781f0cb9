"""Back ends of norm and gate: named or refused, measured once and recorded, and all compute the same."""

import json

import pytest

from latte_scale.bench.subjects import seeded_model
from latte_scale.choices import norm
from latte_scale.choices.norm import measure_norm, norm_backend, norm_shape, recorded_norm
from latte_scale.config import guarded_differences, load_config
from latte_scale.settings import to_mapping
from tests.bench.test_subjects import ALONE, CLASSES, CONFIGS, CPU, tiny


def test_without_a_gpu_torch_computes_it(tmp_path) -> None:
    path = tmp_path / "choices.json"
    assert norm_backend(tiny(), ALONE, path) == norm_backend(tiny("norm.backend=torch"), ALONE, path) == "torch"
    assert not path.exists()


def test_one_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"norm.backend=triton: it runs on NVIDIA GPUs only .*; choose auto or torch"):
        norm_backend(tiny("norm.backend=triton"), ALONE, None)


@pytest.mark.parametrize("overrides", [(), CLASSES])
def test_every_block_is_told(overrides) -> None:
    model = seeded_model(tiny(*overrides), CPU, norm="triton")
    assert {block.norm for block in model.repeated_blocks()} == {"triton"}


def test_what_was_measured_is_recorded_and_reused(tmp_path, monkeypatch, caplog) -> None:
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"attention": 1}))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert recorded_norm(tiny(), CPU, path) == "torch"
    written = json.loads(path.read_text())
    times = written["norm"]["measured_ms"]["blocks"]
    assert written["attention"] == 1 and times["torch"] > 0 and "NVIDIA GPUs only" in times["triton"]

    def not_again(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(norm, "measure_norm", not_again)
    assert recorded_norm(tiny(), CPU, path) == "torch"
    monkeypatch.setattr(norm, "why_no_triton", lambda device: None)
    path.write_text(json.dumps({"norm": written["norm"] | {"backends": {"blocks": "triton"}}}))
    assert recorded_norm(tiny(), CPU, path) == "triton", "a resumed run computes as it began"
    assert "measured again" not in caplog.text
    with pytest.raises(AssertionError, match="measured again"):
        recorded_norm(tiny("train.micro_batch=1"), CPU, path)
    assert "norm is measured again: other shape" in caplog.text


def test_a_record_of_another_version_is_measured_again_and_told(tmp_path, caplog) -> None:
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"norm": {"key": {}, "backend": "triton"}}))
    assert recorded_norm(tiny(), CPU, path) == "torch"
    assert "norm is measured again: another version recorded it" in caplog.text
    assert json.loads(path.read_text())["norm"]["backends"] == {"blocks": "torch"}


def test_a_damaged_record_is_named(tmp_path) -> None:
    (tmp_path / "choices.json").write_text('{"norm": ')
    with pytest.raises(ValueError, match=r"choices.json is not JSON .*; restore it, or remove it to measure anew"):
        recorded_norm(tiny(), CPU, tmp_path / "choices.json")


def test_one_that_is_wrong_is_not_chosen(monkeypatch) -> None:
    from latte_scale.model.kernels import residual

    def without_norm(x, branch, gate, shift, scale, swapped):
        out = x if branch is None else x + gate * branch
        return out, out * (1 + scale) + shift

    monkeypatch.setattr(norm, "why_no_triton", lambda device: None)
    monkeypatch.setattr(residual, "add_and_read", without_norm)
    monkeypatch.setattr(residual, "add", lambda x, branch, gate: x + gate * branch)
    assert "off by" in measure_norm(tiny(), CPU)["triton"]
    monkeypatch.setattr(residual, "add", lambda x, branch, gate: x + gate * branch * float("nan"))
    assert "off by nan" in measure_norm(tiny(), CPU)["triton"]


def test_whatever_a_kernel_raises_it_is_out(monkeypatch) -> None:
    from latte_scale.model.kernels import residual

    def cannot(*_: object, **__: object) -> None:
        raise type("OutOfResources", (Exception,), {})("out of resource: shared memory")  # triton.runtime.errors has it

    monkeypatch.setattr(norm, "why_no_triton", lambda device: None)
    monkeypatch.setattr(residual, "add_and_read", cannot)
    times = measure_norm(tiny(), CPU)
    assert times["triton"] == "out of resource: shared memory" and times["torch"] > 0


def test_what_is_measured_has_the_shape_of_the_run() -> None:
    assert norm_shape(load_config(CONFIGS / "t2v_512.yaml", ["train.micro_batch=2"])) == [2, 16, 1024, 1152]
    cut = ("train.micro_batch=2", "engine.kind=fsdp2", "engine.sequence_parallel=4")
    assert norm_shape(load_config(CONFIGS / "t2v_512.yaml", cut)) == [2, 4, 1024, 1152]


def test_it_may_change_on_resume() -> None:
    assert not guarded_differences(to_mapping(tiny("norm.backend=torch")), to_mapping(tiny()))
