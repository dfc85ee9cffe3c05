"""Rendezvous of agents: who takes part in a round, where a host is to be avoided."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest

from launch.agent import exchange as heartbeat
from launch.agent import rendezvous
from launch.agent.node import HeadNodeLostError, Node, RendezvousRound, RunContext, TooFewNodesError
from launch.agent.rendezvous import join
from launch.config import Config
from launch.runs.folder import RunFolder
from launch.slurm import client

HOSTS = ("n0", "n1", "n2")


def patient(config: Config) -> Config:
    """Return the config with timeouts that no busy machine comes near."""
    for key in ("rendezvous_timeout_s", "node_timeout_s"):
        setattr(config.resilience, key, 240)
    return config


@pytest.mark.parametrize(
    ("avoid", "members", "told"),
    [
        ({}, (0, 1), None),
        ({"n1": "lost in attempt 2"}, (0, 2), ("avoided", ["n1"], "n1: lost in attempt 2")),
        # The head node decides, and cannot be left out; nor can more than there are spares.
        ({"n0": "hung twice"}, (0, 1), ("not_avoided", ["n0"], "n0: hung twice")),
        ({"n2": "why", "n1": "because"}, (0, 1), ("avoided", ["n2"], "n2: why")),
    ],
)
def test_a_spare_takes_the_place_of_a_host_to_avoid(
    tmp_path: Path, avoid: Mapping[str, str], members: tuple[int, ...], told: tuple[str, list[str], str] | None
) -> None:
    config = patient(Config(nodes=2, spare_nodes=1))
    folder = RunFolder(tmp_path)

    def agent(index: int) -> RendezvousRound | None:
        node = Node(index, len(HOSTS), "job", is_slurm=False, hosts=HOSTS)
        with join(RunContext(folder, node, config)) as group:
            rdzv = group.next_round(0, avoid)
            if node.is_head:
                group.end()
            return rdzv

    with ThreadPoolExecutor(len(HOSTS)) as agents:
        rounds = list(agents.map(agent, range(len(HOSTS))))
    assert {rdzv.members for rdzv in rounds if rdzv is not None} == {members}
    events = folder.read_events()
    first = next((e for e in events if e["event"] in ("avoided", "not_avoided")), None)
    assert told == (None if first is None else (first["event"], first["hosts"], first["cause"]))


def test_a_node_that_came_early_and_has_fallen_silent_since_takes_no_part(tmp_path: Path) -> None:
    config, folder, gone = patient(Config(nodes=2)), RunFolder(tmp_path), Event()

    def come_early_and_vanish() -> None:
        with join(RunContext(folder, Node(1, 2, "job", is_slurm=False, hosts=HOSTS[:2]), config)) as group:
            group.heartbeat.publish(host="n1", ready=1)
            assert group.heartbeat.flush(240)
            group.heartbeat.close()
            gone.set()

    with (
        ThreadPoolExecutor(1) as other,
        join(RunContext(folder, Node(0, 2, "job", is_slurm=False, hosts=HOSTS[:2]), config)) as group,
    ):
        vanished = other.submit(come_early_and_vanish)
        assert gone.wait(240)
        assert group.next_round(0) is not None, "it has just been heard"
        assert group.heartbeat.flush(240), "all that it said has been heard"
        group.heartbeat._when[1] -= 241
        with pytest.raises(TooFewNodesError):
            group.next_round(1)
        assert group.lost[1].why.startswith("silent for 2")
        group.end()
        vanished.result()


def test_a_head_node_whose_connection_ended_is_not_one_that_was_silent_for_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "OVER_S", 0.0)  # the word that the run is over will not come
    config, folder, is_there = patient(Config(nodes=2)), RunFolder(tmp_path), Event()

    def head() -> None:
        with join(RunContext(folder, Node(0, 2, "job", is_slurm=False, hosts=HOSTS[:2]), config)):
            assert is_there.wait(240)  # and leaves without a word

    with ThreadPoolExecutor(1) as other:
        gone = other.submit(head)
        with join(RunContext(folder, Node(1, 2, "job", is_slurm=False, hosts=HOSTS[:2]), config)) as group:
            is_there.set()
            gone.result()
            with pytest.raises(HeadNodeLostError, match=r"^its connection ended \(") as lost:
                group.next_round(0)
    assert "silent for 0 s" not in str(lost.value)


def test_after_a_failure_no_message_waits_for_the_next_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an hour between two heartbeats three agents, one of them a spare, agree on the start after a failure."""
    config, folder = patient(Config(nodes=2, spare_nodes=1)), RunFolder(tmp_path)
    everybody = Barrier(len(HOSTS), timeout=240)

    def agent(index: int) -> list[RendezvousRound | None]:
        node = Node(index, len(HOSTS), "job", is_slurm=False, hosts=HOSTS)
        with join(RunContext(folder, node, config)) as group:
            rounds = [group.next_round(0)]
            everybody.wait()
            if node.is_head:
                for module, name in ((heartbeat, "INTERVAL_S"), (heartbeat, "HURRY_S"), (rendezvous, "SPARE_CHECK_S")):
                    monkeypatch.setattr(module, name, 3600.0)
            everybody.wait()
            if index != 2:  # which stands by, and hears of it
                group.report_failed(0)
                assert group.heartbeat.flush(240)
            everybody.wait()
            rounds.append(group.next_round(1))
            everybody.wait()
            if node.is_head:
                group.end()
            return rounds

    with ThreadPoolExecutor(len(HOSTS)) as agents:
        found = list(agents.map(agent, range(len(HOSTS))))
    assert [[one.number for one in rounds if one is not None] for rounds in found] == [[0, 1]] * len(HOSTS)


