"""``launch.on=ssh:LOGIN``: run a command of the launcher, typed on this machine, on a login node of a cluster.

    gpt-launch launch.on=ssh:login.site -m nodes=1,2,4 workload=script script.path=train.py launch.detach=true
    gpt-launch status launch.on=ssh:login.site outputs/train
    gpt-launch report launch.on=ssh:login.site outputs/train

The code of the project, the git checkout around the working directory, is copied to a folder of the login node, where
the command runs. Files of reports are copied back. ``ssh`` is the user's own, with its configuration and keys. It never
asks for a password here.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from launch.errors import ConfigError, counted, refusing
from launch.runs.environment import git
from launch.runs.overrides import typed_value, without_key
from launch.workload import code_files

KEY = "launch.on"
VARIABLE = "LAUNCH_ON"
"""Environment variable with the value of ``launch.on`` for every command."""
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20")
REPORTS = ("scaling.*", "scaling_parts.csv", "summary.*", "all_runs.*", "comparison.*")
"""Patterns of the files that are copied back: those that launch.report writes."""


@dataclass(frozen=True)
class Remote:
    """A login node: its name for ssh, and the folder on it to which the code of the local folder is copied."""

    host: str
    folder: PurePosixPath
    """Path on the login node, absolute or relative to the home folder."""

    def shell(self, text: str, *, options: Sequence[str] = ()) -> list[str]:
        """Return the ssh command that runs ``text``, a line of shell, on the login node.

        The line runs in ``folder``, and programs of ``.venv`` in this folder come first in PATH. ``options`` are
        further options of ssh.
        """
        line = f'cd {shlex.quote(str(self.folder))} && PATH="$PWD/.venv/bin:$PATH" && {text}'
        return [*SSH, *options, self.host, f"bash -lc {shlex.quote(line)}"]


def remote_of(words: Sequence[str]) -> tuple[Remote, list[str]] | None:
    """Return the login node that a command line or LAUNCH_ON names, and the other arguments; None if neither names one.

    Raises:
        ConfigError: the value has another form than ``ssh:LOGIN`` or ``ssh:LOGIN:FOLDER``.
    """
    value = typed_value(words, KEY) or os.environ.get(VARIABLE) or "null"
    if value == "null":
        return None
    kind, _, rest = value.partition(":")
    host, _, folder = rest.partition(":")
    if kind != "ssh" or not host or host.startswith("-"):
        raise ConfigError(
            f"{KEY}={value}", "ssh:LOGIN or ssh:LOGIN:FOLDER, with a host of your ssh", f"{KEY}=ssh:LOGIN"
        )
    here = project()
    default = f"launch/{here.name}-{hashlib.sha256(f'{os.uname().nodename}{here}'.encode()).hexdigest()[:8]}"
    return Remote(host, PurePosixPath(folder or default)), without_key(words, KEY)


def project() -> Path:
    """Return the folder whose code is copied: the git checkout around the working directory, or that directory."""
    found = git(Path.cwd(), "rev-parse", "--show-toplevel")
    return Path(found.decode().strip()) if found else Path.cwd()


def require_launcher(remote: Remote) -> None:
    """Make the folder on the login node. Raises ConfigError if ssh fails, or if the login node has no launcher."""
    folder = shlex.quote(str(remote.folder))
    made = subprocess.run([*SSH, remote.host, f"mkdir -p {folder}"], capture_output=True, text=True, check=False)
    if made.returncode:
        raise ConfigError(
            f"{KEY}=ssh:{remote.host}: {made.stderr.strip() or 'no answer'}",
            "a host that your ssh reaches by a key, without a password, and a folder to write into",
            f"ssh {shlex.quote(remote.host)} mkdir -p {folder}",
        )
    if subprocess.run(remote.shell("command -v gpt-launch"), capture_output=True, check=False).returncode:
        raise ConfigError(
            f"{KEY}=ssh:{remote.host}, and no program gpt-launch there",
            f"the launcher, on the PATH of a login shell or in {remote.folder}/.venv",
            f"ssh {shlex.quote(remote.host)}; there cd {folder}; python3 -m venv .venv; .venv/bin/pip install WHEEL",
        )


def copy_code(remote: Remote) -> None:
    """Copy the code of ``project()`` to the login node. Raises ConfigError if the copy fails."""
    root = project()
    names = [name for name, _ in code_files(root)]
    try:
        packed = subprocess.run(
            ["tar", "-czf", "-", "-C", str(root), "--null", "-T", "-"],
            input="\0".join(names).encode(),
            stdout=subprocess.PIPE,
            check=True,
        )
        subprocess.run(remote.shell("tar -xzf -"), input=packed.stdout, check=True)
    except subprocess.CalledProcessError as error:
        fix = f"ssh {shlex.quote(remote.host)} df -h {shlex.quote(str(remote.folder))}"
        raise ConfigError(f"the code was not copied to {remote.host}: {error}", "room in that folder", fix) from error
    print(f"copied {counted(len(names), 'file')} to {remote.host}:{remote.folder}", file=sys.stderr, flush=True)


def fetch_reports(remote: Remote, output_dir: str) -> None:
    """Copy the files of reports below ``output_dir``, relative to the project, from the login node to this machine."""
    wanted = " -o ".join(f"-name {shlex.quote(name)}" for name in REPORTS)
    find = f"find {shlex.quote(output_dir)} -type f \\( {wanted} \\) -print0 | tar -czf - --null -T -"
    packed = subprocess.run(remote.shell(find), capture_output=True, check=False)
    if packed.returncode == 0:
        subprocess.run(["tar", "-xzf", "-", "-C", str(project())], input=packed.stdout, check=True)
        print(f"the files of reports are also in {project() / output_dir} of this machine", file=sys.stderr, flush=True)


@refusing
def run_remotely(words: Sequence[str], command: str | None = None) -> int:
    """Run a command on the login node that its arguments name. Returns the exit status of the command.

    Before a submission, the code is copied to the login node. After a submission or ``report``, the files of reports
    are copied back, unless ``output_dir`` is an absolute path or the command was refused. Returns 2 if ssh fails or the
    login node has no launcher.

    Args:
        words: arguments of the command, with ``launch.on``.
        command: name of the command, such as ``status``; None for a submission.
    """
    found = remote_of(words)
    assert found is not None
    remote, others = found
    require_launcher(remote)
    if command is None:
        copy_code(remote)
    inside = Path.cwd().relative_to(project())
    line = shlex.join(["gpt-launch", *([command] if command else []), *others])
    options = ["-t"] if sys.stdin.isatty() else []
    typed = remote.shell(f"cd {shlex.quote(str(inside))} && {line}", options=options)
    status = subprocess.run(typed, check=False).returncode
    output_dir = typed_value(others, "output_dir") or "outputs"
    if command in (None, "report") and status != 2 and not Path(output_dir).is_absolute():
        fetch_reports(remote, str(inside / output_dir))
    return status
