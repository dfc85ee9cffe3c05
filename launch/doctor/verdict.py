"""Findings about nodes and links, from the results of the doctor's job.

Pure functions of ``results.json``. Each node is compared with the other nodes, so a cluster that is slow as a whole
gets no complaint. The findings without complaint have the measured figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from launch.doctor.machine import FEW_FILES, SHARED_PATH
from launch.slurm.checks import Finding, fail, fine, warn

Results = dict[str, Any]

SLOW = 0.5
"""Share of the usual bandwidth below which a link or node is reported. An oversubscribed tree gives about half."""
BROKEN = 0.1
"""Share of the usual bandwidth below which the finding is an error."""
SLOW_GPU = 0.8
SKEW_S = 1.0
WAITS = "every collective of a run waits for it"


def check_results(results: Results) -> list[Finding]:
    """Return all findings of the job."""
    checks = [check_node_records, check_folder, check_ports, check_clocks, check_cpus, check_gpus, check_bandwidth]
    return [one for check in [check_job, *(checks if results["nodes"] else [])] for one in check(results)]


def host(results: Results, index: int) -> str:
    """Return the host name of the node with this index; ``node INDEX`` if it has left no record."""
    return next((str(node["host"]) for node in results["nodes"] if node["index"] == index), f"node {index}")


def hosts(nodes: Iterable[dict[str, Any]]) -> str:
    """Return the names of nodes, joined by commas."""
    return ", ".join(str(node["host"]) for node in nodes)


def check_job(results: Results) -> Iterator[Finding]:
    """Check that the job started, and that each of its nodes left a record."""
    job, count, asked = results["job_id"], len(results["nodes"]), results["asked"]["nodes"]
    why = "do not see the folder, or cannot run this Python or this code"
    logs = f"cat {results['logs']}/*_log.*"
    if not results["started"]:
        again = "python -m launch.doctor --on-cluster --wait-min 60 ..."
        found = f"job {job} did not start: {results['state']}; it was cancelled"
        yield warn("job", found, "nothing was measured", again)
    elif count == 0 and (said := results.get("start")):
        works = "cluster.start=ssh"
        found = f"srun fails inside of job {job}, and ssh {'works' if said.endswith(works) else 'too'}: {said}"
        fix = works if said.endswith(works) else "cluster.start=none nodes=1"
        yield fail("start", found, "the batch script of a run starts the agents by srun", fix)
    elif count == 0:
        found = f"job {job} ended ({results['state']}), and no node wrote anything into {results['folder']}"
        yield fail("job", found, f"the nodes {why}", f"{logs}; then {SHARED_PATH}")
    elif count < asked:
        found = f"{count} of {asked} nodes wrote their record: {hosts(results['nodes'])}"
        yield fail("job", found, f"the others {why}", logs)
    else:
        yield fine("job", f"job {job} ran on {hosts(results['nodes'])}")


def check_node_records(results: Results) -> Iterator[Finding]:
    """Check errors of the nodes, faults that the agents of a run would find, and different software."""
    nodes = results["nodes"]
    for node in nodes:
        if node.get("error"):
            fix = f"cluster.exclude={node['host']}, once the log says why: cat {results['logs']}/*_log.*"
            yield fail("node", f"{node['host']}: {node['error']}", "a run would fail there in the same way", fix)
        for fault in node.get("faults", ()):
            why = "a start leaves such a node out, and is refused where no spare takes its place"
            yield fail("health", f"{node['host']}: {fault}", why, f"cluster.exclude={node['host']}")
    if skipped := [node["skipped"] for node in nodes if "skipped" in node]:
        found, why = f"nothing was measured: {skipped[0]}", "an all-reduce would wait for its timeout"
        yield warn("links", found, why, "what the other lines say, then the same command again")
    kinds = {f"Python {node['python']}, torch {node['torch']}": str(node["host"]) for node in nodes}
    if len(kinds) > 1:
        found = ", ".join(f"{software} on {name}" for software, name in sorted(kinds.items()))
        why = "ranks of one run must run the same software"
        yield fail("software", found, why, "one environment on a shared filesystem")
    for lacking in dict.fromkeys(tuple(part) for node in nodes for part in node.get("lacks", ())):
        found, why, fix = lacking
        there = hosts(node for node in nodes if list(lacking) in node.get("lacks", ()))
        yield warn("parts", f"{found} on {there}", why, fix)
    if few := [node for node in nodes if node["open_files"] < FEW_FILES]:
        found = f"ulimit -Hn is below {FEW_FILES} on {hosts(few)}"
        why = "'Too many open files'; agents raise the soft limit to the hard one, and no further"
        yield warn("open files", found, why, "ask the site for a higher hard limit there (LimitNOFILE of slurmd)")


def check_folder(results: Results) -> Iterator[Finding]:
    """Check that each node sees the files of all nodes in the shared folder."""
    nodes, asked = results["nodes"], results["asked"]["nodes"]
    for node in nodes:
        if node.get("unseen"):
            others = ", ".join(host(results, index) for index in node["unseen"])
            found = f"{node['host']} does not see what {others} wrote into {results['folder']} ({node['filesystem']})"
            why = "each node has a folder of its own by that name: logs, metrics and checkpoints fall apart"
            yield fail("shared folder", found, why, SHARED_PATH)
    if len(nodes) == asked and all(node.get("unseen") == [] for node in nodes):
        kinds = ", ".join(sorted({str(node["filesystem"]) for node in nodes}))
        yield fine("shared folder", f"measured: seen and written by every node ({kinds})")


def check_ports(results: Results) -> Iterator[Finding]:
    """Check that each node can connect to a free port of each other node."""
    closed = False
    for node in results["nodes"]:
        for index, problem in sorted(node.get("ports", {}).items()):
            if problem:
                closed, other = True, host(results, int(index))
                why = "ranks listen on free ports of every node; a firewall between nodes stops the rendezvous"
                fix = f"cluster.exclude={other}, and ask the site to open ports between nodes"
                yield fail("ports", f"{node['host']} does not reach {other}: {problem}", why, fix)
    if not closed and len(results["nodes"]) > 1:
        yield fine("ports", "every node reaches a free port on every other")


def check_clocks(results: Results) -> Iterator[Finding]:
    """Check that no clock is more than SKEW_S seconds off that of the first node, beyond the error of measurement."""
    measured = [node for node in results["nodes"] if "clock_offset_s" in node]
    for node in measured:
        offset, name = node["clock_offset_s"], node["host"]
        if abs(offset) - node["clock_error_s"] > SKEW_S:
            found = f"the clock of {name} is {offset:+.1f} s off that of {host(results, 0)}"
            why = "times in events and logs of different nodes cannot be compared; Slurm's munge fails at minutes"
            yield warn("clocks", found, why, f"cluster.exclude={name}, and ask the site about NTP there")
    if measured:
        yield fine("clocks", f"at most {max(abs(node['clock_offset_s']) for node in measured):.3f} s apart")


def check_cpus(results: Results) -> Iterator[Finding]:
    """Check that agents may use the requested CPUs."""
    asked = results["asked"]["cpus_per_task"]
    if few := [node for node in results["nodes"] if asked and node["cpus"] < asked]:
        least = min(node["cpus"] for node in few)
        found = f"the agents on {hosts(few)} may use {least} CPUs, and cluster.cpus_per_task={asked}"
        yield warn("cpus", found, "all ranks of a node share them", f"cluster.cpus_per_task={least}")


def check_gpus(results: Results) -> Iterator[Finding]:
    """Check that each rank has a GPU if GPUs were requested, and that no GPU is slower than the other GPUs."""
    ranks, asked = results["ranks"], results["asked"]["gpus_per_node"]
    for node in results["nodes"] if asked else ():
        seen = [rank["gpus_seen"] for rank in ranks if rank["node"] == node["index"]]
        if seen and min(seen) < results["asked"]["ranks_per_node"]:
            found = f"{node['host']}: cluster.gpus_per_node={asked}, and torch {node['torch']} sees {min(seen)}"
            fix = "srun --gpus-per-node=1 nvidia-smi; pip install torch with the CUDA of the driver"
            yield fail("gpus", found, "the run would train on the CPU or fail", fix)
    on_gpus = [rank for rank in ranks if rank["backend"] == "nccl"]
    usual = statistics.median(rank["matmul_tflops"] for rank in on_gpus) if on_gpus else 0.0
    for rank in on_gpus:
        speed, name = rank["matmul_tflops"], rank["host"]
        if speed < SLOW_GPU * usual:
            found = f"GPU of rank {rank['rank']} on {name}: {speed:.0f} TFLOP/s, usual {usual:.0f}"
            yield warn("gpus", found, "every step waits for the slowest rank", f"cluster.exclude={name}")
    if speeds := [rank["matmul_tflops"] for rank in ranks]:
        devices = ", ".join(sorted({rank["device"] for rank in ranks}))
        yield fine("matmul", f"{min(speeds):.3g} to {max(speeds):.3g} TFLOP/s a rank on {devices}")


def check_bandwidth(results: Results) -> Iterator[Finding]:
    """Find nodes whose links are all slow, and single slow links between sound nodes."""
    pairs: dict[tuple[int, int], float] = {}
    """Pair of nodes -> the smallest bandwidth among the links of their ranks, in Gbit/s."""
    for rank in results["ranks"]:
        for link in rank.get("links", ()):
            pair, rate = (min(rank["node"], link["node"]), max(rank["node"], link["node"])), link["bandwidth_gbit"]
            pairs[pair] = min(pairs.get(pair, rate), rate)
    if not pairs:
        return
    # One good link shows that the node itself is sound.
    best = {node: max(rate for pair, rate in pairs.items() if node in pair) for pair in sorted(pairs) for node in pair}
    usual = statistics.median(best.values())
    slow = {node for node, value in best.items() if value < SLOW * usual}
    for node in sorted(slow):
        name = host(results, node)
        found = f"every link of {name} is slow: {best[node]:.3g} Gbit/s at best, usual are {usual:.3g}"
        yield (fail if best[node] < BROKEN * usual else warn)("bandwidth", found, WAITS, f"cluster.exclude={name}")
    for (a, b), value in sorted(pairs.items()):
        expected, one, other = min(best[a], best[b]), host(results, a), host(results, b)
        if not slow & {a, b} and value < SLOW * expected:
            found = f"the link {one} - {other}: {value:.3g} Gbit/s, both do {expected:.3g} elsewhere"
            why = "collectives that use it wait for it"
            yield (fail if value < BROKEN * expected else warn)("bandwidth", found, why, f"cluster.exclude={other}")
    if not slow:
        ends = f"{min(best.values()):.3g} to {max(best.values()):.3g}"
        yield fine("bandwidth", f"{ends} Gbit/s from node to node, each way")
