"""Settings and record of a sandbox, and how its programs run on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

from launch.errors import CommandFailedError, ConfigError


class SandboxError(CommandFailedError):
    """Raised if a program or daemon of this machine failed. The message ends with its output."""


def search_path() -> str:
    """Return the user's PATH with the folders of system programs, which Debian leaves out of an ordinary PATH."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def run_program(
    command: Sequence[str], *, timeout_s: float = 30.0, env: Mapping[str, str] | None = None, stdin: str | None = None
) -> str:
    """Run a program until it ends, and return its output.

    Args:
        command: the program and its arguments.
        timeout_s: longest time in seconds that the program may take.
        env: complete environment of the program; None for that of this process, with ``search_path()`` as PATH.
        stdin: text for the standard input of the program; None inherits that of this process.

    Raises:
        SandboxError: the program is missing, takes too long, or ends with another status than 0.
    """
    env = dict(os.environ, PATH=search_path()) if env is None else dict(env)
    try:
        done = subprocess.run(
            [*command], capture_output=True, text=True, timeout=timeout_s, env=env, input=stdin, check=True
        )
    except subprocess.CalledProcessError as error:
        output = (error.stderr or error.stdout).strip() or "no output"
        raise SandboxError(f"`{' '.join(command)}` ended with status {error.returncode}: {output}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(str(error)) from error
    return done.stdout


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str | Callable[[], str]) -> None:
    """Poll until ``condition`` returns True.

    Raises SandboxError after ``timeout_s`` seconds. ``what`` names the condition in the message: a text, or a function
    that returns the text.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SandboxError(f"waited {timeout_s:g} s in vain for {what if isinstance(what, str) else what()}")
        time.sleep(0.02)


# Requirements of the machine, checked before anything is started: Debian package -> programs.
PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurm-client": "sbatch srun sinfo squeue scontrol scancel",
    "munge": "munged",
    "util-linux": "setsid unshare nsenter",
    "mount": "mount",
    "hostname": "hostname",
    "iproute2": "ip tc",
}
WITH_LOSS = {"nftables": "nft"}


def missing_packages(needs: Mapping[str, str]) -> list[str]:
    """Return the Debian packages, ascending, of which a program is missing. ``needs`` is package -> its programs."""
    path = search_path()
    return sorted(
        package for package, programs in needs.items() if not all(shutil.which(p, path=path) for p in programs.split())
    )


def require_packages(needs: Mapping[str, str]) -> None:
    """Raise ConfigError if a Debian package of ``needs`` is not installed.

    The error has the command that installs it.
    """
    if packages := missing_packages(needs):
        raise ConfigError(
            found=f"this machine lacks Debian's {', '.join(packages)}",
            expected="Slurm, MUNGE and the programs that build the nodes",
            fix=f"apt-get install --no-install-recommends {' '.join(packages)}",
        )


def why_no_namespaces(probe_interface: str) -> str:
    """Return the kernel's reason why nodes cannot have namespaces of their own; "" if they can.

    The function tries what the nodes need: a process with new namespaces and with mounts in them, and a bridge in the
    network namespace of this process. The bridge has the name ``probe_interface``, and is removed again.
    """
    mounts = "mount -t tmpfs tmpfs /dev/shm && mount -t sysfs sysfs /sys && ip link set lo up"
    unshare = "unshare --net --uts --mount --ipc --pid --fork --mount-proc sh -c"
    try:
        run_program([*unshare.split(), mounts])
        run_program(["ip", "link", "add", probe_interface, "type", "bridge"])
        run_program(["ip", "link", "del", probe_interface])
    except SandboxError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Process:
    """A recorded process: its id, and its start in Unix time. A later process with the same id has another start."""

    pid: int
    started: float

    def find(self) -> psutil.Process | None:
        """Return the process while it runs; None if it has ended, even if its parent has not read the exit status."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid)
            # The kernel has the start of this machine in whole seconds, and counts process starts from it.
            if abs(found.create_time() - self.started) < 2.0 and found.status() != psutil.STATUS_ZOMBIE:
                return found
        return None


def end(process: psutil.Process | None, *, grace_s: float = 0.0) -> None:
    """End a process with SIGTERM, and with SIGKILL after ``grace_s`` seconds; with 0, only with SIGKILL.

    Does nothing for None.

    Raises:
        SandboxError: the process does not end.
    """
    if process is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        if grace_s:
            process.terminate()
            psutil.wait_procs([process], timeout=grace_s)
        process.kill()
        if psutil.wait_procs([process], timeout=20.0)[1]:
            raise SandboxError(f"process {process.pid} has not ended 20 s after SIGKILL")


