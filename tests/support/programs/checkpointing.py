"""A program with checkpoints, of the standard library and ``launch.worker`` alone: a chain of sums, step by step.

Each rank saves its state into ``step_N/rank_K.json`` under the sum of its content, and goes on when all ranks have. A
start goes on from the newest step whose files are all whole, which rank 0 chooses. Arguments: steps, steps between two
saves, seconds a step; and, where steps are to take no time any more from some moment on, a file that is made then.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from launch import worker


def file_of(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step_{step:06d}" / f"rank_{rank}.json"


def save(folder: Path, step: int, rank: int, state: str) -> None:
    path = file_of(folder, step, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"step": step, "state": state})
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w") as file:
        file.write(f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path) -> str | None:
    """The state in a file; None where it is not there, or damaged."""
    try:
        text, told = path.read_text().splitlines()
    except (OSError, ValueError):
        return None
    return json.loads(text)["state"] if hashlib.sha256(text.encode()).hexdigest() == told else None


def starting_step(run: worker.Run, folder: Path) -> int:
    """The newest step whose files are all whole, or 0. Rank 0 chooses: a later rank might find one of this attempt."""
    assert run.folder is not None
    chosen = run.folder / "attempts" / f"{run.attempt:04d}" / "starting_step"
    if run.is_first:
        numbers = sorted((int(path.name.removeprefix("step_")) for path in folder.glob("step_*")), reverse=True)
        files = {number: [file_of(folder, number, rank) for rank in range(run.world_size)] for number in numbers}
        whole = (number for number in numbers if all(load(file) is not None for file in files[number]))
        temporary = chosen.with_suffix(".new")
        temporary.write_text(str(next(whole, 0)))
        temporary.replace(chosen)
    while not chosen.exists():
        time.sleep(0.002)
    return int(chosen.read_text())


def main() -> None:
    steps, interval, step_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    calm = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    run = worker.attach()
    folder = run.checkpoint_dir
    assert folder is not None
    step = starting_step(run, folder)
    state = load(file_of(folder, step, run.rank)) if step else str(run.rank)
    assert state is not None, f"the file of step {step} was damaged after rank 0 had read it"
    while step < steps:
        if calm is None or not calm.exists():
            time.sleep(step_s)
        step += 1
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        run.record(step, loss=int(state[:8], 16) / 2**32, samples=1)
        is_leaving = run.stop_requested()
        if is_leaving or step % interval == 0 or step == steps:
            run.phase("saving", step)
            run.flush()  # before the step is saved: nobody will do it again
            began = time.perf_counter()
            save(folder, step, run.rank, state)
            while not all(file_of(folder, step, rank).exists() for rank in range(run.world_size)):
                time.sleep(0.002)
            run.saved(step, time.perf_counter() - began)
        if is_leaving:
            return
    run.finished(step)


if __name__ == "__main__":
    main()
