"""Command lines that ``same_results`` runs in two checkouts: plans, refusals, and layouts of short training runs.

Every command line is split as a shell splits it, and runs in a folder that holds nothing but ``FILES``.
"""

from __future__ import annotations

from dataclasses import dataclass

STEPS = r"""for step in $(seq 30); do
    sleep 0.02
    if [ "$RANK" = 0 ]; then printf 'iter %d: loss %d.5, time %d.25ms\n' "$step" $((40 - step)) $((20 + step % 3)); fi
done
"""
"""Shell script that prints 30 training steps."""

FILES = {
    "train.py": "print('no step')\n",
    "steps.sh": STEPS,
    "pkg/__init__.py": "",
    "pkg/train.py": "print('no step')\n",
    "corpus.txt": "to be or not to be\n" * 5_000,
    "empty/.keep": "",
}
"""File name -> content of the files in the folder of every command line."""

H100 = "cluster=slurm cluster.gpus_per_node=8 'cluster.gpu_name=NVIDIA H100 80GB HBM3' launch.check_limits=false"
A100 = "cluster=slurm cluster.gpus_per_node=4 cluster.gpu_name=A100-80GB launch.check_limits=false"
CPU = "cluster=slurm cluster.gpus_per_node=0 launch.check_limits=false"
HERE = "cluster=local device=cpu"
SCRIPT = "workload=script script.path=train.py"
PROGRESS = r"'script.progress=iter (?P<step>\d+): loss (?P<loss>[\d.]+), time (?P<step_time_ms>[\d.]+)ms'"

