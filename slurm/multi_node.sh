#!/bin/bash
# One run on the nodes of this job:
#
#     sbatch slurm/multi_node.sh model=gpt2_124m parallel=fsdp
#     sbatch --nodes=4 --gpus-per-node=8 slurm/multi_node.sh model=llama_1p3b optim=gpt2
#
# Type it in the folder of the checkout. Options of sbatch go before the script, overrides of the run after it. The same
# command resumes from the last checkpoint. The run works as under `python -m launch`: one agent on each node starts a
# rank for each GPU.

#SBATCH --job-name=gpt             # change: name in squeue
#SBATCH --nodes=2                  # change: number of nodes
#SBATCH --ntasks-per-node=1        # keep: one agent a node; it starts the ranks
##SBATCH --gpus-per-node=8         # change and remove one #: GPUs of each node, one rank on each
##SBATCH --cpus-per-task=64        # change and remove one #: CPUs of each node, for all its ranks together
##SBATCH --partition=gpu           # change and remove one #: your site's partition
##SBATCH --account=myproject       # change and remove one #: your account
#SBATCH --time=01:00:00            # change: the time limit
#SBATCH --signal=USR2@120          # change: seconds before the limit at which the run saves and leaves
##SBATCH --mail-user=me@site.edu   # change and remove one #: address for mail about this job
##SBATCH --mail-type=BEGIN,END,FAIL,REQUEUE  # remove one # with the line above: events that send mail
#SBATCH --output=slurm-%j.out      # change: file for the output of this script and the agents
##SBATCH --no-kill                 # remove one # for spare_nodes=1 or resilience.min_nodes=1: the job then survives a lost node, with a spare or without
#SBATCH --requeue                  # keep: a preempted job, or one whose node dies, goes back into the queue
#SBATCH --open-mode=append         # keep: a requeued job appends to the same file

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f slurm/env.sh ]; then
    printf 'found: no slurm/env.sh in %s\nexpected: sbatch in the folder of the checkout\ntype next: cd CHECKOUT && sbatch slurm/multi_node.sh ...\n' "$PWD" >&2
    exit 2
fi
# shellcheck source=slurm/env.sh
source slurm/env.sh

# Outside of a job: check the plan, and print what submits it.
if [ -z "${SLURM_JOB_ID:-}${SLURM_SUBMIT_DIR:-}" ]; then
    nodes="${SBATCH_NODES:-$(sed -n 's/^#SBATCH --nodes=\([0-9]*\).*/\1/p' slurm/multi_node.sh)}"
    gpus="${SBATCH_GPUS_PER_NODE:-$(sed -n 's/^#SBATCH --gpus-per-node=\([^ ]*\).*/\1/p' slurm/multi_node.sh)}"
    plan="$(python -m gpt_launch "nodes=$nodes" cluster=slurm launch.check_limits=false dry_run=true \
        ${gpus:+"cluster.gpus_per_node=${gpus##*:}"} "$@")"
    sed '/^sbatch text/,$d' <<< "$plan"
    asked="$(sed -n 's/^#SBATCH --nodes=//p' <<< "$plan")"  # more than the header's if nodes or spare_nodes were typed
    printf 'checked, and not submitted; type next: sbatch --nodes=%s slurm/multi_node.sh%s\n' "${asked:-$nodes}" "${*:+$(printf ' %q' "$@")}"
    exit 0
fi

# Plan for the nodes of this job, refuse what cannot work, and write the run folder.
run_dir="$(python -m gpt_launch batch "$@")"

# The command of an agent: by this Python, or the one of cluster.container.
agent_words="$(python -m gpt_launch batch --agent-command "$run_dir")"
mapfile -t agent <<< "$agent_words"

# A node that is lost, or whose ranks failed, must not end the other nodes: the agents stop them, or continue without it.
status=0
srun --kill-on-bad-exit=0 --no-kill --wait=0 "${agent[@]}" || status=$?

# Requeue the job if srun was killed, or failed because a node rebooted.
if [ "$status" -ne 0 ]; then
    after="$status"
    status=0
    python -m gpt_launch launch.agent.after_step "$after" "$run_dir" || status=$?
fi

python -m gpt_launch report "$run_dir" || true
exit "$status"
