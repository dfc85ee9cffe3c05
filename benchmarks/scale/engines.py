"""Rows of benchmarks/scale/growth.py about the engines: device waits, collectives, memory, data and checkpoints.

Each function measures one row and returns the finding in words, and whether it meets the demand.
"""

from __future__ import annotations

import dataclasses
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from gpt.data.loader import Windows
from gpt.model import layers
from gpt.model.gpt import GPT
from gpt.parallel import nd
from gpt.parallel.ddp import all_gather_rows
from gpt.train import train
from gpt.training.run import Run
from gpt.training.step import GC_INTERVAL
from tests.model.test_functions import computed, torchs, traffic
from tests.parallel import test_fsdp as fsdp
from tests.support.distributed import run_distributed
from tests.support.learning import Operations, compose, config_from, host_waits, start, start_composed
from tests.support.small_models import LLAMA, small
from tests.training import test_loop as loop
from tests.training import test_step as waits

GIB = 2**30
BUILT = ["model=llama_124m", "parallel=fsdp", "optim.global_batch=8", "optim.max_micro_batch=1", "model.block_size=64"]
READ_S, COMPUTE_S = 0.005, 0.1


@contextmanager
def fake_ranks(ranks: int) -> Iterator[DeviceMesh]:
    """Context with a device mesh of ``ranks`` ranks in torch's fake process group. Only rank 0 exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    yield init_device_mesh("cpu", (ranks,))
    dist.destroy_process_group()


def host_waits_of_a_step() -> tuple[str, bool]:
    """Return row A1: how often the host waits for the device while it clips gradients, computes gradient statistics,
    and plans a dispatch to experts.
    """
    clip = len(host_waits(waits.clip_shards)) + len(host_waits(waits.clip_replica))
    sums = len(host_waits(lambda device: waits.Gradients(small(n_layer=24), device).sums(waits.sharded(device))))
    reads = []

    def read(tensor: Tensor) -> list[list[int]]:
        reads.append(tensor)
        return [[16] * 4, [16] * 4]

    def plan(device: torch.device) -> None:
        group: Any = SimpleNamespace(size=lambda: 4)
        nd.plan_dispatch(64, torch.empty(8, dtype=torch.int32, device=device), group, False)

    exchanged = mock.patch.object(nd, "all_to_all", lambda x, *_: x.clone())
    with mock.patch.object(FakeTensor, "tolist", read), exchanged:
        dispatch = len(host_waits(plan))
    dispatch += len(reads)
    return f"{clip}, {sums}, {dispatch}", (clip, sums, dispatch) <= (0, 0, 1)


def fsdp_gathers() -> tuple[str, bool]:
    """Return row A2, and whether it is as expected: the number of all-gathers of FSDP, and the size of the first.

    The model is a Llama of five blocks whose head has its own matrix.
    """
    model = small(**LLAMA, n_layer=fsdp.BLOCKS)
    with fake_ranks(fsdp.RANKS) as mesh:
        forward, backward = fsdp.gathers(fsdp.sharded(model, mesh))
    alone = forward[0] == fsdp.elements(GPT(model).token_embedding)
    first = "the embedding" if alone else f"{forward[0]} elements"
    return f"n - {model.n_layer - len(backward)}; {first}", alone and len(backward) <= model.n_layer - 1


def loss_traffic() -> tuple[str, bool]:
    """Return row A3: the memory traffic of the chunked loss in eager mode. The compiled loss is one Inductor kernel,
    whose operations the measurement cannot see.
    """
    logits = torch.randn(2, 24, 700) * 5
    (found, grad), (expected, expected_grad) = (computed(f, logits, 0.003) for f in (layers.cross_entropy, torchs))
    off = max(float((found / expected - 1).abs()), float((grad - expected_grad).norm() / expected_grad.norm()))
    with mock.patch.object(layers, "LOSS_CHUNK", 4 * 700):
        seen = traffic(layers.cross_entropy)
    moved, made, share = seen.moved / seen.logits, seen.made / seen.logits, seen.largest_fp32 / seen.logits
    return f"{moved:.0f}, {made:.0f}; {share:.0%} of them; {off:.0e}", (
        moved <= 20 and made <= 8 and share < 1 and off < 1e-6
    )


def watched_loop() -> dict[str, Any]:
    """Make a run on two ranks until it is stopped, and return rank 0's measurements by name, such as ``messages`` and
    ``collected``. One rank gets requests to save and to stop."""
    with tempfile.TemporaryDirectory() as folder:
        return dict(run_distributed(loop.watch, 2, Path(folder) / "run")[0])


def messages_of_steps() -> tuple[str, bool]:
    """Return row A4: the number of messages between the ranks through the gloo group ``World.control`` in the first 100
    steps, and the number of steps from the request to stop until the stop."""
    found = watched_loop()
    messages = len([step for step in found["messages"] if step <= 100])
    steps = found["step"] - loop.STOP_AT
    return f"{messages}; {steps}", messages == 0 and steps <= 2


def collections() -> tuple[str, bool]:
    """Return row A14: the number of garbage collections after a step that is not a multiple of ``GC_INTERVAL``, and the
    steps of all collections. Only the steps before the save count."""
    during = [step for step, _ in watched_loop()["collected"] if 0 < step < loop.SAVE_AT]
    others = [step for step in during if step % GC_INTERVAL]
    return f"{len(others)}, others after steps {', '.join(map(str, during))}", not others and bool(during)


def sharded_state(mesh: DeviceMesh, layers: int = 24, width: int = 2048) -> dict[str, Any]:
    """Return a checkpoint state of a model with 1.3 billion parameters and its optimizer, sharded over ``mesh``. The
    tensors have shapes but no values.
    """

    def shard(*shape: int) -> DTensor:
        local = torch.empty(-(-shape[0] // mesh.size()), *shape[1:], device="meta")
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=strides)

    with torch.device("meta"):
        whole = GPT(compose("model=llama_1p36b", f"model.n_layer={layers}", f"model.n_embd={width}").model)
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    moments = {n: {"exp_avg": shard(*s), "exp_avg_sq": shard(*s), "step": torch.zeros(())} for n, s in shapes.items()}
    groups = [{"lr": 1e-3}]
    return {
        "model": {n: shard(*s) for n, s in shapes.items()},
        "optimizer": {"state": moments, "param_groups": groups},
    }


def plan_of_rank(plan: SavePlan, rank: int) -> SavePlan:
    """Return the save plan of the rank ``rank``: a copy of ``plan``, the plan of rank 0, with the shard offsets of
    ``rank``."""
    items = []
    for item in plan.items:
        data = item.tensor_data
        if data is not None and data.chunk.sizes and item.index.offset is not None and "step" not in item.index.fqn:
            offsets = torch.Size([rank * data.chunk.sizes[0], *data.chunk.offsets[1:]])
            index = dataclasses.replace(item.index, offset=offsets)
            chunk = dataclasses.replace(data.chunk, offsets=offsets)
            item = dataclasses.replace(item, index=index, tensor_data=dataclasses.replace(data, chunk=chunk))
        items.append(item)
    return dataclasses.replace(plan, items=items)


def checkpoint_plans(ranks: int = 256) -> tuple[str, bool]:
    """Return row A9: the CPU time that rank 0 needs to plan the first and the second save of the same state."""
    with fake_ranks(ranks) as mesh:
        state = sharded_state(mesh)

        def local_plan() -> tuple[SavePlan, DefaultSavePlanner, float]:
            started = time.process_time()
            planner = DefaultSavePlanner()
            planner.set_up_planner(state, None, is_coordinator=True)
            return planner.create_local_plan(), planner, time.process_time() - started

        own, planner, first_s = local_plan()
        others = [pickle.dumps(plan_of_rank(own, rank)) for rank in range(ranks)]  # as they arrive
        started = time.process_time()
        planner.create_global_plan([pickle.loads(each) for each in others])
        first_s += time.process_time() - started
        again, _, second_s = local_plan()
        started = time.process_time()
        assert again == own, "so no plan is sent"
        second_s += time.process_time() - started
    return f"{first_s:.1f} s; {second_s:.2f} s ({sum(map(len, others)) / 1e6:.0f} and 0 MB of plans)", second_s <= 0.2


def memory_gib(name: str) -> float:
    """Return a value of /proc/self/status, such as VmRSS, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")) / GIB