PLANS = {
    "one run here": HERE,
    "sweep here": f"-m nodes=1,2,4 {HERE}",
    "ranks of a node": f"-m ranks_per_node=1,2,4 {HERE}",
    "sweep of two axes here": f"-m nodes=1,2 optim.lr=1e-3,3e-4 {HERE}",
    "sweep of three axes": f"-m nodes=1,2 parallel=ddp,fsdp precision=bf16,fp32 {H100}",
    "weak scaling": f"-m +experiment=weak_scaling {H100}",
    "strong scaling": f"-m +experiment=strong_scaling {A100} optim.global_batch=64",
    "scaling of GPT-2 on a node": f"-m +experiment=scaling_117m {H100}",
    "experiment on synthetic data": f"+experiment=synthetic {HERE}",
    "gpt2 fsdp": f"-m nodes=1,2,4 model=gpt2_124m optim=gpt2 parallel=fsdp {H100}",
    "llama tensor parallel": f"nodes=4 model=llama_1p3b optim=gpt2 parallel=fsdp_tp {H100}",
    "llama auto": f"nodes=4 model=llama_1p3b optim=gpt2 parallel=auto {H100}",
    "llama auto on A100": f"-m nodes=1,2 model=llama_124m optim=gpt2 parallel=auto {A100}",
    "hybrid shards": f"nodes=2 model=gpt2_1p36b optim=gpt2 parallel=hsdp {H100}",
    "context parallel": f"nodes=2 model=llama_124m optim=gpt2 parallel=fsdp_cp recompute=selective {H100}",
    "three dimensions": f"nodes=2 model=llama_1p36b optim=gpt2 parallel=3d {H100}",
    "experts": f"-m nodes=1,2 model=moe_200m optim=gpt2 parallel=ep cluster.price_per_gpu_hour=2.5 {H100}",
    "zero3 and pipelines": f"-m nodes=2 model=gpt2_124m optim=gpt2 parallel=zero3,ds_pp,pp {H100}",
    "zero1 with offload": f"-m nodes=2 model=gpt2_124m optim=gpt2 parallel=zero1,zero3_offload {H100}",
    "text of a file": f"data=text data.path=corpus.txt optim.max_steps=100 {HERE}",
    "nodes without GPUs": f"nodes=2 ranks_per_node=4 {CPU}",
    "whole nodes": f"-m nodes=1,2 cluster.exclusive=true {H100}",
    "shared nodes": f"-m nodes=1,2 cluster.exclusive=false cluster.cpus_per_task=16 cluster.mem_gb=200 {A100}",
    "one point after another": f"-m nodes=1,2 seed=1,2 launch.sequential=true {A100}",
    "spare nodes": f"nodes=4 spare_nodes=1 resilience.min_nodes=2 model=gpt2_124m optim=gpt2 parallel=fsdp {H100}",
    "placement": f"""nodes=2 {H100} cluster.retry_interval_min=10 cluster.give_up_after_min=120
        cluster.placement='[{{partition: gpu, qos: high}},{{partition: low, gres: "gpu:a100:4"}},{{account: b}}]'""",
    "container of pyxis": f"""nodes=2 {A100} cluster.container=/images/gpt.sqsh cluster.container_runtime=pyxis
        'cluster.container_mounts=["/data","/scratch/me:/scratch:ro"]'""",
    "container of Apptainer": f"""nodes=2 {A100} cluster.container=/images/gpt.sif
        cluster.container_runtime=apptainer cluster.python=/opt/python""",
    "the words of a site": f"""nodes=4 {H100} optim.global_batch=64 'name=my run' cluster.partition=gpu
        cluster.account=abc cluster.qos=high
        cluster.constraint=fast cluster.exclude="'n[3-4]'" cluster.timeout_min=90 resilience.grace_period_s=280
        'cluster.setup=["module load cuda","export X=1"]' 'cluster.srun_args=["--cpu-bind=none"]'
        '++cluster.additional_parameters={{reservation: spring}}'""",
    "sequential after a dependency": f"""-m nodes=1,2 {A100} launch.sequential=true
        '++cluster.additional_parameters={{dependency: singleton}}'""",
    "budget and restarts": f"""-m nodes=1,2 {H100} budget.gpu_hours=100 budget.cost=300 cluster.price_per_gpu_hour=2
        resilience.max_restarts.crashed=5 launch.on_event=sh""",
    "no requeue": f"nodes=2 {A100} resilience.requeue=false checkpoint.interval=10min",
    "an array": f"-m nodes=2 seed=1,2,3,4 {A100} cluster.array_parallelism=2 launch.detach=true",
    "script with arguments": f"-m nodes=1,2 {SCRIPT} 'script.args=\"--batch_size=8 --max_iters=200\"' {H100}",
    "script with options": f"-m nodes=1,2 {SCRIPT} script.options.lr=1e-3,3e-4 script.options.on=true {A100}",
    "script with progress": f"""nodes=2 {SCRIPT} {HERE.split()[0]} {PROGRESS} script.work_per_step=512
        script.unit=images script.max_steps=500 script.silence_timeout_s=600""",
    "script that is a module": f"""nodes=2 workload=script script.module=pkg.train script.style=hydra
        'script.args=["--n","${{nodes}}"]' script.options.model.depth=3 {A100}""",
    "script that is a command": f"nodes=2 workload=script 'script.command=[sh,-c,\"echo 1\"]' script.env.A=1 {CPU}",
    "script that resumes": f"""nodes=4 {SCRIPT} script.resumes=true script.elastic=true resilience.min_nodes=2
        'script.resume_args="--resume ${{checkpoint_dir}}"' script.stop_signal=SIGUSR2 {A100}""",
    "script in a placement": f"""nodes=2 {SCRIPT} script.weak_scaling=true {CPU}
        cluster.placement='[{{partition: a, gpus_per_node: 2}}, {{partition: b, gpus_per_node: 4}}]'""",
}
"""Name -> arguments of ``python -m launch``. ``same_results`` adds ``dry_run=true`` to each."""

ON_A_CLUSTER = {
    "limits of a partition": "-m nodes=1,2 cluster.partition=low",
    "CPUs of a node": "nodes=1 ranks_per_node=2 cluster.exclusive=false",
    "places it refuses": "nodes=2 'cluster.placement=[{partition: short},{partition: low},{partition: closed}]'",
    "script on a cluster": f"-m nodes=1,2 {SCRIPT} cluster.timeout_min=100 cluster.constraint=fast",
}
"""Like ``PLANS``, for command lines that need a Slurm cluster. Scripts that imitate Slurm's commands print the limits
of a small cluster (``SCONTROL``).
"""


