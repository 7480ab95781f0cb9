#!/usr/bin/env bash
# Train on a Slurm cluster. Submit from the root of the repository (slurm/README.md explains every step):
#
#   sbatch slurm/train_t2v.sh [configs/X.yaml] [key=value ...] [--allow-change KEY]
#
#   sbatch slurm/train_t2v.sh                                            configs/t2v_256.yaml, 2 nodes of 8 GPUs
#   sbatch --nodes=8 slurm/train_t2v.sh configs/t2v_512.yaml engine.kind=zero engine.zero_stage=3
#   sbatch --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 slurm/train_t2v.sh configs/t2v_256.yaml train.micro_batch=2
#
# The job requeues itself when it is preempted, before its time limit and after a failure. It then resumes in the same run
# folder from the newest checkpoint, with the losses of an uninterrupted run. It ends when train.steps is reached, when
# the trainer reports that running it again unchanged is pointless (exit code 78), or after three failures in a row
# without a new checkpoint between them. `scancel JOB` stops it: it saves and is not requeued.
#
# There is one task per GPU, not one task per node that starts torchrun. Slurm's signals then reach every rank, and exit
# codes come back (torchrun does not forward USR1 and turns 75 into 1); there is one log per rank; and no agent stands
# between a rank and the daemon that must end it. A requeue does the restarts that torchrun would add, on healthy nodes.
#
#SBATCH --job-name=latte
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# --signal: seconds before the limit, for the ranks to finish a step and a save; exit.json says how long a save took.

set -uo pipefail
MAX_FAILURES=3
SRUN_WAIT_S=15 # after the first rank has left, for the others to say why they do; all leave together after a save

stop() { # CODE WORDS...: end the job, for good
    echo "$(date '+%F %T') job ${SLURM_JOB_ID} stops (exit code $1): ${*:2}"
    exit "$1"
}

# ---- what to run ----------------------------------------------------------------------------------------------------

