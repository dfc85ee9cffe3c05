"""Placement of a point: its candidates in their order, its container, and when a pending job moves on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.config import ClusterConfig, ClusterKind, Config, PlacementConfig
from launch.config.cluster import ContainerRuntime
from launch.errors import ConfigError
from launch.plan import code_copy as snapshot
from launch.plan.budget import Use, use_of
from launch.slurm.limits import OWN_WISH, gres

# Containers: the words by which srun starts the agent of each node inside an image (``cluster.container``).


MAIL_TYPE = "BEGIN,END,FAIL,REQUEUE"
"""Events of a job that send mail, as sbatch --mail-type takes them."""
SLURM_PATHS = ("/etc/slurm", "/run/munge")
"""Paths of the node that Slurm's client in the image needs: agents ask the controller about their job."""


def refuse_local_container(config: Config) -> None:
    """Raise ConfigError if the agents of this machine would run without the container that is requested."""
    if config.cluster.container is not None:
        raise ConfigError(
            f"cluster.container={config.cluster.container} with agents on this machine (cluster=local)",
            "a Slurm cluster, whose srun starts the container on each node",
            "cluster=slurm; or the whole command in the container: apptainer exec IMAGE python -m launch ...",
        )


def mounts(cluster: ClusterConfig, workdir: Path, run_dir: Path) -> list[str]:
    """Mounts as ``SOURCE:TARGET`` with options behind: those that were requested, and what every run needs.

    Working directory and the folder of the run, with the files of its jobs beside it, have their own paths inside.
    """
    asked = [entry if ":" in entry else f"{entry}:{entry}" for entry in cluster.container_mounts]
    targets = {entry.split(":")[1] for entry in asked}
    own = [str(workdir), str(run_dir.parent), *(path for path in SLURM_PATHS if Path(path).exists())]
    return [*asked, *(f"{path}:{path}" for path in dict.fromkeys(own) if path not in targets)]


def srun_arguments(cluster: ClusterConfig, workdir: Path, run_dir: Path) -> list[str]:
    """Options of srun for pyxis; none for Apptainer, nor without a container."""
    if cluster.container is None or cluster.container_runtime is not ContainerRuntime.pyxis:
        return []
    return [
        f"--container-image={cluster.container}",
        f"--container-mounts={','.join(mounts(cluster, workdir, run_dir))}",
        f"--container-workdir={workdir}",
    ]


def python_words(cluster: ClusterConfig, workdir: Path, run_dir: Path) -> list[str] | None:
    """Words that start the Python of the agent where that is the image's; None without a container."""
    if cluster.container is None:
        return None
    if cluster.container_runtime is ContainerRuntime.pyxis:
        return [cluster.container_python]
    binds = [word for entry in mounts(cluster, workdir, run_dir) for word in ("--bind", entry)]
    gpus = [] if cluster.gpus_per_node == 0 else ["--nv"]  # where a node has none, it says so and continues
    return ["apptainer", "exec", *gpus, "--pwd", str(workdir), *binds, cluster.container, cluster.container_python]


def agent_words(cluster: ClusterConfig, workdir: Path, run_dir: Path) -> list[str]:
    """Words behind ``srun`` that start the agents of a run from a batch script."""
    python = python_words(cluster, workdir, run_dir) or ["python"]
    return [*srun_arguments(cluster, workdir, run_dir), *python, "-m", "gpt_launch", "agent", str(run_dir)]


# Keys of ``cluster`` that a command leaves open, and that are settled for its points on Slurm.