def build_and_look(rank: int, size: int, folder: Path) -> float:
    """Return the growth of the peak memory of this rank, in GiB, while the rank builds, shards and initializes the
    model."""
    from gpt import train as module

    config = config_from([*BUILT, "data.max_bytes=60000"])
    config.validate()
    before: list[float] = []
    seed_all, parallelize = module.seed_all, module.parallelize

    def begin(*args: Any) -> None:
        seed_all(*args)
        before.append(memory_gib("VmRSS"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on

    def end(*args: Any) -> Any:
        engine = parallelize(*args)
        before.append(memory_gib("VmHWM"))
        return engine

    with mock.patch.object(module, "seed_all", begin), mock.patch.object(module, "parallelize", end):
        start_composed(rank, size, folder, config)
    return before[1] - before[0]


def memory_of_a_start() -> tuple[str, bool]:
    """Return row A11: the growth of the peak memory of a rank during its start, measured on four real ranks.
    tests/parallel/test_engines.py compares the weights."""
    with tempfile.TemporaryDirectory() as folder:
        grown = max(run_distributed(build_and_look, 4, Path(folder) / "built" / "run", timeout_s=600)) * GIB / 1e9
    return f"{grown:.2f} GB", grown <= 0.3


def slow_steps(rank: int, size: int, folder: Path) -> list[float]:
    """Return for each step the seconds that the step waits for its batch. Reading a window, the tokens of one sequence,
    takes ``READ_S`` seconds, and computing takes ``COMPUTE_S`` seconds."""
    run: Run = start(rank, size, folder, "parallel=ddp", "optim.max_steps=40", "eval.interval=0")
    read = Windows.read
    waited = []

    def slowly(windows: Windows, position: int) -> Any:
        time.sleep(READ_S)
        return read(windows, position)

    backward = run.engine.backward

    def compute(*args: Any) -> Tensor:
        time.sleep(COMPUTE_S)
        return backward(*args)

    def record(step: int, **figures: Any) -> None:
        waited.append(figures["data_wait_s"])

    computing = mock.patch.object(run.engine, "backward", compute)
    with computing, mock.patch.object(run.worker, "record", record), mock.patch.object(Windows, "read", slowly):
        train(run)
    return waited


def data_wait() -> tuple[str, bool]:
    """Return row A12: the median wait for a batch on one rank with 16 sequences in each step."""
    with tempfile.TemporaryDirectory() as folder:
        waited = run_distributed(slow_steps, 1, Path(folder) / "runs" / "run")[0]
    median = statistics.median(waited)
    return f"{median * 1e3:.2f} ms", median < 1e-3


def zero1_gathers() -> tuple[str, bool]:
    """Return row A18: the all-gathers of ZeRO-1 for a Llama of 24 layers on eight ranks."""
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(small(**LLAMA, n_layer=24)).parameters()]

    def is_gather(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        return "all_gather" in name or "allgather" in name

    with fake_ranks(8) as mesh, Operations(is_gather) as seen:
        all_gather_rows([torch.zeros(shape) for shape in shapes], mesh.get_group())
    return f"{len(seen.found)} ({len(shapes)} parameters)", len(seen.found) <= 10
