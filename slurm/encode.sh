#!/usr/bin/env bash
# Encode clips to latents and embeddings on a Slurm cluster. Submit from the root of the repository:
#
#   sbatch slurm/encode.sh INPUT OUTPUT [configs/X.yaml] [key=value ...] [--retry-failed]
#
#   sbatch slurm/encode.sh /shared/shards /shared/latents                      configs/encode_sd_t5.yaml, 4 tasks
#   sbatch --array=0-63%16 slurm/encode.sh s3://bucket/shards s3://bucket/latents configs/encode_sd_t5.yaml
#   sbatch --array=0-9 --gpus=0 --cpus-per-task=16 slurm/encode.sh shards latents configs/encode_tiny.yaml
#
# Every task of the array runs the same command, with one worker per GPU (per core without GPUs). Each claims shards in
# OUTPUT until all are finished, by whichever task (data_tools/claims.py). Any number of tasks may run, start late, be
# preempted and die: the others, or they themselves after a requeue, encode their shards, to the same bytes. Each ends
# when the whole data set is finished; the last line of each slurm-*.out has its counts.
#
#SBATCH --job-name=latte-encode
#SBATCH --array=0-3
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out

set -uo pipefail
MAX_RESTARTS=100 # of a task, by time limits and preemption
me=${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-}}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}

stop() { # CODE WORDS...: end this task, for good
    echo "$(date '+%F %T') task $me stops (exit code $1): ${*:2}"
    exit "$1"
}

: "${SLURM_JOB_ID:?this is a job script: submit it with sbatch slurm/encode.sh INPUT OUTPUT}"
[[ -d data_tools ]] || stop 2 "submit from the root of the repository (or with --chdir), not $PWD"
# shellcheck source=slurm/env.sh
source "${LATTE_ENV:-slurm/env.sh}" || stop 2 "${LATTE_ENV:-slurm/env.sh} cannot be read"
[[ $# -ge 2 && $1 != -* && $2 != -* ]] || stop 2 "expected INPUT OUTPUT [configs/X.yaml] [key=value ...], got: $*"
input=$1 output=$2 && shift 2
config=configs/encode_sd_t5.yaml
if [[ $# -gt 0 && $1 != *=* && $1 != -* ]]; then config=$1 && shift; fi

gpus=${SLURM_GPUS_ON_NODE:-0}
workers=$((gpus > 0 ? gpus : ${SLURM_CPUS_PER_TASK:-1}))
echo "$(date '+%F %T') task $me restart ${SLURM_RESTART_COUNT:-0}: $workers workers on $(hostname); $input -> $output, $config $*"

# ---- run it; a signal ends the command at once, as its finished shards are kept and the one it is at is made again ----

asked=""
inside=() # a container's interpreter is not on this host
# shellcheck disable=SC2016 # expanded in the container
[[ ${#LATTE_SRUN_ARGS[@]} -eq 0 ]] ||
    inside=(srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${LATTE_SRUN_ARGS[@]}" bash -c 'exec "$@"' inside)
${inside[@]+"${inside[@]}"} "$LATTE_PYTHON" -u -m data_tools.cli encode --input "$input" --output "$output" --config "$config" \
    --workers "$workers" "$@" &
command_pid=$!
trap 'asked="the time limit"; kill -TERM $command_pid' USR1
trap 'asked="Slurm ends it"; kill -TERM $command_pid' TERM
code=0
while kill -0 "$command_pid" 2>/dev/null; do wait "$command_pid" && code=0 || code=$?; done

case $code in
0) stop 0 "the data set is finished" ;;
1 | 2) stop "$code" "see the lines above" ;; # nothing could be encoded; a mistake in the command: the same again
esac
# 75: its workers were killed; 128 and more: it was killed itself
[[ $asked == "Slurm ends it" ]] && stop "$code" "$asked; a preempted task is requeued by Slurm"
[[ ${SLURM_RESTART_COUNT:-0} -lt $MAX_RESTARTS ]] || stop "$code" "after ${SLURM_RESTART_COUNT} restarts"
echo "$(date '+%F %T') task $me is requeued (exit code $code): ${asked:-it was killed}"
scontrol requeue "$me" || stop "$code" "it could not be requeued: submit it again, finished shards are kept"
