"""Refusal of a module that ``python -m`` would not run, without importing anything of it. Torch-free.

The parts of the name are looked for one after another by the finders of this Python, editable installs and zip files
included, as an import would, but for the code of the packages on the way. Where that code may change what is found, or
the ranks may search elsewhere, nothing is refused.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import NamedTuple

from launch.errors import ConfigError
from launch.runs.ranges import closest

OWN_IMPORTS = re.compile(r"__path__|declare_namespace|meta_path|path_hooks|sys\.modules")
"""Names in the code of a package whose modules are found in a way of its own."""
USUAL = ("train", "main", "run", "cli")
"""Names of modules to propose first where a package cannot be run itself."""
EXPECTED = "a module that python -m finds from script.workdir"


class Missing(NamedTuple):
    """Where the search for a module ended."""

    package: str
    """Package in which the next part was looked for; empty at the start of the name."""
    part: str
    """Part of the name that was not found."""
    locations: tuple[str, ...] | None
    """Folders of the package; None where it is a module, and no package."""


def require_module(module: str, workdir: Path, pythonpath: Sequence[str] = (), *, elsewhere: bool = False) -> None:
    """Raise ConfigError where ``python -m`` finds no such module, or cannot run it; imports nothing of it.

    Args:
        module: dotted name.
        workdir: folder in which it is run, and searched first.
        pythonpath: folders that are searched after it, before those of this Python.
        elsewhere: the ranks may have search paths, or packages, that this machine does not know.
    """
    if module.endswith(".py") and (workdir / module).is_file():
        dotted = module.removesuffix(".py").replace("/", ".")
        raise ConfigError(
            f"script.module={module}, which is a file",
            "a module, as python -m takes it, without .py",
            f"script.path={module}, or script.module={dotted}",
        )
    searched = [str(workdir), *(str(workdir / folder) for folder in pythonpath), *sys.path]
    importlib.invalidate_caches()  # a folder that was searched before may have new files
    missing = search(module, searched)
    if missing is None or (elsewhere and not missing.package):
        return
    if not missing.package:
        raise ConfigError(
            f"script.module={module}, and there is no {missing.part} in {workdir} nor among the installed packages",
            EXPECTED,
            "script.workdir=PATH of the folder it lies in, or script.path=FILE",
        )
    if missing.locations is None:
        found = f"script.module={module}, and {missing.package} is a module, not a package"
        raise ConfigError(found, EXPECTED, f"script.module={missing.package}")
    names = [entry.name for entry in pkgutil.iter_modules(missing.locations)]
    if missing.package == module:
        found, likely = f"script.module={module}, a package without __main__.py", [*USUAL, *sorted(names)]
    else:
        found = f"script.module={module}, and there is no {missing.part} in {' nor '.join(missing.locations)}"
        likely = closest(missing.part, names)
    rest = module[len(f"{missing.package}.{missing.part}") :]
    runnable = (f"{missing.package}.{name}{rest}" for name in likely if name in names)
    fix = next((name for name in runnable if search(name, searched) is None), f"{missing.package}.MODULE")
    raise ConfigError(found, f"{EXPECTED}, or a package with a __main__.py", f"script.module={fix}")


def search(module: str, searched: Iterable[str]) -> Missing | None:
    """Look for a module and, of a package, its ``__main__``; None where it is there, or may be."""
    name, locations, spec = "", tuple(searched), None
    for part in module.split("."):
        package, name = name, f"{name}.{part}" if name else part
        spec = find_spec(name, locations) if part else None
        if spec is None:
            return Missing(package, part, locations if package else ())
        if spec.submodule_search_locations is None:
            left = module[len(name) + 1 :].partition(".")[0]
            return Missing(name, left, None) if left else None
        if finds_by_itself(spec):
            return None
        locations = tuple(spec.submodule_search_locations)
    return None if find_spec(f"{name}.__main__", locations) else Missing(name, "__main__", locations)


def find_spec(name: str, locations: Sequence[str]) -> ModuleSpec | None:
    """Ask the finders of this Python for one module; ``importlib.util.find_spec`` would import its package."""
    for finder in sys.meta_path:
        # The others take no search path for the first part of a name.
        path = locations if "." in name or finder is PathFinder else None
        spec = finder.find_spec(name, path) if hasattr(finder, "find_spec") else None
        if spec is not None:
            return spec
    return None


def finds_by_itself(spec: ModuleSpec) -> bool:
    """Tell whether the code of a package may find more modules than lie in its folders, as far as it can be read."""
    if spec.origin is None:  # a namespace package has no code
        return False
    try:
        source = spec.loader.get_source(spec.name)  # type: ignore[union-attr]
    except (AttributeError, ImportError, SyntaxError, UnicodeDecodeError):
        return True
    return source is None or OWN_IMPORTS.search(source) is not None
