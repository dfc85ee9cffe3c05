"""A look inside a few steps: ``profile=true profile_from=A profile_to=B``.

Owns torch's profiler and the two files it leaves in the folder of the attempt: a trace for chrome://tracing or
https://ui.perfetto.dev, and a table of the operations that took longest. Only rank 0 is profiled. Must not know what a
step is made of.
"""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from gpt.config import TrainConfig
from gpt.parallel.distributed import World

TRACE = "trace_rank_00000.json.gz"
TABLE = "profile_rank_00000.txt"
ROWS = 40


class StepProfile:
    """Asked after each step whether it has something to do there, since the device must be at rest for that.

    All ranks are at rest there, not only the one that is profiled: a step that the run goes back for is known to all of
    them before the next one, or to none.
    """

    def __init__(self, folder: Path, config: TrainConfig, world: World) -> None:
        self._folder = folder
        self._first, self._last = config.profile_from, config.profile_to
        self._wanted, self._is_profiled = config.profile, world.is_first
        self._is_on = False
        self._activities = [ProfilerActivity.CPU]
        if world.device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._sort_by = "self_cuda_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
        self._profiler: profile | None = None

    def due(self, step: int) -> bool:
        """True where profiling begins or ends after ``step``, on all ranks.

        A run that resumes within the range takes the rest.
        """
        starts = not self._is_on and self._first <= step + 1 <= self._last
        return self._wanted and (starts or (self._is_on and step >= self._last))

    def after(self, step: int) -> None:
        """Begin or end, where it is due."""
        if not self.due(step):
            return
        if self._is_on:
            self.close()
            return
        self._first, self._is_on = step + 1, True
        if self._is_profiled:
            self._profiler = profile(activities=self._activities, record_shapes=True)
            self._profiler.start()

    def close(self) -> None:
        """Write the files, if there is something to write."""
        self._is_on = self._wanted = False
        if self._profiler is None:
            return
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._folder / TRACE))
        table = self._profiler.key_averages().table(sort_by=self._sort_by, row_limit=ROWS)
        (self._folder / TABLE).write_text(table)
        print(f"profiled from step {self._first}: {self._folder / TRACE}, {TABLE} beside it", flush=True)
        self._profiler = None
