# shellcheck shell=bash disable=SC2034
#
# What your site changes, and nothing else: slurm/*.sh read this file on every node. Copy it, point LATTE_ENV to the copy
# (export LATTE_ENV=$HOME/latte-env.sh), and edit that; or edit it here. Whatever you export before sbatch wins.

# The interpreter. `make venv` made .venv; a cluster with modules may want these first:
#   module load python/3.11 cuda/12.8
: "${LATTE_PYTHON:=.venv/bin/python}"

# More words for srun, as an array: a container (enroot and pyxis), a reservation, a binding.
#   LATTE_SRUN_ARGS=(--container-image=/shared/latte.sqsh --container-mounts=/shared --container-workdir="$PWD")
LATTE_SRUN_ARGS=()

# The network between nodes. Without these, torch takes the interface of the host's own name (gloo) and the fastest it
# finds (nccl). Name it where a host's own name leads to 127.0.1.1, or where the first interface found is the wrong one.
#   export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# The ranks meet at the name of the job's first node; where that is not the address for it:
#   LATTE_MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)-ib
# Seconds that the first rank waits for the last one; else 35, or twice what its own start took, up to 300.
#   export LATTE_ROLL_CALL_S=600

# Caches go to the node's own disk: a home may be read-only or slow, and every rank would write the same files there.
: "${LATTE_CACHE:=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/latte-$(id -u)}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$LATTE_CACHE/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$LATTE_CACHE/inductor}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$LATTE_CACHE/extensions}"

# Compute nodes mostly have no network: fail at once instead of waiting for a download. Fetch encoders on a login node.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# One thread a core that the task was given.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
