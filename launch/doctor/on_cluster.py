"""The doctor's job: submitted as runs are, waited for, and read back.

The job has a folder, ``<output_dir>/.doctor/<time>-<random>/``, with ``results.json``. ``launch.doctor.verdict`` says
what is wrong with the results.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table

from launch.config import Config
from launch.doctor import probe
from launch.plan.plan import JOBS
from launch.runs import compose
from launch.runs.files import write_json
from launch.runs.folder import RunFolder
from launch.slurm.client import SlurmError
from launch.slurm.facts import Finding, Request, fail
from launch.slurm.jobs import SlurmJob, ask_queue
from launch.slurm.limits import Limits
from launch.slurm.submit import refusal_text, submit_calls


@dataclasses.dataclass(frozen=True)
class ClusterOfJob:
    """The cluster that the job runs on.

    Attributes:
        name: its name and that of its controller, by which it is known again.
        left_over: nodes that the job could have had beside those it asks for; None where Slurm does not tell.
    """

    name: str
    left_over: int | None


def name_of(limits: Limits) -> str:
    """Name of a cluster and of its controller, by which it is known again."""
    hosts = (value for key, value in sorted(limits.config.items()) if key.startswith("SlurmctldHost"))
    return " ".join([limits.config.get("ClusterName", ""), *hosts]).strip()


JOB_MIN = 5
"""Time limit of the job, minutes."""
POLL_S = 1.0
LATE_S = 5.0
"""Time for which the login node looks for files that the nodes have written: NFS may show them late."""


def measure(
    request: Request, cluster: ClusterOfJob, output: Path, wait_min: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Submit the job for the nodes of ``request``, wait for its end, and return (and write) what was measured.

    Raises:
        SlurmError: the controller does not answer any more.
        submitit.core.utils.FailedJobError: sbatch refused.
    """
    root = make_folder(request.config, output)
    write_json(root / probe.REQUEST, {"uses_cpus": bool(request.plan.promised.uses_cpus)})
    job = submit(request, root)
    say(f"job {job.name} on {request.config.nodes} nodes, folder {root}")
    try:
        state, started = wait(job, wait_min, say)
    except BaseException:
        job.kill()
        raise
    results = collect(root, request, cluster, job.job_id, state, started)
    write_json(root / "results.json", results)
    return results


KEPT_S = 30 * 24 * 3600.0
"""Age of results that still tell something of a cluster, seconds."""


def earlier_results(output: Path, cluster: str) -> dict[str, Any] | None:
    """Results of the newest of these jobs that has run with the same ``output_dir`` on the same cluster lately; None
    if there is none. ``cluster`` is what ``name_of`` calls it."""
    for path in sorted(output.glob(".doctor/*/results.json"), reverse=True):
        try:
            results: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        is_recent = time.time() - results.get("time_s", 0.0) < KEPT_S
        if results.get("nodes") and results.get("cluster") == cluster and is_recent:
            return results
    return None


def make_folder(config: Config, output: Path) -> Path:
    """A folder for one job, with the config that its nodes read."""
    above = output / ".doctor"
    above.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=above))
    (root / "nodes").mkdir()
    resilience = dataclasses.replace(config.resilience, rendezvous_timeout_s=probe.ARRIVAL_S)
    written = OmegaConf.structured(dataclasses.replace(config, resilience=resilience))
    compose.write_config(RunFolder(root), written, [])
    return root


def submit(request: Request, root: Path) -> SlurmJob:
    """Submit the job with the resources of the run, all but its time."""
    limit = min(JOB_MIN, request.config.cluster.timeout_min)
    resources = {**request.plan.slurm, "job_name": "doctor", "time": limit, "signal_delay_s": 0}
    (job,) = submit_calls(root / JOBS, resources, probe.run, [str(root)])
    return job


