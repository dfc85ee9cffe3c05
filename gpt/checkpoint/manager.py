"""The checkpoints of a run: save, poll, finish and load, on disk and in the memory of the nodes.

At most one save is in flight. Its state is staged while all ranks wait, and written and committed during training:

    step n        every rank   start: the writer gets a copy of this rank's part, and writes it
    step n + 1    every rank   poll: returns this rank's votes; step n + 1 sums the votes of all ranks
                  every rank   advance: once all ranks have written, rank 0's writer commits
    step n + 2    every rank   advance: the commit is done, and the save has an outcome

The votes of a rank are two numbers, each 0 or 1: its work on the save is done, or has failed (``Votes``). The
all-reduce that each training step makes anyway also sums the votes. The sums tell every rank that all ranks have
written, so a save during training sends no messages of its own.
``finish`` waits for the outcome when no training step follows; then the ranks exchange messages. A failed write to disk
is tried again, into another folder and from the same copy.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpt import checkpoint as folders
from gpt.checkpoint import DamagedError, FailedSave, LoadedCheckpoint, Manifest, Retention, Saved, Votes, messages
from gpt.checkpoint import writer as jobs
from gpt.checkpoint.formats import TensorFiles
from gpt.checkpoint.memory import MemorySave, MemoryStores, confirm, send
from gpt.checkpoint.messages import CheckpointError, explain, run_on_all_ranks, run_on_first_rank
from gpt.checkpoint.part import RankPart, StagedPart, encode_rank_state, rank_file
from gpt.checkpoint.target import Target, start_aside
from gpt.checkpoint.upkeep import Fetched, UpkeepPlan, fetch_newest, look_for
from gpt.checkpoint.writer import Result, Writer
from launch.errors import ConfigError
from launch.runs.folder import NO_ROOM

RETRY_S = 5.0
"""Seconds from the first failed try of a save to the next one. Each later wait is twice as long, at most
``LONGEST_RETRY_S``."""
LONGEST_RETRY_S = 300.0
HURRIED_RETRY_S = 1.0
"""Seconds from a failed try of a save to the next one while training waits for the save."""
OUTDATED = "a later attempt owns this run"


class OutdatedAttemptError(CheckpointError):
    """A save was not committed, because a later attempt of the run has started."""


@dataclass
class InFlight:
    """State of the save in flight on one rank."""

    about: Manifest
    """Manifest of the checkpoint, still without time and files."""
    may_commit: Callable[[], bool] | None
    """Function that rank 0 calls just before the commit; if it returns False, nothing is committed. None for a save to
    memory."""
    started: float
    """Time of the start of the save, of time.monotonic, in seconds."""
    part: RankPart | StagedPart | None
    """What this rank writes. None if collecting it has failed; each try of the save then fails."""
    failure: str | None
    """Error of collecting ``part``, as text; None if there was none."""
    to: Path | MemorySave
    """Target of the save: a temporary folder on disk, or the description of a save to the memory of the nodes."""
    commits: bool = False
    """False in the first phase, in which all ranks write; True in the second, in which rank 0 commits."""
    submit_at: float | None = None
    """Time, of time.monotonic in seconds, of the next try; None while the writer works."""
    result: Result | None = None
    """Result of this rank's writer in this phase; None before the writer has finished."""


