"""Findings about nodes and links, from the results of the doctor's job.

Pure functions over ``results.json``. A node is compared with the other nodes, so a cluster that is slow as a whole goes
unnoticed here; the measured figures are shown beside the findings.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from launch.slurm.facts import Finding, fail, fine, has_errors, warn

Results = dict[str, Any]
Links = dict[tuple[int, int], float]

SLOW = 0.5
"""Share of the usual bandwidth below which a link or node is named. An oversubscribed tree gives about half."""
BROKEN = 0.1
"""Share below which it is an error."""
SLOW_GPU = 0.8
LATE = 10.0
"""Times the usual latency above which a node is named, where it is above LATE_US too."""
LATE_US = 1000.0
SKEW_S = 1.0
EXCLUDES = re.compile(r"cluster\.exclude=([^\s,]+)")


def check_results(results: Results) -> list[Finding]:
    """All that the job has to say."""
    found = list(check_job(results))
    if not results["nodes"]:
        return found
    found += [
        *check_nodes(results),
        *check_health(results),
        *check_folder(results),
        *check_ports(results),
        *check_names(results),
    ]
    found += [*check_clocks(results), *check_cpus(results), *check_gpus(results)]
    if any("links" in rank for rank in results["ranks"]):
        found += [*check_bandwidth(results), *check_latency(results)]
    return keep_enough_nodes(results, found)


def keep_enough_nodes(results: Results, found: Sequence[Finding]) -> list[Finding]:
    """Return the findings with no more nodes proposed to be excluded than the run can do without."""
    nodes, left = results["asked"]["nodes"], results["asked"].get("left_over")
    excluded: list[str] = []
    kept = []
    for finding in found:
        host = EXCLUDES.match(finding.fix)
        if host is None or left is None:
            kept.append(finding)
            continue
        if host[1] not in excluded:
            excluded.append(host[1])
        if excluded.index(host[1]) < left:
            kept.append(finding)
        elif nodes > 1:
            fewer = rf"nodes={nodes - 1} cluster.exclude=\1 (no node is left over to take its place)"
            kept.append(replace(finding, fix=EXCLUDES.sub(fewer, finding.fix)))
        else:
            kept.append(replace(finding, fix=f"ask the site about {host[1]}: there is no other node to take its place"))
    return kept


def host(results: Results, index: int) -> str:
    """The name of a node."""
    return next((str(node["host"]) for node in results["nodes"] if node["index"] == index), f"node {index}")


def check_job(results: Results) -> Iterator[Finding]:
    """Return whether the job ran at all."""
    count, asked = len(results["nodes"]), results["asked"]["nodes"]
    if not results["started"]:
        found = f"job {results['job_id']} did not start: {results['state']}; it was cancelled"
        yield warn("job", found, "nothing was measured", "python -m launch.doctor --on-cluster --wait-min 60 ...")
    elif count == 0:
        found = (
            f"job {results['job_id']} ended ({results['state']}), and no node wrote anything into {results['folder']}"
        )
        why = "the nodes do not see that folder, or cannot run this Python or this code"
        yield fail(
            "job",
            found,
            why,
            f"cat {results['logs']}/*_log.*; then output_dir=PATH on a filesystem that all nodes mount",
        )
    elif count < asked:
        there = ", ".join(str(node["host"]) for node in results["nodes"])
        why = "the others do not see the folder, or cannot run this Python or this code"
        yield fail(
            "job", f"{count} of {asked} nodes wrote their record: {there}", why, f"cat {results['logs']}/*_log.*"
        )
    else:
        yield fine("job", f"job {results['job_id']} ran on {', '.join(str(node['host']) for node in results['nodes'])}")


def check_nodes(results: Results) -> Iterator[Finding]:
    """Find what went wrong on a node, and whether all run the same software."""
    for node in results["nodes"]:
        if node.get("error"):
            fix = f"cluster.exclude={node['host']}, once the log says why: cat {results['logs']}/*_log.*"
            yield fail("node", f"{node['host']}: {node['error']}", "a run would fail there in the same way", fix)
    skipped = [str(node["skipped"]) for node in results["nodes"] if "skipped" in node]
    if skipped:
        why = "an all-reduce would wait for its timeout"
        fix = "what the other lines say, then the same command again"
        yield warn("links", f"nothing was measured: {skipped[0]}", why, fix)
    for key in ("python", "torch"):
        kinds = {str(node[key]): str(node["host"]) for node in results["nodes"]}
        if len(kinds) > 1:
            found = ", ".join(f"{key} {version} on {name}" for version, name in sorted(kinds.items()))
            yield fail(
                "software",
                found,
                "ranks of one run must run the same software",
                "one environment on a shared filesystem",
            )
    few = [str(node["host"]) for node in results["nodes"] if 0 <= node["limits"]["nofile"] < 4096]
    if few:
        yield warn(
            "open files",
            f"ulimit -Hn is below 4096 on {', '.join(few)}",
            "'Too many open files'; agents raise the soft limit to the hard one, and no further",
            "ask the site for a higher hard limit there (LimitNOFILE of slurmd)",
        )


def check_health(results: Results) -> Iterator[Finding]:
    """Tell which nodes the agents of a run would find sick before its start, by the same checks."""
    for node in results["nodes"]:
        for found in node.get("faults", ()):
            why = "a start leaves such a node out, and is refused where no spare takes its place"
            yield fail("health", f"{node['host']}: {found}", why, f"cluster.exclude={node['host']}")


def check_folder(results: Results) -> Iterator[Finding]:
    """Return whether each node sees in the shared folder what the others wrote."""
    complaints = []
    for node in results["nodes"]:
        if node.get("unseen"):
            others = ", ".join(host(results, index) for index in node["unseen"])
            found = f"{node['host']} does not see what {others} wrote into {results['folder']} ({node['filesystem']})"
            why = "each node has a folder of its own by that name: logs, metrics and checkpoints fall apart"
            complaints.append(fail("shared folder", found, why, "output_dir=PATH on a filesystem that all nodes mount"))
    met = all("unseen" in node for node in results["nodes"]) and len(results["nodes"]) == results["asked"]["nodes"]
    if met and not complaints:
        kinds = ", ".join(sorted({str(node["filesystem"]) for node in results["nodes"]}))
        yield fine("shared folder", f"measured: seen and written by every node ({kinds})")
    yield from complaints


def is_shared(results: Results) -> bool:
    """Return whether the job has shown that the folder is one and the same for this machine and all nodes."""
    findings = list(check_folder(results))
    return bool(findings) and not has_errors(findings)


def check_ports(results: Results) -> Iterator[Finding]:
    """Return whether each node reaches a free port on each other."""
    closed = 0
    for node in results["nodes"]:
        for index, problem in sorted(node.get("ports", {}).items()):
            if problem:
                closed += 1
                found = f"{node['host']} does not reach {host(results, int(index))}: {problem}"
                why = "ranks listen on free ports of every node; a firewall between nodes stops the rendezvous"
                yield fail(
                    "ports",
                    found,
                    why,
                    f"cluster.exclude={host(results, int(index))}, and ask the site to open ports between nodes",
                )
    if not closed and len(results["nodes"]) > 1:
        yield fine("ports", "every node reaches a free port on every other")


def check_names(results: Results) -> Iterator[Finding]:
    """Return whether the nodes' names lead to each other, and not to themselves."""
    bad = 0
    for node in results["nodes"]:
        for name, address in node.get("names", {}).items():
            if address.startswith("!") or (address.startswith("127.") and len(node["names"]) > 1):
                bad += 1
                found = f"on {node['host']}, {name} is {address.removeprefix('!')}"
                why = (
                    "a library that goes by names cannot connect (torchrun, gloo by itself); our agents go by addresses"
                )
                yield warn("host names", found, why, "ask the site to put the nodes' addresses into /etc/hosts or DNS")
    if not bad and any(node.get("names") for node in results["nodes"]):
        yield fine("host names", "every node's name resolves on every node")


