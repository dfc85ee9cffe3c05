#!/bin/bash
# A scaling sweep from plain batch scripts: the same run on 1, 2 and 4 nodes, then one table.
#
#     bash slurm/scaling.sh model=gpt2_124m parallel=fsdp
#     NODES="1 2 4 8" SBATCH_PARTITION=gpu bash slurm/scaling.sh name=my_sweep model=gpt2_124m
#
# sbatch reads options from SBATCH_* variables (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT, ...).
# Every point is planned, and checked by Slurm, before the first is submitted. If one cannot work, none is submitted.
# `python -m launch.status` shows the points while they wait, and `python -m launch.cancel` cancels them.
# `python -m launch -m nodes=1,2,4` does the same and also watches the jobs.

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

# Submit nothing if Slurm would never start one of the points, which would wait forever.
for nodes in "${sizes[@]}"; do
    if [ "${CHECK_LIMITS:-yes}" = yes ] && ! said="$(sbatch --test-only --nodes="$nodes" slurm/multi_node.sh 2>&1)"; then
        printf 'found: nodes=%s, and Slurm: %s\nexpected: what one job may have here (sinfo -o "%%P %%D nodes %%c CPUs %%m MB %%G %%l")\n' \
            "$nodes" "$(tail -n 1 <<< "$said")" >&2
        printf 'type next: NODES="1 2" bash slurm/scaling.sh ..., or fewer GPUs or CPUs in slurm/multi_node.sh; %s\n' \
            "CHECK_LIMITS=no submits it all the same" >&2
        exit 2
    fi
done

# The plan needs the number of ranks, and so the GPUs of a node in these jobs.
gpus="${SBATCH_GPUS_PER_NODE:-$(sed -n 's/^#SBATCH --gpus-per-node=\([^ ]*\).*/\1/p' slurm/multi_node.sh)}"

# In a subshell, so that sbatch does not pass on its modules and variables. Requests of the jobs come from SBATCH_* and the
# lines of multi_node.sh, not from cluster.*; `sbatch --test-only` above has checked them.
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
# Finished points are not submitted. The plan marks them, in the order of the sizes.
mapfile -t finished < <(awk '/^point /{n++; done[n]="no"} /^  finished /{done[n]="yes"} END{for (i=1; i<=n; i++) print done[i]}' <<< "$plan")
folder="$(dirname "$(sed -n 's/^  folder  *//p' <<< "$plan" | head -n 1)")"

# Make the run folders now, so that status and cancel find the runs while they wait. Each job uses its folder.
run_dirs=()
for index in "${!sizes[@]}"; do
    [ "${finished[$index]}" = yes ] && { run_dirs+=(""); continue; }
    nodes="${sizes[$index]}"
    run_dirs+=("$(
        # shellcheck source=slurm/env.sh
        source slurm/env.sh
        python -m gpt_launch batch --nodes "$nodes" ${gpus:+--gpus-per-node "${gpus##*:}"} "${words[@]}"
    )")
done
again=()
for word in "${words[@]}"; do
    case "$word" in fresh=true | resume_from=*) ;; *) again+=("$word") ;; esac
done

jobs=()
entered=()
for index in "${!sizes[@]}"; do
    if [ "${finished[$index]}" = yes ]; then
        echo "nodes=${sizes[$index]}: finished already, and not submitted (fresh=true runs it again in a new folder)"
        continue
    fi
    job="$(sbatch --parsable --nodes="${sizes[$index]}" slurm/multi_node.sh "${again[@]}")"
    echo "nodes=${sizes[$index]}: job $job"
    jobs+=("${job%%;*}")  # in a federation sbatch also prints the cluster
    entered+=(--submitted "${run_dirs[$index]}" "${job%%;*}")
done
if [ "${#jobs[@]}" = 0 ]; then
    # shellcheck source=slurm/env.sh
    source slurm/env.sh
    exec python -m gpt_launch report "$folder"
fi
(
    # shellcheck source=slurm/env.sh
    source slurm/env.sh
    python -m gpt_launch batch "${entered[@]}"
)

# sbatch --wrap would use /bin/sh, which may not understand env.sh.
after="$(IFS=:; echo "${jobs[*]}")"
report="$(sbatch --parsable --nodes=1 --dependency="afterany:$after" --job-name="$(basename "$folder")-report" <<EOF
#!/bin/bash
set -e
source slurm/env.sh
python -m gpt_launch report $(printf '%q' "$folder")
EOF
)"
echo "report: job ${report%%;*}, then $folder/scaling.md"