# The program runs only after its process id was recorded. If the caller dies before, the pipe closes, and `read` fails.
# The shell prints its id as seen in its mount of /proc; exec keeps id and start time. The id comes last, with the log
# open: a caller may read the log at once.
WAIT_FOR_GO = """
read -r pid _ < /proc/self/stat
exec 3>&1 >> "$1" 2>&1; shift
echo "$pid" >&3; exec 3>&-
read -r go && [ "$go" = go ] && exec "$@" < /dev/null
"""

# A Unix socket's path can have 107 bytes, and slurmd appends `spool/n200_4294967295.4294967295` to the directory.
MAX_DIRECTORY_LENGTH = 70
RECORD = "sandbox.json"
MAX_NODES = 200


def _option(default: Any, help: str, metavar: str = "N") -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": help})


@dataclass(frozen=True)
class Settings:
    """Settings of a sandbox: number and size of its nodes, and its Slurm configuration.

        Settings(nodes=2, gpus_per_node=0, slurm_conf=("KillWait=20",))

    Attributes:
        nodes: number of nodes, called n1, n2, ...
        cpus_per_node: CPUs of each node. Slurm checks requests against these sizes, whatever the machine has.
        gpus_per_node: fake GPUs (links to /dev/null) on each node.
        memory_gib_per_node: memory of each node in GiB.
        partitions: one text for each, ``NAME`` or ``NAME:KEY=VALUE,...`` with keys of slurm.conf; the first is the
            default, and each preempts those before it.
        slurm_conf: ``KEY=VALUE`` lines for slurm.conf. A line replaces the sandbox's own line with the same key.
    """

    nodes: int = _option(4, "number of nodes")
    cpus_per_node: int = _option(8, "CPUs that Slurm gives to jobs on each, whatever the machine has")
    gpus_per_node: int = _option(2, "fake GPUs on each")
    memory_gib_per_node: int = _option(256, "memory that Slurm checks --mem against, whatever it has")
    partitions: tuple[str, ...] = _option(
        ("low", "high"),
        "in the words of slurm.conf; the first is the default, later ones preempt earlier ones",
        "NAME[:KEY=VALUE,...]",
    )
    slurm_conf: tuple[str, ...] = ()


def check_settings(settings: Settings, directory: Path) -> None:
    """Raise ConfigError if a setting is malformed, or if the path of the sandbox's folder is too long."""
    if not 1 <= settings.nodes <= MAX_NODES:
        raise ConfigError(f"--nodes {settings.nodes}", f"1 to {MAX_NODES}", "--nodes 4")
    name, option = r"[A-Za-z][\w-]*", r"\w+=[^\s,=]+"
    texts = [
        ("--set", r"[A-Za-z]+=[^\n]+", settings.slurm_conf, "KillWait=5"),
        ("--partitions", rf"{name}(:{option}(,{option})*)?", settings.partitions or ("",), "low:GraceTime=10 high"),
    ]
    for flag, pattern, values, example in texts:
        for value in values:
            if not re.fullmatch(pattern, value):
                raise ConfigError(f"{flag} {value!r}", f"text such as in {flag} {example}", f"{flag} {example}")
    names = [text.partition(":")[0] for text in settings.partitions]
    if len({*names}) < len(names):
        raise ConfigError(f"--partitions {' '.join(names)}", "each name once", "--partitions low high")
    length = len(os.fsencode(directory))
    if length > MAX_DIRECTORY_LENGTH:
        expected = f"at most {MAX_DIRECTORY_LENGTH} bytes, because it holds Unix sockets"
        raise ConfigError(f"--dir {directory} ({length} bytes)", expected, "--dir /tmp/slurm-sandbox")


