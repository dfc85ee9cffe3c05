"""Placement of a job: the places where it may run, and the resources to request from Slurm at each of them.

The places are tried one after another. The resources include the job's container and its copy of the code.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from launch.config import ClusterConfig, Config
from launch.config.cluster import AgentStart, ContainerRuntime
from launch.errors import ConfigError
from launch.plan.budget import Use, use_of
from launch.runs.environment import ORIGIN, ROOT, code_state, describe_code
from launch.runs.folder import write_json, writing_into
from launch.slurm.limits import gres
from launch.workload import CodeTree

# Candidates of a point, and when a pending job moves to the next one.


OF_A_MOVE = ("moved", "stayed", "gave_up", "refused", "cancelled")
"""Names of the events that are recorded while a point is pending.

In this order: the point moves to another candidate; it stays, because it has started; it is given up; sbatch refuses
it; it is cancelled.
"""


@dataclass(frozen=True)
class Candidate:
    """One place where a point may run (a partition, for example), and the resources to request there."""

    name: str
    """Name of the candidate as the user typed it; empty if cluster.placement lists none."""
    slurm: dict[str, Any]
    """Resources, as parameters of submitit's Slurm executor."""
    gpus: int | None = None
    """GPUs of the whole allocation, spares included; None if not known."""
    price_per_gpu_hour: float | None = None
    never: str = ""
    """Reason why the point can never run there; empty if it can."""


