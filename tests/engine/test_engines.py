"""All engines compute the same: losses over 20 steps, accumulation, precision, checkpointing, skipped updates."""

from typing import Any

import pytest
import torch

from latte_scale.engine import EngineSettings, Ranks, build_engine
from latte_scale.engine.activations import checkpoint_blocks
from latte_scale.engine.compiling import compile_blocks
from latte_scale.optim import OptimSettings
from tests.engine.toy import GLOBAL_BATCH, Toy, build, full_weights, on_one, on_ranks, settings, toy, train, train_step

SHARDED = ("fsdp2", "zero1", "zero2", "zero3")
TOLERANCE_FP32 = 1e-5  # relative, over 20 steps; measured at most 3e-7: only the order of the sums differs
TOLERANCE_BF16 = 3e-2
"""Relative, over 20 steps, losses and gradient norm, at equal samples a forward pass; measured at most 1.1e-2. The
first three losses agree to 1e-6; then the last bit of an fp32 weight decides here and there how its bf16 copy rounds,
and bf16 is itself 1e-2 from fp32."""


def apart(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference."""
    assert len(losses) == len(reference)
    return max(abs(loss / other - 1.0) for loss, other in zip(losses, reference, strict=True))


# Each function below runs on every rank, several engines after another in one process, because starting ranks is slow.


def runs(ranks: Ranks, cases: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Train each (kind, keywords of build, keywords of train); losses, weights and facts."""
    results = []
    for kind, how, steps in cases:
        engine = build(kind, ranks, **how)
        losses = train(engine, **{"steps": 20, **steps})
        results.append(
            {
                "losses": losses,
                "weights": full_weights(engine),
                "dtype": engine.module.seen_dtype,
                "num_updates": engine.num_updates,
                "grad_norm": float(train_step(engine, len(losses))[1].grad_norm),
            }
        )
    return results


PLAIN: tuple[dict, dict] = ({}, {})
BF16: tuple[dict, dict] = ({"precision": "bf16"}, {})
SHORT = {"steps": 8}
VARIANTS: list[tuple[str, dict, dict]] = [
    ("fsdp2", {"blocks_per_unit": 2, "activation_checkpointing": "full", "reshard_after_forward": "always"}, SHORT),
    ("zero1", {"activation_checkpointing": "full"}, SHORT),
    ("fsdp2", {"activation_checkpointing": "selective", "checkpointed_share": 0.67}, SHORT),
    ("fsdp2", {"activation_checkpointing": "offload"}, SHORT),
    ("zero3", {"activation_checkpointing": "selective"}, SHORT),
    ("zero3", {"activation_checkpointing": "full"}, SHORT),
    ("zero1", {"cpu_offload": True}, SHORT),
    ("zero2", {"cpu_offload": True}, SHORT),
    ("zero3", {"cpu_offload": True}, SHORT),
]
ACCUMULATED = [(kind, {}, {"micro_batch": 1, **SHORT}) for kind in SHARDED]
BF16_CASES = [
    ("fsdp2", *BF16),
    ("zero2", *BF16),
    ("zero3", *BF16),
    ("zero3", {"precision": "bf16", "activation_checkpointing": "full"}, {}),
]
PAIR_CASES = [(kind, *PLAIN) for kind in SHARDED] + BF16_CASES + VARIANTS + ACCUMULATED


def everything(ranks: Ranks, cases: list[tuple[str, dict, dict]], kinds: list[str]) -> dict[str, Any]:
    """All that the tests below look at, from one start of the ranks."""
    return {
        "runs": runs(ranks, cases),
        "skips": skips(ranks, kinds),
        "bias_corrected": bias_corrected(ranks, kinds),
        "decayed": decayed(ranks, kinds),
        "clipped_late": clipped_late(ranks, kinds),
    }


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """One rank without sharding; its runs by name."""
    cases = {
        "plain": ("single", *PLAIN),
        "short": ("single", {}, SHORT),
        "accumulated": ("single", {}, {"micro_batch": 3}),
        "checkpointed": ("single", {"activation_checkpointing": "full"}, {}),
        "bf16": ("single", {"precision": "bf16"}, {"micro_batch": GLOBAL_BATCH // 2}),  # the GEMMs of two ranks
    }
    results = on_one(everything, list(cases.values()), ["single"])
    return results | {"runs": dict(zip(cases, results["runs"], strict=True))}


@pytest.fixture(scope="module")
def alone(single: dict[str, Any]) -> dict[str, Any]:
    return single["runs"]


SKIPPING = [*SHARDED, "zero2+offload", "zero3+offload"]


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    """Two ranks, every sharded engine and every variant of one."""
    return on_ranks(2, everything, PAIR_CASES, SKIPPING)


def case_name(case: tuple[str, dict, dict]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for keywords in case[1:] for key, value in keywords.items())])


def test_single_learns(alone: dict[str, Any]) -> None:
    assert alone["plain"]["losses"][-1] < 0.05 * alone["plain"]["losses"][0]


@pytest.mark.parametrize("variant", ["accumulated", "checkpointed"])
def test_single_variants(alone: dict[str, Any], variant: str) -> None:
    assert apart(alone[variant]["losses"], alone["plain"]["losses"]) < TOLERANCE_FP32


@pytest.mark.parametrize("index", range(len(PAIR_CASES)), ids=[case_name(case) for case in PAIR_CASES])
def test_two_ranks_equal_single(alone: dict[str, Any], pair: list[dict[str, Any]], index: int) -> None:
    bf16 = PAIR_CASES[index][1].get("precision") == "bf16"
    reference = "bf16" if bf16 else "short" if PAIR_CASES[index][2].get("steps") else "plain"
    expected, got = alone[reference], pair[0]["runs"][index]
    tolerance = TOLERANCE_BF16 if bf16 else TOLERANCE_FP32
    assert apart(got["losses"], expected["losses"]) < tolerance
    assert apart(got["losses"][:3], expected["losses"][:3]) < 1e-6
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4 if not bf16 else TOLERANCE_BF16)
    assert got["dtype"] == (torch.bfloat16 if bf16 else torch.float32)
    assert got["num_updates"] == len(got["losses"])
    if not bf16:
        for name, weight in expected["weights"].items():
            if name.endswith("qkv.bias"):
                continue  # softmax ignores a shift of the keys: their bias follows rounding errors, scaled up by Adam
            torch.testing.assert_close(got["weights"][name], weight, rtol=1e-3, atol=1e-5, msg=name)