def default_directory() -> Path:
    """Return the default folder of a sandbox, in $XDG_STATE_HOME or else ~/.local/state."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "slurm-sandbox"


@dataclass
class SandboxState:
    """State of a sandbox as recorded in its folder.

    Attributes:
        directory: folder of all its files.
        settings: its settings.
        controller: address of slurmctld.
        port: port of slurmctld and of every slurmd, each at its own address.
        nodes: node -> address of its slurmd.
        processes: its daemons (munged, slurmctld, ...), and one process for each node that has power.
        started: true if every node was idle at the end of the start.
    """

    directory: Path
    settings: Settings
    controller: str = ""
    port: int = 0
    nodes: dict[str, str] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    started: bool = False

    @property
    def bridge(self) -> str:
        """Name of the sandbox's network bridge, unique to the sandbox's folder.

        The names of the sandbox's cables begin with this name.
        """
        return f"ssb{hashlib.sha256(str(self.directory).encode()).hexdigest()[:8]}"

    @property
    def slurm_conf(self) -> Path:
        """Path of the configuration file of every daemon and client."""
        return self.directory / "etc" / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        """Path of munged's socket."""
        return self.directory / "munge" / "socket"

    def log(self, daemon: str) -> Path:
        """Return the path of the log of a daemon or a node."""
        return self.directory / "log" / f"{daemon}.out"

    def save(self) -> None:
        """Write the record atomically."""
        temporary = self.directory / f".{RECORD}.new"
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self, enc_hook=str), indent=1))
        temporary.replace(self.directory / RECORD)

    def find(self, name: str) -> psutil.Process | None:
        """Return the process of a daemon or a node; None if it does not run."""
        process = self.processes.get(name)
        return process.find() if process else None

    def forget(self, name: str) -> None:
        """Remove an ended process from the record."""
        self.processes.pop(name, None)
        self.save()

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        inside: str = "",
        before: Callable[[int], None] = lambda pid: None,
        **variables: str,
    ) -> None:
        """Start a program in its own session, not as a child of this process, and record it. Its output goes to a log.

        Args:
            name: name of the daemon or node, in the record and for the log.
            command: the program and its arguments.
            inside: prefix of the command, such as ``unshare --net``.
            before: function that is called with the process id before the program runs. If it raises, the program never
                runs.
            variables: environment variables of the program. Of this process, the program inherits only HOME, locale and
                time zone, so that a sandbox can start inside a job.

        Raises:
            SandboxError: the program does not start, or its log cannot be written.
        """
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "LC_ALL", "TZ") if name in os.environ}
        env = {
            **kept,
            "PATH": search_path(),
            "SLURM_CONF": str(self.slurm_conf),
            **variables,
        }
        shell = ["setsid", "--fork", *inside.split(), "sh", "-c", WAIT_FOR_GO, "sh", str(self.log(name)), *command]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with subprocess.Popen(shell, env=env, text=True, cwd="/", **pipes) as launcher:
            assert launcher.stdin and launcher.stdout and launcher.stderr
            line = launcher.stdout.readline().strip()
            if not line.isdigit():
                raise SandboxError(f"`{' '.join(command)}` did not start: {line}{launcher.stderr.read()}".strip())
            self.processes[name] = Process(int(line), psutil.Process(int(line)).create_time())
            self.save()
            before(int(line))
            launcher.stdin.write("go\n")

    def wait_ready(self, name: str, is_ready: Callable[[], bool]) -> None:
        """Wait until a daemon is ready. Raises SandboxError if the daemon ends, or is not ready after 120 s."""

        def is_there() -> bool:
            found = self.find(name)
            if is_ready():
                return True
            if found is None:
                raise SandboxError(f"{name} ended instead of running on: {self.log(name).read_text()}")
            return False

        wait_until(is_there, timeout_s=120.0, what=f"{name} to answer")


def load_state(directory: Path) -> SandboxState | None:
    """Return the sandbox that is recorded in a folder; None if there is none."""
    try:
        record = (directory / RECORD).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return msgspec.json.decode(record, type=SandboxState, dec_hook=lambda kind, text: kind(text))


def require_state(directory: Path) -> SandboxState:
    """Return the sandbox that is recorded in a folder. Raises ConfigError if there is none."""
    state = load_state(directory)
    if state is None:
        fix = f"python -m slurm.sandbox up --dir {directory}"
        raise ConfigError(f"no sandbox in {directory}", "one that was started", fix)
    return state


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Lock a sandbox's existing folder during a ``with`` block, so that one command at a time works on it."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[SandboxState]:
    """Yield the sandbox that is recorded in a folder, locked against other commands.

    Raises ConfigError if there is none.
    """
    require_state(directory)
    with locked(directory):
        yield require_state(directory)
