"""A small training over gloo in which a rank has a fault: a second set, beside that of faulty.py.

``held_out.py FAULT STEP RANK FOLDER``: the fault comes on this rank in this step. ``FOLDER`` is for files of the fault.
The faults are written from the page docs/troubleshooting.md, without a look at the rules of `launch.why`, and use
other libraries, other errors and other waits than faulty.py. A fault without kinds is a healthy program that looks
suspicious.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import datetime
import fcntl
import json
import logging
import mmap
import multiprocessing
import os
import queue
import re
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from launch import worker
from tests.support.planted import Fault, Scene, register

FAULTS: dict[str, Fault] = {}
fault = partial(register, FAULTS)
"""Adds a fault. ``when`` is one of: ``start`` (before the process group), ``step``, ``all`` (in the step, on all
ranks), ``sample`` (in a worker of the loader), ``loss`` (in place of the loss), ``late`` (after the last step)."""
STEPS = 12
WIDTH = 8
FOREVER_S = 120.0
"""Longer than any limit of the launcher here; a process that is left behind ends some time."""


# A worker of the data loader dies.


@fault("dead_loader_worker", when="sample", options={"workers": 2})
def worker_killed_from_outside(scene: Scene) -> None:
    subprocess.run(["kill", "-KILL", str(os.getpid())], check=True)
    time.sleep(FOREVER_S)


@fault("dead_loader_worker", when="sample", options={"workers": 1})
def worker_bus_error(scene: Scene) -> None:
    touch_truncated_map(scene.folder / f"map_{os.getpid()}")


@fault("dead_loader_worker", when="sample", options={"workers": 2})
def worker_exits(scene: Scene) -> None:
    os._exit(1)


@fault("dead_loader_worker", "exception")
def pool_of_preparers_breaks(scene: Scene) -> None:
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        pool.submit(os._exit, 9).result()


# Collectives differ.


@fault("mismatched_collective", has_rank=False)
def gather_of_another_size(scene: Scene) -> None:
    mine = torch.ones(5)
    dist.all_gather([torch.empty(5) for _ in range(scene.run.world_size)], mine)


@fault("mismatched_collective", has_rank=False)
def barrier_of_one_rank(scene: Scene) -> None:
    dist.barrier()


@fault("mismatched_collective", has_rank=False, when="all")
def two_orders(scene: Scene) -> None:
    flags, names = torch.ones(3), [None] * scene.run.world_size
    if scene.is_faulty:
        dist.all_gather_object(names, f"rank {scene.run.rank}")
        dist.all_reduce(flags)
    else:
        dist.all_reduce(flags)
        dist.all_gather_object(names, f"rank {scene.run.rank}")


@fault("mismatched_collective", "elsewhere", has_rank=False, when="all")
def group_of_all_but_one(scene: Scene) -> None:
    group = dist.new_group(list(range(scene.run.world_size)))
    if not scene.is_faulty:
        dist.all_reduce(torch.ones(2), group=group)


@fault("mismatched_collective", "left_early", has_rank=False, when="all")
def skips_one_reduction(scene: Scene) -> None:
    if not scene.is_faulty:
        dist.all_reduce(torch.zeros(WIDTH * WIDTH))


# A rank leaves early.


@fault("left_early")
def stops_as_loss_is_small(scene: Scene) -> None:
    sys.exit(0)


@fault("left_early", options={"uneven": True})
def fewer_batches(scene: Scene) -> None:
    """The program ends the loop of this rank here."""


# Locks.


@fault("deadlock", line="filled.wait()")
def waits_for_condition(scene: Scene) -> None:
    filled = threading.Condition()
    with filled:
        filled.wait()


@fault("deadlock", "data", "elsewhere", line="prefetched.get()")
def waits_for_dead_prefetcher(scene: Scene) -> None:
    prefetched: queue.Queue[int] = queue.Queue(2)

    def prefetch() -> None:
        raise KeyError("shard_17")

    threading.Thread(target=prefetch).start()
    prefetched.get()


@fault("deadlock", line="shared.acquire()|with shared")
def takes_shared_lock_twice(scene: Scene) -> None:
    shared = multiprocessing.Lock()
    with shared:
        shared.acquire()


@fault("deadlock", "elsewhere", line="outer.result()|inner).result()")
def pool_waits_for_itself(scene: Scene) -> None:
    def inner() -> int:
        return 1

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        outer = pool.submit(lambda: pool.submit(inner).result())
        outer.result()


@fault("deadlock", "elsewhere", line="asyncio.run(never_set())")
def event_that_nobody_sets(scene: Scene) -> None:
    async def never_set() -> None:
        await asyncio.Event().wait()

    asyncio.run(never_set())


# Files that do not come.


@fault("slow_disk", line="path.open()")
def opens_pipe_without_writer(scene: Scene) -> None:
    path = scene.folder / f"index_{scene.run.rank}"
    os.mkfifo(path)
    with path.open() as file:
        file.readline()


@fault("slow_disk", line="torch.load(stuck)")
def loads_checkpoint_that_hangs(scene: Scene) -> None:
    stuck = scene.folder / f"model_{scene.run.rank}.pt"
    os.mkfifo(stuck)
    torch.load(stuck)


@fault("slow_disk", "elsewhere", line="unpacker.stdout.read(")
def reads_from_unpacker(scene: Scene) -> None:
    with subprocess.Popen(["sleep", "120"], stdout=subprocess.PIPE) as unpacker:
        assert unpacker.stdout is not None
        unpacker.stdout.read(1024)


@fault("slow_disk", "deadlock", line="fcntl.flock(file")
def file_locked_by_another(scene: Scene) -> None:
    path = scene.folder / f"cache_{scene.run.rank}.lock"
    holder = subprocess.Popen(["flock", str(path), "-c", "echo; exec sleep 120"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


@fault("slow_disk", line='os.fsync(file|file.write(json|"state.json"', needs="frozen_disk")
def frozen_filesystem(scene: Scene) -> None:
    subprocess.run(["fsfreeze", "--freeze", str(scene.folder)], check=True)
    with (scene.folder / "state.json").open("w") as file:
        file.write(json.dumps({"step": scene.step}))
        file.flush()
        os.fsync(file.fileno())


# Computations that do not end.


@fault("slow_cpu", line="table = table @ table|table /=")
def multiplies_in_numpy(scene: Scene) -> None:
    table = np.random.default_rng(1).random((600, 600))
    while True:
        table = table @ table
        table /= table.max()


@fault("slow_cpu", line="torch.linalg.svd(")
def decomposes_in_torch(scene: Scene) -> None:
    while True:
        torch.linalg.svd(torch.randn(400, 400))


@fault(
    "slow_cpu", line="number //= 2|number = 3|while number|if number %|length +=|for start in|longest =|number = start"
)
def searches_for_long_chain(scene: Scene) -> None:
    longest = 0
    for start in range(1, 1 << 60):
        number, length = start, 0
        while number != 1:
            if number % 2:
                number = 3 * number + 1
            else:
                number //= 2
            length += 1
        longest = max(longest, length)


# The GIL.


@fault("gil_held", "slow_cpu", line="re.match(")
def pattern_that_backtracks(scene: Scene) -> None:
    re.match(r"(a|aa)+$", "a" * 60 + "b")


@fault("gil_held", "slow_cpu", line="len(str(")
def prints_huge_number(scene: Scene) -> None:
    sys.set_int_max_str_digits(0)
    len(str(1 << 40_000_000))


@fault("gil_held", line="ctypes.PyDLL")
def library_waits_with_gil(scene: Scene) -> None:
    ctypes.PyDLL(None).pause()


# Numbers.


@fault("not_finite", when="loss")
def loss_is_infinite(scene: Scene) -> torch.Tensor:
    assert scene.loss is not None
    return scene.loss / torch.zeros(())


@fault("not_finite", when="sample")
def sample_is_not_a_number(scene: Scene) -> torch.Tensor:
    return torch.full((WIDTH,), float("nan"))


@fault("not_finite", "exception", when="loss", line="loss.backward()")
def only_gradient_is_not_finite(scene: Scene) -> torch.Tensor:
    """A finite loss; torch's anomaly detection raises for the gradient of the root of zero times zero."""
    assert scene.loss is not None
    torch.autograd.set_detect_anomaly(True)
    zero = (scene.loss - scene.loss) * 1.0
    return scene.loss + 0.0 * torch.sqrt(zero)


