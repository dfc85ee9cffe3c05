"""Common parts of the result pages of benchmarks: a line with date, versions, machine and commit, the table, and the
file.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt.metrics.writers import software
from launch.runs.environment import code_state, cpu_name

UNCHANGED = hashlib.sha256(b"").hexdigest()


def chosen(words: str, known: Sequence[str]) -> list[str]:
    """Return the names in ``words`` (NAME,NAME), or all ``known`` names if ``words`` is empty. Exits if a name is not
    known.
    """
    names = words.split(",") if words else list(known)
    if strangers := [name for name in names if name not in known]:
        sys.exit(
            f"found: --only {','.join(strangers)}\nexpected: some of {', '.join(known)}\ntype next: --only {known[0]}"
        )
    return names


def cores() -> str:
    """Return the number and the model of the cores that this process may use, as text."""
    return f"{len(os.sched_getaffinity(0))} cores of {cpu_name()}"


def stamp(machine: str) -> str:
    """Return a line with the date, versions, the text ``machine``, and the commit."""
    known = software()
    versions = ", ".join(f"{name} {known[name]}" for name in ("python", "torch", "deepspeed") if name in known)
    state = code_state()
    changes = "" if state.get("diff_sha256") in (None, UNCHANGED) else ", with changes"
    return f"{time.strftime('%Y-%m-%d')}, {versions}, {machine}, commit {state.get('commit', 'unknown')[:7]}{changes}."


def keep(script: Path, title: str, document: str | None, text: str, words: str = "--write") -> None:
    """Write the result page of a benchmark next to its script.

    Args:
        script: path of the script.
        title: title of the page.
        document: docstring of the script, of at least three paragraphs: summary, commands, and the paragraph for the
            page.
        text: the result.
        words: options of the command that the page shows.
    """
    about = (document or "").split("\n\n")[2].strip()
    page = f"# {title}\n\n`python -m benchmarks.{script.parent.name}.{script.stem} {words}`.\n\n{about}\n\n{text}"
    script.with_suffix(".md").write_text(page.rstrip() + "\n")


def keep_parts(script: Path, title: str, document: str | None, parts: Mapping[str, str]) -> None:
    """Write the result page as ``keep`` does, with a section for each entry of ``parts``: heading -> text. The page
    keeps its other sections.
    """
    page = script.with_suffix(".md")
    older = (page.read_text() if page.is_file() else "").split("\n## ")[1:]
    texts = {head: text.strip() for head, _, text in (part.partition("\n") for part in older)} | dict(parts)
    keep(script, title, document, "\n\n".join(f"## {head}\n\n{text.strip()}" for head, text in texts.items()))


def merged(script: Path, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of ``rows``, and of the rows that the script's page already has. A new row replaces the
    old row with the same first cell; other new rows come last. If the table on the page has other ``titles``, its old
    rows are dropped."""
    page = script.with_suffix(".md")
    lines = page.read_text().splitlines() if page.is_file() else []
    table = {row[0]: row for row in rows}
    if (head := line_of(titles)) in lines:
        below = itertools.takewhile(lambda line: line.startswith("|"), lines[lines.index(head) + 2 :])
        older = [[cell.strip() for cell in line.strip("|").split("|")] for line in below]
        table = {row[0]: row for row in older} | table
    return "\n".join(map(line_of, (titles, ["---"] * len(titles), *table.values())))


def line_of(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def commit() -> str:
    """Return the date and the commit as a table cell, for a row that is measured separately from other rows."""
    state = code_state()
    changes = "" if state.get("diff_sha256") in (None, UNCHANGED) else " with changes"
    return f"{time.strftime('%Y-%m-%d')}, {state.get('commit', 'unknown')[:7]}{changes}"
