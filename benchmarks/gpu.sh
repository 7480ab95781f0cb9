#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: the GPU tests, steps against their rivals, what the engines cost.
#
#   benchmarks/gpu.sh OUT [WHEELS]                      all parts
#   LIMIT_S=540 BUDGET_S=20 benchmarks/gpu.sh OUT       as many as 9 minutes allow
#   PARTS="tests t2v_512" benchmarks/gpu.sh OUT         some of them
#
# In: a machine with a GPU, Python 3.11 or newer and a CUDA build of torch >= 2.11; nothing else and no network. WHEELS
# is a folder of wheels that the machine lacks (pip download on one that has a network; pure wheels, or of its Python):
# diffusers, transformers, rich, pydantic, safetensors, google-crc32c, webdataset and their needs; av and pytest with
# hypothesis for the tests; deepspeed (built with DS_BUILD_OPS=0) for the part overhead_zero; flash-attn if it is built.
# Out: OUT/PART.json and PART.log, environment.txt, summary.txt (what passed, failed, how long it took) and table.md,
# which is what benchmarks/RESULTS.md wants; each as soon as it is known, so whoever ends the script keeps what it had.
# A part that fails does not stop the next ones; the exit code is their number.
# Parts come in the order of what they are worth; with its rival each fits into one GPU of 140 GB. LIMIT_S: seconds for
# all of them (none): one that has no time left is named as not begun, and PARTS takes these names. BUDGET_S (60):
# seconds of counted rounds a part. SCRATCH: a folder for packages and compiled graphs, which a second call finds again.
# OVERRIDES: settings for every bench, to try the script on a CPU.
set -uo pipefail