@fault("not_finite", "exception", line="torch.nn.utils.clip_grad_norm_")
def clipping_refuses_gradient(scene: Scene) -> None:
    for parameter in scene.model.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    torch.nn.utils.clip_grad_norm_(scene.model.parameters(), 1.0, error_if_nonfinite=True)


@fault("bit_flip", "not_finite")
def bit_of_weight_flips(scene: Scene) -> None:
    """The highest bit of an exponent: the weight is enormous, the loss overflows, and the program raises."""
    next(scene.model.parameters()).data.view(torch.int32).view(-1)[3] ^= 1 << 30


@fault("bit_flip", "exception", when="all", has_rank=False)
def replicas_differ(scene: Scene) -> None:
    """The program compares checksums of the replicas itself."""
    weight = next(scene.model.parameters()).data
    if scene.is_faulty:
        weight.view(torch.int32).view(-1)[0] ^= 1 << 10
    sums = [torch.zeros(1, dtype=torch.float64) for _ in range(scene.run.world_size)]
    dist.all_gather(sums, weight.double().sum().reshape(1))
    for rank, each in enumerate(sums):
        if not torch.equal(each, sums[0]):
            raise RuntimeError(f"parameters of rank {rank} differ from those of rank 0: bits have flipped")


# Memory.


@fault("oom_kill", needs="small_memory")
def reads_too_much_into_tensors(scene: Scene) -> None:
    kept = []
    while True:
        kept.append(torch.ones(128 << 20))


