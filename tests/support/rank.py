"""A rank of ``distributed.run_distributed``: ``python -m tests.support.rank FOLDER TIMEOUT``, and what torchrun sets.

What it does lies in ``FOLDER/work``; into ``FOLDER/answer_RANK`` it puts when it was done, the result, and the error.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import random
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path


def main(folder: Path, timeout_s: float) -> None:
    """Meet the other ranks, call the function, and leave once all have answered."""
    import numpy
    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.dump_traceback_later(0.9 * timeout_s)
    torch.set_num_threads(1)
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    try:
        # A file to meet at: no port that another process could take.
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        function, args = pickle.loads((folder / "work").read_bytes())
        value, error = function(rank, world_size, *args), None
    except BaseException:  # torch's CheckpointException is not an Exception
        value, error = None, traceback.format_exc()
    # Plain pickle copies tensors; that of multiprocessing would share them with a process that is about to end.
    (folder / f"answer_{rank}.tmp").write_bytes(pickle.dumps((time.monotonic(), value, error)))
    (folder / f"answer_{rank}.tmp").rename(folder / f"answer_{rank}")
    faulthandler.cancel_dump_traceback_later()
    if error is None and dist.is_initialized():
        # Rank 0 closing the group early would fail a rank that still works; one that leaves this first fails nobody.
        with suppress(RuntimeError):
            dist.barrier()
    os._exit(0)  # Python's end takes as long as some tests


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
