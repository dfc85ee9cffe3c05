"""A training that takes its time: ranks of gpt that wait in every step, so that faults find them before they are done.

Such a run computes next to nothing while a test waits for Slurm, on whatever machine.
"""

from __future__ import annotations

from pathlib import Path

PACED = """
import importlib.machinery, os, sys, time

class Pacemaker:
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "gpt.training.step" else None
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), self.pace(module))
        return spec

    def pace(self, module):
        lr_at = module.lr_at
        def paced(config, step):
            if not os.path.exists(os.environ["HURRY"]):
                time.sleep(0.1)
            return lr_at(config, step)
        module.lr_at = paced

if "HURRY" in os.environ:
    sys.meta_path.insert(0, Pacemaker())
"""
"""Imported at the start of every interpreter of the run; asks for the file HURRY in each step."""


def paced(folder: Path) -> tuple[list[str], Path]:
    """Words with which a run on Slurm waits in each step, and the file that ends this once it is there."""
    there, hurry = folder / "paced", folder / "hurry"
    there.mkdir()
    (there / "sitecustomize.py").write_text(PACED)
    return [f"cluster.setup=['export PYTHONPATH={there}:$PYTHONPATH','export HURRY={hurry}']"], hurry
