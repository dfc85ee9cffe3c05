"""A program that counts instead of training: every step waits a while and adds its square to a sum.

For tests of the launcher. A rank costs a tenth of a second of processor time, where one that imports torch costs some,
and a step costs nothing. It saves the sum and goes on from it, so whether a step was lost or done twice is seen in what
it ends with: n (n + 1) (2 n + 1) / 6. The ranks count each for itself; rank 0 saves. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from launch import worker

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=1_000_000)
parser.add_argument("--save-every", type=int, default=0, help="steps; 0 for never, beside the end")
parser.add_argument("--step-s", type=float, default=0.05)
parser.add_argument("--begin", type=Path, help="file without which nothing begins")
parser.add_argument("--hurry", type=Path, help="file with which steps take no time")
parser.add_argument("--hang", type=Path, help="file with which a save takes for ever")
args = parser.parse_args()


def is_there(path: Path | None) -> bool:
    """Tell whether a file was named, and exists."""
    return path is not None and path.exists()


while args.begin is not None and not args.begin.exists():
    time.sleep(0.05)
run = worker.attach()
run.phase("starting")
assert run.checkpoint_dir is not None, "for the launcher only"
newest = run.checkpoint_dir / "newest.json"


def read() -> dict[str, int]:
    """Return the newest checkpoint, or what there is before the first one."""
    found: dict[str, int] = json.loads(newest.read_text()) if newest.exists() else {"step": 0, "sum": 0}
    return found


step, total = read()["step"], read()["sum"]
print(f"goes on from step {step}", flush=True)


def place(rank: int) -> Path:
    """File in which a rank of this attempt says at which step it has come to save."""
    return newest.with_name(f"{run.attempt}.{rank}")


def steps_of_all() -> list[int]:
    """Return the steps at which the ranks have come to save."""
    return [int(place(rank).read_text() or 0) if place(rank).exists() else 0 for rank in range(run.world_size)]


def save() -> None:
    """Write the sum on rank 0 once all have come, as to a collective, and say so on every rank."""
    run.phase("saving", step)
    newest.parent.mkdir(parents=True, exist_ok=True)
    place(run.rank).write_text(str(step))
    while run.is_first and min(steps_of_all()) < step:
        time.sleep(0.01)
    while is_there(args.hang):
        time.sleep(0.1)
    if run.is_first:
        written = newest.with_name(f"{run.attempt}.tmp")
        written.write_text(json.dumps({"step": step, "sum": total, "attempt": run.attempt}))
        if run.is_current():
            written.replace(newest)
    while not run.is_first and read()["step"] < step:  # nobody says that it is saved before it is
        time.sleep(0.01)
    run.saved(step)


while step < args.steps:
    if not is_there(args.hurry):
        time.sleep(args.step_s)
    step += 1
    total += step * step
    run.record(step, loss=1 / step, samples=4)
    stop, save_now = run.stop_requested(), run.save_requested()
    if stop or save_now or step == args.steps or (args.save_every and step % args.save_every == 0):
        save()
    if stop:
        break
else:
    print(f"counted {step} steps", flush=True)
