"""Terms of head nodes: one node of many gets the next one, the others follow, and a lost node gets none."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier

import pytest

from launch.agent import exchange
from launch.agent.exchange import RendezvousEndpoint, SignedStore, next_endpoint, open_endpoint, open_tcp_store
from launch.agent.node import Node, RunContext, Term, claim_term, is_replaced, newest_term
from launch.agent.policy import AlreadyDecidedError, RunFailedError, refuse_replaced
from launch.config import Config
from launch.runs.folder import RunFolder

JOB = "slurm-7-0-0"
HOSTS = ("n0", "n1", "n2", "n3")
WAIT_S = 60.0


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Node, "own_address", lambda self: "127.0.0.1")


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
    gone = open_endpoint(folder, node(0), WAIT_S, WAIT_S).term

    def follow(index: int) -> RendezvousEndpoint:
        return next_endpoint(folder, node(index), gone, "silent for 5 s", WAIT_S)

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
    first = open_endpoint(folder, node(0), WAIT_S, WAIT_S).term
    # The head node has lost n1, and has begun a term of its own without it.
    claim_term(folder, JOB, Term(0, first.address, first.port, first.token, 1, ((1, "silent for 6 s"),)))
    with pytest.raises(RunFailedError, match="n1 was cut off, and the run continues without it: its connection ended"):
        next_endpoint(folder, node(1), first, "its connection ended", WAIT_S)
    after = next_endpoint(folder, node(2), first, "silent for 5 s", WAIT_S).term
    assert (after.head, after.number, [index for index, _ in after.lost]) == (2, 2, [1, 0])


def test_a_next_head_node_that_does_not_answer_counts_as_lost_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "FIRST_S", 0.0)
    folder = RunFolder(tmp_path)
    first = open_endpoint(folder, node(0), WAIT_S, WAIT_S).term
    closed = open_tcp_store("127.0.0.1", timedelta(seconds=WAIT_S))
    port = closed.port
    del closed
    claim_term(folder, JOB, Term(1, "127.0.0.1", port, first.token, 1, ((0, "silent"),)))
    term = next_endpoint(folder, node(3), first, "silent", 1.0).term
    assert (term.head, term.number, [index for index, _ in term.lost]) == (3, 2, [0, 1])