def wait(job: SlurmJob, wait_min: float, say: Callable[[str], None]) -> tuple[str, bool]:
    """Follow a job to its end; its last state as Slurm names it, and whether it ever started.

    A job that has not started after ``wait_min`` is cancelled.
    """
    deadline = time.monotonic() + 60 * wait_min
    last, started = "", False
    while True:
        known = ask_queue([job]).get(job.name)
        if known is None:
            return last or "unknown", started
        started = started or known.state not in ("PENDING", "CONFIGURING")
        if known.phase == "over":
            return known.state, started
        state = known.state if known.reason in ("", "None") else f"{known.state} ({known.reason})"
        if state != last:
            say(f"job {job.name}: {state}")
            last = state
        if not started and time.monotonic() > deadline:
            job.kill()
            return last, False
        time.sleep(POLL_S)


def collect(
    root: Path, request: Request, cluster: ClusterOfJob, job_id: str, state: str, started: bool
) -> dict[str, Any]:
    """Everything the nodes wrote, with what was asked of them."""
    deadline = time.monotonic() + (LATE_S if started else 0)
    nodes, ranks = probe.read_records(root)
    while len(nodes) < request.config.nodes and time.monotonic() < deadline:
        time.sleep(POLL_S)
        nodes, ranks = probe.read_records(root)
    asked = {
        "nodes": request.config.nodes,
        "ranks_per_node": request.config.ranks_on_node,
        "cpus_per_task": request.config.cluster.cpus_per_task,
        "left_over": cluster.left_over,
        "gpus_per_node": None if request.plan.promised.uses_cpus else request.config.cluster.gpus_per_node,
    }
    logs = str(root / JOBS)
    return {
        **{"job_id": job_id, "state": state, "started": started, "folder": str(root), "logs": logs},
        **{"asked": asked, "nodes": nodes, "ranks": ranks, "cluster": cluster.name, "time_s": time.time()},
    }


def refused(error: Exception) -> Finding:
    """sbatch refused the job."""
    why = "a run with the same resources would be refused too"
    return fail("job", refusal_text(SlurmError(str(error))), why, "python -m launch dry_run=true ...")


def group_line(results: dict[str, Any]) -> str:
    """The all-reduce over all ranks for people; empty if there was none."""
    groups = [rank["group"] for rank in results["ranks"] if "group" in rank]
    if not groups:
        return ""
    worst = min(groups, key=lambda group: float(group["bandwidth_gbit"]))
    latency = max(float(group["latency_us"]) for group in groups)
    return (
        f"all-reduce over {len(results['ranks'])} ranks ({results['ranks'][0]['backend']}): {latency:.0f} us "
        f"for 4 bytes, "
        f"{worst['bytes'] / 2**20:g} MiB at {worst['bandwidth_gbit']:.3g} Gbit/s (bus {worst['bus_gbit']:.3g})"
    )


def table(results: dict[str, Any]) -> Table:
    """Lines on each rank: its device and its measurements."""
    shown = Table(box=None, pad_edge=False)
    for title in (
        "rank",
        "host",
        "device",
        "matmul TFLOP/s",
        "best link Gbit/s",
        "worst link Gbit/s",
        "latency us",
        "clock ms",
    ):
        shown.add_column(title, justify="left" if title in ("host", "device") else "right")
    clocks = {node["index"]: node.get("clock_offset_s") for node in results["nodes"]}
    for rank in results["ranks"]:
        rates = [link["bandwidth_gbit"] for link in rank.get("links", ())]
        delays = [link["latency_us"] for link in rank.get("links", ())]
        clock = clocks.get(rank["node"])
        shown.add_row(
            str(rank["rank"]),
            str(rank["host"]),
            str(rank["device"]),
            f"{rank['matmul_tflops']:.3g}",
            f"{max(rates):.3g}" if rates else "",
            f"{min(rates):.3g}" if rates else "",
            f"{min(delays):.0f}" if delays else "",
            "" if clock is None else f"{1000 * clock:+.3f}",
        )
    return shown
