"""A trainer with DDP over gloo in which a rank has a fault: a third set, beside those of faulty.py and held_out.py.

``held_out_two.py FAULT STEP RANK FOLDER``: the fault comes on this rank in this step. ``FOLDER`` is for files of the
fault. The faults are written from the page docs/troubleshooting.md, without a look at the rules of `launch.why`. A
fault without kinds is a healthy program that looks suspicious.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import datetime
import faulthandler
import gzip
import hashlib
import http.client
import itertools
import logging
import multiprocessing
import os
import pickle
import random
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # ends gloo's threads in time: docs/scripts.md
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset

from launch import worker
from tests.support.planted import Fault, Scene, register

FAULTS: dict[str, Fault] = {}
fault = partial(register, FAULTS)
"""Adds a fault. ``when`` is one of: ``start`` (before the process group), ``step`` (after a step), ``all`` (the same,
on all ranks), ``row`` (in the stream of rows), ``loss`` (a change of the loss), ``late`` (after the last step)."""
STEPS = 12
LONG_S = 120.0
log = logging.getLogger("trainer")


# Workers of the loader.


@fault("dead_loader_worker", when="row", options={"workers": 1})
def worker_aborts(at: Scene) -> None:
    os.abort()


@fault("dead_loader_worker", when="row", options={"workers": 2})
def worker_out_of_cpu_time(at: Scene) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
    while True:
        hashlib.sha256(b"row").hexdigest()


@fault("dead_loader_worker", when="row", options={"workers": 1})
def worker_terminated(at: Scene) -> None:
    subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)
    time.sleep(LONG_S)


# Collectives.


@fault("mismatched_collective", has_rank=False, when="all")
def other_type(at: Scene) -> None:
    dist.all_reduce(torch.ones(16, dtype=torch.float64 if at.is_faulty else torch.float32))


@fault("mismatched_collective", "elsewhere", "network", line="dist.recv(")
def receives_what_nobody_sends(at: Scene) -> None:
    dist.recv(torch.empty(4), src=(at.run.rank + 1) % at.run.world_size)


@fault("mismatched_collective", has_rank=False, when="all")
def another_source(at: Scene) -> None:
    """With two ranks both are a source and go on, so the fault reduces afterwards, once more on one rank."""
    dist.broadcast(torch.ones(4), src=at.run.rank if at.is_faulty else (at.run.rank + 1) % at.run.world_size)
    if at.is_faulty:
        dist.reduce(torch.ones(4), dst=0)


@fault("mismatched_collective", has_rank=False)
def evaluates_alone(at: Scene) -> None:
    scores: list[Any] = [None] * at.run.world_size
    dist.all_gather_object(scores, {"accuracy": 0.4})


# A rank that leaves.


@fault("left_early")
def budget_of_time_is_spent(at: Scene) -> None:
    log.info("the time of this rank is over")
    os._exit(0)


@fault("left_early", when="row")
def stream_ends_early(at: Scene) -> None:
    raise EndOfStreamError


class EndOfStreamError(Exception):
    """The stream of rows takes it as its end."""


# Locks.


@fault("deadlock", line="slots.acquire()")
def semaphore_without_slots(at: Scene) -> None:
    slots = threading.BoundedSemaphore(2)
    for _ in range(3):
        slots.acquire()


@fault("deadlock", line="parties.wait()")
def barrier_of_three_threads(at: Scene) -> None:
    parties = threading.Barrier(3)
    threading.Thread(target=parties.wait, daemon=True).start()
    parties.wait()


@fault("deadlock", "elsewhere", line="results.get()")
def queue_of_dead_child(at: Scene) -> None:
    results: multiprocessing.Queue[int] = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=os._exit, args=(3,))
    child.start()
    results.get()


@fault("deadlock", "elsewhere", "dead_loader_worker", line="pool.map(")
def pool_loses_its_task(at: Scene) -> None:
    """A worker of multiprocessing.Pool that is killed is replaced, and its task never ends."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(die, range(4))