def test_bf16_is_another_function_than_fp32(alone: dict[str, Any]) -> None:
    """Else the bf16 rows above would hold with autocast off."""
    assert alone["bf16"]["dtype"] == torch.bfloat16
    assert apart(alone["bf16"]["losses"], alone["plain"]["losses"]) > 1e-4


def test_three_ranks_equal_single(alone: dict[str, Any]) -> None:
    """8 samples, 5 rows and 1 row over 3 ranks: uneven shares, empty slots, ranks without a row."""
    results = on_ranks(3, runs, [(kind, {}, {"micro_batch": 2, **SHORT}) for kind in ("fsdp2", "zero3")])[0]
    for result in results:
        assert apart(result["losses"], alone["short"]["losses"]) < TOLERANCE_FP32


def skips(ranks: Ranks, kinds: list[str]) -> list[dict[str, Any]]:
    """Two good steps, one with an infinite sample that only one rank sees, one good step; state around the bad one."""
    results = []
    for kind in kinds:
        engine = build_named(kind, ranks)
        train(engine, 2)
        before = state_of(engine)
        result = train_step(engine, 2, poison=0)[1]
        after, updates = state_of(engine), engine.num_updates
        loss, again = train_step(engine, 3)
        results.append(
            {
                "moved": [key for key in before if not torch.equal(before[key], after[key])],
                "applied": [float(result.applied), float(again.applied)],
                "finite": [bool(result.grad_norm.isfinite()), bool(again.grad_norm.isfinite())],
                "shapes": [result.grad_norm.shape, result.applied.shape],
                "updates": [updates, engine.num_updates],
                "loss": loss,
                "changed": any(not torch.equal(after[key], value) for key, value in state_of(engine).items()),
            }
        )
    return results


def build_named(kind: str, ranks: Ranks, optim: OptimSettings | None = None) -> Any:
    """`zero2+offload` is zero2 with the optimizer in host memory."""
    kind, _, offload = kind.partition("+")
    return build(kind, ranks, optim, cpu_offload=bool(offload))


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    state = {}
    for shard in engine.local_shards():
        state[shard.name] = shard.param.clone()
        state |= {f"{shard.name} {key}": value.clone() for key, value in shard.state.items()}
    return state


