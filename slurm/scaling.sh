#!/bin/bash
# A scaling sweep from plain batch scripts: the same run on 1, 2 and 4 nodes, then one table of them.
#
#     bash slurm/scaling.sh model=gpt2_124m parallel=fsdp
#     NODES="1 2 4 8" SBATCH_PARTITION=gpu bash slurm/scaling.sh name=my_sweep model=gpt2_124m
#
# sbatch reads options from SBATCH_* variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, ...).
# `python -m launch -m nodes=1,2,4` does the same and watches the jobs as well.

set -euo pipefail
cd "$(dirname "$0")/.."

name="scaling"
for word in "$@"; do
    case "$word" in
        name=*) name="${word#name=}" ;;
    esac
done

jobs=()
for nodes in ${NODES:-1 2 4}; do
    job="$(sbatch --parsable --nodes="$nodes" slurm/multi_node.sh "name=$name" "$@")"
    echo "nodes=$nodes: job $job"
    jobs+=("$job")
done
after="$(IFS=:; echo "${jobs[*]}")"
report="$(sbatch --parsable --nodes=1 --dependency="afterany:$after" --job-name="$name-report" \
    --output="slurm-%j.out" --wrap "source slurm/env.sh && python -m launch.report 'outputs/$name'")"
echo "report: job $report, then outputs/$name/scaling.md"
