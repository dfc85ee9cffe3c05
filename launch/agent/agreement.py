"""The agents' half of a request that all ranks obey at the same step: a stop, or a save.

Each agent reads the heartbeat files of its ranks and says what it found; the head node decides and tells all. The
protocol is in ``launch.runs.heartbeat``. Runs in the thread that talks to the other agents, so that it goes on while
the main thread waits for ranks, also for those of other nodes. Torch-free. Must not know how messages travel.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.runs.heartbeat import HeartbeatFile, Request

SETTLE_S = 0.05
"""From setting ``hold`` to reading the counts. A processor shows a write to the others in microseconds."""
ANSWER_S = 5.0
"""After so long the head node decides without the nodes that have not answered; the run is about to lose them."""
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """One node's part in the agreement on one kind of request."""

    wants: int = 0
    """Largest wish: a signal, or how many saves were asked for."""
    held: int = 0
    """Ticket for which all ranks of the node wait, if they ask."""
    most: int = 0
    """Largest count of questions."""
    least: int = 0
    """Smallest count, 0 where a rank has yet to start: it would miss an earlier save if the next one were agreed on."""


@dataclass
class Decision:
    """Decision of the head node about one kind of request."""

    ticket: int = 0
    at: int = 0
    cause: int = 0
    taken: int = 0
    """Wish that the last ticket was drawn for."""
    since: float = 0.0


class Agreement:
    """One agent's part, for one start of the ranks.

    Args:
        start: number of the start; messages about another one are passed over.
        index: this node, among those of the job; 0 is the head node.
        members: the nodes that take part in the start.
        ranks: the files of this node's ranks.
    """

    def __init__(self, start: int, index: int, members: Sequence[int], ranks: Sequence[HeartbeatFile]) -> None:
        self._start = start
        self._index = index
        self._members = members
        self._ranks = ranks
        self._stop_cause = 0
        self._held = dict.fromkeys(Request, (0, 0.0))
        self._decisions = {request: Decision() for request in Request}
        self._is_under_way = False

    @property
    def is_under_way(self) -> bool:
        """Tell whether ranks may be waiting, so that the agents should talk quickly."""
        return self._is_under_way

    def want_stop(self, number: int) -> None:
        """Wish for a stop because of signal ``number``, as the agent of this node."""
        self._stop_cause = self._stop_cause or number

    def turn(self, heard: Mapping[int, Message]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Do what can be done now. Returns what to say, and on the head node what to add to the leader state.

        Args:
            heard: what other agents said last, by node; elsewhere than on the head node its leader state, as 0.
        """
        own = {request: self._report(request) for request in Request}
        report = {"start": self._start, **{request.name: asdict(own[request]) for request in Request}}
        leader_state: dict[str, Any] = {}
        if self._index == 0:
            others = {index: self._message_of(heard, index) for index in self._members if index != 0}
            for request in Request:
                reports = [Report(**said[request.name]) for said in others.values() if said]
                self._decide(request, [own[request], *reports])
            leader_state = {"start": self._start}
            leader_state |= {r.name: [d.ticket, d.at, d.cause] for r, d in self._decisions.items()}
        self._obey(leader_state or self._message_of(heard, 0))
        return {"requests": report}, {"requests": leader_state}

    def _message_of(self, heard: Mapping[int, Message], index: int) -> Message:
        message: Message = heard.get(index, {}).get("requests") or {}
        return message if message.get("start") == self._start else {}

    def _report(self, request: Request) -> Report:
        wishes = [file.wants(request) for file in self._ranks]
        if request is Request.stop:
            wishes.append(self._stop_cause)
        ticket, since = self._held[request]
        held = ticket if ticket and time.monotonic() >= since + SETTLE_S else 0  # before the counts are read
        calls = [file.calls(request) for file in self._ranks]
        return Report(max(wishes, default=0), held, max(calls, default=0), min(calls, default=0))

    def _decide(self, request: Request, reports: Sequence[Report]) -> None:
        """On the head node: draw a ticket where somebody wants one, and settle the one that is out."""
        decided, now = self._decisions[request], time.monotonic()
        wish = max(report.wants for report in reports)
        if decided.ticket > decided.at:
            settled = [report for report in reports if report.held >= decided.ticket]
            if len(settled) == len(self._members) or (settled and now > decided.since + ANSWER_S):
                decided.at = max(decided.ticket, 1 + max(report.most for report in settled))
        elif wish > decided.taken and (decided.at == 0 or self._may_follow(request, decided, reports)):
            decided.ticket, decided.taken, decided.cause, decided.since = decided.at + 1, wish, wish, now

    def _may_follow(self, request: Request, decided: Decision, reports: Sequence[Report]) -> bool:
        """Tell whether another request may come: never after a stop; after a save once every rank has had it."""
        all_there = len(reports) == len(self._members)
        return request is Request.save and all_there and min(r.least for r in reports) >= decided.at

    def _obey(self, leader_state: Message) -> None:
        """Hand the head node's decisions to the ranks of this node."""
        under_way = False
        for request in Request:
            ticket, at, cause = leader_state.get(request.name, (0, 0, 0))
            if ticket > self._held[request][0]:
                for file in self._ranks:
                    file.set_hold(request, ticket)
                self._held[request] = (ticket, time.monotonic())
            if at:
                for file in self._ranks:
                    file.set_at(request, at, cause)
            under_way = under_way or ticket > at or self._is_wanted(request, at)
        self._is_under_way = under_way

    def _is_wanted(self, request: Request, at: int) -> bool:
        """Tell whether this node waits for the first ticket of a stop; a save has time."""
        wishes = [self._stop_cause, *(file.wants(request) for file in self._ranks)]
        return request is Request.stop and at == 0 and max(wishes) > 0