class CheckpointManager:
    """Saves and loads the checkpoints of one run. Every method but ``steps`` and ``poll`` is collective.

    Args:
        folder: folder of the run's checkpoints, on a filesystem of all ranks.
        keeps: rule for the checkpoints to keep. It must keep at least the newest one.
        group: gloo group of all ranks, for messages. None means the default group, which must then be gloo.
        fmt: format of checkpoints on disk; None means whole tensors by name.
        writer: writes what this rank saves; None means this process, while training waits.
        give_up_after_s: seconds, from the first failed try of a save, for which the save is tried again. A failure
            after this time is raised. With 0 every failure is raised.
    """

    def __init__(
        self,
        folder: Path,
        keeps: Retention,
        group: dist.ProcessGroup | None = None,
        fmt: TensorFiles | None = None,
        writer: Writer | None = None,
        give_up_after_s: float = 0.0,
    ) -> None:
        assert (keeps.last is None or keeps.last >= 1) and keeps.best >= 0, keeps
        self.folder = folder
        self.group = group
        self.format = fmt or TensorFiles()
        self.memory: MemoryStores | None = None
        """Checkpoints in the memory of the nodes, which a load prefers to older checkpoints on disk. None if the run
        keeps none in memory."""
        self.connect: Callable[[], Target] | None = None
        """Function that returns the ``Target`` with the copies of the run's checkpoints. A load calls it if there is no
        undamaged checkpoint on disk. None if there are no copies."""
        self.beat: Callable[[], None] = lambda: None
        """Called about once a second while a copy is fetched, to report that this rank is alive."""
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self.keeps = keeps
        self.writer = writer or Writer()
        self.give_up_after_s = give_up_after_s
        self.upkeep: UpkeepPlan | None = None
        """Settings of the work on each committed checkpoint. With None, checkpoints that ``keeps`` does not keep are
        deleted, and nothing else is done."""
        self.failures = 0
        self._failing_since = 0.0
        self._phases = self._names = 0
        self._pending: InFlight | None = None

    # Saving.

    @property
    def is_pending(self) -> bool:
        """True while a save is in flight; the same on all ranks."""
        return self._pending is not None

    def start(
        self,
        step: int,
        state: Any,
        rank_state: dict[str, Any],
        meta: dict[str, Any],
        may_commit: Callable[[], bool] | None,
    ) -> None:
        """Start a save, to disk or to the memory of the nodes. No other save may be in flight.

        Args:
            step: step of the checkpoint. The step must not have a checkpoint yet.
            state: state in the type that the format needs; by default tensors and DTensors in nested dicts, as
                get_state_dict of torch.distributed.checkpoint returns them.
            rank_state: state of this rank alone: tensors and plain Python values.
            meta: plain JSON for the manifest; that of rank 0 is saved.
            may_commit: called on rank 0 just before the commit; if it returns False, nothing is committed. Picklable,
                for a writer process. None saves to the memory of the nodes.

        Raises:
            CheckpointError: torch cannot plan the save of the state; raised on every rank.
        """
        assert self._pending is None
        started = time.monotonic()
        part: RankPart | StagedPart | None = None
        failure: str | None = None
        try:
            collected = self.format.collect(step, state, self.group)
            collected.files[rank_file(self._rank)] = encode_rank_state(rank_state)
            part = self.writer.stage(collected)
        except CheckpointError:
            raise
        except Exception as error:  # the other ranks must learn of it by the votes, as of failed writes
            failure = explain(error)
        to: Path | MemorySave
        if may_commit is not None:
            to = self._new_folder(step)
        else:
            assert self.memory is not None
            to = MemorySave(self._new_name(), step, self._ranks, meta, self.memory.places, self.memory.secret)
        about = Manifest(step, self._ranks, 0.0, meta, {}, self.format.describe())
        self._pending = InFlight(about, may_commit, started, part, failure, to)
        self._phases += 1
        self._submit(self._pending)

    def poll(self) -> Votes:
        """Return the status of the save in flight on this rank, without waiting."""
        pending = self._pending
        if pending is None:
            return Votes()
        takes_part = not pending.commits or self._rank == 0  # every rank writes, and only rank 0 commits
        if takes_part and pending.result is None:
            if pending.submit_at is not None and time.monotonic() >= pending.submit_at:
                self._submit(pending)
            if pending.submit_at is None:
                pending.result = pending.result or self.writer.poll()
        is_over = takes_part and pending.result is not None
        has_failed = self._failure(pending) is not None
        return Votes(self._phases, {"done": is_over and not has_failed, "failed": is_over and has_failed})

    def advance(self, phase: int, sums: Mapping[str, float]) -> Saved | FailedSave | None:
        """Advance the save in flight to its next phase, or to its outcome, if all ranks have completed the phase. All
        ranks must call this with the same arguments.

        Args:
            phase: ``Votes.phase`` of the votes that were summed.
            sums: ``Votes.figures``, summed over all ranks.

        Returns:
            ``Saved`` when the checkpoint is committed; ``FailedSave`` when a try has failed. Each outcome is returned
            once. None while the save is in flight, and if the votes are of an earlier phase.

        Raises:
            CheckpointError: saves have failed for ``give_up_after_s`` seconds; raised on every rank.
            ConfigError: the same, because the disk is full or broken; raised on every rank.
            OutdatedAttemptError: ``may_commit`` returned False; raised on every rank.
        """
        pending = self._pending
        if pending is None or phase != self._phases:
            return None  # the votes are of a phase that has ended
        if sums["done"] + sums["failed"] < (1 if pending.commits else self._ranks):
            return None  # the folder stays while some rank writes into it
        return self._end_phase(pending, sums["failed"] > 0, hurries=False)

    def finish(self, hurries: bool = True) -> Saved | FailedSave | None:
        """Wait until the save in flight is committed, or until a try of it has failed. Return this outcome; None if no
        save is in flight.

        After the failed try of a save to disk, the save is still in flight: the next call tries it again.

        Args:
            hurries: True for a next try ``HURRIED_RETRY_S`` seconds after a failure. False for a longer wait, which
                grows with each failure.

        Raises:
            CheckpointError, ConfigError: saves have failed for ``give_up_after_s`` seconds; raised on every rank.
            OutdatedAttemptError: a later attempt of the run has started; raised on every rank.
        """
        while (pending := self._pending) is not None:
            if (not pending.commits or self._rank == 0) and pending.result is None:
                if pending.submit_at is not None:
                    wait_s = pending.submit_at - time.monotonic()
                    time.sleep(max(0.0, min(HURRIED_RETRY_S, wait_s) if hurries else wait_s))
                    self._submit(pending)
                pending.result = pending.result or self.writer.wait()
            has_failed = self._failure(pending) is not None
            outcome = self._end_phase(pending, any(messages.all_gather(has_failed, self.group)), hurries)
            if outcome is not None:
                return outcome
        return None

    def give_up(self) -> None:
        """Give up the save in flight, and delete its temporary folder; do nothing if no save is in flight. The
        checkpoint before it stays the newest one."""
        if self._pending is not None and isinstance(self._pending.to, Path):
            # A rank that still writes may create the folder anew: then the next save removes it.
            self._on_first(partial(jobs.remove_save, self._pending.to, self.keeps, False))
        self._pending = None

    def _submit(self, pending: InFlight) -> None:
        """Make this rank's writer write this rank's part, to the disk or to the memory of the nodes."""
        pending.submit_at = None
        if pending.part is None:
            pending.result = Result(failure=pending.failure)
        elif isinstance(pending.to, Path):
            self.writer.submit(partial(jobs.write_rank, pending.to, pending.about.step, pending.part, self._rank == 0))
        else:
            self.writer.submit(partial(send, pending.to, pending.part))

    def _end_phase(self, pending: InFlight, has_failed: bool, hurries: bool) -> Saved | FailedSave | None:
        step = pending.about.step
        if isinstance(pending.to, MemorySave):
            self._pending = None
            assert pending.result is not None
            if has_failed:
                cause = messages.first_failure(pending.result.failure, self.group).splitlines()[0]
                return FailedSave(step, cause, 1, in_memory=True)
            self.writer.submit(partial(confirm, pending.to))
            return Saved(step, pending.result.ended - pending.started, in_memory=True)
        if has_failed:
            return self._fail(pending, pending.to, hurries)
        if not pending.commits:
            assert pending.may_commit is not None
            pending.commits, pending.result = True, None
            self._phases += 1
            self._on_first(partial(jobs.commit_save, pending.to, pending.about, pending.may_commit))
            return None
        self._pending = None
        self.failures = 0
        ended = time.monotonic() if pending.result is None else pending.result.ended
        self.tend(step, None)
        return Saved(step, ended - pending.started, in_memory=False)

    def _fail(self, pending: InFlight, temporary: Path, hurries: bool) -> FailedSave:
        """Handle the failed try of a save to disk, and return the failure: remove the folder of the try, choose a new
        folder, and set the time of the next try, which ``poll`` or ``finish`` begins. Collective.

        Args:
            pending: the save in flight.
            temporary: folder of the failed try.
            hurries: True for a next try after ``HURRIED_RETRY_S`` seconds. False for a longer wait, which grows with
                each failure.

        Raises:
            OutdatedAttemptError: a later attempt of the run has started.
            CheckpointError: saves have failed for ``give_up_after_s`` seconds.
            ConfigError: the same, because the disk is full or broken.
        """
        now = time.monotonic()
        if not self.failures:
            self._failing_since = now
        self.failures += 1
        step = pending.about.step
        cause = messages.first_failure(self._failure(pending), self.group)
        failing_s = messages.all_gather(now - self._failing_since, self.group)[0]  # rank 0's clock decides
        no_room = room_error(cause)
        is_over = OUTDATED in cause or failing_s >= self.give_up_after_s
        self._on_first(partial(jobs.remove_save, temporary, self.keeps, no_room is not None and not is_over))
        if is_over:
            if self._rank == 0:
                self.writer.wait()
            self._pending = None
            if OUTDATED in cause:
                raise OutdatedAttemptError(f"step {step} is not saved: a later attempt owns this run")
            if no_room is None:
                raise CheckpointError(cause)
            before = max(self.steps(), default=None)
            needed = "all checkpoints (checkpoint.keep_last=null)"
            if (last := self.keeps.last) is not None:
                needed = f"{last + 1} checkpoints (checkpoint.keep_last={last}, and the new one)"
            raise ConfigError(
                f"the checkpoint of step {step} cannot be written into {self.folder}: {no_room}",
                f"room for {needed}",
                f"df -h {self.folder.parent}, remove what is not needed, or checkpoint.keep_last=1; then the same "
                f"command, which {'begins anew' if before is None else f'continues from step {before}'}",
            )
        delay_s = HURRIED_RETRY_S if hurries else min(LONGEST_RETRY_S, RETRY_S * 2 ** (self.failures - 1))
        pending.to, pending.commits, pending.result = self._new_folder(step), False, None
        pending.submit_at = now + delay_s
        self._phases += 1
        return FailedSave(step, cause, self.failures, in_memory=False)

    def _failure(self, pending: InFlight) -> str | None:
        """Return the error of this rank's writer in this phase, as text; None if there is none, or if the checkpoint
        was committed before the error."""
        result = pending.result
        if result is None or not pending.commits:
            return None if result is None else result.failure
        if result.failure is None:
            return OUTDATED if result.value is None else None
        return None if folders.is_committed(self.folder, pending.about.step) else result.failure

    def _on_first(self, job: jobs.Job) -> None:
        """Make the writer of rank 0 do a job; do nothing on other ranks."""
        if self._rank == 0:
            self.writer.submit(job)

    def _new_name(self) -> str:
        """Return a new name for a save, of 16 hexadecimal digits, the same on all ranks."""
        if not self._names:
            self._names = int(messages.all_gather(secrets.randbits(63), self.group)[0])
        self._names += 1
        return hashlib.sha256(str(self._names).encode()).hexdigest()[:16]

    def _new_folder(self, step: int) -> Path:
        """Return the path of a new temporary folder for a save, the same on all ranks."""
        return self.folder / f".saving_{folders.final_for(self.folder, step).name}_{self._new_name()[:8]}"

    # Return of the run to an earlier step.

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints of all steps after ``step``, because the run continues from ``step``.

        This call deletes those on disk; the upkeep deletes their copies later. All checkpoints in the memory of the
        nodes are deleted, also those of earlier steps.

        Raises:
            CheckpointError: a checkpoint cannot be deleted; raised on every rank.
        """
        run_on_first_rank(lambda: folders.discard_after(self.folder, step), self.group)
        if self.memory is not None:
            self.memory.keep("")
        self.tend(None, step)

    def tend(self, committed: int | None, back_to: int | None) -> None:
        """Make rank 0's writer do the upkeep of checkpoints: delete, verify and copy them, as the settings in
        ``self.upkeep`` request.

        Args:
            committed: step of a newly committed checkpoint; None if there is none.
            back_to: step to which the run has gone back; copies of later steps are deleted. None if the run has not
                gone back.
        """
        self._on_first(partial(jobs.tend_saved, self.folder, self.keeps, self.upkeep, committed, back_to))

    # Loading.

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint on disk, ascending."""
        return folders.steps(self.folder)

    def is_new(self) -> bool:
        """Return True if the run certainly has no checkpoint to load: the folder is empty, and the run uses neither
        checkpoints in memory nor copies."""
        if self.memory is not None or self.connect is not None:
            return False
        return run_on_first_rank(lambda: not any(self.folder.glob("*")), self.group)

    def load(self, state: Any) -> LoadedCheckpoint | None:
        """Load the newest undamaged checkpoint into ``state``, and return a description of the checkpoint; None if the
        run has no checkpoint.

        The checkpoint may be in the memory of the nodes, on disk, or a copy in ``checkpoint.copy_to``. Damaged
        checkpoints on disk are renamed. ``state`` must have the names and shapes that were saved; parallelism and
        number of ranks may differ.

        Raises:
            ConfigError: all checkpoints are damaged, or the newest undamaged one is of another model.
            CheckpointError: the filesystem failed.
        """

        def list_swept() -> list[Path]:
            folders.sweep(self.folder)
            return folders.list_committed(self.folder)

        paths = run_on_first_rank(list_swept, self.group)
        newest = max(map(folders.step_of, paths), default=0)
        loaded, why_not = (None, None) if self.memory is None else self.memory.load(state, newest)
        if loaded is None:
            loaded = self._load_from_disk(paths, state)
            if loaded is not None:
                loaded = replace(loaded, memory_damage=why_not)
            if self.memory is not None:  # the run makes the steps in memory again
                self.memory.keep("")
        return loaded

    def verify(self, path: Path) -> Manifest:
        """Verify the files of the checkpoint in ``path``, each by one of the ranks. Return its manifest.

        Raises:
            DamagedError: some file is damaged; raised on every rank.
            CheckpointError: a file cannot be read, or the manifest is of another version; raised on every rank.
        """

        def read() -> Manifest | str:
            try:
                manifest = folders.read_manifest(path)
            except DamagedError as damage:
                return str(damage)
            return (
                manifest
                if manifest.step == folders.step_of(path)
                else f"{folders.NAME} is that of step {manifest.step}"
            )

        manifest = run_on_first_rank(read, self.group)
        if isinstance(manifest, str):
            raise DamagedError(manifest)
        # Largest first, one for each rank in turn, so that the ranks read about equally much.
        names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
        mine = names[self._rank :: self._ranks]
        found = run_on_all_ranks(
            lambda: [folders.find_damage(path / name, manifest.files[name]) for name in mine], self.group
        )
        damages = sorted(damage for of_rank in found for damage in of_rank if damage)
        if damages:
            raise DamagedError("; ".join(damages))
        return manifest

    def _load_from_disk(self, paths: list[Path], state: Any) -> LoadedCheckpoint | None:
        damaged: list[str] = []
        for path in reversed(paths):
            try:
                manifest = self.verify(path)
            except DamagedError as damage:
                why = str(damage)
                run_on_first_rank(partial(folders.set_aside, path, why), self.group)
                damaged.append(f"{path.name}: {why}")
            else:
                return self._fill(path, manifest, state, damaged)
        bad = run_on_first_rank(lambda: folders.list_set_aside(self.folder), self.group)
        fetched = self._fetch()
        if (copy := fetched.path) is not None:
            # Verified on its way. Rank 0 reads it for all ranks, whose disks may not show it yet.
            manifest = run_on_first_rank(lambda: folders.read_manifest(copy), self.group)
            why = f"{len(bad)} on the disk, all damaged" if bad else "none on the disk"
            return replace(self._fill(copy, manifest, state, [*damaged, *fetched.damaged]), fetched_for=why)
        if fetched.damaged:
            found = f"no copy of a checkpoint is whole, nor one in {self.folder}: {'; '.join(fetched.damaged)}"
        elif bad:  # also damage of earlier: a restart after this refusal must not begin from nothing either
            found = f"no checkpoint in {self.folder} is whole; damaged: {', '.join(path.name for path in bad)}"
        else:
            return None
        raise ConfigError(
            found,
            "at least one that is as it was saved, to go on from",
            "fresh=true to start over in a new folder, or restore a checkpoint there from a backup",
        )

    def _fetch(self) -> Fetched:
        """Fetch the newest undamaged copy from ``checkpoint.copy_to``, the second place of the run's checkpoints, into
        the folder of its checkpoints on disk. Collective: rank 0 fetches, and every rank returns the result. If there
        are no copies (``connect`` is None), the result has no path.

        During the fetch, all ranks exchange a message each second, so that no collective times out.

        Raises:
            CheckpointError: the copies cannot be read.
        """
        if (connect := self.connect) is None:
            return Fetched(None)
        search = start_aside(lambda: fetch_newest(self.folder, connect())) if self._rank == 0 else Future[Fetched]()
        while True:
            found = run_on_first_rank(lambda: look_for(search), self.group)
            if found is not None:
                return found
            self.beat()

    def _fill(self, path: Path, manifest: Manifest, state: Any, damaged: list[str]) -> LoadedCheckpoint:
        """Read a verified checkpoint into ``state``, and return its description. ``damaged`` has a line for each
        damaged checkpoint that was found before this one.

        Raises:
            ConfigError: the checkpoint does not fit ``state``. Its files are undamaged, so it is of another model.
        """
        try:
            run_on_all_ranks(lambda: self.format.read(path, manifest, state, self.group), self.group)
        except CheckpointError as error:
            raise ConfigError(
                f"{path} cannot be loaded into this model ({str(error).splitlines()[0]})",
                "the model and optimizer it was saved from",
                "fresh=true to start over in a new folder, or the model it was saved from",
            ) from error
        rank_state: list[dict[str, Any]] = []
        if manifest.world_size == self._ranks:
            own = path / rank_file(self._rank)
            # Through a list: the result of an action is sent to all ranks.
            run_on_all_ranks(
                lambda: rank_state.append(torch.load(own, map_location="cpu", weights_only=True)), self.group
            )
        return LoadedCheckpoint(
            manifest.step, manifest.meta, manifest.world_size, rank_state[0] if rank_state else None, tuple(damaged)
        )


def room_error(cause: str) -> str | None:
    """Return the message of the operating system if the error ``cause`` of a save means that the filesystem is full or
    broken; else None."""
    line = cause.splitlines()[0]
    return next((os.strerror(number) for number in NO_ROOM if f"[Errno {number}]" in line), None)