@dataclass(frozen=True)
class Refusal:
    """A wrong command line, and the words that the refusal must contain."""

    line: str
    key: str
    """Wrong key, option, file or word, as typed, which the refusal must contain."""
    value: str = ""
    """Wrong value; empty if the refusal need not contain a value."""
    on_a_cluster: bool = False
    """True if the command line needs the replacements of Slurm's commands (``SCONTROL``)."""
    parts: bool = True
    """False if the message need not have the three parts "found", "expected" and "type next"."""


RENAMED = {"-m launch.agent.after_step": "-m gpt_launch launch.agent.after_step"}
"""Former text of a batch script -> today's text. ``same_results`` ignores these differences only."""

GONE = {
    f"{key}: null"
    for key in (
        "strict",
        "snapshot",
        "spares",
        "micro_batch",
        "stop_grace_s",
        "frozen_timeout_s",
        "hang_timeout_slow_s",
    )
} | {"attainable: null", "links:", "links: []", "bind_cpus: true"}
"""Lines of a composed config with keys that the second checkout no longer has. ``same_results`` removes these lines
from the configs of the recorded runs."""

REFUSALS = (
    # Keys
    Refusal("launch model.n_layr=3", "model.n_layr", "3"),
    Refusal("launch +foo=17", "foo", "17"),
    Refusal("launch node=2", "node", "2"),
    Refusal("launch gpus=8", "gpus", "8"),
    Refusal("launch batch_size=4", "batch_size", "4"),
    Refusal("launch optim.learning_rate=1e-3", "optim.learning_rate", "1e-3"),
    Refusal("launch bf16=true", "bf16"),
    Refusal("launch parallel.tensor=2", "parallel.tensor", "2"),
    Refusal("launch cluster.time=1:30:00", "cluster.time"),
    Refusal("launch resilience.max_restart.crashed=1", "resilience.max_restart", "1"),
    Refusal("launch gradient_accumulation_steps=2", "gradient_accumulation_steps"),
    Refusal("launch ~model", "~model"),
    # Values and types
    Refusal("launch precision=fp23", "precision", "fp23"),
    Refusal("launch optim.max_steps=many", "optim.max_steps", "many"),
    Refusal("launch nodes=two", "nodes", "two"),
    Refusal("launch dry_run=perhaps", "dry_run", "perhaps"),
    Refusal("launch cluster.mem_gb=lots", "cluster.mem_gb", "lots"),
    Refusal("launch launch.report_files=[pdf]", "launch.report_files", "pdf"),
    Refusal("launch launch=3", "launch", "3"),
    # Groups
    Refusal("launch model=gpt5", "model", "gpt5"),
    Refusal("launch cluster=mars", "cluster", "mars"),
    Refusal("launch parallel=[ddp,fsdp]", "parallel", "[ddp,fsdp]"),
    Refusal("launch +experiment=strong_scalling", "experiment", "strong_scalling"),
    Refusal("launch workload=skript", "workload", "skript"),
    # What Hydra cannot read
    Refusal("launch nodes", "nodes"),
    Refusal("launch nodes==2", "nodes", "2"),
    Refusal("launch 'cluster.exclude=n[3-4]'", "cluster.exclude", "n[3-4]"),
    Refusal("launch nodes=2,3", "nodes", "3"),
    Refusal("launch outputs/x", "outputs/x"),
    # Ranges
    Refusal("launch nodes=0", "nodes", "0"),
    Refusal("launch nodes=-2", "nodes", "-2"),
    Refusal("launch cluster.timeout_min=0", "cluster.timeout_min", "0"),
    Refusal("launch launch.poll_s=0.1", "launch.poll_s", "0.1"),
    Refusal("launch resilience.max_restarts.crashed=-1", "resilience.max_restarts.crashed", "-1"),
    # Contradictions between keys
    Refusal("launch -m nodes=2,3 cluster=local", "nodes", "3"),
    Refusal("launch model.n_head=3", "model.n_head", "3"),
    Refusal("launch optim.min_lr=1", "optim.min_lr", "1"),
    Refusal("launch cluster.gpus_per_node=2 ranks_per_node=4", "ranks_per_node", "4"),
    Refusal("launch device=cuda nodes=64 optim.global_batch=64", "64 ranks"),
    Refusal("launch nodes=2 resilience.min_nodes=3", "resilience.min_nodes", "3"),
    Refusal("launch cluster.timeout_min=1 resilience.grace_period_s=90", "resilience.grace_period_s", "90"),
    Refusal("launch parallel.tp=3 nodes=3", "parallel.tp", "3"),
    Refusal("launch -m resilience.grace_period_s=10,20", "folder"),
    Refusal("launch budget.cost=5 cluster.gpus_per_node=8", "budget.cost", "5"),
    Refusal("launch budget.gpu_hours=-1 cluster.gpus_per_node=8", "budget.gpu_hours", "-1"),
    Refusal(f"launch {H100} budget.gpu_hours=1 nodes=4 optim.global_batch=64", "budget.gpu_hours", "1"),
    Refusal("launch cluster=slurm cluster.container=/nowhere.sif", "cluster.container", "/nowhere.sif"),
    Refusal("launch cluster=slurm launch.sequential=true 'cluster.placement=[{partition: a}]'", "launch.sequential"),
    Refusal("launch cluster=slurm cluster.mail_typ=FINISHED", "cluster.mail_typ", "FINISHED"),
    Refusal("launch launch.detach=true cluster=local", "launch.detach"),
    # Files and names
    Refusal("launch data=text data.path=/nowhere.txt", "/nowhere.txt"),
    Refusal("launch name=../../escape", "name", "../../escape"),
    Refusal("launch --config-dir /nowhere nodes=2", "/nowhere"),
    # Scripts
    Refusal("launch workload=script", "script.path"),
    Refusal("launch workload=script script.path=trian.py", "trian.py"),
    Refusal("launch workload=script script.module=pkg.trian", "pkg.trian"),
    Refusal(f"launch {SCRIPT} script.module=pkg.train", "script.module"),
    Refusal(f"launch {SCRIPT} model.n_layer=2", "model.n_layer", "2"),
    Refusal(f"launch {SCRIPT} script.option.lr=3", "script.option", "3"),
    Refusal(f'launch {SCRIPT} "script.args=\'--a \\"b\'"', "script.args"),
    Refusal(f"launch {SCRIPT} \"script.args='--n ${{node}}'\"", "script.args", "${node}"),
    Refusal(f"launch {SCRIPT} 'script.progress=step (?P<stepp>x)'", "script.progress"),
    Refusal(f"launch {SCRIPT} script.stop_signal=SIGKILL", "script.stop_signal", "SIGKILL"),
    Refusal(f"launch {SCRIPT} resilience.min_nodes=1 nodes=2", "resilience.min_nodes", "1"),
    # Flags of other launchers
    Refusal("launch --nproc-per-node=2", "--nproc-per-node", "2"),
    Refusal("launch --time 1:00:00", "--time"),
    Refusal("launch --nnodes 2 train.py", "--nnodes", "2"),
    Refusal("launch run nodes=2", "run", "run"),
    Refusal("launch status outputs", "status", "outputs"),
    # A cluster that does not have it
    Refusal("launch cluster.partition=lwo", "cluster.partition", "lwo", on_a_cluster=True),
    Refusal("launch nodes=9 optim.global_batch=36", "nodes", "9", on_a_cluster=True),
    Refusal("launch cluster.partition=short cluster.timeout_min=90", "cluster.timeout_min", "30", on_a_cluster=True),
    Refusal("launch cluster.cpus_per_task=999", "cluster.cpus_per_task", "999", on_a_cluster=True),
    # Other commands
    Refusal("launch.report nowhere", "nowhere"),
    Refusal("launch.report empty", "empty"),
    Refusal("launch.report empty --files pdf", "pdf"),
    Refusal("launch.report empty --swep 2", "--swep"),
    Refusal("launch.status nowhere", "nowhere"),
    Refusal("launch.status --jsn", "--jsn"),
    Refusal("launch.logs nowhere", "nowhere"),
    Refusal("launch.logs empty --rank x", "x"),
    Refusal("launch.verify nowhere", "nowhere"),
    Refusal("launch.cancel nowhere", "nowhere"),
    Refusal("launch.move nowhere", "nowhere"),
    Refusal("launch.project empty", "--nodes"),
    Refusal("launch.project nowhere --nodes 8,16", "nowhere"),
    Refusal("launch.project empty --nodes eight", "eight"),
    Refusal("launch.project empty --nodes 8 --mtbf-hours -3", "--mtbf-hours", "-3"),
    Refusal("launch.project --fit 'big model'", "big model"),
    Refusal("launch.doctor nodes=0", "nodes", "0", parts=False),
)