def test_a_non_finite_gradient_changes_nothing_anywhere(single: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    reference = single["skips"][0]
    rows = [reference, *[row for rank in pair for row in rank["skips"]]]
    for kind, row in zip(["single", *SKIPPING, *SKIPPING], rows, strict=True):
        assert row["moved"] == [], kind
        assert (row["applied"], row["finite"]) == ([0.0, 1.0], [False, True]), kind
        assert row["shapes"] == [torch.Size([]), torch.Size([])], kind
        assert row["updates"] == [2, 3] and row["changed"], kind
        assert row["loss"] == pytest.approx(reference["loss"], rel=TOLERANCE_FP32), kind


def bias_corrected(ranks: Ranks, kinds: list[str]) -> list[float]:
    """The largest movement of a weight by the first update without clipping: lr, if the bias correction is right."""
    moved = []
    for kind in kinds:
        engine = build_named(kind, ranks, OptimSettings(clip_norm=None))
        before = full_weights(engine)
        train_step(engine, 0, lr=1e-3)
        after = full_weights(engine)
        moved.append(max(float((after[name] - before[name]).abs().max()) for name in before))
    return moved


def test_the_first_update_is_bias_corrected(single: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    """A step counter that starts at 1 (DeepSpeed's dummy step in older releases) would give 0.74 lr."""
    for results in (single, *pair):
        assert results["bias_corrected"] == pytest.approx([1e-3] * len(results["bias_corrected"]), rel=1e-3)


def decayed(ranks: Ranks, kinds: list[str]) -> list[list[float]]:
    return [train(build_named(kind, ranks, OptimSettings(weight_decay=0.3, clip_norm=0.5)), 6) for kind in kinds]


def test_weight_decay_is_the_same_everywhere(single: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    """Two parameter groups: DeepSpeed flattens each of them on its own."""
    assert apart(single["decayed"][0], single["runs"]["plain"]["losses"][:6]) > 1e-4
    for losses in pair[0]["decayed"]:
        assert apart(losses, single["decayed"][0]) < TOLERANCE_FP32


def clipped_late(ranks: Ranks, kinds: list[str]) -> list[list[list[float]]]:
    """Losses of seven steps without clipping, and of three without and four with a limit that bites."""
    results = []
    for kind in kinds:
        optim = OptimSettings(eps=1e-2, clip_norm=0.02)  # a large eps: the size of a gradient shows in the update
        free = train(build_named(kind, ranks, optim), 7, clip=False)
        engine = build_named(kind, ranks, optim)
        results.append([free, train(engine, 3, clip=False) + train(engine, range(3, 7))])
    return results


def test_clipping_can_begin_late(single: dict[str, Any], pair: list[dict[str, Any]]) -> None:
    ((free, late),) = single["clipped_late"]
    assert late[:4] == free[:4] and apart(late[4:], free[4:]) > 1e-4
    for results in pair[0]["clipped_late"]:
        assert apart(results[0], free) < TOLERANCE_FP32 and apart(results[1], late) < TOLERANCE_FP32


def test_blocks_compute_the_same_checkpointed_and_compiled() -> None:
    x_BTC = torch.linspace(-1, 1, 96).view(2, 6, 8)
    grads = []
    for change in (None, checkpoint_blocks, lambda blocks: compile_blocks(blocks, backend="aot_eager")):
        model = toy()
        names = list(model.state_dict())
        if change is not None:
            change(list(model.blocks))
        assert list(model.state_dict()) == names
        model(x_BTC).square().sum().backward()
        grads.append(model.blocks[0].qkv.weight.grad)
    assert torch.equal(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2])


# what a user can get wrong -----------------------------------------------------------------------------------------

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpointed_share": 1.5}, r"must lie in \[0, 1\]"),
        ({"cpu_offload": True}, "needs engine.kind=zero"),
        ({"kind": "zero", "zero_stage": 3, "compile": True}, "stage 3"),
        ({"blocks_per_unit": 0}, "blocks_per_unit"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"timeout_s": 1e12}, "timeout_s must lie in"),
    ],
)
def test_settings_refuse(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineSettings(**change)


def test_single_refuses_many_ranks() -> None:
    with pytest.raises(ValueError, match="single runs on one rank, 2 were started"):
        build("single", Ranks(0, 2, 0, torch.device("cpu")))


def spoil(model: Toy, how: str) -> None:
    if how == "half":
        model.head.to(torch.bfloat16)
    elif how == "frozen":
        model.head.weight.requires_grad_(False)
    elif how == "scalar":
        model.scale = torch.nn.Parameter(torch.ones(()))
    else:
        model.register_buffer("mean", torch.zeros(3))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("half", r"head\.weight is torch.bfloat16"),
        ("frozen", r"head\.weight is frozen"),
        ("scalar", "scale is a scalar"),
        ("buffer", r"\['mean'\] would be missing from checkpoints"),
    ],
)
def test_models_that_cannot_be_saved_exactly_are_refused(how: str, message: str) -> None:
    model = toy()
    spoil(model, how)
    with pytest.raises(ValueError, match=message):
        build_engine(EngineSettings(), OptimSettings(), "fp32", model, list(model.blocks), ALONE)


