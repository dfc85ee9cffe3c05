"""Rendezvous of agents: the nodes of each round, spares, sick and lost nodes; and the terms of head nodes."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from datetime import timedelta
from itertools import count
from pathlib import Path
from threading import Barrier, Event
from typing import TypeVar

import pytest

from launch.agent import exchange, rendezvous
from launch.agent.exchange import (
    Agreement,
    Heartbeat,
    RendezvousEndpoint,
    SignedStore,
    heartbeat_key,
    next_endpoint,
    open_endpoint,
    open_tcp_store,
)
from launch.agent.health import Fault
from launch.agent.node import (
    HeadNodeLostError,
    Node,
    RendezvousRound,
    RunContext,
    Term,
    TooFewNodesError,
    claim_term,
    is_replaced,
    newest_term,
    presence_file,
)
from launch.agent.policy import AlreadyDecidedError, RunFailedError, refuse_replaced
from launch.agent.rendezvous import AgentGroup
from launch.config import Config
from launch.runs.events import fewer_nodes, select_events
from launch.runs.folder import RunFolder, write_json
from launch.runs.process import HeartbeatFile, Request

T = TypeVar("T")
HOSTS = ("n0", "n1", "n2", "n3")
WAIT_S = 240
"""Longer than a busy machine needs for any step of a test."""


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes have names that no server knows."""
    monkeypatch.setattr(Node, "own_address", lambda self: "127.0.0.1")


def config_of(nodes: int, spares: int = 0) -> Config:
    """A config with timeouts that no busy machine comes near; the tests make the findings of the health check."""
    config = Config(nodes=nodes, spare_nodes=spares)
    for key in ("rendezvous_timeout_s", "node_timeout_s"):
        setattr(config.resilience, key, WAIT_S)
    config.resilience.health_check = False
    return config


def context(folder: RunFolder, index: int, config: Config, count: int, switches: str = "") -> RunContext:
    node = Node(index, count, "job", is_slurm=False, hosts=HOSTS[:count], switches=tuple(switches.split()))
    return RunContext(folder, node, config)


def join(context: RunContext) -> AbstractContextManager[AgentGroup]:
    """The agent in the group of the first term."""
    limits = context.config.resilience
    endpoint = exchange.open_endpoint(context.folder, context.node, limits.rendezvous_timeout_s, limits.node_timeout_s)
    return closing(AgentGroup(context, endpoint))


def run_agents(
    folder: RunFolder, config: Config, count: int, agent: Callable[[AgentGroup, int], T], switches: Sequence[str] = ()
) -> list[T]:
    """Results of an agent on each of ``count`` nodes. The head node ends the run."""

    def run(index: int) -> T:
        with join(context(folder, index, config, count, switches[index] if switches else "")) as group:
            try:
                return agent(group, index)
            finally:
                if index == 0:
                    group.end()

    with ThreadPoolExecutor(count) as agents:
        return list(agents.map(run, range(count)))


@pytest.mark.parametrize(
    ("avoid", "sick", "members", "recorded"),
    [
        ({}, {}, (0, 1), []),
        ({"n1": "lost in attempt 2"}, {}, (0, 2), [(["n1"], "n1: lost in attempt 2")]),
        # The head node decides, and cannot be left out; nor can more than there are spares.
        ({"n0": "hung twice"}, {}, (0, 1), []),
        ({"n2": "why", "n1": "because"}, {}, (0, 1), [(["n2"], "n2: why")]),
        ({}, {1: "fan"}, (0, 2), []),
        ({}, {2: "fan"}, (0, 1), []),
        ({}, {1: "fan", 2: "heat"}, None, []),
        ({}, {0: "fan"}, None, []),
    ],
)
def test_a_spare_takes_the_place_of_a_host_to_avoid_and_of_a_sick_node(
    tmp_path: Path, avoid: Mapping[str, str], sick: Mapping[int, str], members: tuple[int, ...] | None, recorded: object
) -> None:
    folder = RunFolder(tmp_path)

    def agent(group: AgentGroup, index: int) -> RendezvousRound | TooFewNodesError | None:
        make_sick(group, sick.get(index))
        try:
            return group.next_round(0, avoid)
        except TooFewNodesError as error:
            return error

    rounds, events = run_agents(folder, config_of(2, 1), 3, agent), folder.read_events()
    if members is None:
        (error,) = [found for found in rounds if isinstance(found, TooFewNodesError)]
        assert error is rounds[0] and {one.index: one.why for one in error.sick} == sick
        return
    assert {found.members for found in rounds if isinstance(found, RendezvousRound)} == {members}
    assert [(e["hosts"], e["cause"]) for e in select_events(events, "avoided")] == recorded
    named = {(e["node"], e["host"], e["cause"]) for e in select_events(events, "node_sick")}
    assert named == {(index, HOSTS[index], why) for index, why in sick.items()}