def check_clocks(results: Results) -> Iterator[Finding]:
    """Return whether the clocks agree, within what the network lets one measure."""
    offsets = {
        str(n["host"]): (n["clock_offset_s"], n["clock_error_s"]) for n in results["nodes"] if "clock_offset_s" in n
    }
    for name, (offset, error) in offsets.items():
        if abs(offset) - error > SKEW_S:
            found = f"the clock of {name} is {offset:+.1f} s off that of {host(results, 0)}"
            why = (
                "events and logs of different nodes have times that cannot be compared; Slurm's munge fails at minutes"
            )
            yield warn("clocks", found, why, f"cluster.exclude={name}, and ask the site about NTP there")
    if offsets:
        most = max(abs(offset) for offset, _ in offsets.values())
        yield fine(
            "clocks", f"at most {1000 * most:.3f} ms apart (± {1000 * max(e for _, e in offsets.values()):.3f} ms)"
        )


def check_cpus(results: Results) -> Iterator[Finding]:
    """Return whether the agents may use the CPUs that were requested; nodes of one kind together."""
    asked = results["asked"]["cpus_per_task"]
    alike: dict[tuple[int, bool], list[str]] = {}
    for node in results["nodes"] if asked else ():
        if node["cpus"] < asked:
            alike.setdefault((node["cpus"], node["cpus"] == node["cpus_of_machine"]), []).append(str(node["host"]))
    for (cpus, are_all), hosts in alike.items():
        agents = "the agent on" if len(hosts) == 1 else "each of the agents on"
        found = f"{agents} {', '.join(hosts)} may use {cpus} CPUs, and cluster.cpus_per_task={asked}"
        if are_all:
            why = "all its ranks share them; the node has no more, whatever slurm.conf says of it"
            yield warn("cpus", found, why, f"cluster.cpus_per_task={cpus}")
            continue
        why = "all its ranks share them; srun does not take --cpus-per-task over from sbatch since 22.05"
        yield fail("cpus", found, why, f"""'cluster.srun_args=["--cpus-per-task={asked}"]'""")


