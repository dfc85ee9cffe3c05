"""One contestant of benchmarks.gpu, in its own process: a run of ours, or the step of another library.

Has the parts of our loop that a comparison leaves out (``WITHOUT``), and finds the places at which the host waits for
the device.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.loops import FOR_EVER, open_run, our_turn
from benchmarks.speed.peer_models import Shape
from benchmarks.speed.peers import serve_peer
from benchmarks.turns import ROOT, Served, serve
from gpt.accounting import peak_flops, training_flops_per_token
from gpt.data.loader import StepBatch, train_indices
from gpt.metrics.writers import describe_rank, software
from gpt.model.attention import prefer_fast_kernels
from gpt.parallel.distributed import open_world
from gpt.parallel.modules import plain_cross_entropy
from gpt.planning import memory
from gpt.training.run import Run, parse_arguments, parse_request
from gpt.training.step import collect_together
from launch.runs.environment import raise_open_files, set_defaults
from launch.runs.process import die_with_parent

WATCHED = 10
"""Steps in which waits are looked for: the gradients are measured by layer in one of them."""
WAITS = "called a synchronizing CUDA operation"
"""What torch says of one."""


class BatchesInTurn:
    """Batches that the training thread reads itself when it needs them, from memory that is not pinned."""

    def __init__(self, run: Run) -> None:
        self._run, self._ahead = run, run.batches
        self.passed_over = run.batches.passed_over

    def take(self, step: int) -> StepBatch:
        """Return the batch of a step, counted from 1."""
        run, started = self._run, time.perf_counter()
        number = self.passed_over.batch_of(step)
        indices = train_indices(number, run.dims.data_rank(run.world.rank), run.batch)
        tokens_BT, targets_BT = (x.to(run.world.device) for x in run.samples.batch("train", indices))
        waited_s = time.perf_counter() - started
        return StepBatch(tokens_BT, targets_BT, int(indices[0]), int(indices[-1]), waited_s)

    def close(self) -> None:
        """End the thread that is not needed."""
        self._ahead.close()


def with_whole_logits(run: Run, step: Callable[[], None]) -> Callable[[], None]:
    """Compute the loss as torch writes it, operation by operation, with all logits in fp32."""
    vars(run.engine)["criterion"] = partial(plain_cross_entropy, vocab_size=run.config.model.vocab_size)
    return step


def with_batches_in_turn(run: Run, step: Callable[[], None]) -> Callable[[], None]:
    """Read each batch when it is needed."""
    vars(run)["batches"] = BatchesInTurn(run)
    return step


def with_a_wait(run: Run, step: Callable[[], None]) -> Callable[[], None]:
    """Wait for the device after each step, as a loop does that reads its loss at once."""

    def waiting() -> None:
        step()
        if run.world.device.type == "cuda":
            torch.cuda.synchronize()

    return waiting


def as_it_is(run: Run, step: Callable[[], None]) -> Callable[[], None]:
    """Change nothing."""
    return step


WITHOUT: dict[str, Callable[[Run, Callable[[], None]], Callable[[], None]]] = {
    "": as_it_is,
    "fused loss": with_whole_logits,
    "batches read ahead": with_batches_in_turn,
    "running ahead": with_a_wait,
    "cuDNN attention": as_it_is,  # by leaving out a context
}
"""What a comparison may leave out, and how."""


def serve_run(words: Sequence[str], without: str, folder: Path) -> Served:
    """Build a run of ours as ``gpt.train`` does, without one thing."""
    raise_open_files()
    set_defaults()
    config = parse_request(parse_arguments([*words])).config
    stack = contextlib.ExitStack()
    world = stack.enter_context(open_world(config.device, config.parallel.timeout_s))
    if without != "cuDNN attention":
        stack.enter_context(prefer_fast_kernels(world.device))
    mine = str(folder)
    run = open_run([*words, f"run_dir={world.on_first(lambda: mine)}/run", FOR_EVER], world)
    collect = stack.enter_context(collect_together())
    turn = WITHOUT[without](run, our_turn(run))

    def step() -> None:
        turn()
        collect(run.step)

    return Served(
        step,
        told_of(run),
        world.device.type,
        {"memory": partial(memory_peak, world.device.type), "waits": partial(waits, step)},
        partial(world.on_first, sys.stdin.readline),
    )


def told_of(run: Run) -> dict[str, Any]:
    """What the referee is to know of a run: sizes, the device and its peak, the plan's memory."""
    config = run.config
    device = describe_rank(run.world)["device_name"]
    return {
        "parameters": sum(p.numel() for p in run.engine.module.parameters()),
        "tokens": run.tokens_per_step,
        "ranks": run.world.size,
        "micro_batch": run.batch.micro,
        "flops_per_token": training_flops_per_token(config.model).palm,
        "precision": "tf32" if config.tf32 else config.precision.name,
        "compile": config.compile.name,
        "peak_flops_per_s": peak_flops(device, config.precision, bool(config.tf32)),
        "planned_gib": memory.per_rank(config, run.dims, run.batch).total_gib,
        "device": device,
        "software": software(),
    }


def memory_peak(device: str) -> dict[str, Any]:
    """The most memory of this rank so far: in tensors on the GPU, or of RAM by the process."""
    if device == "cuda":
        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def waits(step: Callable[[], None]) -> dict[str, Any]:
    """Find the places in which the host waits for the device in ``WATCHED`` steps: each with how often it does.

    First torch warns of them, so that all are found; where it warns of none, as many steps are done under its mode
    ``error``. None on a CPU, where nothing is to be waited for.
    """
    if not torch.cuda.is_available():
        return {"waits": None}
    found: Counter[str] = Counter()
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(WATCHED):
                step()
        found.update(place(Path(one.filename), one.lineno) for one in caught if WAITS in str(one.message))
        if not found:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(WATCHED):
                step()
    except RuntimeError as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
        found[f"{place(Path(frames[-1].filename), frames[-1].lineno or 0)}: {str(error).splitlines()[0]}"] += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": dict(found)}


def place(file: Path, line: int) -> str:
    """Name a line of this project by its path in it, another by its file."""
    return f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name}:{line}"


def serve_other(told: dict[str, Any]) -> Served:
    """Build the step of another library."""
    checkout = None if told["checkout"] is None else Path(told["checkout"])
    shape, device = Shape(**told["shape"]), told["device"]
    served = serve_peer(told["peer"], shape, checkout, told["compiled"], True, device, told["data"])
    served.commands = {"memory": partial(memory_peak, device), "waits": lambda: {"waits": None}}
    return served


def main() -> None:
    """Serve what the only argument describes, in JSON."""
    die_with_parent(os.getppid())
    told = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="gpu_") as folder:
        if told["peer"]:
            serve(partial(serve_other, told))
        else:
            serve(partial(serve_run, told["words"], told["without"], Path(folder)))
    os._exit(0)  # threads and process group are given up


if __name__ == "__main__":
    main()