@pytest.mark.parametrize(
    ("nodes", "switches", "members"),
    [
        (4, ("core b", "core a", "core b", "core a"), (0, 2, 1, 3)),
        (4, ("core b", "edge a", "core a", "core b"), (0, 3, 2, 1)),
        (4, ("", "", "", ""), (0, 1, 2, 3)),
        # The spare is the node that is farthest from the head node.
        (3, ("core b", "core a", "core b", "core b"), (0, 2, 3)),
    ],
)
def test_ranks_are_numbered_by_the_switches_above_their_nodes(
    tmp_path: Path, nodes: int, switches: tuple[str, ...], members: tuple[int, ...]
) -> None:
    def agent(group: AgentGroup, index: int) -> RendezvousRound | None:
        return group.next_round(0)

    rounds = run_agents(RunFolder(tmp_path), config_of(nodes, 4 - nodes), 4, agent, switches)
    assert {found.members for found in rounds if found is not None} == {members}


def make_sick(group: AgentGroup, why: str | None) -> None:
    found = [] if why is None else [Fault("command", why)]
    group._health.examine = lambda: found  # type: ignore[method-assign]


def test_a_restart_waits_for_room_in_the_run_folder_and_the_first_start_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([[Fault("run folder", "full")], [Fault("run folder", "full")], [Fault("run folder", "full")], []])
    monkeypatch.setattr(rendezvous, "ROOM_POLL_S", 0.0)
    with join(context(RunFolder(tmp_path), 0, config_of(1), 1)) as group:
        monkeypatch.setattr(group._health, "examine", lambda: next(found))
        with pytest.raises(TooFewNodesError) as refusal:
            group.next_round(0)
        assert refusal.value.sick[0].is_shared
        assert group.next_round(1) is not None and next(found, None) is None
        group.end()


def test_a_start_uses_fewer_nodes_while_some_are_sick_and_all_nodes_afterwards(tmp_path: Path) -> None:
    folder, config = RunFolder(tmp_path), config_of(4)
    config.resilience.min_nodes = 1
    write_json(folder.plan, {"promised": {"fewer_nodes": [2, 1]}})
    sick: list[dict[int, str]] = [{}, {1: "fan"}, {1: "fan", 2: "heat", 3: "dust"}, {}]

    def agent(group: AgentGroup, index: int) -> list[tuple[int, ...]]:
        members = []
        for number, faults in enumerate(sick):
            make_sick(group, faults.get(index))
            rdzv = group.next_round(number)
            members.append(() if rdzv is None else rdzv.members)
        return members

    members = run_agents(folder, config, 4, agent)[0]
    assert members == [(0, 1, 2, 3), (0, 2), (0,), (0, 1, 2, 3)]
    events = folder.read_events()
    smaller = fewer_nodes(events)
    assert {attempt: (e["nodes"], e["asked"], e["hosts"]) for attempt, e in smaller.items()} == {
        2: (2, 4, ["n0", "n2"]),
        3: (1, 4, ["n0"]),
    }
    assert smaller[2]["cause"] == "n1: sick, fan", "the fourth cannot be used, and waits"
    assert [(e["attempt"], e["spares"]) for e in select_events(events, "members")] == [(2, ["n3"])]
    assert [e["attempt"] for e in select_events(events, "all_nodes")] == [4]


