"""Run folders with fixed contents, whose reports ``same_results`` compares. Runs of ``cases.RECORDED`` add others.

The files are plain JSON in the format of today's run folders. Both checkouts that are compared must be able to read
them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN = 1.7e9
"""Unix time in seconds at which the recorded runs begin. The run of a point on N nodes begins N hours later, so that no
two points use a machine at the same time.
"""
BLOCK = 1024
"""Number of tokens in a sequence."""


GPT = (
    "model=gpt2_124m optim=gpt2 optim.global_batch=96 optim.max_steps=60 precision=bf16 cluster=slurm "
    "'cluster.gpu_name=NVIDIA H100 80GB HBM3'"
)
"""Arguments that describe the written runs of the GPT library."""
Times = Callable[[int, int], float]
Fields = Callable[[int, int], dict[str, Any]]


def lasting(seconds: float, warm_up: int = 0) -> Times:
    """Return a function that gives step times in seconds: ``seconds``, or ten times as long in the first ``warm_up``
    steps."""
    return lambda step, rank: seconds * (10 if step <= warm_up else 1)


def only_at(at: int, **fields: float) -> Fields:
    """Return a function that gives additional fields of step records: ``fields`` for the step ``at``, and none for
    other steps."""
    return lambda step, rank: fields if step == at else {}


class Recorder:
    """Writes one run folder.

    Args:
        folder: the run folder.
        nodes: number of nodes of the point (one run of a sweep).
        per_node: number of ranks of a node, each with one GPU.
        overrides: overrides of the point.
        known: additional entries of environment.json.

    ``now`` is the time of the run in Unix seconds.
    """

    def __init__(self, folder: Path, nodes: int, per_node: int, overrides: tuple[str, ...], **known: Any) -> None:
        self.folder, self.nodes, self.per_node, self.known = folder, nodes, per_node, known
        self.ranks = nodes * per_node
        self.now = BEGIN + 3600 * nodes
        self.chance = random.Random(folder.name)
        self.write(".hydra/overrides.yaml", "".join(f"- {word}\n" for word in overrides))
        point = {"point": folder.name, "run_dir": str(folder), "cluster": "slurm", "nodes": nodes}
        self.write("plan.json", json.dumps({**point, "world_size": self.ranks, "max_steps": 60}))

    def write(self, name: str, text: str) -> None:
        """Append text to a file of the run folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)

    def event(self, event: str, after_s: float = 0.0, **details: Any) -> None:
        """Advance the clock by ``after_s`` seconds and append an event to the event log."""
        self.now += after_s
        self.write("events.jsonl", json.dumps({"time": self.now, "event": event, **details}) + "\n")

    def allocated(self, job: str, after_s: float) -> None:
        """Advance the clock by ``after_s`` seconds and append an event: the agent starts in a job whose nodes were
        allocated 5 s before."""
        self.now += after_s
        details: dict[str, Any] = {"job": job, "nodes": self.nodes, "gpus": self.ranks, "price_per_gpu_hour": 2.5}
        self.event("agent_started", **details, allocated_at=self.now - 5, limit_s=36000.0)

    def attempt(self, number: int, after_s: float = 10.0, nodes: int | None = None, from_step: int = 0) -> None:
        """Advance the clock by ``after_s`` seconds and start an attempt: write environment.json and append the event.
        ``nodes`` is the number of nodes of the attempt; None: all nodes of the point.
        """
        size = (nodes or self.nodes) * self.per_node
        (self.folder / f"attempts/{number:04d}/logs").mkdir(parents=True)
        self.now += after_s
        ranks = [self.place(rank) for rank in range(size)]
        sharded = self.known.get("strategy", "ddp") == "fsdp"
        topology: dict[str, Any] = {"strategy": "fsdp" if sharded else "ddp"}
        topology |= {"dp_replicate": 1 if sharded else size, "dp_shard": size if sharded else 1}
        gpt = {"topology": topology, "global_batch": 96, "micro_batch": 96 // size, "accumulation": 1}
        gpt |= {"weak_scaling": False, "block_size": BLOCK, "precision": "bf16", "model": "gpt2_124m", "max_steps": 60}
        gpt |= {"parameters": 124439808, "flops_per_token": 8.6e8, "peak_flops_per_s": 989e12}
        script = {"workload": "script", "command": ["python", "train.py"], "weak_scaling": False, "max_steps": None}
        environment = {
            **{"attempt": number, "time": self.now, "world_size": size, "ranks": ranks, "from_step": from_step},
            **{"software": {"python": "3.11.7", "torch": "2.13.0"}, "git": {"commit": "0123456789abcdef"}},
            **(script if "unit" in self.known else gpt),
            **self.known,
        }
        self.write(f"attempts/{number:04d}/environment.json", json.dumps(environment, indent=2))
        self.event("started", attempt=number, world_size=size, from_step=from_step)

    def place(self, rank: int) -> dict[str, Any]:
        """Return the host, device and process of a rank, as in environment.json."""
        node, local = divmod(rank, self.per_node)
        return {
            **{"rank": rank, "local_rank": local, "node": node, "host": f"n{node + 1}", "machine": f"boot-{node}"},
            **{"pid": 100 + rank, "device": f"cuda:{local}", "device_name": "NVIDIA H100 80GB HBM3", "cores": 96},
            **{"threads": 1, "device_uuid": f"GPU-{rank:08d}", "memory_gib": 79.6},
        }

    def steps(
        self,
        attempt: int,
        first: int,
        last: int,
        seconds: Times,
        more: Fields = lambda step, rank: {},
        ranks: int | None = None,
    ) -> None:
        """Append the step records of all ranks of an attempt.

        Args:
            attempt: number of the attempt.
            first: first step.
            last: last step.
            seconds: gives the step time of a step and rank in seconds; the records add up to 2 % of random noise.
            more: gives additional record fields of a step and rank.
            ranks: number of ranks that write records; None: all ranks of the point.
        """
        size = ranks or self.ranks
        share = 96 // size
        for step in range(first, last + 1):
            times = [seconds(step, rank) * (1 + 0.02 * self.chance.random()) for rank in range(size)]
            self.now += max(times)
            for rank, time_s in enumerate(times):
                start = (step - 1) * 96 + rank * share
                record: dict[str, Any] = {"step": step, "attempt": attempt, "step_time_s": time_s, "time": self.now}
                if "unit" not in self.known:
                    record |= {"lr": 3e-4 * min(1.0, step / 10), "tokens": share * BLOCK, "grad_norm": 1 / (1 + step)}
                    record |= {"samples": [start, start + share - 1], "memory_peak_gib": 61.1 + rank / 100}
                    record["mfu_palm"] = 8.6e8 * share * BLOCK / time_s / 989e12
                if rank == 0:
                    record["loss"] = 10.5 / (1 + step / 20)
                    record |= {"val_loss": 10.6 / (1 + step / 20)} if step % 20 == 0 else {}
                self.write(f"metrics/rank_{rank:05d}.jsonl", json.dumps({**record, **more(step, rank)}) + "\n")

    def samples(self, node: int, begin: float, seconds: int, throttled: float = 0.0) -> None:
        """Append GPU telemetry of a node, one sample every 5 s.

        Args:
            node: index of the node.
            begin: Unix time of the first sample, in seconds.
            seconds: length of the telemetry in seconds.
            throttled: probability, 0 to 1, that a GPU reports in a sample that its clock is throttled.
        """
        energy = [1000.0 * gpu for gpu in range(self.per_node)]
        for after in range(0, seconds, 5):
            power = [round(self.chance.uniform(300, 700), 1) for _ in energy]
            energy = [joules + 5 * watts for joules, watts in zip(energy, power)]
            line: dict[str, Any] = {"time": begin + after, "attempt": 1, "host": f"n{node + 1}"}
            line["bus"] = [f"0000:{gpu:02x}:00.0" for gpu in range(self.per_node)]
            line |= {"power_w": power, "energy_j": [round(joules, 3) for joules in energy]}
            line |= {"sm_clock_mhz": [self.chance.randint(1200, 1980) for _ in power]}
            line |= {"temperature_c": [self.chance.randint(40, 88) for _ in power]}
            line["throttle_reasons"] = [0x04 if self.chance.random() < throttled else 0 for _ in power]
            self.write(f"telemetry/node_{node:05d}.jsonl", json.dumps(line) + "\n")

    def failed(self, attempt: int, rank: int, step: int, cause: str) -> None:
        """Append the failure of a rank to the event log."""
        at = {"attempt": attempt, "rank": rank, "host": f"n{rank // self.per_node + 1}", "step": step}
        log = f"attempts/{attempt:04d}/logs/rank_{rank:05d}.log"
        self.event("rank_failed", after_s=1, **at, cause=cause, traceback="", log=log, echo=False)

    def finished(self, attempt: int, step: int, job: str | None = None) -> None:
        """Append the end of a run that has made all its steps; if ``job`` is given, also the ends of the attempt and of
        the job's agent."""
        self.event("finished", attempt=attempt, step=step, after_s=1)
        if job is not None:
            self.event("attempt_ended", attempt=attempt, cause="finished", step=step, job=job, after_s=1)
            self.event("agent_ended", job=job, ended_at=self.now + 1, after_s=1)


def strong_scaling(folder: Path) -> None:
    """Write runs on 1, 2 and 4 nodes with two GPUs each."""
    for nodes, base in ((1, 1.0), (2, 0.52), (4, 0.29)):
        run = Recorder(folder / f"nodes={nodes}", nodes, 2, (f"nodes={nodes}", "parallel=fsdp"), strategy="fsdp")
        run.event("submitted", cluster="slurm", job_id=str(nodes), nodes=nodes, candidate=0)
        run.allocated(f"slurm-{nodes}-0-0", after_s=60.0 * nodes)
        run.attempt(1)
        run.steps(1, 1, 60, lasting(base, warm_up=3))
        run.event("saved", attempt=1, step=60, seconds=2.0, after_s=2)
        run.finished(1, 60, f"slurm-{nodes}-0-0")


def storm(folder: Path) -> None:
    """Write a run of four nodes with a crash, a restart in place, a lost node, fewer nodes, a preemption, and all nodes
    again.
    """
    run = Recorder(folder / "nodes=4", 4, 2, ("nodes=4",))
    run.event("submitted", cluster="slurm", job_id="1", nodes=4, candidate=0)
    run.allocated("slurm-1", after_s=256)
    run.attempt(1, after_s=64)
    run.steps(1, 1, 20, lasting(0.5), only_at(1, compile_s=0.2))
    run.event("saved", attempt=1, step=20, seconds=2.0, after_s=2)
    run.steps(1, 21, 25, lasting(0.5))
    run.failed(1, rank=3, step=25, cause="RuntimeError: out of luck")
    run.event("attempt_ended", attempt=1, cause="crashed", step=25, job="slurm-1", after_s=3)
    run.event("decided", attempt=1, action="restart", cause="crashed", reason="1 of 3")
    run.attempt(2, from_step=20)
    run.steps(2, 21, 32, lasting(0.5), only_at(21, restore_s=0.3))
    run.event("saved", attempt=2, step=32, seconds=2.0, after_s=2)
    run.event("node_lost", attempt=2, node=3, host="n4", cause="nothing heard for 30 s", after_s=30)
    run.event("attempt_ended", attempt=2, cause="node_failed", step=32, job="slurm-1")
    run.event("decided", attempt=2, action="restart", cause="node_failed", reason="on fewer nodes")
    run.event("fewer_nodes", attempt=3, nodes=3, asked=4, hosts=["n1", "n2", "n3"], cause="n4: lost", after_s=2)
    run.attempt(3, nodes=3, from_step=32)
    run.steps(3, 33, 44, lasting(0.7), ranks=6)
    run.event("saved", attempt=3, step=44, seconds=2.5, after_s=2.5)
    run.event("attempt_ended", attempt=3, cause="preempted", step=44, job="slurm-1", after_s=1)
    run.event("decided", attempt=3, action="requeue", cause="preempted", reason="")
    run.event("requeued", job_id="1", by="slurm", cause="preempted")
    run.event("agent_ended", job="slurm-1", ended_at=run.now + 4, after_s=4)
    run.allocated("slurm-2", after_s=128)
    run.event("all_nodes", attempt=4, nodes=4, hosts=["n1", "n2", "n3", "n5"])
    run.attempt(4, from_step=44)
    run.steps(4, 45, 50, lasting(0.5), only_at(45, restore_s=0.4))
    run.event("rolled_back", attempt=4, step=48, first=49, last=50, cause="loss not finite")
    run.steps(4, 49, 60, lasting(0.5), only_at(49, restore_s=0.3))
    run.event("save_failed", attempt=4, step=60, cause="no space left on device", failures=1)
    run.event("saved", attempt=4, step=60, seconds=3.0, after_s=3)
    run.finished(4, 60, "slurm-2")


def stragglers(folder: Path) -> None:
    """Write runs on 1 and 2 nodes with eight GPUs each: a slow rank, waits by cause, and GPU telemetry."""

    def waits(step: int, rank: int) -> dict[str, Any]:
        """Return record fields of a step: wait times of the rank in seconds, and on rank 0 also the shortest and the
        longest time of any rank, and the number of the slowest rank."""
        parts = {"data_wait_s": 0.002, "forward_backward_s": 0.3, "comm_s": 0.05 + 0.001 * rank, "optimizer_s": 0.01}
        parts |= {"comm_dp_s": 0.02, "comm_fsdp_s": 0.03, "bubble_s": 0.004 * (rank % 4)}
        return parts | ({"own_min_s": 0.4, "own_max_s": 0.5, "slowest_rank": 5} if rank == 0 else {})

    for nodes in (1, 2):
        words = (f"nodes={nodes}", "parallel=ddp")
        run = Recorder(folder / f"nodes={nodes}", nodes, 8, words)
        run.event("submitted", cluster="slurm", job_id=str(nodes), nodes=nodes, candidate=0)
        run.allocated(f"slurm-{nodes}", after_s=20)
        run.attempt(1)
        begin = run.now
        run.steps(1, 1, 60, lambda step, rank: 0.4 + (0.06 if rank == 5 else 0.001 * (rank % 3)), waits)
        for node in range(nodes):
            run.samples(node, begin, int(run.now - begin), throttled=0.3 * node)
        run.finished(1, 60, f"slurm-{nodes}")


def script_with_progress(folder: Path) -> None:
    """Write runs of a script that counts samples: one finished, one failed, and one with another value of an option."""
    for nodes, base, is_whole in ((1, 2.0, True), (2, 1.1, True), (4, 0.7, False)):
        words = (f"nodes={nodes}", "workload=script")
        run = Recorder(folder / f"nodes={nodes}", nodes, 1, words, unit="samples", work_per_step=512)
        run.event("submitted", cluster="local", job_id=str(nodes), nodes=nodes, candidate=0)
        run.attempt(1)
        run.steps(1, 1, 30 if is_whole else 12, lasting(base))
        if is_whole:
            run.finished(1, 30)
        else:
            run.failed(1, rank=1, step=12, cause="ValueError: no more data")
            run.event("attempt_ended", attempt=1, cause="crashed", step=12, job=None, after_s=2)
            run.event("decided", attempt=1, action="fail", cause="crashed", reason="no second start")


WRITTEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "strong scaling": (strong_scaling, f"{GPT} parallel=fsdp cluster.gpus_per_node=2"),
    "storm": (storm, f"{GPT} cluster.gpus_per_node=2"),
    "stragglers": (stragglers, f"{GPT} parallel=ddp cluster.gpus_per_node=8"),
    "script with progress": (script_with_progress, "workload=script script.path=train.py script.work_per_step=512"),
}
"""Name -> function that writes run folders, and the arguments of ``python -m launch`` for the config of these runs."""