@fault("oom_kill", "exception", needs="small_memory")
def tool_is_killed_for_memory(scene: Scene) -> None:
    take = "x = []\nwhile True: x.append(b'1' * (512 << 20))"
    subprocess.run([sys.executable, "-c", take], check=True)


@fault("memory_error", line="np.ones((1 <<")
def numpy_lacks_memory(scene: Scene) -> None:
    np.ones((1 << 22, 1 << 22))


@fault("memory_error", line="torch.empty(1 <<")
def torch_lacks_memory(scene: Scene) -> None:
    torch.empty(1 << 46)


@fault("memory_error", line="mmap.mmap(-1, 64|from cache_error")
def map_lacks_memory(scene: Scene) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    try:
        mmap.mmap(-1, 64 << 30)
    except OSError as cache_error:
        raise RuntimeError("the cache of tokens was not made") from cache_error


# Links.


def sockets_of_ranks() -> Iterator[socket.socket]:
    """Yield this process's TCP connections, which are those to other ranks and to the store."""
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(descriptor.name))) as link:
            link.getpeername()
            if link.family in (socket.AF_INET, socket.AF_INET6):
                yield link


@fault("network", has_rank=False)
def link_drops_all_packets(scene: Scene) -> None:
    """A socket filter drops what arrives at this rank, so acknowledgements do not come back either."""
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0: drop the packet
    program = struct.pack("HxxxxxxP", 1, ctypes.addressof(instruction))
    for link in sockets_of_ranks():
        link.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER


@fault("network", has_rank=False)
def connection_is_reset(scene: Scene) -> None:
    nothing, _other_end = socket.socketpair()
    with nothing:
        for link in sockets_of_ranks():
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            inode = os.fstat(link.fileno()).st_ino
            for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
                with contextlib.suppress(OSError):
                    if os.fstat(descriptor).st_ino == inode and descriptor != link.fileno():
                        os.dup2(nothing.fileno(), descriptor)


@fault("network", "exception", line="socket.create_connection(")
def service_refuses_connection(scene: Scene) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        socket.create_connection(taken.getsockname(), timeout=5)