def test_a_ready_node_that_became_silent_takes_no_part(tmp_path: Path) -> None:
    gone, is_lost = Event(), Event()

    def agent(group: AgentGroup, index: int) -> None:
        if index == 1:
            group.heartbeat.publish(host="n1", ready=1)
            assert group.heartbeat.flush(WAIT_S)
            group.heartbeat.close()
            gone.set()
            assert is_lost.wait(WAIT_S)
            return
        assert gone.wait(WAIT_S)
        assert group.next_round(0) is not None, "its message is new"
        assert group.heartbeat.flush(WAIT_S), "all its messages are here"
        group.heartbeat._when[1] -= WAIT_S + 1
        try:
            with pytest.raises(TooFewNodesError):
                group.next_round(1)
            assert group.lost[1].why.startswith("silent for 2")
        finally:
            is_lost.set()

    run_agents(RunFolder(tmp_path), config_of(2), 2, agent)


def test_a_lost_connection_to_the_head_node_is_not_described_as_silence(tmp_path: Path) -> None:
    config, folder, is_there = config_of(2), RunFolder(tmp_path), Event()
    hasty = config_of(2)
    hasty.resilience.node_timeout_s = 1

    def head() -> None:
        with join(context(folder, 0, hasty, 2)):
            assert is_there.wait(WAIT_S)  # and leaves without a message

    with ThreadPoolExecutor(1) as other:
        gone = other.submit(head)
        with join(context(folder, 1, config, 2)) as group:
            is_there.set()
            gone.result()
            with pytest.raises(HeadNodeLostError, match=r"^its connection ended \("):
                group.next_round(0)


def test_many_agents_exchange_less_often() -> None:
    rates = [count / exchange.exchange_interval_s(count) for count in (2, 80, 400, 4000)]
    assert rates == pytest.approx([20, 800, 800, 8000])


def node_message(store: SignedStore) -> str | None:
    """Return the message of node 1 in the store."""
    (message,) = store.read([heartbeat_key(1)])
    return message


def test_a_stop_of_4096_nodes_needs_two_waits_of_a_node_and_messages_do_not_grow_with_them(tmp_path: Path) -> None:
    """Time line of a node: sees the request, at most 0.5 s; its ranks wait, 0.05 s; sees the step, at most 0.5 s."""

    class Called(Heartbeat):
        def _run(self) -> None:
            pass

    raw = open_tcp_store("127.0.0.1", timedelta(seconds=WAIT_S))
    store, file = SignedStore(raw, "token", "heartbeats"), HeartbeatFile(tmp_path / "rank")
    head, node = Called(0, 2, store), Called(1, 4096, store)
    head.publish(round=RendezvousRound(0, 1, tuple(range(4096)), "127.0.0.1", 1))
    head.agreement, node.agreement = Agreement(0, 0, (0, 1), []), Agreement(0, 1, (0, 1), [file])
    assert [one.exchange() for one in (head, node, head, node)][3] == 0.5
    assert max(len(raw.get(key)) for key in raw.list_keys() if "heartbeat" in key) < 500
    rdzv = node.of(0).round
    assert rdzv is not None and len(rdzv.members) == 4096
    head.agreement.request_stop(15)
    head.exchange()
    said = [node_message(store)]
    report_s = node.exchange()
    assert report_s <= 0.05, "the node reports as soon as its ranks are known to wait"
    said.append(node_message(store))
    time.sleep(report_s)
    step_s = node.exchange()
    assert step_s <= 0.5 and file.cause == 0
    said.append(node_message(store))
    head.exchange()
    node.exchange()
    assert file.cause == 15 and file.ask(Request.stop, 0)
    said.append(node_message(store))
    assert said[0] == said[1] != said[2] == said[3], "the node sends only that its ranks wait"
    node.exchange()
    assert node_message(store) != said[3]
    for one in (head, node):
        one.close()


