"""Hydra launcher for any ``@hydra.main`` app: the task function runs in every rank of a multi-node job.

    python app.py -m lr=1e-3,3e-4 hydra/launcher=multinode hydra.launcher.nodes=2
    python app.py -m n=1,2,4 hydra/launcher=multinode 'hydra.launcher.nodes=${n}'    # own resources for each point
    python app.py -m lr=1e-3,3e-4 hydra/launcher=multinode_local                # processes of this machine

Keys that hydra-submitit-launcher has too mean the same here. Hydra imports this module in every app of the environment,
also in a project with its own ``launch.py``; so the launcher itself is imported only when a job is launched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.launch_plugin import _multinode_config  # noqa: F401  # registers the keys

OF_CLUSTER = (
    *("timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "partition", "qos", "account", "constraint"),
    *("exclude", "gres", "array_parallelism", "setup", "placement"),
)
"""Keys of this launcher that are keys of the group ``cluster``, with the same names."""
OF_SBATCH = ("cpus_per_gpu", "mem_per_gpu", "mem_per_cpu", "comment")
"""Keys of this launcher that become options of sbatch, with the same names."""
GROUPS = ("cluster", "resilience", "budget", "launch")
"""Keys of this launcher that are whole groups of keys, such as ``+hydra.launcher.resilience.requeue=false``."""

REFUSED = {
    "gpus_per_task": (
        "GPUs of a whole node: one agent starts all of its ranks",
        "hydra.launcher.gpus_per_node=N, and hydra.launcher.tasks_per_node=N for one rank on each",
    ),
    "submitit_folder": (
        "no other folder: batch scripts are in launch/.submitit below hydra.sweep.dir, logs in the run folders",
        "hydra.launcher.submitit_folder=null",
    ),
}
"""Key of hydra-submitit-launcher without a counterpart -> (the expected setting, the override to type in its place)."""


def run_task(
    context: HydraContext, task_function: TaskFunction, config: DictConfig, state: dict[Any, Any], base: Any
) -> JobReturn:
    """Call the task function of one point in one rank, as Hydra does in a plain sweep.

    Returns Hydra's result of the call. If the function raises an exception, this function raises the same exception.

    All ranks have the same output folder. Only rank 0 writes Hydra's own files into it.

    Args:
        context: Hydra's context of the launching process.
        task_function: the user's function.
        config: composed config of the point.
        state: singletons of Hydra in the launching process.
        base: ``version_base`` of the launching process.
    """
    Singleton.set_state(state)
    VersionBase.instance().version_base = base
    setup_globals()
    if os.environ.get("RANK", "0") != "0":
        with open_dict(config):
            config.hydra.output_subdir = None
    result = run_job(
        hydra_context=context,
        task_function=task_function,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
    if result.status is JobStatus.FAILED:
        raise result._return_value
    return result


class MultinodeLauncher(Launcher):
    """Hydra launcher that runs each point of a sweep as a run of this project's launcher."""

    def __init__(self, **keys: Any) -> None:
        self.keys = keys
        self.config: DictConfig | None = None
        self.context: HydraContext | None = None
        self.task_function: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store Hydra's context, the task function and the config for ``launch``."""
        self.context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the points of one batch, and return the value of the task function on rank 0 for each point.

        A point that fails has its exception as its result, which Hydra raises when the sweeper reads the value.

        Args:
            job_overrides: overrides of each point.
            initial_job_idx: Hydra's number of the first point.
        """
        import gpt_launch.own_names  # noqa: F401
        from launch.api import Job, overrides_of, start_and_wait
        from launch.worker.call import Call

        assert self.context is not None and self.config is not None and self.task_function is not None
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        state, base = Singleton.get_state(), VersionBase.instance().version_base
        points, composed = [], []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = str(number), number
            words = overrides_of_point(config, filter_overrides(overrides))
            shown = re.sub(r"[^\w=.,+~-]", "_", ",".join(filter_overrides(overrides)))[:80]
            words += overrides_of("run_dir", folder / "launch" / f"{number},{shown}".rstrip(","))
            words += [*overrides_of("output_dir", folder), "fresh=true"]  # Hydra runs a task again in the same folder.
            call = Call(run_task, (self.context, self.task_function, config, state, base))
            points.append((words, call))
            composed.append(config)
        GlobalHydra.instance().clear()  # The launcher composes its own config.
        try:
            jobs: Sequence[Job] = start_and_wait(points)
        finally:
            Singleton.set_state(state)
            VersionBase.instance().version_base = base
        return [task_return(*parts) for parts in zip(jobs, composed, job_overrides, strict=True)]


def overrides_of_point(config: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return the overrides with which this project's launcher runs one point of a user's app.

    They contain the resources from ``hydra.launcher``, and the point's own overrides as arguments of the function. An
    override that only chooses resources, such as ``n=2`` with ``hydra.launcher.nodes=${n}``, is no argument, because
    the scaling table compares points with the same arguments.

    Args:
        config: composed config of the point, with Hydra's keys.
        overrides: overrides of the point, as typed for the app.

    Raises:
        ConfigError: a key of hydra-submitit-launcher is set that has no counterpart here (``REFUSED``).
    """
    from launch.api import overrides_of
    from launch.config import SIGNAL_MARGIN_S
    from launch.errors import ConfigError

    keys = OmegaConf.to_container(config.hydra.launcher, resolve=True)
    chosen = re.findall(r"\$\{([\w.]+)\}", str(OmegaConf.to_container(config.hydra.launcher, resolve=False)))
    arguments = [text for text in overrides if text.partition("=")[0].lstrip("+") not in chosen]
    assert isinstance(keys, dict)
    for name, (expected, fix) in REFUSED.items():
        if keys[name] is not None:
            raise ConfigError(f"hydra.launcher.{name}={keys[name]}", expected, fix)
    values = {f"cluster.{name}": keys[name] for name in OF_CLUSTER}
    values |= {f"cluster.additional_parameters.{name}": keys[name] for name in OF_SBATCH}
    values |= {"ranks_per_node": keys["tasks_per_node"]}
    if keys["signal_delay_s"] is not None:
        values["resilience.grace_period_s"] = max(1, keys["signal_delay_s"] - SIGNAL_MARGIN_S)
    if keys["max_num_timeout"] == 0:
        values["resilience.requeue"] = False
    words = ["workload=function", f"cluster={keys['kind']}", f"nodes={keys['nodes']}"]
    words += [f"{name}={keys[name]}" for name in ("spare_nodes", "spare_jobs")]
    words += [*overrides_of("name", keys["name"] or config.hydra.job.name)]
    words += overrides_of("script.resumes", keys["resumes"])
    words += overrides_of("call.args.overrides", ",".join(arguments)) if arguments else []
    for key, value in values.items():
        words += [] if value is None else overrides_of(key, value)
    words += overrides_of("cluster.additional_parameters", keys["additional_parameters"])
    return words + [word for group in GROUPS for word in overrides_of(group, keys[group])]


def task_return(job: Any, config: DictConfig, overrides: Sequence[str]) -> JobReturn:
    """Wait for the ``launch.api.Job`` of a point, and return its result in the form for Hydra's sweeper.

    The result of a failed point has the exception as its value.
    """
    error = job.exception()
    if error is None:
        found = job.result()
        assert isinstance(found, JobReturn)
        return found
    found = JobReturn(overrides=list(overrides), cfg=config, status=JobStatus.FAILED)
    found.return_value = error
    return found
