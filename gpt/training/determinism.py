"""Reproducibility of a run: seeds, and torch's deterministic mode.

Owns the settings of the process. The weights and the order of the samples follow from ``seed`` by themselves (see
gpt/model/init.py and gpt/data/order.py); what is seeded here is dropout, and libraries that draw for themselves. Must
not know what is trained.
"""

from __future__ import annotations

import os
import random
import sys

import numpy as np
import torch

from gpt.config import CompileMode, TrainConfig
from launch.process import hash_seed

CUBLAS = ":4096:8"
"""CUBLAS_WORKSPACE_CONFIG, one of the two values with which cuBLAS is deterministic (cuBLAS manual, section 2.1.4)."""


def fix_hash_seed(config: TrainConfig) -> None:
    """In deterministic mode, start this process again with PYTHONHASHSEED set: Python reads it only at its start.

    Nothing here depends on the order of sets of strings; what a user adds may. The launcher sets it for its ranks.
    """
    if config.deterministic and "PYTHONHASHSEED" not in os.environ:
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONHASHSEED": hash_seed(config.seed)})


def seed_all(seed: int, rank: int) -> None:
    """Seed every generator, differently on each rank: dropout differs by rank, and is saved with it."""
    own = (seed * 1000 + rank) % 2**63
    random.seed(own)
    np.random.seed(own % 2**32)
    torch.manual_seed(own)


def set_determinism(config: TrainConfig) -> None:
    """Have torch refuse what is not deterministic, where the config asks for it. Before the first use of a GPU.

    Compiled code then draws the random numbers of eager code, so dropout is the same in both.
    """
    if not config.deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if config.compiles or (config.compile is CompileMode["auto"] and torch.cuda.device_count()):
        from torch._inductor import config as inductor  # slow to import

        inductor.fallback_random = True


def set_matmul_precision(config: TrainConfig) -> None:
    """Allow TF32 in fp32 products where the settled config says so. Before anything is compiled.

    By the older of torch's two ways, which torch 2.11 to 2.13 all know, and their compiler reads.
    """
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")


def state() -> dict[str, str | bool | None]:
    """Return the settings in force in this process, for the record."""
    return {
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED"),
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }
