"""Libraries that not every run needs may be missing where they are not needed: on a login node, and under DDP."""

from __future__ import annotations

import pytest

from tests.support.commands import TINY, python, run

WITHOUT = """
import importlib.abc, os, runpy, sys
import hydra_plugins

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
# Hydra looks for its plugins in the folders of this package, whatever the importers say.
hydra_plugins.__path__ = [folder for folder in hydra_plugins.__path__ if "site-packages" not in folder]
import gpt.generate, gpt.train, launch.__main__, launch.report.__main__, launch.status

for line in sys.argv[1:]:
    print(f"$ {line}", flush=True)
    if (pid := os.fork()) == 0:
        status, sys.argv = 1, line.split()
        try:
            sys.argv[0] = sys.argv[0].removesuffix(".__main__")
            status = sys.modules[line.split()[0]].main()
        finally:
            sys.stdout.flush()
            os._exit(status)
    print("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
TRAIN = f"gpt.train {' '.join(TINY)} optim.max_steps=2"
LINES = {
    "launch.__main__ -m nodes=1,2 dry_run=true": "2 x 1 = 2 ranks on",
    "launch.__main__ parallel=zero2 cluster=slurm dry_run=true": "ds_zero2",
    TRAIN: "step 2/2",
    "launch.status outputs": "finished",
    "launch.report.__main__ outputs/quick_test": "finished",
    "launch.__main__ parallel=zero2 cluster=local": "no package deepspeed",
    f"{TRAIN} parallel=zero2": "type next: pip install -c constraints.txt deepspeed, or parallel=fsdp",
    "gpt.generate zero -p x": "type next: pip install -c constraints.txt deepspeed, and the same command again",
    "launch.__main__ hydra/launcher=submitit_slurm": "type next: pip install hydra-submitit-launcher",
}
"""Commands in the order in which they are typed, and what they say."""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Output of each of the commands, forked from one process without those libraries."""
    cwd = tmp_path_factory.mktemp("without")
    run("gpt.train optim.max_steps=2 run_dir=zero parallel=zero2", *TINY, cwd=cwd)  # with DeepSpeed
    printed = python(f"import os; os.dup2(1, 2)\n{WITHOUT}", *LINES, cwd=cwd)
    blocks = [block.partition("\n") for block in printed.split("$ ")[1:]]
    return {line: text for line, _, text in blocks}


@pytest.mark.parametrize("line", [*LINES])
def test_what_needs_neither_works_without_and_the_rest_is_refused(line: str, said: dict[str, str]) -> None:
    assert LINES[line] in said[line], said
    assert f"status {2 if 'type next' in said[line] else 0}\n" in said[line]
    assert "Traceback" not in said[line]
