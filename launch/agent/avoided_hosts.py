"""Hosts that a run avoids, and why: a pure function of the event log. Torch-free.

Owns what counts as a failure of a host. Must not know how a host is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from types import MappingProxyType

from launch.agent.restart_policy import Cause, attempt_ends
from launch.runs.events import Events, events_since_submission
from launch.runs.failures import first_failure

NO_HOSTS: Mapping[str, str] = MappingProxyType({})
UNRELIABLE = 2
"""After so many failures a host is avoided: one may be chance, or the run's own."""
DRIFT = "replicas_differ"
"""Event of a run whose replicas of the parameters were not the same."""
OF_A_HOST = (Cause.crashed, Cause.hung, Cause.node_failed)
"""Causes that a host may have brought about. A loss that is no number, memory that is too small and a refusal come from
what is run, wherever it is run."""


def unreliable_hosts(events: Events) -> dict[str, str]:
    """Hosts that have failed in more than one attempt since the command was typed, each with its failures in words.

    One that has changed parameters, as a majority of the replicas tells, is unreliable at once: that is no chance.
    """
    certain = {
        host for e in events_since_submission(events) if e["event"] == DRIFT and e["certain"] for host in e["hosts"]
    }
    failures = failures_of_hosts(events).items()
    return {host: "; ".join(told) for host, told in sorted(failures) if len(told) >= UNRELIABLE or host in certain}


def hosts_to_avoid(events: Events) -> dict[str, str]:
    """Hosts that a requeued job must not come back to: the unreliable ones, and any that was lost or found sick."""
    now = events_since_submission(events)
    lost = {str(e["host"]) for e in now if e["event"] == "node_lost"}
    told = failures_of_hosts(events)
    avoid = {host: "; ".join(told[host]) for host in sorted(lost | {*unreliable_hosts(events)})}
    sick = {str(e["host"]): f"sick: {e['cause']}" for e in now if e["event"] == "node_sick"}
    return avoid | {host: "; ".join(filter(None, (avoid.get(host), why))) for host, why in sick.items()}


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
