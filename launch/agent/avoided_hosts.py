"""Hosts that a run avoids, and why: a pure function of its event log, and of those of the points beside it. Torch-free.

Owns what counts as a failure of a host. Points of one command, which are elements of a job array or jobs of their own,
share what they have found. Must not know how a host is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType

from launch.agent.restart_policy import Cause, attempt_ends
from launch.errors import ConfigError
from launch.plan.budget import command_folders
from launch.runs.events import Events, events_since_submission
from launch.runs.failures import first_failure
from launch.runs.folder import RunFolder

NO_HOSTS: Mapping[str, str] = MappingProxyType({})
NO_EVENTS: Mapping[str, Events] = MappingProxyType({})
UNRELIABLE = 2
"""After so many failures a host is avoided: one may be chance, or the run's own."""
DRIFT = "replicas_differ"
"""Event of a run whose replicas of the parameters were not the same."""
OF_A_HOST = (Cause.crashed, Cause.hung, Cause.node_failed)
"""Causes that a host may have brought about. A loss that is no number, memory that is too small and a refusal come from
what is run, wherever it is run."""


def points_beside(folder: RunFolder) -> dict[str, Events]:
    """Read what the other points of the command have told since this one was submitted: name of the point -> events.

    A plan that cannot be read names none: what it is for is told where it is needed.
    """
    try:
        others = [other for other in command_folders(folder) if other.path != folder.path]
    except ConfigError:
        return {}
    since = next((event["time"] for event in events_since_submission(folder.read_events())), 0.0)
    logs = {other.path.name: events_since_submission(other.read_events()) for other in others}
    return {name: [event for event in log if event["time"] >= since] for name, log in logs.items()}


def unreliable_hosts(events: Events, beside: Mapping[str, Events] = NO_EVENTS) -> dict[str, str]:
    """Hosts that have failed in more than one attempt since the command was typed, each with its failures in words.

    One that has changed parameters, as a majority of the replicas tells, is unreliable at once: that is no chance.

    Args:
        events: event log of the run.
        beside: those of the other points of its command, by their names.
    """
    certain = {
        host
        for log in (events, *beside.values())
        for e in events_since_submission(log)
        if e["event"] == DRIFT and e["certain"]
        for host in e["hosts"]
    }
    failures = failures_everywhere(events, beside).items()
    return {host: "; ".join(told) for host, told in sorted(failures) if len(told) >= UNRELIABLE or host in certain}


def hosts_to_avoid(events: Events, beside: Mapping[str, Events] = NO_EVENTS) -> dict[str, str]:
    """Hosts that a requeued job must not come back to: the unreliable ones, and any that was lost or found sick.

    The arguments are those of ``unreliable_hosts``.
    """
    logs = {"": events_since_submission(events), **{f"{name}: ": log for name, log in beside.items()}}
    lost = {str(e["host"]) for log in logs.values() for e in log if e["event"] == "node_lost"}
    told = failures_everywhere(events, beside)
    avoid = {host: "; ".join(told[host]) for host in sorted(lost | {*unreliable_hosts(events, beside)})}
    for name, log in logs.items():
        sick = {str(e["host"]): f"{name}sick: {e['cause']}" for e in log if e["event"] == "node_sick"}
        avoid |= {host: "; ".join(filter(None, (avoid.get(host), why))) for host, why in sick.items()}
    return avoid


def failures_everywhere(events: Events, beside: Mapping[str, Events]) -> dict[str, list[str]]:
    """Failures of each host in this run, then in the points ``beside`` it, with their names."""
    found = failures_of_hosts(events)
    for name, log in beside.items():
        for host, told in failures_of_hosts(log).items():
            found.setdefault(host, []).extend(f"{name}: {failure}" for failure in told)
    return found


def failures_of_hosts(events: Events) -> dict[str, list[str]]:
    """Failures of each host since the command was typed, at most one for an attempt, in the order of the attempts.

    A host has failed where it was lost, or where the rank that failed first in an attempt ran there. An error about a
    lost peer says nothing about the host that noticed it. Where replicas of the parameters differed, all ranks fail,
    and the hosts are those of the replicas.
    """
    now = events_since_submission(events)
    failures: dict[str, dict[object, str]] = defaultdict(dict)
    for number, event in enumerate(now):
        if event["event"] == "node_lost":
            attempt = event.get("attempt")
            when = "before the ranks started" if attempt is None else f"in attempt {attempt}"
            failures[event["host"]].setdefault(number if attempt is None else attempt, f"lost {when}")
    drifts = [event for event in now if event["event"] == DRIFT]
    for event in drifts:
        for host in event["hosts"]:
            failures[host].setdefault(event["attempt"], f"in attempt {event['attempt']}: {event['cause']}")
    told_otherwise = {event["attempt"] for event in drifts}
    for end in attempt_ends(now):
        is_of_host = end["cause"] in OF_A_HOST and end["attempt"] not in told_otherwise
        first = first_failure(now, end["attempt"]) if is_of_host else None
        if first is not None and not first.get("echo"):
            told = f"rank {first['rank']} failed first in attempt {end['attempt']}: {first['cause']}"
            failures[first["host"]].setdefault(end["attempt"], told)
    return {host: list(by_attempt.values()) for host, by_attempt in failures.items()}


def reasons(hosts: Mapping[str, str]) -> str:
    """Reasons for which hosts are avoided, for the event log."""
    return " | ".join(f"{host}: {why}" for host, why in sorted(hosts.items()))