def settle_key(
    key: str,
    choose: Callable[[Config], tuple[Any, str]],
    documents: Sequence[DictConfig],
    configs: Sequence[Config],
    kinds: Sequence[ClusterKind],
) -> list[str]:
    """Set a key of ``cluster`` in each point on Slurm.

    Args:
        key: its name in ``cluster``.
        choose: returns the value for a config, None to leave it, and what is to be said of that, if anything.
        documents: the composed config of each point, which its run folder will hold.
        configs: the same, typed; both are changed.
        kinds: the cluster of each point, settled.

    Returns:
        What was decided and by what, for people; each line once.
    """
    told: list[str] = []
    for document, config, kind in zip(documents, configs, kinds, strict=True):
        if kind is not ClusterKind.slurm:
            continue
        value, text = choose(config)
        if value is not None:
            setattr(config.cluster, key, value)
            OmegaConf.update(document, f"cluster.{key}", value)
        told += [text] if text else []
    return list(dict.fromkeys(told))


# Placement of a point: its candidates in their order, and when a job that waits moves on.


OF_A_MOVE = ("moved", "stayed", "gave_up", "refused", "cancelled")
"""Events that a point's event log may gain while it waits."""


def cluster_of(slurm: Mapping[str, Any]) -> str | None:
    """The other cluster that resources for submitit are asked of; None if it is the local one."""
    name: str | None = slurm.get("additional_parameters", {}).get("clusters")
    return name


@dataclass(frozen=True)
class Candidate:
    """One place, and what is requested from Slurm there."""

    name: str
    """Name of the candidate, as the user typed it; empty if there is no list."""
    slurm: dict[str, Any]
    """The resources, as parameters of submitit's Slurm executor."""
    gpus: int | None = None
    """GPUs of the whole allocation there, where that is known."""
    price_per_gpu_hour: float | None = None
    never: str = ""
    """Reason for which the point could never run there; empty where it could."""

    def as_event(self) -> dict[str, Any]:
        """Fields of a ``submitted`` event for this place; what is not known is absent."""
        known = {
            "placement": self.name or None,
            "slurm_cluster": cluster_of(self.slurm),
            "partition": self.slurm.get("partition"),
            "gpus": self.gpus,
            "price_per_gpu_hour": self.price_per_gpu_hour,
        }
        return {key: value for key, value in known.items() if value is not None}


@dataclass(frozen=True)
class Placement:
    """The candidates of a point in their order, and its patience."""

    candidates: tuple[Candidate, ...]
    retry_interval_min: float
    give_up_after_min: float | None = None

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> Placement:
        """Read back what ``plan.json`` holds."""
        return cls(**{**known, "candidates": tuple(Candidate(**one) for one in known["candidates"])})

    @property
    def possible(self) -> list[int]:
        """Indices of the candidates where the point could run."""
        return [index for index, candidate in enumerate(self.candidates) if not candidate.never]

    @property
    def is_watched(self) -> bool:
        """Return whether a point that waits needs somebody to move it, or to give up."""
        return len(self.possible) > 1 or self.give_up_after_min is not None

    def exclude_hosts(self, hosts: Sequence[str]) -> Placement:
        """Return this placement, kept away from hosts that failed in this run."""
        changed = []
        for one in self.candidates:
            excluded = ",".join(names for names in (one.slurm.get("exclude"), *hosts) if names)
            changed.append(replace(one, slurm={**one.slurm, "exclude": excluded}))
        return replace(self, candidates=tuple(changed))

    def rule_out(self, index: int, why: str) -> Placement:
        """Return this placement with one candidate marked as impossible."""
        changed = [replace(c, never=why) if i == index else c for i, c in enumerate(self.candidates)]
        return replace(self, candidates=tuple(changed))


@dataclass(frozen=True)
class Step:
    """Decision about a point that waits: stay (both None), move to a candidate, or give up."""

    move_to: int | None = None
    give_up: bool = False


def decide(placement: Placement, at: int, here_s: float, all_s: float) -> Step:
    """Decide about a point that waits at candidate ``at``.

    Args:
        placement: what was promised.
        at: index of the candidate it waits in.
        here_s: seconds it has waited there.
        all_s: seconds it has waited since it last ran, or was first submitted.
    """
    if placement.give_up_after_min is not None and all_s >= 60 * placement.give_up_after_min:
        return Step(give_up=True)
    if here_s >= 60 * placement.retry_interval_min:
        return Step(move_to=next_candidate(placement, at))
    return Step()


