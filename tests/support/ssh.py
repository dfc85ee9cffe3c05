"""A real ssh with keys made for a test: a client's command in a folder of its own, and servers that know its key."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from slurm.sandbox.cluster import Cluster
from slurm.sandbox.nodes import process_one
from slurm.sandbox.state import require_state
from tests.support.runs import write_program

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH')}:/usr/sbin")
CLIENT = """
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""
SERVER = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""


def make_ssh(folder: Path, client: str = "") -> Path:
    """Make keys, a server's ``sshd_config`` and a client's ``bin/ssh`` in a new folder.

    Skips where no server is installed. ``client`` is put before the client's configuration, with ``{folder}`` and
    ``{sshd}`` filled in.
    """
    if SSHD is None or os.getuid() != 0:
        pytest.skip("needs openssh-server and root")
    Path("/run/sshd").mkdir(exist_ok=True)
    folder.mkdir(parents=True)
    for name in ("key", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "config").write_text((client + CLIENT).format(sshd=SSHD, folder=folder))
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    write_program(folder / "bin" / "ssh", f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    return folder


def serve_ssh(sandbox: Cluster, folder: Path) -> dict[str, str]:
    """Start a server on each node of a sandbox. Returns node -> address. A node that has one keeps it."""
    state = require_state(sandbox.directory)
    for name in state.nodes:
        first = process_one(state, name)
        assert first is not None and SSHD is not None
        inside = ["nsenter", f"--target={first.pid}", *(f"--{kind}" for kind in ("mount", "uts", "ipc", "net", "pid"))]
        subprocess.run([*inside, SSHD, "-f", folder / "sshd_config"], check=False)
    return dict(state.nodes)
