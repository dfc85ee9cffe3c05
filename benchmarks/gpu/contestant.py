"""One contestant of benchmarks.gpu: the process that makes the training steps of this project or of another library.

Some comparisons leave out a part of this project's training loop; the functions in ``WITHOUT`` remove these parts. The
function ``waits`` finds the places at which the host waits for the device.
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
"""Number of steps in which this program looks for waits. One of these steps also measures the gradients by layer."""
WAITS = "called a synchronizing CUDA operation"
"""Text in each of torch's warnings about a wait."""


class BatchesInTurn:
    """Source of batches without a prefetch thread. The training thread reads each batch at the start of its step, into
    memory that is not pinned.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._ahead = run, run.batches
        self.passed_over = run.batches.passed_over

    def take(self, step: int) -> StepBatch:
        """Return the batch of step ``step``; the first step is 1."""
        run, started = self._run, time.perf_counter()
        number = self.passed_over.batch_of(step)
        indices = train_indices(number, run.dims.data_rank(run.world.rank), run.batch)
        tokens_BT, targets_BT = (x.to(run.world.device) for x in run.samples.batch("train", indices))
        waited_s = time.perf_counter() - started
        return StepBatch(tokens_BT, targets_BT, int(indices[0]), int(indices[-1]), waited_s)

    def close(self) -> None:
        """End the prefetch thread that ``run`` has started."""
        self._ahead.close()


def with_whole_logits(run: Run, step: Callable[[], None]) -> Callable[[], None]:
    """Replace the fused loss by a loss that holds all logits in fp32. Returns ``step``."""
    vars(run.engine)["criterion"] = partial(plain_cross_entropy, vocab_size=run.config.model.vocab_size)
    return step


def with_batches_in_turn(run: Run, step: Callable[[], None]) -> Callable[[], None]:
    """Replace the prefetched batches of ``run`` by ``BatchesInTurn``. Returns ``step``."""
    vars(run)["batches"] = BatchesInTurn(run)
    return step


def with_a_wait(run: Run, step: Callable[[], None]) -> Callable[[], None]:
    """Return a step that waits for the device after ``step``, like a loop that reads its loss at once."""

    def waiting() -> None:
        step()
        if run.world.device.type == "cuda":
            torch.cuda.synchronize()

    return waiting


def as_it_is(run: Run, step: Callable[[], None]) -> Callable[[], None]:
    """Return ``step`` unchanged."""
    return step


WITHOUT: dict[str, Callable[[Run, Callable[[], None]], Callable[[], None]]] = {
    "": as_it_is,
    "fused loss": with_whole_logits,
    "batches read ahead": with_batches_in_turn,
    "running ahead": with_a_wait,
    "cuDNN attention": as_it_is,  # by leaving out a context
}
"""Name of a part of the training loop -> function that removes this part from a run and returns the new step."""


def serve_run(words: Sequence[str], without: str, folder: Path) -> Served:
    """Build a run as ``gpt.train`` does, but without one part of the loop. Return its step, and the requests that it
    answers.

    Args:
        words: overrides of the run.
        without: name of the missing part, a key of ``WITHOUT``; empty for the whole loop.
        folder: folder for the run folder.
    """
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
    """Return the properties of a run for the result table: parameters, tokens of a step, device, peak FLOP/s, planned
    memory.
    """
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
    """Return ``{"peak_gib": GiB}`` with the peak memory of this rank: that of the tensors on the GPU, or the RAM of the
    process on a CPU."""
    if device == "cuda":
        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def waits(step: Callable[[], None]) -> dict[str, Any]:
    """Return ``{"waits": lines}``, where ``lines`` is a dictionary: source line at which the host waits for the device
    -> number of its waits in ``WATCHED`` steps. On a CPU ``lines`` is None.

    The function first lets torch warn about each wait. If there is no warning, the function runs as many steps in
    torch's mode ``error``, in which a wait raises an error.
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
    """Return file and line as text: the path inside the checkout, or the file name alone for a file outside of it."""
    return f"{file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name}:{line}"


def serve_other(told: dict[str, Any]) -> Served:
    """Build the training step of another library. ``told`` is the JSON object from the command line of this process:
    library, checkout, shape of the model, device, data, and whether to compile."""
    checkout = None if told["checkout"] is None else Path(told["checkout"])
    shape, device = Shape(**told["shape"]), told["device"]
    served = serve_peer(told["peer"], shape, checkout, told["compiled"], True, device, told["data"])
    served.commands = {"memory": partial(memory_peak, device), "waits": lambda: {"waits": None}}
    return served


def main() -> None:
    """Build the training step that the only argument of the command line describes in JSON. Then make steps and answer
    requests, as the process of benchmarks.gpu asks on standard input."""
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
