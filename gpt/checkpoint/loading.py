"""Loading of a run's checkpoints: from the memory of the nodes, from disk, or from a copy on another filesystem."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gpt.checkpoint import folders
from gpt.checkpoint.folders import NAME, DamagedError, LoadedCheckpoint, Manifest, find_damage, read_manifest
from gpt.checkpoint.formats import TensorFiles
from gpt.checkpoint.memory import MemoryStores
from gpt.checkpoint.messages import CheckpointError, run_on_all_ranks, run_on_first_rank
from gpt.checkpoint.part import rank_file
from gpt.checkpoint.target import Target, start_aside
from gpt.checkpoint.upkeep import Fetched, fetch_newest, look_for
from launch.errors import ConfigError


class CheckpointLoader:
    """Finds, verifies and loads the newest whole checkpoint of a run. Every method but ``steps`` is collective.

    Args:
        folder: the folder of ``step_00000100`` and the like; every rank sees it.
        group: gloo group of all ranks, for the control messages; None means the default group.
        fmt: format of the state on disk.
    """

    def __init__(self, folder: Path, group: dist.ProcessGroup | None, fmt: TensorFiles) -> None:
        self.folder = folder
        self.group = group
        self.format = fmt
        self.memory: MemoryStores | None = None
        """Further checkpoints in the memory of the nodes; a load prefers them if they are not older."""
        self.connect: Callable[[], Target] | None = None
        """Opens the copies on another filesystem, for a load that finds no whole checkpoint; None without copies."""
        self.beat: Callable[[], None] = lambda: None
        """Called about once a second while a copy is fetched."""
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)

    def steps(self) -> list[int]:
        """List the steps that have a checkpoint, ascending."""
        return folders.steps(self.folder)

    def is_new(self) -> bool:
        """Return True if no load can find a checkpoint: the folder is empty, and memory and copies are not in use."""
        if self.memory is not None or self.connect is not None:
            return False
        return run_on_first_rank(lambda: folders.is_empty(self.folder), self.group)

    def load(self, state: Any) -> LoadedCheckpoint | None:
        """Fill ``state`` from the newest checkpoint that is whole; None if there never was a checkpoint.

        Damaged checkpoints are set aside with a warning on rank 0. ``state`` has the structure and the shapes that were
        saved; topology and number of ranks may differ.

        Raises:
            ConfigError: there were checkpoints and all are damaged, or the whole one belongs to another model.
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
            if self.memory is not None:  # the steps in memory are made again
                self.memory.keep("")
        return loaded

    def verify(self, path: Path) -> Manifest:
        """Verify a checkpoint's files, shared among the ranks; return its manifest.

        Raises:
            DamagedError: some file differs from the saved one; on every rank.
        """

        def read() -> Manifest | str:
            try:
                manifest = read_manifest(path)
            except DamagedError as damage:
                return str(damage)
            return manifest if manifest.step == folders.step_of(path) else f"{NAME} is that of step {manifest.step}"

        manifest = run_on_first_rank(read, self.group)
        if isinstance(manifest, str):
            raise DamagedError(manifest)
        # Largest first, one for each rank in turn, so that the ranks read about equally much.
        names = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
        mine = names[self._rank :: self._ranks]
        found = run_on_all_ranks(lambda: [find_damage(path / name, manifest.files[name]) for name in mine], self.group)
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
            manifest = run_on_first_rank(lambda: read_manifest(copy), self.group)
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
        """Fetch the newest whole copy on rank 0; the ranks communicate each second, so that no collective times out.

        Raises:
            CheckpointError: the target cannot be read.
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
        """Read a verified checkpoint into ``state``.

        Raises:
            ConfigError: the checkpoint does not fit ``state``; its files are sound, so it belongs to another model.
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
