"""Every kernel through Triton's whole compiler, to machine code of an A100, an H100 and a B200, which needs no GPU.

The interpreter is more lenient than the compiler. At the released width and head dim nothing may spill to memory.
"""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from latte_scale.model.kernels import residual_triton, small_attention_triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
WIDTH = {"D": 1152, "BLOCK": 2048}
FP32 = dict.fromkeys(("x", "out", "shift", "scale", "gate", "grad_out", "grad_x", "partial"), "*fp32")
HALF = dict.fromkeys(("branch", "read", "grad_read", "grad_branch"), "*bf16")
BETWEEN = FP32 | HALF | {"eps": "fp32"}
HEADS = {"S": 16, "E": 72, "BLOCK_S": 16, "BLOCK_E": 128}
BF16 = dict.fromkeys(("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v"), "*bf16") | {"scale": "fp32"}
USES = {  # as a block uses the kernels: with a branch, with a gate, what is read
    "sum": (1, 1, 0),
    "first_read": (0, 0, 2),
    "sum_and_read": (1, 1, 2),
    "plain_sum_and_read": (1, 0, 2),
    "sum_read_as_it_is": (1, 1, 1),
}
CASES = {  # name -> kernel, types of its arguments, what it is compiled for, number of warps
    "attention_forward": (small_attention_triton.attention_forward, BF16, HEADS, 1),
    "attention_backward": (small_attention_triton.attention_backward, BF16, HEADS, 1),
}
for use, flags in USES.items():
    constants = WIDTH | dict(zip(("BRANCH", "GATED", "READS"), flags, strict=True))
    CASES[f"{use}_forward"] = residual_triton.residual_forward, BETWEEN, constants, 8
    kinds = {"KINDS": 2 * (flags[2] == 2) + flags[1]}
    CASES[f"{use}_backward"] = residual_triton.residual_backward, BETWEEN, constants | kinds, 8


# Triton compiles anew for integers that are 1, as in chunks of one row.
@pytest.mark.parametrize(("capability", "ones"), [(80, False), (90, False), (90, True), (100, False)])
@pytest.mark.parametrize("name", CASES)
def test_it_compiles_and_spills_nothing(name, ones, capability, tmp_path) -> None:
    kernel, types, constants, num_warps = CASES[name]
    if "ROWS" in kernel.arg_names:
        constants = constants | {"ROWS": 1 if ones else 32}
    if ones:
        constants = constants | {
            n: 1 for n in ("size_s", "num_groups", "num_members", "row_m") if n in kernel.arg_names
        }
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    (tmp_path / "kernel.cubin").write_bytes(built.asm["cubin"])
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", usage) == [("0", "0")], usage
