"""What a plan warns of, from what the run folders of earlier attempts hold. Writes nothing.

Owns the warnings that ``dry_run`` and a submission show. What cannot work at all is refused by ``launch.plan``.
"""

from __future__ import annotations

from dataclasses import replace

from gpt.code import changed_since, code_state, library_versions, refuse_change
from gpt.run_folder import RunFolder
from launch import snapshot
from launch.config import Config
from launch.plan import Plan


def forewarn(plan: Plan, config: Config) -> Plan:
    """The plan with its warnings.

    Raises:
        ConfigError: the code or a library has changed since the last attempt, and ``strict`` forbids that.
    """
    return replace(plan, warnings=tuple(changed_code(plan, config)))


def changed_code(plan: Plan, config: Config) -> list[str]:
    """Whether the next attempt would run something else than the last one did."""
    folder = RunFolder(plan.run_dir)
    now = {"code": snapshot.code(), "git": code_state(), "software": library_versions()}
    changed = changed_since(folder, now) if folder.attempts() else None
    if changed is None:
        return []
    if config.strict:
        refuse_change(folder, *changed)
    return [f"changed since attempt {changed[0]}: {changed[1]} (strict=true refuses that)"]