: "${SLURM_JOB_ID:?this is a job script: submit it with sbatch slurm/train_t2v.sh}"
[[ -d latte_scale ]] || stop 78 "submit from the root of the repository (or with --chdir), not $PWD"
# shellcheck source=slurm/env.sh
source "${LATTE_ENV:-slurm/env.sh}" || stop 78 "${LATTE_ENV:-slurm/env.sh} cannot be read"
config=configs/t2v_256.yaml
if [[ $# -gt 0 && $1 != *=* && $1 != -* ]]; then config=$1 && shift; fi
restart=${SLURM_RESTART_COUNT:-0}
inside=() # a container's interpreter is not on this host
# shellcheck disable=SC2016 # expanded in the container
[[ ${#LATTE_SRUN_ARGS[@]} -eq 0 ]] ||
    inside=(srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${LATTE_SRUN_ARGS[@]}" bash -c 'exec "$@"' inside)
run=$(${inside[@]+"${inside[@]}"} "$LATTE_PYTHON" -m latte_scale.run "$config" "$@") || stop 78 "no run folder: see the line above"
[[ $restart -eq 0 || -d $run/logs ]] || stop 1 "run.dir $run, which this job had made, is not there: is its disk mounted on $(hostname)?"
mkdir -p "$run/logs" || stop 78 "run.dir $run cannot be made: set run.dir to a folder that every node may write"

tasks_per_node=${SLURM_NTASKS_PER_NODE:?give --ntasks-per-node, the number of GPUs of a node}
if [[ -n ${SLURM_GPUS_ON_NODE:-} && $SLURM_GPUS_ON_NODE -ne $tasks_per_node ]]; then
    stop 78 "$tasks_per_node tasks a node on $SLURM_GPUS_ON_NODE GPUs a node: give --ntasks-per-node=$SLURM_GPUS_ON_NODE"
fi
if [[ $SLURM_NTASKS -ne $((SLURM_JOB_NUM_NODES * tasks_per_node)) ]]; then
    stop 78 "$SLURM_NTASKS tasks, expected $SLURM_JOB_NUM_NODES nodes x $tasks_per_node: leave --ntasks to Slurm"
fi

# Static rendezvous: the first node of this attempt (a MASTER_ADDR that you have exported does not count), and a port
# that an earlier attempt of the job, which may live on, does not hold.
export MASTER_ADDR="${LATTE_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT=$((15000 + (SLURM_JOB_ID * 16 + restart % 16) % 16000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$tasks_per_node SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# shellcheck disable=SC2016 # expanded by each task
as_rank='RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"'

# ---- run it ---------------------------------------------------------------------------------------------------------

echo "$(date '+%F %T') job $SLURM_JOB_ID restart $restart: $WORLD_SIZE ranks on $SLURM_JOB_NODELIST; $config $*"
echo "  run folder $run; to follow it: tail -f $run/logs/rank-00000.out"
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # for sites that signal the script: --signal=B:USR1@...
trap : TERM                                       # Slurm ends the job: let the ranks save first
srun --kill-on-bad-exit=0 --wait="$SRUN_WAIT_S" --gpu-bind=none --open-mode=append --output="$run/logs/rank-%5t.out" \
    ${LATTE_SRUN_ARGS[@]+"${LATTE_SRUN_ARGS[@]}"} bash -c "$as_rank" rank \
    "$LATTE_PYTHON" -u -m latte_scale.train --config "$config" "$@" &
srun_pid=$!
code=0
while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid" && code=0 || code=$?; done # a signal ends `wait`, not srun

# ---- how it ended ---------------------------------------------------------------------------------------------------

exit_field() { # NAME: a field of this attempt's exit.json; nothing if it is another's
    sed -n "/\"job_id\": \"$SLURM_JOB_ID\", \"restart\": $restart,/s/.*\"$1\": \([^,}]*\).*/\1/p" "$run/exit.json" 2>/dev/null
}

job_state() { # as the controller sees it, which may be restarting
    local words
    for _ in {1..60}; do
        words=$(scontrol show job --oneliner "$SLURM_JOB_ID" 2>/dev/null) && break
        sleep 5
    done
    # A node that Slurm had given up may come back with this script on it, while the next attempt runs elsewhere.
    [[ $words == *" Restarts=$restart "* ]] || { echo "taken over" && return; }
    sed -n 's/.* JobState=\([A-Z_]*\) .*/\1/p' <<<"$words"
}

requeue() { # WORDS...: run the job again, unless Slurm is ending it (scancel) or requeues it already
    local state
    state=$(job_state)
    [[ $state == RUNNING ]] || stop "$code" "$*; Slurm says $state, so it is left alone"
    echo "$(date '+%F %T') job $SLURM_JOB_ID is requeued, $(squeue -h -o %L -j "$SLURM_JOB_ID") of its time left: $*"
    for _ in {1..60}; do
        scontrol requeue "$SLURM_JOB_ID" && exit 0
        sleep 5
    done
    stop "$code" "it could not be requeued: $*"
}

said=$(exit_field code) # exit.json alone says "finished": srun returns 0 too when it has lost a node
if [[ -n $said ]]; then
    reason=$(cat "$run/exit.json")
else
    reason=$(tail -qn 3 "$run"/logs/rank-*.out 2>/dev/null | grep -m 1 '^error')
fi
reason="$reason (srun: $code; logs: $run/logs)"
[[ $code == 78 && $said != 0 && $said != 75 ]] && said=78 # a rank forbids a requeue, before it could write it down
case $said in
0) stop 0 "finished" ;;
75) code=75 && requeue "$reason" ;;
78) stop 78 "$reason" ;;
esac
[[ $code == 0 ]] && code=1
if [[ -z $said && ($code == 138 || $code == 143) ]]; then # USR1 or TERM, while they imported: no setting is wrong
    reason="stopped by a signal before the ranks listened to it $reason"
elif [[ -z $said && $restart -eq 0 ]] && ! grep -q "\"job_id\": \"$SLURM_JOB_ID\", \"restart\": 0," "$run/lease.json" 2>/dev/null; then
    stop "$code" "the ranks ended before they held the run folder, or another attempt holds it: $reason"
fi # a restart has been started well before: it is tried again, as after any other failure
resumed_at=$(tail -n 1 "$run/logs/restarts.jsonl" 2>/dev/null | sed -n 's/.*"step": \([0-9]*\).*/\1/p')
echo "${resumed_at:-0}" >>"$run/logs/failures.txt" # the step from which the attempt that failed had started
if [[ $(tail -n "$MAX_FAILURES" "$run/logs/failures.txt" | uniq -c | awk 'NR == 1 {print $1}') -ge $MAX_FAILURES ]]; then
    stop "$code" "$MAX_FAILURES failures in a row from step ${resumed_at:-0}: $reason"
fi
requeue "failed: $reason"