SCONTROL = """#!/bin/sh
# scontrol of a small cluster: answers the queries of the launcher before it submits.
case "$*" in
*ping*) echo "Slurmctld(primary) at ctl is UP" ;;
*config*) cat <<END
AccountingStorageType   = accounting_storage/none
ClusterName             = sandbox
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = 1001
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SelectTypeParameters    = CR_CPU
SLURM_VERSION           = 22.05.8
END
;;
*partition*)
for words in "low Default=YES MaxTime=1-00:00:00 State=UP" "short Default=NO MaxTime=00:30:00 State=UP" \\
             "closed Default=NO MaxTime=UNLIMITED State=DOWN"; do
    echo "PartitionName=$words AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL QoS=N/A GraceTime=0 MaxNodes=UNLIMITED" \\
        "MinNodes=0 MaxCPUsPerNode=UNLIMITED PriorityTier=1 OverSubscribe=NO PreemptMode=OFF TotalNodes=3" \\
        "DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED"
done ;;
*hostnames*) printf 'n1\\nn2\\n' ;;
*node*)
for name in n1 n2 n3; do
    echo "NodeName=$name CPUEfctv=8 CPUTot=8 AvailableFeatures=fast Gres=gpu:a100:4(S:0-1) RealMemory=262144" \\
        "State=IDLE Partitions=low,short,closed"
done ;;
*) exit 1 ;;
esac
"""
OTHERS_OF_SLURM = ("sbatch", "srun", "sinfo", "squeue", "sacct", "scancel", "sacctmgr")
"""Slurm commands whose replacements print nothing and end with status 0."""

