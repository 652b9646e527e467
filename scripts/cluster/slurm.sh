#!/usr/bin/env bash
# Label on Slurm: one Ray node per task, the driver on the first.
#
#     sbatch scripts/cluster/slurm.sh /data/images /data/labels convnext_base.fb_in22k_ft_in1k
#
# A job that runs out of time is simply submitted again: what is committed stays. Not tried on a real Slurm by the authors.
#SBATCH --job-name=label
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail
images=$1 store=$2 teacher=$3
bin=${SLURM_SUBMIT_DIR:-.}/.venv/bin
gpus=${SLURM_GPUS_ON_NODE:-4}
port=$((20000 + SLURM_JOB_ID % 20000))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
head_address=$(srun --nodes=1 --ntasks=1 -w "$first" hostname --ip-address | awk '{print $1}')

srun --nodes=1 --ntasks=1 -w "$first" "$bin/ray" start --head --port="$port" --num-gpus="$gpus" --block &
sleep 20  # the head must listen before the others ask for it; they try again by themselves
if ((SLURM_JOB_NUM_NODES > 1)); then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$first" \
        "$bin/ray" start --address="$head_address:$port" --num-gpus="$gpus" --block &
fi

"$bin/python" -m labeler label "$images" --store "$store" --teacher "$teacher" --device cuda \
    --workers $((SLURM_JOB_NUM_NODES * gpus)) --ray-address "$head_address:$port" &
driver=$!
trap 'kill -TERM $driver; wait $driver' TERM
wait $driver