@fault("network", "elsewhere", line="peer.recv(")
def service_does_not_answer(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as peer:
        peer.recv(16)


# Disks that are full.


@fault("full_disk", needs="small_disk", line="torch.save(")
def torch_fills_disk(scene: Scene) -> None:
    for part in range(100):
        torch.save({"weights": torch.ones(1 << 20)}, scene.folder / f"step_{scene.run.rank}_{part}.pt")


@fault("full_disk", needs="small_disk", line="np.save(")
def numpy_fills_disk(scene: Scene) -> None:
    for part in range(100):
        np.save(scene.folder / f"tokens_{scene.run.rank}_{part}.npy", np.ones(1 << 20))


@fault("full_disk", needs="small_disk", line="shutil.copyfile(")
def copy_fills_disk(scene: Scene) -> None:
    whole = scene.folder.parent / f"whole_{scene.run.rank}"
    with whole.open("wb") as file:
        file.truncate(64 << 20)
    shutil.copyfile(whole, scene.folder / "export")


@fault("full_disk", needs="small_disk", line="database.execute(|database.commit(")
def database_fills_disk(scene: Scene) -> None:
    with contextlib.closing(sqlite3.connect(scene.folder / "metrics.db")) as database:
        database.execute("create table rows (step int, figures text)")
        while True:
            database.execute("insert into rows values (?, ?)", (scene.step, "x" * (1 << 20)))
            database.commit()


# Exits.


@fault("exit_status")
def exits_with_text(scene: Scene) -> NoReturn:
    raise SystemExit("the license of the tokenizer has run out")


@fault("exit_status")
def leaves_without_a_word(scene: Scene) -> None:
    os._exit(17)


@fault("exit_status")
def wrong_option(scene: Scene) -> None:
    import argparse

    parser = argparse.ArgumentParser("evaluate")
    parser.add_argument("--split", choices=("train", "test"))
    parser.parse_args(["--split", "dev"])


# Files that are missing.


@fault("missing_file", line="torch.load(scene.folder")
def checkpoint_is_missing(scene: Scene) -> None:
    torch.load(scene.folder / "step_9" / "model.pt")


@fault("missing_file", "exception", line='run(["tokenize-corpus"')
def tool_is_missing(scene: Scene) -> None:
    subprocess.run(["tokenize-corpus", "--fast"], check=True)


@fault("missing_file", "exception", line='raise RuntimeError("the data set could not be built|open_index(')
def missing_below_two_errors(scene: Scene) -> None:
    def open_index() -> str:
        try:
            return (scene.folder / "index.json").read_text()
        except FileNotFoundError as error:
            raise ValueError("no index") from error

    try:
        open_index()
    except ValueError as error:
        raise RuntimeError("the data set could not be built") from error


@fault("missing_file", "exception", line="import_module(")
def module_is_missing(scene: Scene) -> None:
    import importlib

    importlib.import_module("fused_kernels_of_this_node")


@fault("missing_file", "exception", line="os.open(locked")
def no_permission(scene: Scene) -> None:
    locked = scene.folder / f"secret_{scene.run.rank}"
    locked.touch(0o000)
    os.seteuid(65534)
    try:
        os.open(locked, os.O_RDONLY)
    finally:
        os.seteuid(0)


# Crashes in compiled code.


def touch_truncated_map(path: Path) -> None:
    """Read a page of a mapped file that was truncated meanwhile: SIGBUS."""
    path.write_bytes(bytes(1 << 20))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        file.truncate(0)
        view[1 << 19]


@fault("crash", line="view[1 << 19]")
def bus_error(scene: Scene) -> None:
    touch_truncated_map(scene.folder / f"map_{scene.run.rank}")


@fault("crash", line="ctypes.CDLL(None).free(")
def frees_wrong_address(scene: Scene) -> None:
    block = ctypes.create_string_buffer(256)
    ctypes.CDLL(None).free(ctypes.c_void_p(ctypes.addressof(block) + 8))


@fault("crash", line="call()")
def illegal_instruction(scene: Scene) -> None:
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\x0f\x0b")  # ud2
    call = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    call()


# Signals from outside.


def signal_from_outside(name: str) -> None:
    subprocess.run(["kill", f"-{name}", str(os.getpid())], check=True)
    time.sleep(1)


@fault("killed")
def killed_from_outside(scene: Scene) -> None:
    signal_from_outside("KILL")


@fault("killed", options={"handle_signals": False})
def terminated_from_outside(scene: Scene) -> None:
    signal_from_outside("TERM")


@fault("killed")
def limit_of_cpu_time(scene: Scene) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (1, 600))  # importing torch took longer
    while True:
        torch.randn(300, 300).inverse()


@fault("stopped")
def stopped_from_outside(scene: Scene) -> None:
    signal_from_outside("STOP")