def die(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@fault("deadlock", line="writer.join()|.join()")
def joins_writer_that_waits(at: Scene) -> None:
    guard = threading.RLock()

    def write() -> None:
        with guard:
            log.info("written")

    writer = threading.Thread(target=write, daemon=True)
    with guard:
        writer.start()
        writer.join()


# Files.


@fault("slow_disk", needs="small_disk", line="share.iterdir()|os.listdir(share|share.mkdir|mount_without_server(share")
def server_of_files_is_silent(at: Scene) -> None:
    """A FUSE filesystem whose server never answers, as a hard NFS mount does."""
    share = at.folder / f"share_{at.run.rank}"
    share.mkdir()
    mount_without_server(share)
    list(share.iterdir())


def mount_without_server(folder: Path) -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"silent", str(folder).encode(), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")


@fault("slow_disk", line="np.fromfile(")
def tokens_that_do_not_come(at: Scene) -> None:
    path = at.folder / f"tokens_{at.run.rank}.bin"
    os.mkfifo(path)
    np.fromfile(path, dtype=np.uint16)


@fault("slow_disk", line="os.write(")
def pipe_that_nobody_empties(at: Scene) -> None:
    _, end = os.pipe()
    while True:
        os.write(end, bytes(4096))


@fault("slow_disk", needs="frozen_disk", line="torch.save(|.mkdir(")
def checkpoint_on_frozen_disk(at: Scene) -> None:
    at.run.phase("saving", at.step)
    subprocess.run(["fsfreeze", "--freeze", str(at.folder)], check=True)
    at.run.phase("training", at.step)
    torch.save(at.model.state_dict(), at.folder / "model.pt")


# Computation.


@fault("slow_cpu", line="while not is_ready|pass")
def spins(at: Scene) -> None:
    is_ready: list[int] = []
    while not is_ready:
        pass


@fault("slow_cpu", line="torch.nn.functional.conv2d(")
def convolves(at: Scene) -> None:
    images, kernel = torch.randn(4, 8, 96, 96), torch.randn(8, 8, 7, 7)
    while True:
        images = torch.nn.functional.conv2d(images, kernel, padding=3).clamp(-1, 1)


@fault("slow_cpu", line="route(|for each in|return min|if not left")
def tries_all_routes(at: Scene) -> None:
    def route(path: tuple[int, ...], left: frozenset[int]) -> int:
        if not left:
            return sum(abs(a - b) for a, b in itertools.pairwise(path))
        return min(route((*path, each), left - {each}) for each in left)

    route((), frozenset(range(40)))


@fault("gil_held", "slow_cpu", line="sum(itertools.count(")
def adds_without_end(at: Scene) -> None:
    sum(itertools.repeat(0))  # sum(itertools.count()) in compiled code


@fault("gil_held", line=".poll(None")
def library_polls_with_gil(at: Scene) -> None:
    ctypes.PyDLL(None).poll(None, 0, int(LONG_S) * 1000)


@fault("gil_held", "slow_cpu", line="7 ** ")
def huge_power(at: Scene) -> None:
    7 ** (10**9)


# Numbers.


@fault("not_finite", when="loss")
def log_of_zero(at: Scene) -> torch.Tensor:
    assert at.loss is not None
    return at.loss + torch.log(at.loss * 0).sum()


@fault("not_finite", when="loss")
def half_overflows(at: Scene) -> torch.Tensor:
    assert at.loss is not None
    return (at.loss.half() + 60000).float() * 1.0 + (torch.tensor(6e4).half() * 2).float()


@fault("not_finite", "exception", line="torch.distributions.Normal(")
def distribution_refuses_nan(at: Scene) -> None:
    torch.distributions.Normal(torch.tensor([float("nan")]), torch.ones(1)).sample()


@fault("not_finite", when="all", has_rank=False)
def nan_weight_reaches_all(at: Scene) -> None:
    with torch.no_grad():
        next(at.model.parameters()).fill_(float("nan"))


@fault("bit_flip", "exception", when="all", has_rank=False)
def hashes_of_weights_differ(at: Scene) -> None:
    weight = next(at.model.parameters()).detach()
    if at.is_faulty:
        weight.view(torch.int32).view(-1)[1] ^= 1 << 3
    hashes: list[Any] = [None] * at.run.world_size
    dist.all_gather_object(hashes, hashlib.sha256(weight.numpy().tobytes()).hexdigest())
    assert len(set(hashes)) == 1, f"weights differ between replicas: {hashes}"


# Memory.


@fault("oom_kill", needs="small_memory")
def columns_grow(at: Scene) -> None:
    columns: dict[int, np.ndarray[Any, Any]] = {}
    for number in itertools.count():
        columns[number] = np.random.default_rng(number).random(8 << 20)


@fault("oom_kill", needs="small_memory")
def python_objects_grow(at: Scene) -> None:
    rows: list[list[int]] = []
    while True:
        rows.append(list(range(1 << 20)))


@fault("memory_error", line="bytearray(1 << 50)")
def buffer_is_too_large(at: Scene) -> None:
    bytearray(1 << 50)


@fault("memory_error", "exception", line="raise RuntimeError(|prepare_batch(|torch.zeros(1 << 44")
def memory_error_below_another(at: Scene) -> None:
    try:
        torch.zeros(1 << 44)
    except RuntimeError as error:
        raise RuntimeError(f"batch {at.step} was not prepared") from error


# Links.


@fault("network", "exception", line="urlopen(")
def download_is_refused(at: Scene) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        urllib.request.urlopen(f"http://127.0.0.1:{taken.getsockname()[1]}/vocab.json", timeout=3)


@fault("network", "exception", line="getresponse()")
def server_hangs_up(at: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        connection = http.client.HTTPConnection(*server.getsockname(), timeout=3)
        connection.request("GET", "/")
        connection.getresponse()


@fault("network", has_rank=False)
def links_break_one_after_another(at: Scene) -> None:
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as link:
            link.getpeername()
            if link.family in (socket.AF_INET, socket.AF_INET6):
                link.shutdown(random.choice((socket.SHUT_RD, socket.SHUT_WR)))


# Disks.


@fault("full_disk", needs="small_disk", line="pickle.dump(")
def pickle_fills_disk(at: Scene) -> None:
    with (at.folder / "state.pkl").open("wb") as file:
        pickle.dump([os.urandom(1 << 20) for _ in range(40)], file)


@fault("full_disk", needs="small_disk", line="archive.write")
def archive_fills_disk(at: Scene) -> None:
    with gzip.open(at.folder / "log.gz", "wb") as archive:
        while True:
            archive.write(os.urandom(1 << 20))


@fault("full_disk", needs="small_disk", line="os.posix_fallocate(")
def reserves_too_much(at: Scene) -> None:
    with (at.folder / "cache.bin").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 30)


@fault("full_disk", needs="small_disk", line="table.writerow|with (|flush()|.open(")
def rows_fill_disk(at: Scene) -> None:
    with (at.folder / "rows.csv").open("w") as file:
        table = csv.writer(file)
        while True:
            table.writerow(["x" * 1000] * 100)


@fault("full_disk", "crash", needs="small_disk", line="shared[:]")
def map_on_full_disk(at: Scene) -> None:
    """Writing into a mapped file for which a tmpfs has no room is SIGBUS."""
    shared = np.memmap(at.folder / "shared.bin", dtype=np.uint8, mode="w+", shape=(64 << 20,))
    shared[:] = 1


# Ends that the program chooses.


@fault("exit_status")
def becomes_another_program(at: Scene) -> None:
    os.execvp("sh", ["sh", "-c", "exit 9"])


@fault("exit_status", when="start")
def refuses_to_start(at: Scene) -> None:
    print("usage: train.py [--fast]\ntrain.py: error: unrecognized arguments: --slow", file=sys.stderr)
    sys.exit(2)


# Files.


@fault("missing_file", "exception", line="ctypes.CDLL(")
def library_is_missing(at: Scene) -> None:
    ctypes.CDLL(str(at.folder / "libkernels.so"))


@fault("missing_file", when="row", options={"workers": 1})
def shard_is_missing_in_worker(at: Scene) -> None:
    (at.folder / "shard_0007.tar").read_bytes()


@fault("missing_file", line="np.load(|.result()|read_part")
def part_is_missing_in_thread(at: Scene) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        pool.submit(np.load, at.folder / "part_3.npy").result()


@fault("missing_file", "exception", line="(at.folder / 'a_file' / 'b').write_text")
def folder_is_a_file(at: Scene) -> None:
    (at.folder / "a_file").touch()
    (at.folder / 'a_file' / 'b').write_text("x")  # fmt: skip


# Crashes.


@fault("crash")
def thread_of_library_crashes(at: Scene) -> None:
    thread = threading.Thread(target=ctypes.memset, args=(16, 0, 64))
    thread.start()
    thread.join()


@fault("crash", line="float(far.sum())")
def reads_beyond_array(at: Scene) -> None:
    far = np.lib.stride_tricks.as_strided(np.ones(8), shape=(1 << 20,), strides=(1 << 20,))
    float(far.sum())


@fault("crash", line="faulthandler._sigabrt()")
def library_aborts(at: Scene) -> None:
    faulthandler._sigabrt()  # type: ignore[attr-defined]


@fault("crash", line="libc.div")
def divides_by_zero(at: Scene) -> None:
    faulthandler._sigfpe()  # type: ignore[attr-defined]  # libc.div(1, 0) in a library


# Signals.


def from_outside(name: str) -> None:
    subprocess.run(["kill", f"-{name}", str(os.getpid())], check=True)
    time.sleep(1)


@fault("killed")
def terminal_hangs_up(at: Scene) -> None:
    from_outside("HUP")


@fault("killed")
def alarm_rings(at: Scene) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    time.sleep(LONG_S)


@fault("killed", when="late")
def killed_after_last_step(at: Scene) -> None:
    from_outside("KILL")


@fault("stopped")
def suspended(at: Scene) -> None:
    from_outside("TSTP")


@fault("stopped", "elsewhere")
def held_by_debugger(at: Scene) -> None:
    """Another process attaches with ptrace and lets this one wait."""
    attach = f"import ctypes, time; ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", attach])
    time.sleep(3)


