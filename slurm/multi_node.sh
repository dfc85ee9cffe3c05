#!/bin/bash
# One run on the nodes of this job:
#
#     sbatch slurm/multi_node.sh model=gpt2_124m parallel=fsdp
#     sbatch --nodes=4 --gpus-per-node=8 slurm/multi_node.sh model=llama_1p3b optim=gpt2
#
# Type it in the folder of the checkout. Options of sbatch go before the script, overrides of the run behind it. The same
# command again goes on from the last checkpoint. The run takes the same road as `python -m launch`: one agent on each
# node, which starts a rank for each GPU.

#SBATCH --job-name=gpt             # change: what squeue shows
#SBATCH --nodes=2                  # change: how many nodes
#SBATCH --ntasks-per-node=1        # keep: one agent a node; it starts the ranks
##SBATCH --gpus-per-node=8         # change and remove one #: GPUs of each node, one rank on each
##SBATCH --cpus-per-task=64        # change and remove one #: CPUs of each node, for all its ranks together
##SBATCH --partition=gpu           # change and remove one #: your site's partition
##SBATCH --account=myproject       # change and remove one #: who pays
#SBATCH --time=01:00:00            # change: the time limit
#SBATCH --signal=USR2@120          # change: seconds before the limit at which the run saves and leaves
##SBATCH --mail-user=me@site.edu   # change and remove one #: who gets mail about this job
##SBATCH --mail-type=BEGIN,END,FAIL,REQUEUE  # remove one # with the line above: what about
#SBATCH --output=slurm-%j.out      # change: where this script and the agents write
##SBATCH --no-kill                 # remove one # to type spare_nodes=1 or resilience.min_nodes=1: a lost node must not end the job, which goes on with a spare or without
#SBATCH --requeue                  # keep: a preempted job, or one whose node dies, goes back into the queue
#SBATCH --open-mode=append         # keep: a requeued job goes on in the same file

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f slurm/env.sh ]; then
    printf 'found: no slurm/env.sh in %s\nexpected: sbatch in the folder of the checkout\ntype next: cd CHECKOUT && sbatch slurm/multi_node.sh ...\n' "$PWD" >&2
    exit 2
fi
# shellcheck source=slurm/env.sh
source slurm/env.sh

# Plans for the nodes of this job, refuses what cannot work, and writes the run folder.
run_dir="$(python -m gpt_launch batch "$@")"

# What starts the agent of a node: this Python, or the one of cluster.container.
agent_words="$(python -m gpt_launch batch --agent-command "$run_dir")"
mapfile -t agent <<< "$agent_words"

# A node whose ranks failed, or that is lost, must not take the others along: they end in order, or go on with a spare or without.
status=0
srun --kill-on-bad-exit=0 --no-kill --wait=0 "${agent[@]}" || status=$?

# Where nobody wanted that end (srun was killed, or gave up for a node that rebooted) the job goes back into the queue.
if [ "$status" -ne 0 ]; then
    after="$status"
    status=0
    python -m gpt_launch launch.agent.after_step "$after" "$run_dir" || status=$?
fi

python -m gpt_launch report "$run_dir" || true
exit "$status"