def check_gpus(results: Results) -> Iterator[Finding]:
    """Return whether every rank has a GPU where GPUs were requested, and one that is as fast as the others."""
    ranks, asked = results["ranks"], results["asked"]["gpus_per_node"]
    for node in results["nodes"] if asked else ():
        seen = [rank["gpus_seen"] for rank in ranks if rank["node"] == node["index"]]
        if seen and min(seen) < results["asked"]["ranks_per_node"]:
            found = f"{node['host']}: cluster.gpus_per_node={asked}, and torch {node['torch']} sees {min(seen)}"
            fix = "srun --gpus-per-node=1 nvidia-smi; pip install torch with the CUDA of the driver"
            yield fail("gpus", found, "the run would train on the CPU or fail", fix)
    speeds = {rank["rank"]: rank["matmul_tflops"] for rank in ranks if rank["backend"] == "nccl"}
    usual = statistics.median(speeds.values()) if speeds else 0.0
    for rank in ranks:
        if rank["rank"] in speeds and speeds[rank["rank"]] < SLOW_GPU * usual:
            found = (
                f"GPU of rank {rank['rank']} on {rank['host']}: {speeds[rank['rank']]:.0f} TFLOP/s, usual {usual:.0f}"
            )
            yield warn("gpus", found, "every step waits for the slowest rank", f"cluster.exclude={rank['host']}")


def links(results: Results, key: str) -> Links:
    """One figure for each pair of ranks: the worse of what its two ends saw."""
    each = results["asked"]["ranks_per_node"]
    found: Links = {}
    for rank in results["ranks"]:
        for link in rank.get("links", ()):
            other = int(link["node"]) * each + rank["rank"] % each
            pair = (min(rank["rank"], other), max(rank["rank"], other))
            worse = max if key == "latency_us" else min
            value = link.get(key, link["bandwidth_gbit"])  # of an earlier version, which measured each once
            found[pair] = worse(found.get(pair, value), value)
    return found


def best_of_each(pairs: Links, best: Any) -> dict[int, float]:
    """For each rank the best of its links: one good link shows that the rank itself is well."""
    ranks = {rank for pair in pairs for rank in pair}
    return {rank: best(value for pair, value in pairs.items() if rank in pair) for rank in sorted(ranks)}


def rank_name(results: Results, rank: int) -> str:
    """The host of a rank, and which of several ranks there it is."""
    each = results["asked"]["ranks_per_node"]
    name = host(results, rank // each)
    return name if each == 1 else f"{name} (local rank {rank % each})"


def check_bandwidth(results: Results) -> Iterator[Finding]:
    """Name nodes whose links are all slow, and then single links between nodes that are well.

    The median of several measurements is compared, and nothing is called slow that was once as fast as others are at
    their slowest: that is a machine with something else to do.
    """
    pairs, low, high = (links(results, key) for key in ("bandwidth_gbit", "low_gbit", "high_gbit"))
    best, best_low, best_high = (best_of_each(of_pairs, max) for of_pairs in (pairs, low, high))
    usual, usual_low = statistics.median(best.values()), statistics.median(best_low.values())
    slow = {rank for rank, value in best.items() if value < SLOW * usual and best_high[rank] < usual_low}
    each = results["asked"]["ranks_per_node"]
    for rank in sorted(slow):
        found = (
            f"every link of {rank_name(results, rank)} is slow: {best[rank]:.3g} Gbit/s at best, usual are {usual:.3g}"
        )
        say = fail if best[rank] < BROKEN * usual else warn
        yield say(
            "bandwidth",
            found,
            "every collective of a run waits for it",
            f"cluster.exclude={host(results, rank // each)}",
        )
    for (a, b), value in sorted(pairs.items()):
        expected = min(best[a], best[b])
        is_apart = high[a, b] < min(best_low[a], best_low[b])
        if a not in slow and b not in slow and value < SLOW * expected and is_apart:
            ends = f"{rank_name(results, a)} - {rank_name(results, b)}"
            found = f"the link {ends}: {value:.3g} Gbit/s, both do {expected:.3g} elsewhere"
            say = fail if value < BROKEN * expected else warn
            yield say(
                "bandwidth", found, "collectives that use it wait for it", f"cluster.exclude={host(results, b // each)}"
            )
    if not slow:
        spread = f"; single measurements {min(low.values()):.3g} to {max(high.values()):.3g}" if low != high else ""
        text = f"{min(best.values()):.3g} to {max(best.values()):.3g} Gbit/s from node to node, each way{spread}"
        yield fine("bandwidth", text)


def check_latency(results: Results) -> Iterator[Finding]:
    """Name nodes that answer late to everybody."""
    best = best_of_each(links(results, "latency_us"), min)
    usual = statistics.median(best.values())
    for rank, value in best.items():
        if value > max(LATE_US, LATE * usual):
            found = f"{rank_name(results, rank)} answers after {value:.0f} us at best, usual {usual:.0f}"
            node = host(results, rank // results["asked"]["ranks_per_node"])
            yield warn("latency", found, "every collective of a run waits for it", f"cluster.exclude={node}")
    yield fine("latency", f"{min(best.values()):.0f} to {max(best.values()):.0f} us from node to node")
