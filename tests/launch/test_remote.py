"""Commands on a login node: a real ssh and a real sshd, which serves one connection over a pipe and opens no port."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.support.commands import run
from tests.support.ssh import make_ssh

PROGRAM = Path(sys.executable).with_name("gpt-launch")
CLIENT = """
Host login
  ProxyCommand {sshd} -i -f {folder}/sshd_config
Host away
  ProxyCommand false
"""


@pytest.fixture
def login(tmp_path: Path) -> Path:
    """The home of a login node called ``login``. Its ``bin`` has the ssh that reaches it with a key made for it."""
    if not PROGRAM.exists():
        pytest.skip("needs an installed gpt-launch")
    return make_ssh(tmp_path / "login", CLIENT)


def test_a_command_runs_on_a_login_node_with_the_code_of_this_folder(login: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", login / "project"
    (here / "inner").mkdir(parents=True)
    (here / "inner" / "part.py").write_text("WORD = 'it runs'\n")
    (here / "train.py").write_text("import os\nfrom inner.part import WORD\nprint(WORD, 'in', os.getcwd())\n")
    command = partial(run, cwd=here, PATH=f"{login / 'bin'}:{os.environ['PATH']}")
    words = ("workload=script", "script.path=train.py", "cluster=local", "launch.report_files=[md,csv]")
    on = f"launch.on=ssh:login:{there}"

    for wrong, said in (
        ("launch.on=ssh:away", "type next: ssh away mkdir -p launch/here-"),
        ("launch.on=login", "expected: ssh:LOGIN or ssh:LOGIN:FOLDER"),
        (on, "no program gpt-launch there"),
    ):
        assert said in command("launch", wrong, *words, status=2)
        assert [path.name for path in here.iterdir() if path.name != "__pycache__"] == ["inner", "train.py"]

    (there / ".venv" / "bin").mkdir(parents=True)
    (there / ".venv" / "bin" / "gpt-launch").symlink_to(PROGRAM)
    text = command("launch", on, "nodes=1", *words)
    assert f"copied 2 files to login:{there}" in text and "finished" in text
    run_folder = there / "outputs" / "train" / "nodes=1"
    assert f"it runs in {there}" in (run_folder / "attempts" / "0001" / "logs" / "rank_00000.log").read_text()
    assert "finished" in (here / "outputs" / "train" / "nodes=1" / "summary.md").read_text()
    assert not (here / "outputs" / "train" / "nodes=1" / "events.jsonl").exists()

    status = command("gpt_launch", "status", "outputs/train", LAUNCH_ON=f"ssh:login:{there}")
    assert "nodes=1" in status and "finished" in status
    logs = command("gpt_launch", "logs", on, "outputs/train/nodes=1")
    assert f"it runs in {there}" in logs
    refused = command("gpt_launch", "report", on, "outputs/nothing", status=2)
    assert refused.startswith("found: no folder outputs/nothing") and "files of reports" not in refused