@fault("stopped", "elsewhere", needs="freezer")
def frozen_by_cgroup(scene: Scene) -> None:
    group = Path(os.environ["FREEZER"])
    (group / "cgroup.procs").write_text(str(os.getpid()))
    (group / "freezer.state").write_text("FROZEN")


# Waits for data.


@fault("data", when="sample", options={"workers": 2}, line="for batch in loader")
def worker_waits_for_lock(scene: Scene) -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire()


@fault("data", when="sample", options={"workers": 1}, line="for batch in loader")
def worker_asks_dead_server(scene: Scene) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as peer:
        peer.recv(16)


@fault("data", "elsewhere", when="sample", line="time.sleep(FOREVER_S)  # a download")
def download_in_loader(scene: Scene) -> None:
    time.sleep(FOREVER_S)  # a download that does not end, in the rank itself


# Errors of Python.


@fault("exception", line='["loss_scale"]')
def key_error(scene: Scene) -> None:
    json.loads('{"lr": 0.1}')["loss_scale"]


@fault("exception", when="sample", options={"workers": 1}, line="for batch in loader|raise UnicodeError")
def error_in_worker(scene: Scene) -> None:
    raise UnicodeError("byte 0x9d in document 8811")


@fault("exception", line="torch.nn.functional.cross_entropy(")
def wrong_shapes(scene: Scene) -> None:
    torch.nn.functional.cross_entropy(torch.ones(4, 3), torch.ones(5, dtype=torch.long))


@fault("exception", line="assert len(")
def assertion(scene: Scene) -> None:
    assert len(list(scene.model.parameters())) == 0, "parameters are left over"


@fault("exception", line='raise ArithmeticError("the backward|.backward()')
def error_in_backward(scene: Scene) -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise ArithmeticError("the backward of Scale has no case for this")

    Scale.apply(torch.ones(2, requires_grad=True)).sum().backward()


@fault("exception", when="all", has_rank=False)
def unused_parameters(scene: Scene) -> None:
    branches = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})

    class Switch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = branches

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.branches["a"](x)

    scene.run.phase("starting")  # the first model under DDP imports for seconds
    model = torch.nn.parallel.DistributedDataParallel(Switch())
    scene.run.phase("training", scene.step - 1)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()


@fault("exception", line="check=True, capture_output=True)")
def subprocess_fails(scene: Scene) -> None:
    subprocess.run(["tar", "-xf", "/dev/null/no.tar"], check=True, capture_output=True)


@fault("exception", line="raise ExceptionGroup")
def group_of_errors(scene: Scene) -> None:
    def fail(number: int) -> None:
        raise ValueError(f"shard {number} has another vocabulary")

    errors = []
    for number in (1, 2):
        try:
            fail(number)
        except ValueError as error:
            errors.append(error)
    raise ExceptionGroup("two shards are wrong", errors)


@fault("exception", "deadlock", "elsewhere", "data", line="done.wait()")
def thread_dies_of_error(scene: Scene) -> None:
    done = threading.Event()

    def save() -> None:
        raise TypeError("Object of type Tensor is not JSON serializable")
        done.set()

    threading.Thread(target=save).start()
    done.wait()


@fault("exception", when="start")
def config_is_wrong(scene: Scene) -> None:
    raise ValueError("batch size 12 is not divisible by 8")


# Waits outside of all that.


@fault("elsewhere", "network", when="start", words=("resilience.startup_and_save_timeout_s=5",))
def comes_late_to_the_group(scene: Scene) -> None:
    time.sleep(FOREVER_S)


@fault("elsewhere", line='subprocess.run(["sleep"')
def waits_for_tool(scene: Scene) -> None:
    subprocess.run(["sleep", "120"], check=True)


@fault("slow_cpu", "elsewhere", "network", options={"group_timeout_s": 3}, line="total = total")
def slower_than_group_allows(scene: Scene) -> None:
    """The other ranks raise the timeout of the process group before the launcher sees a hang."""
    total = 0
    while True:
        total = total * 3 % 1_000_003


# Healthy programs that look suspicious.


@fault()
def quiet_caught_traceback(scene: Scene) -> None:
    try:
        (scene.folder / "cache.bin").read_bytes()
    except FileNotFoundError:
        traceback.print_exc()