def test_agents_in_a_hurry_ask_the_head_node_the_less_often_the_more_they_are() -> None:
    rates = [count / heartbeat.quick_s(count) for count in (2, 16, 100, 400, 4000)]
    assert rates[:4] == pytest.approx([100, 800, 800, 800]) and rates[4] == 4000 / heartbeat.INTERVAL_S


def test_nodes_that_slurm_takes_before_they_come_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where they went down, or did not answer, in the moment in which the job started on them."""

    def answer(*command: str, **options: int) -> str:
        return " ".join(HOSTS[:1]) if command[1:] == ("show", "hostnames", "n0") else "JobId=7 NodeList=n0 NumNodes=1"

    monkeypatch.setattr(client, "run", answer)
    monkeypatch.setattr(rendezvous, "ASK_SLURM_S", 0.0)
    node = Node(0, len(HOSTS), "slurm-7-0-0", is_slurm=True, slurm_job="7", hosts=HOSTS)
    assert Node(1, len(HOSTS), "slurm-7-0-0", is_slurm=True, hosts=HOSTS).taken_hosts() == set(), "it is taken itself"
    monkeypatch.setattr(Node, "own_address", lambda node: "127.0.0.1")
    with join(RunContext(RunFolder(tmp_path), node, patient(Config(nodes=2, spare_nodes=1)))) as group:
        with pytest.raises(TooFewNodesError, match="1 nodes left, and 2 are needed"):
            group.next_round(0)
        assert {one.host for one in group.lost.values()} == {"n1", "n2"}
        group.end()


def test_a_lost_member_that_comes_back_stays_out_and_its_spare_stays_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a node whose cable was out for longer than ``resilience.node_timeout_s``."""
    config, folder, everybody = patient(Config(nodes=2, spare_nodes=1)), RunFolder(tmp_path), Barrier(3, timeout=240)

    def agent(index: int) -> list[tuple[int, ...]]:
        node = Node(index, len(HOSTS), "job", is_slurm=False, hosts=HOSTS)
        with join(RunContext(folder, node, config)) as group:
            first = group.next_round(0)
            assert first is not None and group.heartbeat.flush(240)
            everybody.wait()
            if node.is_head:
                with monkeypatch.context() as silence:
                    silence.setattr(group, "_silence", lambda index: 241.0 * (index == 1))
                    assert [one.host for one in group.find_silent(first)] == ["n1"]
            everybody.wait()
            rounds = [first, group.next_round(1), group.next_round(2)]  # the lost one asks for them as well
            everybody.wait()
            if node.is_head:
                group.end()
            return [each.members for each in rounds if each is not None]

    with ThreadPoolExecutor(len(HOSTS)) as agents:
        assert list(agents.map(agent, range(len(HOSTS)))) == [[(0, 1), (0, 2), (0, 2)]] * len(HOSTS)


def test_a_spare_that_reboots_disturbs_nobody_and_is_missed_at_the_next_start_only(tmp_path: Path) -> None:
    config, folder = patient(Config(nodes=2, spare_nodes=1)), RunFolder(tmp_path)
    met, both, gone = Barrier(3, timeout=240), Barrier(2, timeout=240), Event()

    def agent(index: int) -> list[tuple[int, ...]]:
        node = Node(index, len(HOSTS), "job", is_slurm=False, hosts=HOSTS)
        with join(RunContext(folder, node, config)) as group:
            first = group.next_round(0)
            assert first is not None and group.heartbeat.flush(240)
            met.wait()
            if index == 2:
                group.heartbeat.close()  # without a word
                gone.set()
                return []
            assert gone.wait(240)
            if node.is_head:
                assert group.heartbeat.flush(240), "all that it said has been heard"
                group.heartbeat._when[2] -= 241
                assert group.find_silent(first) == [] and not group.lost
            second = group.next_round(1)
            assert second is not None
            both.wait()
            if node.is_head:
                assert list(group.lost) == [2]
                group.end()
            return [first.members, second.members]

    with ThreadPoolExecutor(len(HOSTS)) as agents:
        assert list(agents.map(agent, range(len(HOSTS)))) == [[(0, 1), (0, 1)]] * 2 + [[]]