def test_precision_is_checked() -> None:
    with pytest.raises(ValueError, match="one of fp32, bf16, fp8, got 'fp16'"):
        build("single", ALONE, precision="fp16")


def different_seeds(ranks: Ranks) -> str:
    with pytest.raises(ValueError) as caught:
        build("fsdp2", ranks, seed=ranks.rank)
    return str(caught.value)


def test_ranks_with_different_weights_are_refused() -> None:
    assert (
        on_ranks(2, different_seeds)
        == ["the initial weights of ranks [1] differ from rank 0's; build the model from one seed"] * 2
    )


class Seldom(torch.nn.Module):
    """A layer, and a table that only some steps use: as temporal positions, of which a step of images needs none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.zeros(3, 8))

    def forward(self, x_BC: torch.Tensor, uses_table: bool) -> torch.Tensor:
        return self.layer(x_BC + self.table.sum(0) if uses_table else x_BC)


def seldom_used(ranks: Ranks, kinds: list[str]) -> dict[str, tuple[list[float], torch.Tensor]]:
    """Gradient norms of two steps that use the table, two that do not and one more that does, and the table then."""
    found = {}
    for case in kinds:
        kind, _, offload = case.partition("+")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Seldom()
        optim = OptimSettings(clip_norm=None, eps=1e-3)  # eps: a gradient of rounding errors alone moves nothing
        engine = build_engine(settings(kind, cpu_offload=bool(offload)), optim, "fp32", model, [model.layer], ranks)
        norms = []
        for step, uses_table in enumerate((True, True, False, False, True)):
            for micro in range(2):
                x_BC = torch.randn(4, 8, generator=torch.Generator().manual_seed(2 * step + micro))
                mine = x_BC[4 * ranks.rank // ranks.size : 4 * (ranks.rank + 1) // ranks.size]
                engine.backward(engine.model(mine, uses_table).square().sum() / 8, last_microbatch=micro == 1)
            norms.append(float(engine.step(1e-2).grad_norm))
        found[case] = norms, full_weights(engine)["table"]
    return found


def test_a_parameter_that_a_step_does_not_use_has_no_gradient_in_it():
    """And not once more that of the step before, which ZeRO keeps in its buffers (stage 3, or offload)."""
    norms, table = on_one(seldom_used, ["single"])["single"]
    kinds = [*SHARDED, "zero1+offload", "zero2+offload", "zero3+offload"]
    for kind, (came, its) in on_ranks(2, seldom_used, kinds)[0].items():
        assert apart(came, norms) < TOLERANCE_FP32, kind
        torch.testing.assert_close(its, table, rtol=1e-5, atol=1e-6, msg=kind)


def after_loads_and_looks(ranks: Ranks, ways: list[str]) -> list[list[float]]:
    """Losses under stage 3 of two steps right after a load, and of two after forwards alone."""
    found = []
    for way in ways:
        engine = build("zero3", ranks, activation_checkpointing=way, zero_persistent_elements=200)
        engine.after_load(0)
        losses = train(engine, 2)
        with torch.no_grad():
            for step in range(2):
                engine.model(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(step)))
        found.append(losses + train(engine, range(2, 4)))
    return found


def test_selective_checkpointing_does_not_mind_how_stage_3_gathers_weights():
    """DeepSpeed gathers inside the blocks, and more in some steps than in others: torch took that for another model."""
    selective, full = on_ranks(2, after_loads_and_looks, ["selective", "full"])[0]
    assert selective == full