def test_a_lost_node_that_returns_takes_no_part_and_its_spare_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a node whose cable was out for longer than ``resilience.node_timeout_s``."""
    everybody = Barrier(3, timeout=WAIT_S)

    def agent(group: AgentGroup, index: int) -> list[tuple[int, ...]]:
        first = group.next_round(0)
        assert first is not None and group.heartbeat.flush(WAIT_S)
        everybody.wait()
        if index == 0:
            with monkeypatch.context() as silence:
                silence.setattr(group, "_silence", lambda index: (WAIT_S + 1.0) * (index == 1))
                assert [one.host for one in group.find_silent(first)] == ["n1"]
        everybody.wait()
        rounds = [first, group.next_round(1), group.next_round(2)]  # the lost one asks for them as well
        everybody.wait()
        return [each.members for each in rounds if each is not None]

    assert run_agents(RunFolder(tmp_path), config_of(2, 1), 3, agent) == [[(0, 1), (0, 2), (0, 2)]] * 3


def test_a_lost_spare_matters_only_at_the_next_start(tmp_path: Path) -> None:
    met, both, gone = Barrier(3, timeout=WAIT_S), Barrier(2, timeout=WAIT_S), Event()

    def agent(group: AgentGroup, index: int) -> list[tuple[int, ...]]:
        first = group.next_round(0)
        assert first is not None and group.heartbeat.flush(WAIT_S)
        met.wait()
        if index == 2:
            group.heartbeat.close()  # without a message
            gone.set()
            return []
        assert gone.wait(WAIT_S)
        if index == 0:
            assert group.heartbeat.flush(WAIT_S), "all its messages are here"
            group.heartbeat._when[2] -= WAIT_S + 1
            assert group.find_silent(first) == [] and not group.lost
        second = group.next_round(1)
        assert second is not None
        both.wait()
        assert index != 0 or list(group.lost) == [2]
        return [first.members, second.members]

    assert run_agents(RunFolder(tmp_path), config_of(2, 1), 3, agent) == [[(0, 1), (0, 1)]] * 2 + [[]]


# Terms of head nodes: one node of many gets the next one, the others follow, and a lost node gets none.


JOB = "slurm-7-0-0"
CLAIM_S = 60.0


def node(index: int) -> Node:
    return Node(index, 4, JOB, is_slurm=True, slurm_job="7", hosts=HOSTS)


@pytest.mark.parametrize("has_links", [True, False])
def test_of_many_claims_of_a_term_one_succeeds_and_its_file_is_whole_and_private(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr("launch.agent.node.os.link", refuse)
    folder, together = RunFolder(tmp_path), Barrier(8)

    def claim(index: int) -> bool:
        together.wait()
        return claim_term(folder, JOB, Term(index, "10.0.0.1", 1, "secret", number=1, lost=((0, "silent"),)))

    with ThreadPoolExecutor(8) as nodes:
        won = [index for index, has_won in enumerate(nodes.map(claim, range(8))) if has_won]
    term = newest_term(folder, JOB)
    assert term is not None and [term.head] == won and term.lost == ((0, "silent"),)
    (file,) = (path for path in (tmp_path / ".launch").iterdir() if path.is_file())
    assert file.stat().st_mode & 0o077 == 0, "it has the secret"
    assert newest_term(folder, "slurm-7-1-0") is None, "another start of the job"
    assert [is_replaced(folder, node(index)) for index in range(2)] == [index not in won for index in range(2)]


def test_after_the_loss_of_the_head_node_all_others_meet_at_one_of_them(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    gone = open_endpoint(folder, node(0), CLAIM_S, CLAIM_S).term

    def follow(index: int) -> RendezvousEndpoint:
        return next_endpoint(folder, node(index), gone, "silent for 5 s", CLAIM_S)

    with ThreadPoolExecutor(3) as nodes:
        endpoints = list(nodes.map(follow, (1, 2, 3)))
    (term,) = {endpoint.term for endpoint in endpoints}
    assert term.number == 1 and term.lost == ((0, "silent for 5 s"),) and term.token == gone.token
    SignedStore(endpoints[0].store, term.token, "name").set("key", "from one")
    assert [SignedStore(each.store, term.token, "name").read(["key"]) for each in endpoints] == [["from one"]] * 3
    old = RunContext(folder, node(0), Config())
    with pytest.raises(AlreadyDecidedError, match="n0 was cut off, and another node is the head node now"):
        refuse_replaced(old)


def test_a_node_that_the_head_node_has_lost_claims_nothing_and_the_others_see_later_terms(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = open_endpoint(folder, node(0), CLAIM_S, CLAIM_S).term
    # The head node has lost n1, and has begun a term of its own without it.
    claim_term(folder, JOB, Term(0, first.address, first.port, first.token, 1, ((1, "silent for 6 s"),)))
    with pytest.raises(RunFailedError, match="n1 was cut off, and the run continues without it: its connection ended"):
        next_endpoint(folder, node(1), first, "its connection ended", CLAIM_S)
    after = next_endpoint(folder, node(2), first, "silent for 5 s", CLAIM_S).term
    assert (after.head, after.number, [index for index, _ in after.lost]) == (2, 2, [1, 0])


def test_a_node_that_is_cut_off_alone_leaves_the_next_term_to_the_head_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FIRST_S": 0.0, "EACH_S": 0.0, "ALONE_S": 1e6}.items():
        monkeypatch.setattr(exchange, name, value)
    folder, looks = RunFolder(tmp_path), count()
    first = open_endpoint(folder, node(0), CLAIM_S, CLAIM_S).term
    presence_file(folder, JOB, 0, 1).touch()
    presence_file(folder, JOB, 0, 2).touch()

    def look(folder: RunFolder, job: str) -> Term | None:
        if next(looks) == 3:  # meanwhile, the head node has lost n1 and n2, a half of the four nodes
            lost = ((1, "silent for 6 s"), (2, "silent for 6 s"))
            claim_term(folder, JOB, Term(0, first.address, first.port, first.token, 1, lost))
        return newest_term(folder, job)

    monkeypatch.setattr(exchange, "newest_term", look)
    with pytest.raises(RunFailedError, match="n1 was cut off, and the run continues without it"):
        next_endpoint(folder, node(1), first, "silent for 5 s", CLAIM_S)


def test_a_node_claims_the_next_term_once_more_than_half_of_the_nodes_have_lost_the_head_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "ALONE_S", 1e6)
    folder = RunFolder(tmp_path)
    first = open_endpoint(folder, node(0), CLAIM_S, CLAIM_S).term
    for index in (1, 2, 3):
        presence_file(folder, JOB, 0, index).touch()
    assert next_endpoint(folder, node(2), first, "silent for 5 s", CLAIM_S).term.head == 2


def test_a_next_head_node_that_does_not_answer_counts_as_lost_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "FIRST_S", 0.0)
    folder = RunFolder(tmp_path)
    first = open_endpoint(folder, node(0), CLAIM_S, CLAIM_S).term
    closed = open_tcp_store("127.0.0.1", timedelta(seconds=CLAIM_S))
    port = closed.port
    del closed
    claim_term(folder, JOB, Term(1, "127.0.0.1", port, first.token, 1, ((0, "silent"),)))
    term = next_endpoint(folder, node(3), first, "silent", 1.0).term
    assert (term.head, term.number, [index for index, _ in term.lost]) == (3, 2, [0, 1])
