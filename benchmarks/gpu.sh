#!/usr/bin/env bash
# Everything that only a GPU can show, in one call: the GPU tests, steps against their rivals, what the engines cost.
#
#   benchmarks/gpu.sh OUT [WHEELS]                      all parts
#   LIMIT_S=540 BUDGET_S=20 benchmarks/gpu.sh OUT       as many as 9 minutes allow
#   PARTS="tests t2v_512" benchmarks/gpu.sh OUT         some of them
#
# In: a machine with a GPU, Python 3.11 or newer and a CUDA build of torch >= 2.11; nothing else and no network. WHEELS
# is a folder of wheels that the machine lacks (pip download on one that has a network; pure wheels, or of its Python):
# diffusers, rich, pydantic, safetensors, google-crc32c, av, webdataset and their needs; deepspeed (built with
# DS_BUILD_OPS=0) for the part overhead_zero; pytest with pytest-timeout and hypothesis for the tests; flash-attn if it
# was built. Out: OUT/PART.json and PART.log, environment.txt, summary.txt (what passed, failed, how long it took) and
# table.md, which is what benchmarks/RESULTS.md wants. A part that fails does not stop the next ones; the exit code is
# their number.
# Parts come in the order of what they are worth. LIMIT_S: seconds for all of them (none): one that has no time left is
# named as not begun, and PARTS takes these names. BUDGET_S (60): seconds of counted rounds a part. OVERRIDES: settings
# for every bench, to try the script on a CPU.
set -uo pipefail

if [ $# -lt 1 ]; then sed -n '2,/^set /{/^set /!p}' "$0"; exit 2; fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root:$out/site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$out/inductor}"  # a part run again compiles nothing anew
cd "$root" || exit 2
failures=0
least_s=30  # a part that has less is not begun
: >>"$out/summary.txt"

if [ $# -ge 2 ]; then  # --no-deps: torch and what came with it stay as they are
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$out/site" "$2"/*.whl || exit 2
fi
"$python" - <<'PY' || exit 2
import importlib.util, sys
names = "torch numpy yaml safetensors google_crc32c av pydantic rich webdataset diffusers transformers".split()
missing = [name for name in names if importlib.util.find_spec(name) is None]
sys.exit(f"gpu.sh: these packages are missing: {' '.join(missing)}; bring their wheels in WHEELS" if missing else 0)
PY

part() {  # part NAME LIMIT_S COMMAND...: run it if it is wanted, keep its output and what became of it
    local name=$1 limit_s=$2 began=$SECONDS code=0
    shift 2
    case " ${PARTS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    if [ -n "${LIMIT_S:-}" ]; then
        [ "$limit_s" -le $((LIMIT_S - SECONDS)) ] || limit_s=$((LIMIT_S - SECONDS))
        if [ "$limit_s" -lt "$least_s" ]; then
            echo "$name not begun: LIMIT_S=$LIMIT_S" | tee -a "$out/summary.txt"
            return 0
        fi
    fi
    echo "== $name"
    timeout -s INT -k 20 "$limit_s" "$@" >"$out/$name.log" 2>&1 || code=$?
    tail -n 25 "$out/$name.log"
    echo "$name exit $code after $((SECONDS - began)) s" | tee -a "$out/summary.txt"
    [ "$code" -eq 0 ] || failures=$((failures + 1))
}

bench() {  # bench NAME CONFIG [option or override ...]
    local name=$1 config=$2
    shift 2
    # shellcheck disable=SC2086  # OVERRIDES is a list of words
    part "$name" 480 "$python" -m latte_scale.cli bench step --config "configs/$config.yaml" \
        --budget-s "${BUDGET_S:-60}" --out "$out/$name.json" "$@" ${OVERRIDES:-}
}

kernels() {  # kernels NAME CONFIG [override ...]: every way to compute attention, norm and gate; JSON in OUT/kernels
    local name=$1 config=$2
    shift 2
    # shellcheck disable=SC2086  # OVERRIDES is a list of words
    part "$name" 300 "$python" -m latte_scale.cli bench kernels --config "configs/$config.yaml" \
        --out "$out/kernels/$name.json" "$@" ${OVERRIDES:-}
}

environment() {
    date -u +%FT%TZ
    nvidia-smi
    git rev-parse HEAD
    "${CC:-cc}" --version
    "$python" -m pip list --format freeze
    "$python" -m torch.utils.collect_env || "$python" -c 'import torch; print(torch.__version__)'
}

command -v "${CC:-cc}" gcc clang >/dev/null ||
    echo "no C compiler here: engine.compile and the Triton kernels build their launchers with one, so most parts will fail" |
    tee -a "$out/summary.txt"
environment >"$out/environment.txt" 2>&1

# The goals: MFU at 512 px and 2 x diffusers at 0.6 x its memory; XL/2 against fp32 with TF32, eager (diffusers has no
# class model). Memory is there on one large GPU, so nothing is computed twice; what that costs is the part after.
kept="engine.kind=single engine.compile=true engine.activation_checkpointing=none"
# shellcheck disable=SC2086  # lists of words
{
    bench t2v_512 t2v_512 --against diffusers $kept train.micro_batch=2 train.global_batch=4
    bench xl2 ffs --against eager $kept train.micro_batch=16 train.global_batch=16
    part tests 480 "$python" -m pytest -q -p no:cacheprovider tests/gpu tests/validation/test_gpu.py
    kernels kernels_512 t2v_512 $kept train.micro_batch=2 train.global_batch=4
    for engine in fsdp2 zero single; do
        bench "overhead_$engine" t2v_256 --against plain $kept train.micro_batch=8 train.global_batch=16 \
            engine.kind=$engine
    done
    bench t2v_512_fp8 t2v_512 --against diffusers $kept train.micro_batch=2 train.global_batch=4 train.precision=fp8
    bench t2v_512_auto t2v_512 $kept train.micro_batch=4 train.global_batch=4 \
        engine.activation_checkpointing=auto engine.memory_budget_gib=60
    for norm in torch triton; do
        bench "norm_$norm" t2v_512 $kept train.micro_batch=2 train.global_batch=4 norm.backend=$norm
    done
    bench t2v_256 t2v_256 --against diffusers $kept train.micro_batch=8 train.global_batch=16
    bench t2v_256_mixed t2v_256 --against diffusers --captions mixed $kept train.micro_batch=8 train.global_batch=16
    kernels kernels_256 t2v_256 $kept train.micro_batch=8 train.global_batch=16
    for way in selective full offload; do
        bench "t2v_512_$way" t2v_512 $kept train.micro_batch=4 train.global_batch=4 engine.activation_checkpointing=$way
    done
    bench deterministic t2v_256 $kept train.micro_batch=8 train.global_batch=16 train.deterministic=true
}

results=("$out"/*.json)
if [ -e "${results[0]}" ]; then
    "$python" -m latte_scale.bench.table "${results[@]}" | tee "$out/table.md"
fi
cat "$out/summary.txt"
exit "$failures"
