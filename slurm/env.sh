# shellcheck shell=bash disable=SC2034
#
# Site settings: slurm/*.sh read this file on every node. Edit it here, or edit a copy and point LATTE_ENV to it
# (export LATTE_ENV=$HOME/latte-env.sh). Variables exported before sbatch take precedence.

# The interpreter. `make venv` created .venv; a cluster with environment modules may need these first:
#   module load python/3.11 cuda/12.8
: "${LATTE_PYTHON:=.venv/bin/python}"

# More arguments for srun, as an array: a container (enroot and pyxis), a reservation, a binding.
#   LATTE_SRUN_ARGS=(--container-image=/shared/latte.sqsh --container-mounts=/shared --container-workdir="$PWD")
LATTE_SRUN_ARGS=()

# The network between nodes. By default, torch takes the interface of the host's own name (gloo) and the fastest one it
# finds (nccl). Name it where a host's name resolves to 127.0.1.1, or where torch picks the wrong interface.
#   export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# The ranks meet at the name of the job's first node; where that is the wrong address:
#   LATTE_MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)-ib
# Seconds that the first rank waits for the last one; default: 35, or twice what its own start took, up to 300.
#   export LATTE_ROLL_CALL_S=600

# Caches go to a node-local disk: a home may be read-only or slow, and every rank would write the same files there.
: "${LATTE_CACHE:=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/latte-$(id -u)}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$LATTE_CACHE/triton}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$LATTE_CACHE/inductor}"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$LATTE_CACHE/extensions}"

# Compute nodes often have no network: fail at once instead of waiting for a download. Fetch encoders on a login node.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# One thread per core of the task.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
