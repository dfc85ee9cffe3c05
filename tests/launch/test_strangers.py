"""A run among other users of its machine: what they send to its ports changes nothing; its folder is its owner's."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from launch.agent.exchange import ROUND_KEY, Heartbeat, Message, SignedStore, heartbeat_key, open_tcp_store
from launch.agent.node import RendezvousRound
from launch.plan.plan import refuse_exposed
from launch.runs.folder import RunFolder, deny_others_writing, make_folder, write_json
from launch.runs.records import read_records
from launch.slurm.jobs import run_dirs_of
from tests.support.commands import TINY, descendants, ranks_of, run, start_fork, wait_for
from tests.support.planning import refused

TIMEOUT = timedelta(seconds=30)
LOOPBACK = "127.0.0.1"
VALIDATE, PING = 0, 13
"""Requests of torch's store, by which a port that serves one is told from others (TCPStoreBackend.hpp)."""
MAGIC = 0x3C85F7CE
NAME = """it's $(touch pwned) `touch pwned` "a=b,c"; é *"""
"""A run of this name is started, and must neither stumble over it nor have a shell run it."""


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Address and port of every listening socket of some processes."""
    found = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            sockets = psutil.Process(pid).net_connections("tcp")
            found |= {(each.laddr.ip, each.laddr.port) for each in sockets if each.status == psutil.CONN_LISTEN}
    return found


def send_garbage(port: int) -> None:
    for text in (b"GET / HTTP/1.0\r\n\r\n", bytes(8), b"\xff" * 70_000, pickle.dumps(("x", 1))):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(text)


def is_store(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(1)
        connection.sendall(struct.pack("=BIBI", VALIDATE, MAGIC, PING, 4711))
        return connection.recv(4) == struct.pack("=I", 4711)
    return False


def connect(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)


def orders(port: int) -> list[str]:
    """Give a store the orders that once killed a run, and overwrite and delete all that it tells of; its keys."""
    store = connect(port)
    for key in (heartbeat_key(0), heartbeat_key(1), "agents/left", "left", "left/all"):
        store.set(key, '{"beat": 1000000, "over": true, "failed": 0, "failure": "a stranger says so"}')
    keys = store.list_keys()
    for number, key in enumerate(keys):
        before = store.get(key)
        store.set(key, [b"garbage", before + b" ", before[::-1]][number % 3])
        if number % 2:
            store.delete_key(key)
    return keys


@pytest.fixture
def umask_000() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_strangers_change_nothing_in_a_run_and_cannot_write_into_its_folder(tmp_path: Path, umask_000: None) -> None:
    words = [*TINY, "optim.max_steps=80", "checkpoint.interval=40", "logging.tensorboard=true"]
    quoted = NAME.replace('"', '\\"')
    out = tmp_path / "out put"
    named = [f'name="{quoted}"', f"output_dir='{out}'"]
    local = ["nodes=2", "ranks_per_node=1", "cluster=local"]
    launcher = start_fork("launch", *local, *words, *named, cwd=tmp_path, log=tmp_path / "log")

    def rank_1_trains() -> bool:
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        return any(len(read_records(path)) > 2 for path in out.glob("*/*/metrics/rank_00001.jsonl"))

    wait_for(rank_1_trains, "the first steps")
    family = descendants(launcher.pid)
    paused = ranks_of(family)[1]
    os.kill(paused, signal.SIGSTOP)  # so that the run is not over before the stranger has tried everything
    (folder,) = (RunFolder(path.parent) for path in out.glob("*/*/plan.json"))
    ports = listening(family)
    assert len(ports) >= 2 and {address for address, _ in ports} == {LOOPBACK}
    for _, port in ports:
        send_garbage(port)
    keys = {port: orders(port) for _, port in ports if is_store(port)}
    ((agents, told),) = (
        (port, of) for port, of in keys.items() if any(key.endswith(f"/{heartbeat_key(0)}") for key in of)
    )
    ((_, met),) = ((port, of) for port, of in keys.items() if port != agents)
    assert any("cpu//" in key for key in met)  # where the ranks of a process group find each other
    store = connect(agents)

    def is_noticed() -> bool:
        for key in told:
            store.set(key, "garbage")
        return any(event["event"] == "foreign_message" for event in folder.read_events())

    wait_for(is_noticed, "the event of a foreign message")
    os.kill(paused, signal.SIGCONT)
    assert launcher.wait() == 0, (tmp_path / "log").read_text()
    events = [event["event"] for event in folder.read_events()]
    assert events.count("foreign_message") in (1, 2)  # once for each agent that saw one
    assert events.count("started") == 1 and "rank_failed" not in events and "node_lost" not in events

    run("gpt.train", *words, f"run_dir={tmp_path / 'alone'}", cwd=tmp_path)
    alone, disturbed = (read_records(RunFolder(path).metrics(0)) for path in (tmp_path / "alone", folder.path))
    assert [r["loss"] for r in disturbed] == pytest.approx([r["loss"] for r in alone], rel=1e-4)

    assert out.is_dir() and (folder.path.parent.name, folder.path.parent.parent) == (NAME, out)
    assert not list(tmp_path.rglob("pwned"))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (out, *out.rglob("*"))}
    assert not [(path, oct(mode)) for path, mode in modes.items() if mode & 0o022]
    jobs = folder.path.parent / ".submitit"
    pickled = {path.name.partition("_")[2]: modes[path] for path in jobs.glob("*.pkl")}
    assert pickled == {"submitted.pkl": 0o600, "0_result.pkl": 0o600, "1_result.pkl": 0o600}
    assert [mode for path, mode in modes.items() if path.parent.name == ".launch" and path.suffix == ".json"] == [0o600]


@pytest.fixture
def served() -> Iterator[dist.TCPStore]:
    yield open_tcp_store("127.0.0.1", TIMEOUT)


def test_a_store_listens_on_one_address_and_only_messages_signed_for_their_key_are_read(served: dist.TCPStore) -> None:
    assert {address for address, port in listening([os.getpid()]) if port == served.port} == {LOOPBACK}
    ours = SignedStore(served, "token", "heartbeats")
    stranger = connect(served.port)
    assert ours.read(["a", "b"]) == [None, None] and ours.foreign == ""
    ours.set("a", '{"beat": 1}')
    assert ours.read(["a", "b"]) == ['{"beat": 1}', None] and ours.foreign == ""
    first, second = sorted(stranger.list_keys())
    assert not {"a", "b"} & {first, second}  # what is not listed cannot be guessed either
    stranger.set(second, stranger.get(first))  # another's message under this key
    assert ours.read(["b"]) == [None] and ours.foreign == "b"
    SignedStore(stranger, "guessed", "heartbeats").set("a", "over")
    SignedStore(stranger, "token", "departures").set("a", "over")  # another use
    assert ours.read(["a"]) == ['{"beat": 1}']
    stranger.set(first, b"\xff" * 200)
    assert ours.read(["a"]) == [None]
    stranger.delete_key(first)
    assert ours.read(["a", "b"]) == [None, None]  # at once, where torch's own read waits for the key
    assert len(stranger.list_keys()) >= 2


def test_an_earlier_message_that_is_written_again_is_ignored(served: dist.TCPStore) -> None:
    head = Heartbeat(0, 2, SignedStore(served, "token", "heartbeats"))
    node = SignedStore(connect(served.port), "token", "heartbeats")
    try:
        for beat, failed in ((7, 1), (6, 0)):
            node.set(heartbeat_key(1), f'{{"beat": {beat}, "failed": {failed}}}')
            node.read([heartbeat_key(1)])  # torch's client does not wait for the store to have what it sets
            assert head.flush(30)
            assert head.received[1] == Message(beat=7, failed=1)
        assert head.store.foreign == ""
    finally:
        head.close()


def test_an_agent_waits_for_the_newest_round_while_a_stranger_overwrites_it(served: dist.TCPStore) -> None:
    store = connect(served.port)
    head, node = (Heartbeat(index, 2, SignedStore(store, "token", "heartbeats")) for index in range(2))
    rounds = [RendezvousRound(number, 1, (0, 1), LOOPBACK, 1) for number in range(2)]
    try:
        head.publish(round=rounds[0])
        wait_for(lambda: node.of(0).round == rounds[0], "the first round")
        (key,) = (key for key in store.list_keys() if key.endswith(f"/{ROUND_KEY}"))
        old = store.get(key)
        head.publish(round=rounds[1])
        for value in (old, b"garbage") * 20:
            store.set(key, value)
        store.delete_key(key)
        wait_for(lambda: node.of(0).round == rounds[1], "the second round")
    finally:
        head.close()
        node.close()


def test_files_can_be_written_by_their_owner_only_whatever_the_umask(tmp_path: Path, umask_000: None) -> None:
    open_to_all = tmp_path / "shared"
    open_to_all.mkdir()
    write_json(tmp_path / "note.json", {"token": "x"}, mode=0o600)
    for umask, readable in ((0o000, 0o644), (0o002, 0o644), (0o007, 0o640), (0o077, 0o600)):
        os.umask(umask)
        deny_others_writing()
        write_json(tmp_path / "plan.json", {})
        assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == readable
    make_folder(open_to_all)
    assert stat.S_IMODE(open_to_all.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "note.json").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("folder", "mode", "is_refused"),
    [
        (".submitit", 0o755, False),
        (".submitit", 0o775, True),
        (".submitit", 0o707, True),
        ("run", 0o775, False),
        ("run", 0o777, True),
        (".", 0o777, True),
        (".", 0o1777, False),
    ],
)
def test_a_folder_that_others_can_change_is_refused(folder: str, mode: int, is_refused: bool, tmp_path: Path) -> None:
    sweep = tmp_path / "my sweep"
    refuse_exposed(sweep / "run")  # which is not there yet
    (sweep / folder).mkdir(parents=True)
    (sweep / folder).chmod(mode)
    if is_refused:
        refusal = refused(refuse_exposed, sweep / "run")
        assert f"{mode:04o}" in refusal.found and refusal.fix.startswith(f"chmod -R go-w '{sweep}")
        os.system(refusal.fix.split(",")[0])
    refuse_exposed(sweep / "run")


class Trap:
    """Something that runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self._command,)


@pytest.mark.parametrize(
    ("mode", "owner", "runs"),
    [(0o600, None, True), (0o644, None, True), (0o620, None, False), (0o602, None, False), (0o644, 65534, False)],
)
def test_a_pickle_that_other_users_could_write_is_not_opened(
    mode: int, owner: int | None, runs: bool, tmp_path: Path
) -> None:
    """As launch.status finds them in the folder of somebody else's runs; one's own would run, which shows the trap."""
    path, pwned = tmp_path / "7_submitted.pkl", tmp_path / "pwned"
    path.write_bytes(pickle.dumps(Trap(f"touch {pwned}")))
    path.chmod(mode)
    if owner is not None:
        if os.getuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(path, owner, -1)
    assert run_dirs_of(path) == ()
    assert pwned.exists() is runs
