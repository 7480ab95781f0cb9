"""The budget adds up, and names are sorted where they belong."""

import pytest

from latte_scale.bench.budget import budget, category_of, self_times
from latte_scale.bench.subjects import Ours
from latte_scale.synthetic import step_inputs
from tests.bench.test_subjects import ALONE, CPU, TINY, tiny


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        (
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off",
            "gemm",
        ),
        ("aten::addmm", "gemm"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4>>(...)", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k96_sm80(...)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x96_4x1x1", "attention"),
        ("aten::_softmax_backward_data", "attention"),
        ("triton_red_fused_add_mul_native_layer_norm_native_layer_norm_backward_3", "norm_modulate"),
        ("void at::native::vectorized_layer_norm_kernel<float, float>", "norm_modulate"),
        ("triton_poi_fused_gelu_5", "elementwise"),
        ("triton_poi_fused__to_copy_addmm_gelu_view_4", "elementwise"),
        ("triton_red_fused__scaled_dot_product_flash_attention_backward_sum_view_7", "elementwise"),
        ("triton_poi_fused__to_copy_2", "memory"),
        ("triton_poi_fused_clone_transpose_view_11", "memory"),
        ("triton_tem_fused_addmm_3", "gemm"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "memory"),
        ("aten::mul", "elementwise"),
    ],
)
def test_categories(name, category) -> None:
    assert category_of(name) == category


def test_self_times_are_without_what_runs_inside() -> None:
    spans = [(0, -10, "a", "outer"), (1, -3, "a", "inner"), (2, -1, "a", "innermost"), (5, -5, "b", "other thread")]
    times_s = self_times(sorted(spans))
    assert {name: round(value * 1e6) for name, value in times_s.items()} == {
        "outer": 7,
        "inner": 2,
        "innermost": 1,
        "other thread": 5,
    }


def test_a_budget_adds_up_to_the_step() -> None:
    config = tiny(*TINY)
    subject = Ours(config, ALONE, step_inputs(config, CPU, 1))
    phases = {"forward_backward_s": 2.0, "update_s": 0.3, "average_s": 0.1}
    result = budget(subject, phases, CPU)
    assert sum(result["seconds"].values()) == pytest.approx(2.4)
    assert sum(result["shares"].values()) == pytest.approx(1.0)
    assert result["seconds"]["optimizer"] == 0.3 and result["seconds"]["ema"] == 0.1
    assert result["shares"]["gemm"] > 0.05 and result["shares"]["attention"] > 0.005
    assert result["top"][0][1] >= result["top"][1][1] > 0
