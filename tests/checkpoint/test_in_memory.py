"""Checkpoints in the memory of nodes, and the messages of ranks, whose reading runs no code."""

from __future__ import annotations

import base64
import json
import math
import os
import pickle
import socket
import threading
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.checkpoint import FailedSave, FileSum, Manifest, Retention, Saved
from gpt.checkpoint.memory import MemoryStores, neighbors
from gpt.checkpoint.messages import decode_value, encode_value
from gpt.checkpoint.writer import ProcessWriter, Writer
from gpt.config import ParallelConfig, Strategy
from gpt.planning.memory import RankMemory, in_memory_bytes, staging_bytes
from gpt.workload.plan import checkpoint_text, refuse_too_little_host
from launch.config import ClusterConfig
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.worker.memory import CHUNK, Place, Store, StoreClient, StoreError, Upload, serve_ranks
from launch.workload import PlanRequest
from tests.support.checkpoints import Checkpoints, Trained
from tests.support.commands import TINY
from tests.support.composing import config_from
from tests.support.distributed import run_distributed

SECRET = "a secret of this job"


class Served:
    """A memory store that answers on a port of this process."""

    def __init__(self) -> None:
        self.store = Store()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.place = Place("127.0.0.1", self._listener.getsockname()[1])
        threading.Thread(target=serve_ranks, args=(self.store, self._listener, SECRET), daemon=True).start()

    def flip_a_bit(self, rank: int) -> str:
        """Damage the largest file of a rank's part; returns its name."""
        (save,) = self.store._saves.values()
        name, file = max(save.parts[rank].items(), key=lambda entry: entry[1].size)
        found = os.pread(file._descriptor, 1, file.size // 2)
        os.pwrite(file._descriptor, bytes([found[0] ^ 1]), file.size // 2)
        return name

    def steps(self) -> list[int]:
        return [entry["step"] for entry in self.store.inventory()["saves"]]


@pytest.fixture
def nodes() -> Iterator[list[Served]]:
    """Stores of three nodes, of which the last is a spare."""
    yield [Served() for _ in range(3)]


def open_checkpoints(rank: int, size: int, places: list[Place], writer: Any) -> Checkpoints:
    """The checkpoints of a rank, in memory where ``places`` has its node, and on a disk."""
    store = Checkpoints(Path(os.environ["DISK"]), Retention(1, 0), writer=writer)
    store.memory = MemoryStores(None, places[rank * len(places) // size], SECRET)
    return store


def save_four(rank: int, size: int, places: list[Place]) -> tuple[list[Any], dict[str, str]]:
    """Save step 1 to the disk, 2 and 3 to memory, and 4 so that one rank fails; what became of them, and step 3."""
    trained, writer = Trained("fsdp", 1), ProcessWriter()
    store = open_checkpoints(rank, size, places, writer)
    found: list[Any] = []
    digests = {}
    for step in range(1, 5):
        trained.step(step)
        state, own = trained.state(), {"of": torch.tensor([rank, step])}
        if step == 1:
            store.save(step, state, own, {"told": step})
            continue
        if step == 4 and rank == 1:
            store.memory.places = (Place("127.0.0.1", 9), *store.memory.places)
        digests[step] = trained.digests()
        store.start(step, state, own, {"told": step}, None)
        trained.step(0)  # training goes on
        found.append(store.finish())
    writer.close()
    return found, digests[3]


def load(rank: int, size: int, places: list[Place]) -> tuple[Any, dict[str, str]]:
    trained = Trained("fsdp", 2)
    trained.step(9)  # so that the optimizer has its states
    store = open_checkpoints(rank, size, places, Writer())
    state = trained.state()
    loaded = store.load(state)
    trained.take(state)
    return loaded, trained.digests()


def test_a_state_is_found_on_the_nodes_that_are_left_and_a_damaged_copy_is_not_taken(
    nodes: list[Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISK", str(tmp_path))
    places = [node.place for node in nodes]
    saved = run_distributed(save_four, 4, places[:2])
    for found, digests in saved:
        assert [type(entry) for entry in found] == [Saved, Saved, FailedSave]
        assert found[2].step == 4 and found[2].cause.startswith("rank 1: ConnectionRefusedError")
        assert digests == saved[0][1]
    (held,) = (entry for entry in nodes[0].store._saves.values() if entry.is_committed)
    assert nodes[0].steps() == nodes[1].steps() == [3] and sorted(held.parts) == [0, 1, 2, 3]

    # The second node is lost, and a spare, which holds nothing, takes its place.
    for rank, (loaded, digests) in enumerate(run_distributed(load, 4, [places[0], places[2]])):
        assert (loaded.is_from_memory, loaded.step, loaded.meta) == (True, 3, {"told": 3})
        assert digests == saved[0][1] and loaded.memory_damage is None
        assert loaded.rank_state["of"].tolist() == [rank, 3]

    name = nodes[0].flip_a_bit(0)
    for loaded, digests in run_distributed(load, 2, places[:2]):
        assert (loaded.is_from_memory, loaded.rank_state) == (True, None) and digests == saved[0][1]
        assert f"the part of rank 0 at {places[0]}: {name} with a wrong checksum" in loaded.memory_damage

    nodes[1].flip_a_bit(0)
    for loaded, digests in run_distributed(load, 2, places[:2]):
        assert (loaded.is_from_memory, loaded.step) == (False, 1) and digests != saved[0][1]
        assert loaded.memory_damage.startswith("step 3 is damaged: the part of rank 0 at")
    assert nodes[0].steps() == nodes[1].steps() == [], "the steps after that checkpoint are made again"


def test_a_part_goes_to_its_own_node_and_to_the_next_in_the_ring() -> None:
    a, b, c = (Place("node", port) for port in range(3))
    assert neighbors(a, [a, a]) == (a,)
    assert neighbors(a, [a, b]) == (a, b) and neighbors(b, [a, b]) == (b, a)
    assert [neighbors(own, [a, a, b, b, c, c])[1] for own in (a, b, c)] == [b, c, a]


def test_a_save_counts_when_all_ranks_have_agreed_on_it(nodes: list[Served]) -> None:
    with StoreClient(nodes[0].place, SECRET) as store:

        def send(save: str, step: int, content: bytes) -> None:
            store.ask("begin", save=save, rank=0, step=step, world_size=1)
            upload = Upload([store], save, 0, "file")
            upload.write(content)
            upload.end()

        content = os.urandom(CHUNK) + b"rest"
        send("first", 1, content)
        store.ask("finish", save="first", rank=0)
        assert nodes[0].steps() == [], "other ranks may still send"
        store.ask("commit", save="first")
        send("second", 2, b"unfinished")
        assert nodes[0].steps() == [1]
        store.ask("commit", save="first")  # of a rank that is late
        assert set(nodes[0].store._saves) == {"first", "second"}, "others are sending the next"
        send("third", 3, b"")
        assert set(nodes[0].store._saves) == {"first", "third"}, "what nobody agreed on makes room"
        assert store.read_all("first", 0, "file", len(content)) == content
        store.ask("finish", save="third", rank=0)
        store.ask("commit", save="third")
        assert nodes[0].steps() == [3]


def test_who_does_not_know_the_token_is_not_heard(nodes: list[Served]) -> None:
    place = nodes[0].place
    with pytest.raises(StoreError, match="another token"):
        StoreClient(place, "a guess")
    for text in (b"", b"GET / HTTP/1.0\r\n\r\n", bytes(200)):
        with socket.create_connection((place.host, place.port)) as stranger:
            answer = b""
            with suppress(OSError):  # it may hang up at the first wrong byte
                stranger.sendall(text)
                stranger.shutdown(socket.SHUT_WR)
                while told := stranger.recv(1 << 16):
                    answer += told
            assert len(answer) <= 32, "a random number at most, whatever is said"
    with StoreClient(place, SECRET) as store:
        store.ask("begin", save="s", rank=0, step=1, world_size=1)
        connection = store._channel._connection
        # Somebody between the two who changes what they say, or says it again.
        connection.sendall(b"\0\0\0\x12" + bytes(32) + b'{"op":"commit"} ...')
        with pytest.raises((StoreError, OSError)):
            store.ask("commit", save="s")
    assert nodes[0].steps() == []


def test_a_copy_that_changes_on_its_way_is_refused(nodes: list[Served]) -> None:
    with StoreClient(nodes[0].place, SECRET) as store:
        store.ask("begin", save="s", rank=0, step=1, world_size=1)
        store.append(b"other bytes", "0" * 64, save="s", rank=0, name="file")
        with pytest.raises((StoreError, OSError)):
            store.ask("finish", save="s", rank=0)
    assert nodes[0].store._saves["s"].parts[0] == {}


def test_the_plan_counts_the_memory_of_two_nodes_and_refuses_what_does_not_fit() -> None:
    config = config_from([*TINY, "checkpoint.memory_interval=7"])
    share = staging_bytes(config, 4)
    assert in_memory_bytes(config, 4, 1) == 2 * share, "the last, and the one on its way"
    assert in_memory_bytes(config, 4, 2) == in_memory_bytes(config, 4, 4) == 4 * share, "of this node and another"
    assert in_memory_bytes(config_from(TINY), 4, 2) == 0
    text = checkpoint_text(config, 4, 2)
    assert "every 7 steps in the memory of its own node and of the next" in text
    assert f"{4 * share / 2**30:.3f} GiB for each rank" in text
    assert "a lost head node, or two neighbors lost together, take it along: then the disk's counts" in text
    assert "a lost node takes it along" in checkpoint_text(config, 4, 1)
    assert "in the memory" not in checkpoint_text(config_from(TINY), 4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nodes_without_that_memory_are_refused(device: str, tmp_path: Path) -> None:
    words = [*TINY, f"device={device}", "checkpoint.asynchronous=true"]
    asked = config_from([*words, "checkpoint.memory_interval=10"])
    held = in_memory_bytes(asked, 4, 2)
    needed = RankMemory(0, 0, 0, 0, 0, 0)
    refused = pytest.raises(ConfigError, match=r"checkpoints in memory of .* GiB(.|\n)*checkpoint\.memory_interval=0")
    for room, outcome in ((held // 2, refused), (2 * (held + staging_bytes(asked, 4)), nullcontext())):
        cluster = ClusterConfig(mem_gb=2 * room / 2**30)
        with outcome:
            refuse_too_little_host(asked, needed, PlanRequest((), RunFolder(tmp_path), False, 2, 2, cluster, 0))


# Messages between ranks: values come back as they were, and what somebody else sends runs nothing.


SENT = [
    None,
    [True, 1, -0.5, 2**80, "é\n"],
    (1, (2, [3]), ()),
    {"a", "b"},
    {1: {"tuple": 2}, "dict": []},
    {"path": Path("a b/c")},
    Strategy.fsdp,
    Manifest(3, 2, 1.5, {"meta": None}, {"x": FileSum(1, "ff")}),
    ParallelConfig(strategy=Strategy.zero1, tp=2),
]


@pytest.mark.parametrize("value", SENT, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_equal_and_of_the_same_types(value: Any) -> None:
    found = decode_value(encode_value(value))
    assert found == value
    assert repr(found) == repr(value) or isinstance(value, set)


def test_numbers_tensors_and_refusals_come_back() -> None:
    tensors = [torch.arange(6.0).view(2, 3).bfloat16().T, torch.tensor(True), torch.empty(0, 3, dtype=torch.int32)]
    found = decode_value(encode_value({"nan": math.nan, "tensors": tensors, "no": ConfigError("a", "b", "c")}))
    assert math.isnan(found["nan"])
    torch.testing.assert_close(found["tensors"], tensors, rtol=0, atol=0)
    assert (found["no"].found, found["no"].expected, found["no"].fix) == ("a", "b", "c")


@pytest.mark.parametrize("value", [object(), lambda: None, b"bytes", ValueError("x"), [{"a": object()}]])
def test_what_cannot_be_sent_is_refused_by_the_sender(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent to other ranks"):
        encode_value(value)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harmed"),)


FORGED = [
    pickle.dumps(Harmful()),
    base64.b64encode(pickle.dumps(Harmful())),
    *(
        json.dumps(plain).encode()
        for plain in (
            {"dataclass": ["subprocess:Popen", [["args", ["touch", "harmed"]]]]},
            {"dataclass": ["os:system", [["command", "touch harmed"]]]},
            {"dataclass": ["gpt.checkpoint:sum_file", [["path", {"path": "/etc/passwd"}]]]},
            {"dataclass": ["gpt.checkpoint:Path", []]},
            {"enum": ["gpt.checkpoint:FileSum", "size"]},
            {"tensor": ["load", [1], ""]},
            {"eval": "1"},
            {"path": "a", "tuple": []},
        )
    ),
]


@pytest.mark.parametrize("message", FORGED)
def test_a_forged_message_runs_nothing(message: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        decode_value(message)
    assert list(tmp_path.iterdir()) == []
