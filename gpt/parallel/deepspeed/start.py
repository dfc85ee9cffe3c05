"""Loading DeepSpeed: the few things that it reads from its surroundings, said once.

Owns the import, which takes seconds: nothing else imports ``deepspeed`` at its top. Must not know models.
"""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta

import torch.distributed.distributed_c10d as c10d

from gpt.parallel.world import World


def load_deepspeed(world: World) -> None:
    """Set the module ``deepspeed`` up for the device of this rank; it then says only what went wrong."""
    os.environ["DS_ACCELERATOR"] = world.device.type  # else it takes a GPU that it sees, whatever ``device`` says
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 renames the collectives that it calls in every pass, and 2.11 knows no other names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Shared memory between the ranks of a node: compiled at the first start for a minute, and gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.groups.mpu = None  # left behind where this process has had a pipeline before
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=False)


def set_timeouts(timeout_s: int) -> None:
    """Have collectives fail after ``timeout_s`` in the groups that DeepSpeed made: it gives them torch's default."""
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
