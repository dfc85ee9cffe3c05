"""``python -m launch.keys [WORD]``: keys of a config with default, range and meaning.

python -m launch.keys timeout              all keys with this word in their name or meaning
python -m launch.keys --workload script    the keys for a program of your own, in place of the GPT
python -m launch.keys --markdown           docs/keys.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple, get_args, get_type_hints

from omegaconf import ListConfig, OmegaConf
from rich.padding import Padding

import gpt_launch.own_names  # noqa: F401
from launch.config import Config
from launch.config.compose import compose_launch, schema_of, target_of
from launch.errors import CommandParser, ConfigError, closest, list_elements, range_text, refusing
from launch.runs.find import plain_console


class Key(NamedTuple):
    """One key of a schema, as a row of a table."""

    name: str
    default: str
    values: str
    """Unit and range of a number, or the options; empty for any text."""
    meaning: str


@cache
def docstrings(schema: type) -> dict[str, str]:
    """Return field of a dataclass -> its docstring as one line, for the fields that have a docstring.

    Fields of base classes are included. A class made by ``make_dataclass`` has no source, so its fields are absent.
    """
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__[:-1]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        except OSError:  # make_dataclass made the class, which has no source.
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


def enum_of(kind: Any) -> type[Enum] | None:
    """Return the Enum of a key's options, from the type ``kind`` of the key; None if that type has no Enum."""
    kinds = (kind, *get_args(kind))
    return next((one for one in kinds if isinstance(one, type) and issubclass(one, Enum)), None)


def values_of(kind: Any, metadata: Any) -> str:
    """Return the values that a key accepts as text: its options, or unit and range of a number; "" for any text.

    ``kind`` is the type of the key; ``metadata`` is that of its dataclass field.
    """
    kinds, enum = (kind, *get_args(kind)), enum_of(kind)
    if enum is not None:
        return ", ".join(option.name for option in enum)
    if bool in kinds:
        return "true, false"
    text = " ".join(part for part in (range_text(metadata), metadata.get("unit", "")) if part)
    return text or ("number" if {int, float} & {*kinds} else "")


def written(value: Any) -> str:
    """Return a default value as a user types it."""
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, ListConfig):
        return f"[{', '.join(map(written, value))}]"
    return str(value)


def keys_of(schema: type, defaults: Any, prefix: str = "") -> Iterator[Key]:
    """Yield the keys of a schema. Keys of groups come last.

    ``defaults`` is a composed config with the default values of the keys. ``prefix`` is the beginning of each key's
    name, such as ``cluster.``.
    """
    hints, elements = get_type_hints(schema), list_elements(schema)
    groups: list[tuple[type, str]] = []
    for field in dataclasses.fields(schema):
        name, inner = f"{prefix}{field.name}", field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            groups.append((inner, field.name))
            continue
        meaning = field.metadata.get("meaning") or docstrings(schema).get(field.name)
        if not meaning:  # the docstring of the Enum of its options
            enum = enum_of(hints[field.name])
            meaning = " ".join((inspect.getdoc(enum) or "").split()) if enum else ""
        default = "" if OmegaConf.is_missing(defaults, field.name) else written(defaults[field.name])
        values = values_of(hints[field.name], field.metadata)
        if field.name in elements:
            values = f"list of {', '.join(elements[field.name])}"
        yield Key(name, default, values, meaning)
    for group, name in groups:
        yield from keys_of(group, defaults[name], f"{prefix}{name}.")


def keys_of_workload(workload: str) -> list[Key]:
    """Return all keys of ``python -m launch workload=NAME`` with their defaults.

    Raises:
        ConfigError: there is no such workload.
    """
    words = [f"workload={workload}"]
    with_program = [*words, "script.path=train.py"] if workload == "script" else words
    found = list(keys_of(schema_of(target_of(words)), compose_launch(with_program)))
    return [key._replace(default="null") if key.name == "script.path" else key for key in found]


def keys_page() -> str:
    """Return the content of docs/keys.md: a table for each group of keys."""
    launcher = list(keys_of(Config, compose_launch([])))
    own = {key.name for key in launcher}
    parts = [
        "# Keys\n\nSet a key as `KEY=VALUE`; `null` means no value.\n"
        "`python -m launch.keys WORD` finds keys by a word; `python -m launch --cfg job` shows the values of a run.",
        "# The launcher",
        *tables(launcher),
        "# Programs of your own (`workload=script`)",
        *tables(key for key in keys_of_workload("script") if key.name not in own),
        "# The GPT (`workload=gpt` and `python -m gpt.train`)",
        *tables(key for key in keys_of_workload("gpt") if key.name not in own),
    ]
    return "\n\n".join(parts).replace("\n# ", "\n## ") + "\n"


def tables(keys: Iterator[Key] | Sequence[Key]) -> Iterator[str]:
    """Yield a Markdown table for each group of keys, with its title."""
    for group, rows in groupby(keys, key=lambda key: key.name.partition(".")[0] if "." in key.name else ""):
        lines = [f"### `{group}.*`\n" if group else "### The root\n", "| key | default | values | meaning |"]
        lines.append("|---|---|---|---|")
        for key in rows:
            cells = (f"`{key.name}`", f"`{key.default}`" if key.default else "", key.values, key.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        yield "\n".join(lines)


@refusing
def main() -> int:
    """Print keys as a table. Returns the exit status: 0, or 2 if no key has the word."""
    parser = CommandParser(prog="python -m launch.keys", description="Print keys with default, range and meaning.")
    parser.add_argument("word", nargs="?", default="", metavar="WORD", help="part of a key's name or meaning")
    parser.add_argument("--workload", default="gpt", metavar="NAME", help="whose keys to add: gpt (default) or script")
    parser.add_argument("--markdown", action="store_true", help="print docs/keys.md")
    args = parser.parse_args()
    if args.markdown:
        print(keys_page(), end="")
        return 0
    keys = keys_of_workload(args.workload)
    word = args.word.lower()
    found = [key for key in keys if word in key.name.lower() or word in key.meaning.lower()]
    if not found:
        likely = closest(word, [part for key in keys for part in key.name.split(".")])
        fix = f"python -m launch.keys {likely[0]}" if likely else "python -m launch.keys"
        raise ConfigError(f"{args.word}, a word of no key", "part of the name or the meaning of a key", fix)
    console = plain_console(soft_wrap=False)
    for key in found:
        console.print(f"{key.name}={key.default}" + (f"    ({key.values})" if key.values else ""), style="bold")
        console.print(Padding(key.meaning, (0, 0, 0, 4)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
