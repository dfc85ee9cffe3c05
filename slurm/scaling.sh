#!/bin/bash
# A scaling sweep from plain batch scripts: the same run on 1, 2 and 4 nodes, then one table of them.
#
#     bash slurm/scaling.sh model=gpt2_124m parallel=fsdp
#     NODES="1 2 4 8" SBATCH_PARTITION=gpu bash slurm/scaling.sh name=my_sweep model=gpt2_124m
#
# sbatch reads options from SBATCH_* variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, ...).
# Every point is planned before the first is submitted: where one cannot work, none is.
# `python -m launch -m nodes=1,2,4` does the same and watches the jobs as well.

set -euo pipefail
cd "$(dirname "$0")/.."

read -r -a sizes <<< "${NODES:-1 2 4}"
words=(name=scaling "$@")
for word in "$@"; do
    case "$word" in
        nodes=*)
            printf 'found: %s\nexpected: the numbers of nodes in NODES\ntype next: NODES="1 %s" bash slurm/scaling.sh ...\n' \
                "$word" "${word#nodes=}" >&2
            exit 2
            ;;
    esac
done

# The number of ranks decides what can work: GPUs of a node, as the jobs will be given them.
gpus="${SBATCH_GPUS_PER_NODE:-$(sed -n 's/^#SBATCH --gpus-per-node=\([^ ]*\).*/\1/p' slurm/multi_node.sh)}"

# In a subshell, whose modules and variables sbatch must not hand on. What Slurm has is not compared with what cluster.*
# asks for: these jobs ask by SBATCH_* and by the lines of multi_node.sh.
plan="$(
    # shellcheck source=slurm/env.sh
    source slurm/env.sh
    python -m launch -m "nodes=$(IFS=,; echo "${sizes[*]}")" dry_run=true cluster=slurm launch.check_limits=false \
        ${gpus:+"cluster.gpus_per_node=${gpus##*:}"} "${words[@]}"
)"
if [ "$(grep -c '^point ' <<< "$plan")" != "${#sizes[@]}" ]; then
    grep '^point ' <<< "$plan" >&2
    printf 'found: a sweep within the points\nexpected: one run for each of NODES="%s"\ntype next: %s\n' \
        "${sizes[*]}" "python -m launch -m nodes=..., which sweeps over more" >&2
    exit 2
fi
folder="$(dirname "$(sed -n 's/^  folder  *//p' <<< "$plan" | head -n 1)")"

jobs=()
for nodes in "${sizes[@]}"; do
    job="$(sbatch --parsable --nodes="$nodes" slurm/multi_node.sh "${words[@]}")"
    echo "nodes=$nodes: job $job"
    jobs+=("${job%%;*}")  # of a federation sbatch says the cluster too
done

# sbatch --wrap would run in /bin/sh, which need not understand env.sh.
after="$(IFS=:; echo "${jobs[*]}")"
report="$(sbatch --parsable --nodes=1 --dependency="afterany:$after" --job-name="$(basename "$folder")-report" <<EOF
#!/bin/bash
set -e
source slurm/env.sh
python -m launch.report $(printf '%q' "$folder")
EOF
)"
echo "report: job ${report%%;*}, then $folder/scaling.md"