@dataclass(frozen=True)
class Placement:
    """Candidates of a point in order. A pending point moves to the next one after ``retry_interval_min`` minutes.

    The point is given up after ``give_up_after_min`` minutes in all; None means never.
    """

    candidates: tuple[Candidate, ...]
    retry_interval_min: float
    give_up_after_min: float | None = None

    @property
    def possible(self) -> list[int]:
        """Indices of the candidates at which the point can run."""
        return [index for index, candidate in enumerate(self.candidates) if not candidate.never]

    @property
    def is_watched(self) -> bool:
        """True if a process has to watch the pending job: to move it to another candidate, or to give it up."""
        return len(self.possible) > 1 or self.give_up_after_min is not None

    def exclude_hosts(self, hosts: Sequence[str]) -> Placement:
        """Return this placement with ``hosts`` excluded at every candidate."""
        return self.change_slurm(lambda slurm: {"exclude": ",".join(filter(None, (slurm.get("exclude"), *hosts)))})

    def change_slurm(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Placement:
        """Return this placement with changed Slurm resources.

        ``change`` receives the resources of a candidate, and returns those that are added or replaced.
        """
        changed = (replace(one, slurm=one.slurm | change(one.slurm)) for one in self.candidates)
        return replace(self, candidates=tuple(changed))

    def rule_out(self, index: int, why: str) -> Placement:
        """Return this placement with candidate ``index`` marked as impossible. ``why`` is the reason."""
        changed = [replace(one, never=why) if i == index else one for i, one in enumerate(self.candidates)]
        return replace(self, candidates=tuple(changed))


def decide(placement: Placement, at: int, here_s: float, all_s: float) -> tuple[bool, int | None]:
    """Return whether a pending point leaves candidate ``at``, and the index of the next candidate.

    (True, None) means that the point is given up, (False, None) that it stays where it is.

    Args:
        placement: placement of the plan.
        at: index of the present candidate.
        here_s: seconds that the point has been pending at this candidate.
        all_s: seconds since the point last ran, or was first submitted.
    """
    if placement.give_up_after_min is not None and all_s >= 60 * placement.give_up_after_min:
        return True, None
    to = next_candidate(placement, at) if here_s >= 60 * placement.retry_interval_min else None
    return to is not None, to


def next_candidate(placement: Placement, at: int) -> int | None:
    """Return the index of the next candidate after index ``at`` at which the point can run.

    After the last candidate comes the first. None if the point can run at no candidate other than ``at``.
    """
    others = [index for index in placement.possible if index != at]
    return next((index for index in others if index > at), min(others, default=None))


def waiting_since(events: Sequence[Mapping[str, Any]], since_here: float) -> float:
    """Return the Unix time since which a point has been pending, over all candidates.

    If the point was moved, and its job has not run since then, return the time when the point became pending at its
    first candidate. In all other cases, return ``since_here``.

    Args:
        events: events of the run since the command was typed.
        since_here: Unix time when the point became pending at its present candidate.
    """
    last = max((i for i, e in enumerate(events) if e["event"] == "submitted"), default=0)
    ran = any(e["event"] not in OF_A_MOVE for e in events[last + 1 :])  # The job ran and was requeued.
    moves = [e for e in events[:last] if e["event"] == "moved"]
    return since_here if ran or not moves or not events[last].get("moved") else float(moves[-1]["waiting_since"])


def placement_lines(placement: Placement) -> list[str]:
    """Return lines of text on the candidates and their times, for people; empty if no line is needed.

    No line is needed for a single candidate without a name and without a time after which the point is given up.
    """
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


# Candidates and resources from the config.


def configs(config: Config) -> list[tuple[str, Config]]:
    """Return (name, config) of each candidate of ``cluster.placement``.

    If this list is empty, the only candidate has an empty name, and its config is ``config``.
    """
    found = []
    for candidate in config.cluster.placement:
        said = {key: value for key, value in asdict(candidate).items() if value is not None}
        name = " ".join(f"{key}={value}" for key, value in said.items() if key != "price_per_gpu_hour")
        if "gpus_per_node" not in said and any(part.name == "gpu" for part in gres(candidate.gres or "")):
            said["gpus_per_node"] = None  # sbatch takes GPUs from gres or from gpus-per-node, not from both
        cluster = replace(config.cluster, **said, placement=[])
        # The number of ranks is the same at each candidate.
        found.append((name or "as cluster says", replace(config, ranks_per_node=config.ranks_on_node, cluster=cluster)))
    return found or [("", config)]


def place_point(config: Config, run_dir: Path, code: Path | None = None, resumes: bool = True) -> Placement:
    """Return the candidates of a point with their resources.

    Args:
        config: config of the point.
        run_dir: run folder of the point.
        code: copy of the code from which the job runs; None for the checkout.
        resumes: True if the job may be requeued.
    """
    candidates = []
    for name, there in configs(config):
        in_gres = sum(part.count for part in gres(there.cluster.gres or "") if part.name == "gpu")
        gpus = config.nodes_asked * (there.cluster.gpus_per_node or in_gres) or None
        resources = slurm_resources(there, run_dir, code, resumes)
        candidates.append(Candidate(name, resources, gpus, there.cluster.price_per_gpu_hour))
    return Placement(tuple(candidates), config.cluster.retry_interval_min, config.cluster.give_up_after_min)


def worst_case(placed: Placement, nodes: int, timeout_min: int, spare_jobs: int = 0) -> Use:
    """Return the use of one start of the job at the most expensive candidate: all nodes, until the time limit.

    Args:
        placed: placement of the point.
        nodes: number of nodes of the job.
        timeout_min: time limit in minutes.
        spare_jobs: largest number of spare jobs, whose nodes are included.
    """
    hours = timeout_min / 60
    uses = [use_of(hours, nodes, c.gpus, c.price_per_gpu_hour) for c in placed.candidates if not c.never and c.gpus]
    costs = [use.cost for use in uses if use.cost is not None]
    return Use(
        hours * nodes,
        max((use.gpu_hours or 0.0 for use in uses), default=None),
        max(costs) if costs and len(costs) == len(uses) else None,
    ).scaled(1 + spare_jobs / nodes)


def slurm_resources(config: Config, run_dir: Path, code: Path | None, resumes: bool = True) -> dict[str, Any]:
    """Return the resources of a point as submitit's parameters. Each node has one task, the agent.

    The parameter ``python`` is the command line of the agent's Python, if it differs from the Python that submits.

    Args:
        config: config of the point.
        run_dir: run folder of the point.
        code: copy of the code from which the job runs; None for the checkout.
        resumes: True if the job may be requeued.

    Raises:
        ConfigError: a value for the batch script has several lines.
    """
    cluster = config.cluster
    options, python = container_words(cluster, Path.cwd(), run_dir)
    # Since Slurm 22.05 srun does not inherit --cpus-per-task of sbatch: the agent would have one CPU.
    srun_args = [f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []
    # The loss of one node must not end the other nodes, which continue without that node or with a spare.
    survives = bool(config.spare_nodes) or config.may_shrink
    srun_args += ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"] if survives else []
    srun_args += [*options, *cluster.srun_args]
    setup = [*cluster.setup]
    if code is not None:  # the batch script runs the code in the copy; the old PYTHONPATH follows
        after = {"PYTHONPATH": "${PYTHONPATH:+:$PYTHONPATH}"}
        for name, value in _variables(code).items():
            setup.append(f"export {name}={shlex.quote(value)}{after.get(name, '')}")
    asked: dict[str, Any] = {
        "job_name": config.name,
        "nodes": config.nodes_asked,
        "ntasks_per_node": 1,
        "time": cluster.timeout_min,
        "signal_delay_s": config.signal_delay_s,
        **{key: getattr(cluster, key) for key in AS_IN_CLUSTER},
        "exclusive": cluster.exclusive or None,
        "gpus_per_node": cluster.gpus_per_node or None,  # 0 requests no GPUs
        "mem": f"{round(cluster.mem_gb * 1024)}MB" if cluster.mem_gb else None,
        "setup": setup or None,
        "srun_args": srun_args or None,
        "python": None if python is None else shlex.join(python),
        "additional_parameters": {
            "requeue" if config.resilience.requeue is True and resumes else "no_requeue": True,
            **({"no_kill": True} if survives else {}),
            **cluster.additional_parameters,
        },
    }
    if not cluster.by_srun:
        starter = ["launch_agents", sys.executable, "-m", "gpt_launch", "launch.agent.hosts"]
        asked["python"] = shlex.join([*starter, *(python or [sys.executable])])
        # Slurm does not bind what ssh starts to the CPUs and GPUs of the job.
        whole = cluster.start is AgentStart.ssh if cluster.exclusive is None else cluster.exclusive
        asked |= {"use_srun": False, "exclusive": whole or None, "setup": [*setup, LAUNCH_AGENTS]}
        asked["additional_parameters"].setdefault("signal", f"B:USR2@{config.signal_delay_s}")
    for key, value in {**asked, **asked["additional_parameters"]}.items():
        # Without the quotes, the shell would execute the rest.
        if isinstance(value, str) and ("\n" in value or "\r" in value):
            raise ConfigError(
                f"cluster.{key}={value!r}",
                "one line: it is a line of the batch script",
                f"cluster.{key}={shlex.quote(' '.join(value.split()))}",
            )
    return {key: value for key, value in asked.items() if value is not None}


LAUNCH_AGENTS = (
    """launch_agents() { "$@" & launch_pid=$!; trap 'kill -s TERM $launch_pid' TERM URG; """
    """trap 'kill -s USR2 $launch_pid' USR2; while wait $launch_pid; kill -s 0 $launch_pid 2>/dev/null; do :; done; """
    """wait $launch_pid; }"""
)
"""Line of batch scripts without srun: a shell function that runs a command, and sends Slurm's signals to this command.

Slurm sends TERM and USR2, and ``launch.cancel`` sends URG, which a shell without such a trap ignores. A signal ends
``wait``, which is then repeated. Its last call returns the exit status of the command.
"""


AS_IN_CLUSTER = (
    *("partition", "account", "qos", "constraint", "exclude", "gres", "cpus_per_task"),
    "array_parallelism",
)
"""Parameters of submitit that have the name and the value of a key of ``cluster``."""


# Container: the words by which srun starts the agent of each node inside an image (``cluster.container``).


SLURM_PATHS = ("/etc/slurm", "/run/munge")
"""Paths of the node that Slurm's client needs inside the image, because agents query the controller about their job."""


def container_words(cluster: ClusterConfig, workdir: Path, run_dir: Path) -> tuple[list[str], list[str] | None]:
    """Return srun's options for the container, and the words of the command that starts the agent's Python.

    Without a container, there are no options, and the command is ``cluster.python``. If ``cluster.python`` is not set
    either, the command is None, and the agents use the Python of the process that submits. In a container, the working
    directory ``workdir`` and the parent folder of ``run_dir`` have the same paths as outside.
    """
    if cluster.container is None:
        return [], None if cluster.python is None else [cluster.python]
    asked = [entry if ":" in entry else f"{entry}:{entry}" for entry in cluster.container_mounts]
    targets = {entry.split(":")[1] for entry in asked}
    own = [str(workdir), str(run_dir.parent), *(path for path in SLURM_PATHS if Path(path).exists())]
    mounts = [*asked, *(f"{path}:{path}" for path in dict.fromkeys(own) if path not in targets)]
    python = cluster.python or "python3"
    if cluster.container_runtime is ContainerRuntime.pyxis:
        options = {"image": cluster.container, "mounts": ",".join(mounts), "workdir": workdir}
        return [f"--container-{name}={value}" for name, value in options.items()], [python]
    binds = [word for mount in mounts for word in ("--bind", mount)]
    gpus = [] if cluster.gpus_per_node == 0 else ["--nv"]  # On a node without GPUs, --nv only prints a warning.
    words = ["apptainer", "exec", *gpus, "--pwd", str(workdir), *binds, cluster.container, python]
    return [], words


def agent_words(cluster: ClusterConfig, workdir: Path, run_dir: Path, python: str = "python") -> list[str]:
    """Return the arguments of ``srun`` that start the agents of a run.

    Args:
        cluster: keys under ``cluster``.
        workdir: working directory of the agents.
        run_dir: run folder.
        python: command of the agents' Python; not used if ``cluster`` sets a container or a Python.
    """
    options, inside = container_words(cluster, workdir, run_dir)
    return [*options, *(inside or [python]), "-m", "gpt_launch", "agent", str(run_dir)]


# Copy of the code that a job runs from, however the checkout changes while the job is pending. The copies are in
# ``<output_dir>/<name>/.code/<digest>/``: one for each state of the code, shared by all jobs that run it.


RUNS_FROM = "LAUNCH_CODE"
"""Environment variable of a job with the path of its copy of the code. The job must not run other code."""


@cache
def code_of(tree: CodeTree) -> dict[str, Any]:
    """Return the dictionary of ``describe_code`` for a code tree: folder, digest of all files, digest of each file.

    The digests are computed once for each tree, so points of one command share them.
    """
    return describe_code(tree.root, tree.files)


def copy_path(run_dir: Path, tree: CodeTree) -> Path:
    """Return the path of the copy of the code for a run. The copy need not exist yet.

    Raises:
        ConfigError: the path contains the character that separates folders in PYTHONPATH.
    """
    if os.pathsep in str(run_dir.parent):
        raise ConfigError(
            f"copy_code=true and {run_dir.parent}, with a {os.pathsep} in it",
            f"a path that PYTHONPATH can hold, where {os.pathsep} separates two folders",
            f"output_dir=FOLDER without {os.pathsep}, or copy_code=false",
        )
    return run_dir.parent / ".code" / str(code_of(tree)["sha256"])[:16]


def copy_code(target: Path, tree: CodeTree) -> None:
    """Copy the files of a code tree to ``target``. Does nothing if the copy exists.

    Raises:
        ConfigError: a file changed meanwhile, or the copy cannot be written.
    """
    if target.is_dir():
        return
    with writing_into(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.parent / f".new-{secrets.token_hex(8)}"
        scratch.mkdir()
    try:
        for name, path in tree.files(tree.root):
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, scratch / name)
        # Written before the digests: in a folder with this file, all files count, not only those that git tracks.
        write_json(scratch / ORIGIN, {"root": str(tree.root), "git": code_state(tree.root)})
        if describe_code(scratch, tree.files)["sha256"] != code_of(tree)["sha256"]:
            changed = f"a file under {tree.root} that changed while it was copied"
            raise ConfigError(changed, "code that does not change during the command", "the command again")
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _variables(copy: Path) -> dict[str, str]:
    # PYTHONSAFEPATH: else python -m searches the current folder, which is the checkout, before PYTHONPATH.
    return {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1", RUNS_FROM: str(copy)}


@contextmanager
def running_from(copy: Path | None) -> Iterator[None]:
    """Make processes that start during a ``with`` block run the code in ``copy``; None changes nothing."""
    changed, before = {} if copy is None else _variables(copy), dict(os.environ)
    os.environ.update(changed)
    if changed and before.get("PYTHONPATH"):
        os.environ["PYTHONPATH"] += f"{os.pathsep}{before['PYTHONPATH']}"
    try:
        yield
    finally:
        for name in changed:
            os.environ.pop(name)
        os.environ.update(before)


def refuse_other_code() -> None:
    """Raise ConfigError if this process does not run from the copy that its job requires."""
    copy = os.environ.get(RUNS_FROM)
    if copy and Path(copy) != ROOT:
        raise ConfigError(
            f"code from {ROOT} in a job that runs from {copy}",
            "the copy that copy_code=true made at submission",
            "the same command again, which makes a new one",
        )
