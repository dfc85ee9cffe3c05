"""Launchers of Hydra's other plugins: what they start for a point, and the refusal of what they cannot give it.

They give all points of a sweep the same resources, those of ``hydra.launcher``. Each of their tasks becomes an agent
(``launch.batch.run_task``), one for a node, and a point with another number of nodes would fail when it starts.
"""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from launch.errors import ConfigError
from launch.runs.wording import counted


def tasks_of(launcher: DictConfig) -> int | None:
    """Tasks that a launcher starts for every point; None of one that is not known.

    Args:
        launcher: the keys under ``hydra.launcher``.
    """
    target = str(launcher.get("_target_"))
    if target.endswith("submitit_launcher.SlurmLauncher"):
        return int(launcher.nodes) * int(launcher.tasks_per_node)
    if target.endswith("submitit_launcher.LocalLauncher"):
        return int(launcher.tasks_per_node)
    if target.endswith(("basic_launcher.BasicLauncher", "joblib_launcher.JoblibLauncher")):
        return 1
    return None


def refuse_other_tasks(points: Sequence[DictConfig], chosen: str) -> None:
    """Raise ConfigError where a launcher would not start an agent for each node of every point.

    Args:
        points: composed, with Hydra's own keys.
        chosen: option of the group ``hydra/launcher``.
    """
    wanted = [int(point.nodes) + int(point.spare_nodes) for point in points]
    given = [tasks_of(point.hydra.launcher) for point in points]
    wrong = [(need, have) for need, have in zip(wanted, given, strict=True) if have is not None and have != need]
    if not wrong:
        return
    need, have = wrong[0]
    own = f"the same without hydra/launcher={chosen}: then each point gets the nodes that it names"
    same = f"hydra.launcher.tasks_per_node={need}"
    if "slurm" in chosen:
        same = f"hydra.launcher.nodes={need} hydra.launcher.tasks_per_node=1"
    fits = len(set(wanted)) == 1 and "submitit" in chosen
    raise ConfigError(
        f"a point with nodes={need} (spare_nodes included), and hydra/launcher={chosen} starts "
        f"{counted(have, 'task')} for every point",
        "one task, the agent, for each node of a point; a stock launcher gives all points the same resources",
        f"{same}; or {own}" if fits else own,
    )