TINY = (
    "model.n_layer=2 model.n_embd=64 model.n_head=4 model.n_kv_head=2 model.block_size=32 data.max_bytes=200000 "
    "optim.global_batch=8 optim.max_micro_batch=2 optim.max_steps=12 eval.sequences=6 eval.interval=6 "
    "checkpoint.interval=6 device=cpu"
)
"""Overrides of a training run of a few seconds, with gradient accumulation and grouped queries. Each evaluation has 6
sequences; on two ranks, 3 for each rank."""

RECORDED = {
    "training": f"launch -m nodes=1,2 name=swept {HERE} {TINY}",
    "script": f"launch -m nodes=1,2 name=swept cluster=local workload=script 'script.command=[sh,steps.sh]' {PROGRESS} "
    "script.work_per_step=64",
}
"""Name -> command line of a sweep named ``swept``. The first checkout runs the sweep, and both checkouts report it."""

READERS = {
    "report": "launch.report runs --files md,csv,json",
    "projection": "launch.project runs --nodes 8,16,64 --mtbf-hours 20000",
    "status": "launch.status runs --json",
    "logs": "launch.logs runs/nodes=2 --rank 0",
    "checkpoints": "launch.verify runs",
}
"""Name -> command line that reads a copy of the recorded run folders, ``runs``."""

LOSSES = {
    "ddp": "parallel=ddp",
    "zero1": "parallel=zero1",
    "fsdp": "parallel=fsdp",
    "tensor parallel": "parallel=tp",
    "pipeline": "parallel=pp",
    "context parallel": "parallel=cp",
    "DeepSpeed's ZeRO 2": "parallel=zero2",
    "DeepSpeed's ZeRO 3": "parallel=zero3",
}
"""Name -> overrides of ``gpt.train`` on two ranks, in addition to ``TINY``."""
