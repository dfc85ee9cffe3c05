"""The keys that every run has, its folder, which follows from them, and the refusal of a folder with another run in it.

Which further keys name a run, or may change between its attempts, is handed in by whoever knows them. Torch-free.
"""

# OmegaConf 2.3 reads the annotations of a schema at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from launch.errors import ConfigError
from launch.runs.compose import flatten, plain, read_config
from launch.runs.folder import RunFolder
from launch.runs.overrides import point_name
from launch.runs.renamed import in_former_spelling

PLACE_KEYS = ("output_dir", "name", "run_dir", "fresh", "require_same_code", "strict")
"""Keys that say where the files of a run go, not what it computes: they neither name it nor bind its next attempt."""


@dataclass
class RunConfig:
    """Config that every run has, whatever it computes and whatever starts it."""

    name: str = "run"
    """Folder under output_dir that holds the points of one sweep."""
    output_dir: str = "outputs"
    run_dir: Optional[str] = None
    """The folder of this run; null derives it from output_dir, name and the overrides."""
    fresh: bool = False
    """Start over in a new folder instead of resuming."""
    require_same_code: bool = False
    """Refuse to go on where the code or a library has changed since the attempt before, instead of warning."""
    strict: Optional[bool] = None
    """Former name of require_same_code."""

    def validate(self) -> None:
        """Raise ConfigError for the first thing that cannot work; nothing here can be wrong by itself."""


def choose_folder(config: RunConfig, overrides: Sequence[str], not_in_point: Sequence[str]) -> RunFolder:
    """The folder of a run: ``run_dir``, or ``<output_dir>/<name>/<point>``.

    With ``fresh`` a new generation, ``<point>~2``, ``<point>~3``, ...; without it the newest there is, so that the
    same command goes on where the last one stopped.
    """
    above = Path(config.output_dir) / config.name
    base = Path(config.run_dir or above / point_name(overrides, not_in_point)).expanduser().absolute()
    former = above / point_name(map(in_former_spelling, overrides), not_in_point)
    if config.run_dir is None and not base.exists() and former.is_dir():
        base = former.expanduser().absolute()  # made by the same command, when its keys had other names
    generations = [1] if base.exists() else []
    generations += [
        int(p.name.rsplit("~", 1)[1]) for p in base.parent.glob(f"{glob_escape(base.name)}~*") if p.is_dir()
    ]
    newest = max(generations, default=0) + (1 if config.fresh else 0)
    return RunFolder(base if newest <= 1 else base.with_name(f"{base.name}~{newest}"))


def glob_escape(name: str) -> str:
    """``name`` with the characters that mean something to glob taken literally."""
    return re.sub(r"([*?[])", r"[\1]", name)


def refuse_other_run(folder: RunFolder, config: Any, schema: type, resumable: Sequence[str]) -> None:
    """Raise ConfigError where ``folder`` already holds a run with other settings.

    Args:
        folder: of the run.
        config: what was asked for now.
        schema: dataclass whose fields are compared; ``config`` has them all.
        resumable: keys, or groups of keys, that may change between the attempts of one run.
    """
    if not folder.config.is_file():
        return
    values = dataclasses.asdict(config)
    there = flatten(dataclasses.asdict(read_config(folder, schema)))
    here = flatten({field.name: values[field.name] for field in dataclasses.fields(schema)})
    changed = [key for key in here if here[key] != there.get(key) and not may_change(key, resumable)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{folder.path} holds a run with {key}={plain(there.get(key))}, and now {key}={plain(here[key])}",
            "the same settings, to go on with that run",
            f"fresh=true, for a new folder beside it (or {key}={plain(there.get(key))}, to go on)",
        )


def may_change(key: str, resumable: Sequence[str]) -> bool:
    """Tell whether ``key``, or a group that it is in, is among ``resumable``."""
    return any(f"{key}.".startswith(f"{allowed}.") for allowed in resumable)