def next_candidate(placement: Placement, at: int) -> int | None:
    """The next possible candidate after ``at``, from the first again after the last; None if there is no other."""
    others = [index for index in placement.possible if index != at]
    return next((index for index in others if index > at), min(others, default=None))


def waiting_since(events: Sequence[Mapping[str, Any]], since_here: float) -> float:
    """Time when a point began to wait, over all places, in Unix seconds.

    Args:
        events: the event log since a person last requested the run.
        since_here: when it began to wait where it is.
    """
    last = max((i for i, e in enumerate(events) if e["event"] == "submitted"), default=0)
    ran = any(e["event"] not in OF_A_MOVE for e in events[last + 1 :])  # and was put back into the queue
    moves = [e for e in events[:last] if e["event"] == "moved"]
    return since_here if ran or not moves or not events[last].get("moved") else float(moves[-1]["waiting_since"])


def waits_for_room(reason: str) -> bool:
    """Return whether a pending job with this reason waits for what another place might have."""
    return reason not in OWN_WISH


def configs(config: Config) -> list[tuple[str, Config]]:
    """The config that holds at each candidate, and its name; the config itself if there is no list."""
    if not config.cluster.placement:
        return [("", config)]
    return [(name_of(candidate), config_at(config, candidate)) for candidate in config.cluster.placement]


def config_at(config: Config, candidate: PlacementConfig) -> Config:
    """The config with what the candidate says in place of what ``cluster`` says."""
    said = {key: value for key, value in asdict(candidate).items() if value is not None}
    if "gpus_per_node" not in said and any(part.name == "gpu" for part in gres(candidate.gres or "")):
        said["gpus_per_node"] = None  # the gres says it: sbatch takes one of the two
    # The number of ranks is the run's, whatever a place has.
    return replace(config, ranks_per_node=config.ranks_on_node, cluster=replace(config.cluster, **said, placement=[]))


def name_of(candidate: PlacementConfig) -> str:
    """The candidate as it was typed, without its price."""
    said = {key: value for key, value in asdict(candidate).items() if value is not None and key != "price_per_gpu_hour"}
    return " ".join(f"{key}={value}" for key, value in said.items()) or "as cluster says"


def gpus_of(config: Config) -> int | None:
    """GPUs of the whole allocation at a place, spares included; None where nothing says how many a node has."""
    named = [part.count for part in gres(config.cluster.gres or "") if part.name == "gpu"]
    each = config.cluster.gpus_per_node or sum(named)
    return config.nodes_asked * each if each else None


def minutes(seconds: float) -> str:
    """A wait for people."""
    return f"{round(seconds / 60, 1):g} min"


def text(placement: Placement) -> list[str]:
    """The candidates as a person reads them, a line each; nothing if there is but one, and no end to its wait."""
    lines = []
    for number, candidate in enumerate(placement.candidates, start=1):
        head = "  placement  " if number == 1 else " " * 13
        price = candidate.price_per_gpu_hour
        costs = "" if price is None else f", {price:g} per GPU-hour"
        never = f": skipped, {candidate.never}" if candidate.never else ""
        lines.append(f"{head} {number}. {candidate.name or 'as cluster says'}{costs}{never}")
    rules = []
    if len(placement.possible) > 1:
        rules.append(f"to the next after {placement.retry_interval_min:g} min in the queue, round and round")
    if placement.give_up_after_min is not None:
        rules.append(f"given up after {placement.give_up_after_min:g} min in the queue")
    named = any(candidate.name for candidate in placement.candidates)
    return [*(lines if named else []), *([f"  {'waiting':<11} {'; '.join(rules)}"] if rules else [])]