# Data.


@fault("data", when="row", options={"workers": 2}, line="for rows in self.loader")
def worker_reads_stuck_pipe(at: Scene) -> None:
    with subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE) as source:
        assert source.stdout is not None
        source.stdout.read(1)


@fault("data", when="row", options={"workers": 1}, line="for rows in self.loader")
def worker_computes_long(at: Scene) -> None:
    while True:
        sorted(random.random() for _ in range(1000))


# Errors of Python, some with misleading words.


@fault("exception", line='raise ValueError("No space')
def words_of_full_disk(at: Scene) -> None:
    raise ValueError("No space left in the table for token 7")


@fault("exception", line="raise RuntimeError(")
def words_of_memory(at: Scene) -> None:
    raise RuntimeError("the plan is out of memory slots for prompt 3: raise max_slots")


@fault("exception", line="raise RuntimeError(")
def words_of_network(at: Scene) -> None:
    raise RuntimeError("state machine: connection closed twice, timed out is not a state")


@fault("exception", line="assert ")
def words_of_nan(at: Scene) -> None:
    assert at.step < 0, "expected a nan mask of 8 rows\n  found: 7 rows\n  where: collate"


@fault("exception", line="raise LookupError|raise KeyError")
def error_while_handling(at: Scene) -> None:
    try:
        raise KeyError("lr")
    except KeyError:
        raise LookupError("schedule 'cosine' has no value for 'lr'")  # noqa: B904


