"""How many micro-batches a rank of a pipeline has begun and not finished, at most."""

from __future__ import annotations

from gpt.config import ParallelConfig, Schedule
from gpt.topology.stages import local_stages


def passes_at_once(parallel: ParallelConfig, pp_rank: int, micro_batches: int) -> int:
    """Whose activations a rank keeps, counted in passes through all of its stages, rounded up.

    gpipe keeps all; 1f1b as many as there are ranks from here to the end (arXiv 2104.04473, section 2.2.1); interleaved
    has that many more begun as torch's schedule warms up with (section 2.2.2); the V-shaped ones as many as there are
    ranks, on every rank, DualPipeV one more (arXiv 2401.10241, section 6; https://github.com/deepseek-ai/DualPipe).
    """
    ranks, held = parallel.pp, local_stages(parallel)
    if ranks == 1:
        return 1
    after = ranks - 1 - pp_rank
    in_round = micro_batches // max(1, micro_batches // ranks)
    most = {
        Schedule.gpipe: micro_batches,
        Schedule["1f1b"]: after + 1,
        Schedule.interleaved: -(-((held - 1) * in_round + 2 * after + 1) // held),
        Schedule.zbv: ranks,
        Schedule.dualpipev: ranks + 1,
    }
    return min(micro_batches, most[parallel.schedule])
