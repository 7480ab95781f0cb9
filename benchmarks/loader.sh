#!/usr/bin/env bash
# The other loaders that benchmarks/loader.py is measured against, in an environment of their own.
#   benchmarks/loader.sh [FOLDER]      default .venv-rivals; then: FOLDER/bin/python benchmarks/loader.py ...
# Each is installed by itself. One that does not install is noted, with its last words, in FOLDER/refused.txt, and the
# benchmark reports it so. Run it again to try those again.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${1:-.venv-rivals}
PIP="$VENV/bin/pip install --quiet --disable-pip-version-check"

[ -x "$VENV/bin/python" ] || python3 -m venv "$VENV"
# The same torch build and the same versions as the project's own environment wherever both need a package.
$PIP "$(grep '^torch==' constraints.txt)"
held=$(mktemp)
trap 'rm -f "$held"' EXIT
{ grep -v '^torch==' constraints.txt; "$VENV/bin/pip" freeze | grep '^torch=='; } > "$held"
$PIP -c "$held" -e '.[s3]'

: > "$VENV/refused.txt"
try() {  # NAME, then what pip is to install
    local name=$1 log
    shift
    log=$($PIP "$@" 2>&1) || printf '%s: %s\n' "$name" "$(tail -n 3 <<< "$log" | tr '\n' ' ')" >> "$VENV/refused.txt"
}
try webdataset -c "$held" webdataset
try litdata -c "$held" litdata
try megatron-energon -c "$held" megatron-energon
# Its metadata pins numpy<2.2, transformers<5, torchvision and three cloud SDKs; it works without them.
try mosaicml-streaming --no-deps mosaicml-streaming brotli python-snappy zstd xxhash catalogue cramjam
cat "$VENV/refused.txt"
"$VENV/bin/pip" list 2> /dev/null | grep -iE '^(torch|webdataset|litdata|megatron-energon|mosaicml-streaming|boto3) '
