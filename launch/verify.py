"""``python -m launch.verify PATH...``: check that the checkpoints of runs have exactly the bytes that were saved.

The workload knows the files of its checkpoints. The command changes no file, and works while a run continues.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import Progress

import gpt_launch.own_names  # noqa: F401
from launch.config.compose import workload_of_run
from launch.errors import CommandParser, refusing
from launch.runs.events import SavedCheckpoint
from launch.runs.find import add_paths, find_runs, labels_inside, plain_console
from launch.runs.folder import RunFolder


def verify(checkpoints: Sequence[SavedCheckpoint], console: Console, title: str) -> tuple[int, int]:
    """Check the checkpoints of one run, and print a line for each. Returns the numbers of sound and damaged
    checkpoints.

    ``title`` is the name of the run.
    """
    whole = broken = 0
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=sum(each.size for each in checkpoints))
        for each in checkpoints:
            damage = each.find_damage(lambda size: progress.advance(task, size))
            whole, broken = whole + (damage == ()), broken + bool(damage)
            said = f"damaged: {'; '.join(damage)}" if damage else f"whole, {each.size / 2**20:,.1f} MiB"
            if damage is None:
                said = "deleted meanwhile, as newer ones are kept"
            progress.console.print(f"{title} {each.path.name}: {said}")
    return whole, broken


def verify_runs(folders: Iterable[RunFolder], console: Console, *, newest: bool, copies: bool = False) -> bool:
    """Check the checkpoints of runs, and print the result for each run. Returns True if no checkpoint is damaged.

    ``newest`` checks only the newest checkpoint of each run. ``copies`` checks the copies of checkpoints at other paths
    instead.

    Raises:
        ConfigError: the config of a run is damaged, or its copies cannot be reached.
    """
    folders = list(folders)
    labels = labels_inside({folder.path.parent for folder in folders})
    sound = True
    for folder in folders:
        title, workload = labels[folder.path], workload_of_run(folder)
        listed = workload.copies(folder) if copies else workload.checkpoints(folder)
        if listed is None:
            console.print(f"{title}: its checkpoints are its own program's, which says nothing of their content here")
            continue
        found = list(listed)
        chosen = [each for each in found if each.step is not None][:1] if newest else found
        whole, broken = verify(chosen, console, title)
        sound = sound and not broken
        text = f"{whole} whole, {broken} damaged" if found else "no checkpoint yet"
        if broken:
            refused = "a new start would be refused: restore one from a backup, or fresh=true begins again"
            text += f"; {'a new start passes over what is damaged' if whole else refused}"
        console.print(f"{title}: {text}")
    return sound


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Check the checkpoints of runs, and print the results.

    Returns the exit status: 0 all checkpoints are sound, 1 some are damaged, 2 there is no such run.
    """
    parser = CommandParser(
        prog="python -m launch.verify",
        description="Read every checkpoint of runs and compare it with what was saved. Changes nothing.",
    )
    add_paths(parser)
    parser.add_argument("--copies", action="store_true", help="those at checkpoint.copy_to instead of the disk's")
    parser.add_argument("--newest", action="store_true", help="only the newest of each run")
    args = parser.parse_intermixed_args(arguments)
    sound = verify_runs(find_runs(args.paths), plain_console(), newest=args.newest, copies=args.copies)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
