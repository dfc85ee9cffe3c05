# shellcheck shell=bash
# Sourced by multi_node.sh on the head node of the job. Change it for your site; srun passes the environment to all nodes.

# module load cuda                      # change: your site's modules
# conda activate gpt-launch             # change: your environment; by default the checkout's own .venv is used
if [ -x "$PWD/.venv/bin/python" ]; then
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
fi

# One thread for each rank, as torchrun sets it. With more threads, ranks on the same cores wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi
# export NCCL_DEBUG=WARN                # change: INFO to debug collectives
