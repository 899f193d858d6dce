#!/bin/bash
# Several nodes under Slurm, from the checkout:
#   sbatch --nodes=2 docs/slurm.sh configs/train_gpt2.py [--key=value ...]
# When its time is nearly up, or on preemption, the run saves; the job is queued again and resumes.
#SBATCH --job-name=ridgegpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
export OMP_NUM_THREADS=8
# A new store after each restart, without the addresses of dead ranks.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Slurm signals this shell alone. It passes the signal on to the ranks (torchrun starts them with
# -u), not to torchrun, which would kill them 30 seconds later. The run saves and exits with 0.
stopping=0
stop_ranks() {
    stopping=1
    srun --overlap --nodes="$SLURM_NNODES" --ntasks-per-node=1 \
        pkill -USR1 -f -- '-u .*train/run[.]py'
}
trap stop_ranks USR1

srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:29500" \
    train/run.py "$@" --init_from=auto &
run=$!
wait $run
code=$?
while [ $stopping -eq 1 ] && kill -0 $run 2>/dev/null; do  # a trap ends `wait` early
    wait $run
    code=$?
done
if [ $stopping -eq 1 ] && [ $code -eq 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
