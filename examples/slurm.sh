#!/bin/bash
# Training on several machines under Slurm: sbatch examples/slurm.sh [more tessera flags]
# One task per machine; each starts one process per GPU. Submitted again, or requeued, the job goes on where it stopped.
#SBATCH --job-name=tessera
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the time limit this script gets USR1; the checkpoint is written in that time.
#SBATCH --signal=B:USR1@300
set -euo pipefail

MODEL=${MODEL:-my-model}
DATASET=${DATASET:-train.jsonl}
OUTPUT_DIR=${OUTPUT_DIR:-output/slurm-job}

export NNODES=$SLURM_JOB_NUM_NODES
export NPROC_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
# The first machine of the job is node 0. The port depends on the job, so that two jobs on a machine do not collide.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Go on from the newest complete checkpoint, if there is one.
resume=()
if compgen -G "$OUTPUT_DIR/*/checkpoint-*" > /dev/null; then
    resume=(--resume_from_checkpoint true)
fi

# NODE_RANK is known only inside a task. srun ends all tasks when one fails.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec tessera "$@"' tessera \
    sft \
    --model "$MODEL" \
    --dataset "$DATASET" \
    --output_dir "$OUTPUT_DIR" \
    --save_steps 500 \
    "${resume[@]}" "$@" &
step=$!

# Time is nearly up: SIGTERM makes every rank save and stop; then the job queues again, to go on from there.
requeue=false
trap 'requeue=true; kill -TERM "$step"' USR1
# A step that is cancelled by scancel is stopped the same way, but not queued again.
trap 'kill -TERM "$step"' TERM
code=0
wait "$step" || code=$?
while kill -0 "$step" 2> /dev/null; do # wait returns early when a signal arrives
    code=0
    wait "$step" || code=$?
done
if $requeue && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