@fault(when="start")
def quiet_long_start(scene: Scene) -> None:
    time.sleep(3)


@fault()
def quiet_long_step(scene: Scene) -> None:
    time.sleep(3)


@fault(when="all")
def quiet_words_of_errors(scene: Scene) -> None:
    warnings.warn("RuntimeError: CUDA out of memory was avoided", stacklevel=1)
    logging.error("error: Killed worker was replaced; No space left on device soon")
    print("Segmentation fault (core dumped) in a test of the tool, MemoryError: none", file=sys.stderr)


@fault(when="loss")
def quiet_nan_is_skipped(scene: Scene) -> torch.Tensor:
    """The program looks for losses that are not finite, and takes zero in their place."""
    assert scene.loss is not None
    return scene.loss if torch.isfinite(scene.loss.detach() * float("nan")) else scene.loss * 0.0


@fault()
def quiet_tool_fails(scene: Scene) -> None:
    subprocess.run(["false"], check=False)
    subprocess.run(["sh", "-c", "kill -SEGV $$"], check=False)
    subprocess.run(["no-such-tool"], check=False) if shutil.which("no-such-tool") else None


@fault(when="sample", options={"workers": 2})
def quiet_slow_loader(scene: Scene) -> None:
    time.sleep(3)


@fault()
def quiet_child_is_terminated(scene: Scene) -> None:
    with subprocess.Popen(["sh", "-c", "trap 'exit 0' TERM; echo; sleep 30 & wait"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGTERM)


@fault()
def quiet_retry_of_connection(scene: Scene) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for _ in range(3):
            try:
                socket.create_connection(taken.getsockname(), timeout=1)
            except ConnectionRefusedError as error:
                logging.warning("connection refused, trying again: %s", error)


@fault(when="late")
def quiet_rank_ends_late(scene: Scene) -> None:
    time.sleep(3)


@fault()
def quiet_error_in_thread(scene: Scene) -> None:
    def report() -> None:
        raise RuntimeError("the tracker does not answer")

    thread = threading.Thread(target=report)
    thread.start()
    thread.join()


# The program.


class Samples(Dataset[torch.Tensor]):
    """Random rows, one of which calls the fault in place of the row where the fault is one of samples."""

    def __init__(self, scene: Scene, make: Any) -> None:
        self._scene, self._make = scene, make

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        changed = self._make(self._scene) if self._make and index == self._scene.step - 1 else None
        row = torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))
        return row if changed is None else changed


def train(known: Fault, at: int, where: int, folder: Path) -> None:
    assert known.make is not None
    run = worker.attach(handle_signals=known.options.get("handle_signals", True))
    torch.manual_seed(1)
    model = torch.nn.Linear(WIDTH, WIDTH)
    is_faulty = run.rank == where
    scene = Scene(run, is_faulty, at, folder, model)
    run.phase("starting")
    if is_faulty and known.when == "start":
        known.make(scene)
    limit = datetime.timedelta(seconds=known.options.get("group_timeout_s", 60))
    dist.init_process_group("gloo", timeout=limit)
    workers = known.options.get("workers", 0) if is_faulty else 0
    loader = DataLoader(Samples(scene, is_faulty and known.when == "sample" and known.make), num_workers=workers)
    run.phase("training", 0)
    step = 0
    for batch in loader:
        step += 1
        if step == at and (known.when == "all" or (known.when == "step" and is_faulty)):
            known.make(scene)
            if is_faulty and "uneven" in known.options:
                break
        loss = scene.loss = (model(batch) - batch).square().mean()
        if step == at and is_faulty and known.when == "loss":
            loss = known.make(scene)
        loss.backward()
        run.record(step, loss=float(loss), samples=len(batch))
        if not torch.isfinite(loss) or float(loss) > 1e30:
            run.flush()
            raise FloatingPointError(f"loss {float(loss)} in step {step}")
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.data -= 0.1 * parameter.grad / run.world_size
            parameter.grad = None
        time.sleep(0.02)
    if is_faulty and known.when == "late":
        known.make(scene)
    if "uneven" not in known.options or step == STEPS:
        run.finished(STEPS)
    dist.destroy_process_group()


if __name__ == "__main__":
    train(FAULTS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