def place(config: Config, run_dir: Path, code: Path | None = None, resumes: bool = True) -> Placement:
    """The candidates of ``cluster.placement``, each with what is asked there; without a list the cluster itself.

    ``code`` is the copy of the code that the job runs from, if it runs from one. A run that does not resume must not be
    put back into the queue.
    """
    candidates = [
        Candidate(
            name,
            slurm_resources(there, run_dir, code, resumes),
            gpus_of(there),
            there.cluster.price_per_gpu_hour,
        )
        for name, there in configs(config)
    ]
    cluster = config.cluster
    return Placement(tuple(candidates), cluster.retry_interval_min, cluster.give_up_after_min)


def slurm_resources(config: Config, run_dir: Path, code: Path | None, resumes: bool = True) -> dict[str, Any]:
    """Resources requested from Slurm for this point, as parameters of submitit. One task a node: the agent.

    ``python`` is the command line of the agent's Python where that is not the one which submits.
    """
    cluster = config.cluster
    python = python_words(cluster, Path.cwd(), run_dir)
    # Since Slurm 22.05 srun does not take --cpus-per-task over from sbatch, and the agent could be left with one CPU.
    srun_args = [f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []
    # A node that is lost must not take the others, which go on without it or with the spare that replaces it.
    survives = bool(config.spare_nodes) or config.may_shrink
    srun_args += ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"] if survives else []
    srun_args += [*srun_arguments(cluster, Path.cwd(), run_dir), *cluster.srun_args]
    asked: dict[str, Any] = {
        "job_name": config.name,
        "nodes": config.nodes_asked,
        "ntasks_per_node": 1,
        "time": cluster.timeout_min,
        "signal_delay_s": cluster.signal_delay_s,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "exclusive": cluster.exclusive or None,
        "gres": cluster.gres,
        "gpus_per_node": cluster.gpus_per_node or None,  # 0 is a word to the launcher: ask for none
        "cpus_per_task": cluster.cpus_per_task,
        "mem": f"{round(cluster.mem_gb * 1024)}MB" if cluster.mem_gb else None,
        "comment": cluster.comment,
        "array_parallelism": cluster.array_parallelism,
        "setup": [*cluster.setup, *(snapshot.shell_lines(code) if code else [])] or None,
        "srun_args": srun_args or None,
        "python": None if python is None else shlex.join(python),
        "additional_parameters": {
            "requeue" if config.resilience.requeue and resumes else "no_requeue": True,
            **({"no_kill": True} if survives else {}),
            **({"clusters": cluster.cluster} if cluster.cluster else {}),
            **({"mail_user": cluster.mail_user, "mail_type": MAIL_TYPE} if cluster.mail_user else {}),
            **cluster.additional_parameters,
        },
    }
    refuse_line_breaks(asked)
    return {key: value for key, value in asked.items() if value is not None}


def refuse_line_breaks(asked: Mapping[str, Any]) -> None:
    """Raise ConfigError if a value would not stay on its ``#SBATCH`` line: what follows would run as shell."""
    for key, value in {**asked, **asked["additional_parameters"]}.items():
        if isinstance(value, str) and ("\n" in value or "\r" in value):
            raise ConfigError(
                f"cluster.{key}={value!r}",
                "one line: it is a line of the batch script",
                f"cluster.{key}={shlex.quote(' '.join(value.split()))}",
            )


def worst_case(placed: Placement, nodes: int, timeout_min: int) -> Use:
    """Worst case of one start of the job: all nodes, to the time limit, where that is most."""
    hours = timeout_min / 60
    uses = [use_of(hours, nodes, c.gpus, c.price_per_gpu_hour) for c in placed.candidates if not c.never]
    gpu_hours = [use.gpu_hours for use in uses if use.gpu_hours is not None]
    costs = [use.cost for use in uses if use.gpu_hours is not None]
    known = [cost for cost in costs if cost is not None]
    return Use(hours * nodes, max(gpu_hours, default=None), max(known) if known and len(known) == len(costs) else None)
