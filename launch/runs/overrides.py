"""Overrides of a run as they were typed: ``key=value``, in Hydra's grammar of overrides."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from launch.errors import ConfigError
from launch.runs.folder import RunFolder, damaged, read_strictly


def typed_value(overrides: Iterable[str], key: str) -> str | None:
    """Value typed for ``key``, of the last override where it was typed twice; None if it was not."""
    values = [override.split("=", 1)[1] for override in overrides if "=" in override and typed_key(override) == key]
    return values[-1] if values else None


def without_key(overrides: Iterable[str], key: str) -> list[str]:
    """Overrides without those of ``key``."""
    return [override for override in overrides if typed_key(override) != key]


def read_overrides(folder: RunFolder) -> tuple[str, ...]:
    """Read the overrides of the run of a folder; nothing where that was not kept.

    Raises:
        ConfigError: the file is damaged.
    """
    if not folder.overrides.exists():
        return ()
    found = read_strictly(folder.overrides)
    if not isinstance(found, list):  # of a run without overrides it is an empty list
        raise damaged(folder.overrides, "it is empty" if not found else "it holds no list")
    return tuple(str(override) for override in found)


def append_groups(overrides: Iterable[str], groups: Iterable[str] = ("experiment",)) -> list[str]:
    """Overrides in which groups outside the defaults list may be typed without a plus: ``experiment=weak_scaling``.

    Raises:
        ConfigError: a value without a key, which Hydra answers with an error of its own.
    """
    named = tuple(f"{group}=" for group in groups)
    args = [f"+{arg}" if arg.startswith(named) else arg for arg in map(quote_option, overrides)]
    if "=" in args:  # nodes = 2 reaches a program as three arguments
        joined = " ".join(args).replace(" = ", "=")
        raise ConfigError(" ".join(args), "KEY=VALUE without blanks around the =", joined)
    for arg in args:
        if "=" in arg and not typed_key(arg):
            raise ConfigError(f"{arg}, a value without a key", "KEY=VALUE", f"the same without {arg}")
        if arg.startswith("~") and typed_key(arg) in config_groups().difference(COMPOSED):
            expected = f"one option of {typed_key(arg)}, which no run is without"
            raise ConfigError(f"{arg}, which takes it away", expected, f"the same without {arg}")
        refuse_listed_options(arg)
    return args


COMPOSED = ("experiment", "workload", "hydra")
"""Groups of which several options can be composed, or which are refused by what they name."""


def refuse_listed_options(override: str) -> None:
    """Raise ConfigError if a group is given a list, from which Hydra would compose all options over each other."""
    key, _, value = override.partition("=")
    if typed_key(override) not in config_groups().difference(COMPOSED) or not value.startswith("["):
        return
    options = [word for option in value.split(",") if (word := option.strip("[] '\""))]
    fix = f"{key}={','.join(options)}" if options else f"the same without {override}"
    raise ConfigError(
        f"{override}, a list of options",
        f"one option of {key}; python -m launch -m sweeps over several",
        f"python -m launch -m {fix}" if len(options) > 1 else fix,
    )


@cache
def config_groups() -> frozenset[str]:
    """Folders of config files, of which an option is chosen by its name: ``model``, ``optim`` and their like."""
    return frozenset(folder.name for folder in files("configs").iterdir() if folder.is_dir())


NO_NAME = re.compile(r"[-+]?(\d+|\d+\.\d*|\.\d+)(e[-+]?\d+)?|true|false|null|nan|[-+]?inf", re.IGNORECASE)
"""Values that Hydra's grammar reads as something else than text."""


def quote_option(override: str) -> str:
    """Make a text of a number that is typed as the option of a group: Hydra answers it with an error of its own."""
    key, equals, value = override.partition("=")
    options = value.split(",")
    if not equals or typed_key(override) not in config_groups() or not any(map(NO_NAME.fullmatch, options)):
        return override
    quoted = (f"'{option}'" if NO_NAME.fullmatch(option) else option for option in options)
    return f"{key}={','.join(quoted)}"


PLACE_KEYS = ("output_dir", "name", "run_dir", "fresh", "resume_from", "require_same_code")
"""Keys that say where the files of a run go, not what it computes: they neither name it nor bind its next attempt."""

NOT_IN_POINT = (
    *PLACE_KEYS,
    "workload",
    "spare_nodes",
    "cluster",
    "resilience",
    "budget",
    "launch",
    "objective",
    "objective_of",
    "dry_run",
    "copy_code",
    "hydra",
)
"""Keys that say where and how a run is submitted, not what it is: they do not enter the name of its folder."""

RANK_VALUES = ("nodes", "ranks_per_node", "world_size", "run_dir", "checkpoint_dir", "attempt", "name")
"""Names that ``${...}`` in the arguments of a program may stand for: values that are known when a rank starts."""

NOTHING_TYPED = "default"
"""Name of the folder of a run for which nothing was typed."""
NAME_LIMIT = 120  # a folder name holds 255 bytes on common filesystems; leaves room for suffixes


def typed_key(override: str) -> str:
    """The key of an override: ``nodes`` for ``++nodes=2``."""
    return override.split("=", 1)[0].lstrip("+~")


def point_name(overrides: Iterable[str], exclude: Iterable[str]) -> str:
    """Return the name of a point: the same overrides in any order give the same name.

    ``overrides`` are ``key=value`` strings; those whose key, or a parent of it, is in ``exclude`` say where or when
    a run happens, not what it is. Characters that do not belong in a folder name are replaced and the exact text is
    then kept apart by a hash.
    """
    # A plus before a key is for Hydra, and does not change the run.
    return _name(override.lstrip("+") for override in _kept(overrides, exclude))


def point_keys(overrides: Iterable[str], exclude: Iterable[str]) -> frozenset[str]:
    """The overrides that name a point, however they were typed: two points with the same ones are the same run."""
    return frozenset(override.lstrip("+") for override in _kept(overrides, exclude))


def _kept(overrides: Iterable[str], exclude: Iterable[str]) -> list[str]:
    """The overrides that tell runs apart."""
    excluded = set(exclude)
    kept = []
    for override in overrides:
        key = typed_key(override)
        parents = {".".join(key.split(".")[: i + 1]) for i in range(len(key.split(".")))}
        if not parents & excluded:
            kept.append(override)
    return kept


def _name(kept: Iterable[str]) -> str:
    exact = ",".join(sorted(kept)) or NOTHING_TYPED
    name = re.sub(r"[^A-Za-z0-9_=.,+~-]", "_", exact)
    if name == exact and len(name) <= NAME_LIMIT and not name.startswith("."):
        return name
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{name[:NAME_LIMIT].lstrip('.')}-{digest}"