@fault("exception", line="total.backward()")
def backward_twice(at: Scene) -> None:
    total = (torch.ones(2, requires_grad=True) ** 2).sum()
    total.backward()
    total.backward()


@fault("exception", line="next(names())")
def generator_ends(at: Scene) -> None:
    def names() -> Iterator[str]:
        yield next(iter(()))

    next(names())


@fault("exception", line="dist.all_reduce([")
def wrong_type_for_collective(at: Scene) -> None:
    dist.all_reduce([1.0, 2.0])  # type: ignore[arg-type]


@fault("exception", line="zipfile.ZipFile(")
def archive_is_damaged(at: Scene) -> None:
    (at.folder / "data.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    zipfile.ZipFile(at.folder / "data.zip")


@fault("exception", when="all", has_rank=False, line="torch.cat(")
def all_ranks_fail_alike(at: Scene) -> None:
    torch.cat([torch.ones(2, 3), torch.ones(2, 4)])


@fault("exception", line="Path(os.devnull).open()")
def too_many_open_files(at: Scene) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    kept = []
    while True:
        kept.append(Path(os.devnull).open())  # noqa: SIM115


@fault("exception", line="breakpoint()")
def forgotten_breakpoint(at: Scene) -> None:
    breakpoint()


@fault("exception", line="raise TypeError(|at.model(torch.ones")
def error_of_hook(at: Scene) -> None:
    def hook(*_: Any) -> None:
        raise TypeError("hook() takes no Linear")

    at.model.register_forward_hook(hook)
    at.model(torch.ones(1, 8))


# Other waits.


@fault("elsewhere", line="signal.sigtimedwait|signal.pause")
def waits_for_signal(at: Scene) -> None:
    signal.sigtimedwait({signal.SIGRTMIN}, LONG_S)


@fault("elsewhere", "network", line="select.select(")
def waits_in_select(at: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        select.select([server], [], [], LONG_S)


@fault("elsewhere", line="time.sleep(2)")
def tries_again_and_again(at: Scene) -> None:
    while not (at.folder / "lock_is_free").exists():
        time.sleep(2)


# Healthy programs.


@fault()
def quiet_child_killed(at: Scene) -> None:
    child = subprocess.Popen(["sleep", "60"])
    child.kill()
    child.wait()


@fault()
def quiet_stopped_shortly(at: Scene) -> None:
    subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
    from_outside("STOP")


@fault(when="all")
def quiet_long_save(at: Scene) -> None:
    at.run.phase("saving", at.step)
    time.sleep(8)
    at.run.phase("training", at.step)


@fault(when="all")
def quiet_nan_in_metrics(at: Scene) -> None:
    at.run.record(at.step, loss=0.5, perplexity=float("nan"), val_loss=float("inf"))


@fault()
def quiet_thread_waits(at: Scene) -> None:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


@fault()
def quiet_error_in_finalizer(at: Scene) -> None:
    class Cache:
        def __del__(self) -> None:
            raise OSError(28, "No space left on device")

    Cache()


@fault()
def quiet_memory_error_is_handled(at: Scene) -> None:
    size = 1 << 50
    while True:
        try:
            bytearray(size)
            return
        except MemoryError as error:
            log.error("MemoryError: %s; a smaller buffer", error)
            size >>= 30


@fault()
def quiet_interrupt_is_handled(at: Scene) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        log.warning("KeyboardInterrupt was ignored")


@fault(when="late")
def quiet_leaves_slowly(at: Scene) -> None:
    at.run.phase("leaving")
    time.sleep(7)


# The program.


class Rows(Dataset[torch.Tensor]):
    """Rows by number, one of which calls the fault."""

    def __init__(self, at: Scene, make: Any) -> None:
        self.at, self.make = at, make

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, number: int) -> torch.Tensor:
        if self.make and number == self.at.step - 1:
            self.make(self.at)
        return torch.randn(8, generator=torch.Generator().manual_seed(number))


class Stream(IterableDataset[torch.Tensor]):
    """The same rows as a stream, for a rank without workers."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(STEPS):
            try:
                yield self.rows[number]
            except EndOfStreamError:
                return


class Trainer:
    """The loop: forward and backward under DDP, step, record."""

    def __init__(self, known: Fault, at: Scene, loader: DataLoader[torch.Tensor]) -> None:
        self.known, self.at, self.loader = known, at, loader
        self.model = DistributedDataParallel(at.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def fit(self) -> int:
        known, at = self.known, self.at
        done = 0
        for rows in self.loader:
            is_now = done + 1 == at.step
            loss = (self.model(rows) - rows).square().mean()
            if is_now and at.is_faulty and known.when == "loss":
                at.loss = loss
                loss = known.make(at)  # type: ignore[misc]
            at.run.record(done + 1, loss=float(loss.detach()))
            if not torch.isfinite(loss):
                at.run.flush()
                raise ValueError(f"training has diverged: the loss of step {done + 1} is {float(loss.detach())}")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            done += 1
            if is_now and (known.when == "all" or (known.when == "step" and at.is_faulty)):
                known.make(at)  # type: ignore[misc]
            time.sleep(0.02)
        return done


def main(name: str, step: int, where: int, folder: Path) -> None:
    logging.basicConfig(level=logging.INFO)
    known = FAULTS[name]
    run = worker.attach()
    torch.manual_seed(1)
    at = Scene(
        run, run.rank == where, step, folder, torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    )
    run.phase("starting")
    if at.is_faulty and known.when == "start":
        known.make(at)  # type: ignore[misc]
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    workers = known.options.get("workers", 0) if at.is_faulty else 0
    rows = Rows(at, at.is_faulty and known.when == "row" and known.make)
    loader = DataLoader(rows if workers else Stream(rows), batch_size=1, num_workers=workers)
    trainer = Trainer(known, at, loader)
    done = trainer.fit()
    if at.is_faulty and known.when == "late":
        known.make(at)  # type: ignore[misc]
    if done == STEPS:
        run.finished(STEPS)
    del trainer
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
