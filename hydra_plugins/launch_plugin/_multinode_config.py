"""Keys of ``hydra/launcher=multinode`` and ``multinode_local``, registered with Hydra.

Hydra's search for plugins runs each module whose name has no leading underscore a second time, outside of
``sys.modules``, where a dataclass cannot be made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore

# OmegaConf 2.3 reads the annotations of a schema at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class MultinodeConf:
    """Keys under ``hydra.launcher``.

    A key with the value None has the default of this project's launcher, unless its description says otherwise.
    """

    _target_: str = "hydra_plugins.launch_plugin.multinode.MultinodeLauncher"
    kind: str = "auto"
    """Source of the nodes: ``slurm``, ``local``, or ``auto`` for Slurm if there is one, else local."""
    nodes: int = 1
    tasks_per_node: Optional[int] = None
    """Ranks on each node. None: one for each requested GPU; one if no GPU is requested."""
    spare_nodes: int = 0
    spare_jobs: int = 0
    name: Optional[str] = None
    """Name of the jobs. None: the name of the app."""
    timeout_min: Optional[int] = None
    cpus_per_task: Optional[int] = None
    """CPUs of each node for all of its ranks together. The agent is the only Slurm task of a node."""
    gpus_per_node: Optional[int] = None
    gpus_per_task: Optional[int] = None
    """Refused, because one agent starts all ranks of a node."""
    mem_gb: Optional[float] = None
    partition: Optional[str] = None
    qos: Optional[str] = None
    account: Optional[str] = None
    constraint: Optional[str] = None
    exclude: Optional[str] = None
    gres: Optional[str] = None
    comment: Optional[str] = None
    signal_delay_s: Optional[int] = None
    max_num_timeout: Optional[int] = None
    """0 sets ``resilience.requeue=false``. Other values have no effect, because the limits of ``resilience`` apply."""
    resumes: bool = False
    """True if the task function resumes from a checkpoint of its own, so that it may be restarted and requeued."""
    array_parallelism: Optional[int] = None
    setup: Optional[list[str]] = None
    stderr_to_stdout: bool = True
    """Without effect, because the log of a rank always has both streams."""
    cpus_per_gpu: Optional[int] = None
    mem_per_gpu: Optional[str] = None
    mem_per_cpu: Optional[str] = None
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    placement: Optional[list[Any]] = None
    submitit_folder: Optional[str] = None
    """Refused, because the folder of batch scripts is ``launch/.submitit`` below ``hydra.sweep.dir``."""
    cluster: dict[str, Any] = field(default_factory=dict)
    resilience: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)


@dataclass
class MultinodeLocalConf(MultinodeConf):
    """Keys of ``hydra/launcher=multinode_local``. All nodes of a run are processes of this machine."""

    kind: str = "local"


for name, conf in (("multinode", MultinodeConf), ("multinode_local", MultinodeLocalConf)):
    ConfigStore.instance().store(group="hydra/launcher", name=name, node=conf, provider="gpt_launch")