if [ $# -lt 1 ]; then sed -n '2,/^set /{/^set /!p}' "$0"; exit 2; fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
wheels=${2:+$(cd "$2" && pwd)} || exit 2
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
scratch=${SCRATCH:-${TMPDIR:-/tmp}/latte_scale_gpu_$UID}
export PYTHONPATH="$root:$scratch/site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}"
cd "$root" || exit 2
failures=0
least_s=30  # a part that has less is not begun
grace_s=20  # of a part whose time is up, to end by itself
: >>"$out/summary.txt"

if [ -n "$wheels" ]; then  # --no-deps: torch and what came with it stay as they are; --no-compile: saves 15 s
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$scratch/site" \
        "$wheels"/*.whl || exit 2
fi
info="$scratch/site/latte_scale.dist-info"  # a checkout is not installed, and manifests name the version of their tool
mkdir -p "$info" || exit 2
printf 'Metadata-Version: 2.1\nName: latte_scale\n' >"$info/METADATA"
sed -n 's/^version = "\(.*\)"/Version: \1/p' pyproject.toml >>"$info/METADATA"
"$python" - <<'PY' || exit 2
import importlib.util, os, sys
if lacking := [name for name in "deepspeed av pytest hypothesis".split() if importlib.util.find_spec(name) is None]:
    print(f"gpu.sh: without {' '.join(lacking)}: overhead_zero needs deepspeed, the tests the others; bring their wheels")
lacking = []  # imported, not only looked for: what lacks a package of its own would fail after minutes
needed = "torch numpy yaml safetensors google_crc32c pydantic rich webdataset transformers diffusers.models.transformers"
for name in needed.split():
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        lacking.append(f"{name} ({error})")
if lacking:
    sys.exit(f"gpu.sh: cannot be imported: {', '.join(lacking)}; bring wheels of what is missing in WHEELS")
import torch
if not torch.cuda.is_available() and "OVERRIDES" not in os.environ:
    sys.exit(f"gpu.sh: torch {torch.__version__} sees no GPU; check nvidia-smi, or set OVERRIDES to try it on a CPU")
PY

part() {  # part NAME LIMIT_S COMMAND...: run it if it is wanted, keep its output and what became of it
    local name=$1 limit_s=$2 began=$SECONDS code=0
    shift 2
    case " ${PARTS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    if [ -n "${LIMIT_S:-}" ]; then
        [ "$limit_s" -le $((LIMIT_S - grace_s - SECONDS)) ] || limit_s=$((LIMIT_S - grace_s - SECONDS))
        if [ "$limit_s" -lt "$least_s" ]; then
            echo "$name not begun: LIMIT_S=$LIMIT_S" | tee -a "$out/summary.txt"
            return 0
        fi
    fi
    echo "== $name"
    timeout -s INT -k "$grace_s" "$limit_s" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 25 "$out/$name.log"
    local why=""  # not from the code: a part that the system killed for memory also ends with 137
    [ $((SECONDS - began)) -lt "$limit_s" ] || why=", its time was up"
    echo "$name exit $code after $((SECONDS - began)) s$why" | tee -a "$out/summary.txt"
    [ "$code" -eq 0 ] || failures=$((failures + 1))
    write_table
}

write_table() {  # OUT/table.md, of the steps measured so far
    local results=("$out"/*.json)
    [ ! -e "${results[0]}" ] || "$python" -m latte_scale.bench.table "${results[@]}" >"$out/table.md"
}

bench() {  # bench NAME CONFIG [option or override ...]
    local name=$1 config=$2
    shift 2
    # shellcheck disable=SC2086  # OVERRIDES is a list of words
    part "$name" 300 "$python" -m latte_scale.cli bench step --config "configs/$config.yaml" \
        --budget-s "${BUDGET_S:-60}" --out "$out/$name.json" "$@" ${OVERRIDES:-}
}

kernels() {  # kernels NAME CONFIG [override ...]: every way to compute attention, norm and gate; JSON in OUT/kernels
    local name=$1 config=$2
    shift 2
    # shellcheck disable=SC2086  # OVERRIDES is a list of words
    part "$name" 200 "$python" -m latte_scale.cli bench kernels --config "configs/$config.yaml" \
        --out "$out/kernels/$name.json" "$@" ${OVERRIDES:-}
}

environment() {
    date -u +%FT%TZ
    timeout 20 nvidia-smi
    git rev-parse HEAD
    "${CC:-cc}" --version
    timeout 20 "$python" -m pip list --format freeze --path "$scratch/site"
    timeout 20 "$python" -m pip list --format freeze
    timeout 30 "$python" -c 'import torch; print(torch.__config__.show())'
}

command -v "${CC:-cc}" gcc clang >/dev/null ||
    echo "no C compiler here: engine.compile and the Triton kernels build their launchers with one, so most parts will fail" |
    tee -a "$out/summary.txt"
environment >"$out/environment.txt" 2>&1

# The goals: MFU at 512 px and 2 x diffusers at 0.6 x its memory; XL/2 against fp32 with TF32, eager (diffusers has no
# class model). Nothing is computed twice; what that costs is measured further down. The size of a micro-batch is what
# the rival has room for, which keeps everything in eager mode.
kept="engine.kind=single engine.compile=true engine.activation_checkpointing=none"
px512="train.micro_batch=1 train.global_batch=4"
px256="train.micro_batch=4 train.global_batch=16"
# shellcheck disable=SC2086  # lists of words
{
    bench t2v_512 t2v_512 --against diffusers $kept $px512
    bench xl2 ffs --against eager $kept train.micro_batch=8 train.global_batch=16
    # Joint images, no host waits, attention back ends, then the rest; the log has a line a test.
    part tests 300 "$python" -m pytest -v -p no:cacheprovider tests/gpu/test_joint_images.py tests/gpu/test_step.py \
        tests/gpu/test_attention.py tests/gpu tests/validation/test_gpu.py
    bench t2v_512_residual t2v_512 $kept $px512 train.residual=bf16  # beside t2v_512
    for engine in single fsdp2 zero; do
        bench "overhead_$engine" t2v_256 --against plain $kept $px256 engine.kind=$engine
    done
    bench deterministic t2v_256 $kept $px256 train.deterministic=true  # beside overhead_single
    bench t2v_512_fp8 t2v_512 $kept $px512 train.precision=fp8  # beside t2v_512
    kernels kernels_512 t2v_512 $kept $px512
    for norm in torch triton; do
        bench "norm_$norm" t2v_512 $kept $px512 norm.backend=$norm
    done
    bench t2v_256 t2v_256 --against diffusers $kept $px256
    bench t2v_256_mixed t2v_256 --against diffusers --captions mixed $kept $px256
    kernels kernels_256 t2v_256 $kept $px256
    for way in selective full offload; do
        bench "t2v_512_$way" t2v_512 $kept train.micro_batch=2 train.global_batch=4 engine.activation_checkpointing=$way
    done
    bench t2v_512_auto t2v_512 $kept train.micro_batch=4 train.global_batch=4 \
        engine.activation_checkpointing=auto engine.memory_budget_gib=60
}

[ ! -e "$out/table.md" ] || cat "$out/table.md"
cat "$out/summary.txt"
exit "$failures"
