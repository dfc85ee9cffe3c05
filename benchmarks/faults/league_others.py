"""The runs of the league whose engine is a library: submitit, and Lightning's Trainer."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.league_program import SAVE_EVERY, START, STEP_S, STEPS, train, weights_sum


class Training:
    """A training function for submitit. After a requeue, submitit calls it again, and the training resumes from the
    newest checkpoint.
    """

    def __call__(self, folder: str) -> None:
        """Train on this rank."""
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        train(Path(folder))

    def checkpoint(self, folder: str) -> object:
        """Return the submitit job that continues this one."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, folder)


def submit(folder: Path) -> None:
    """Submit the training with submitit, and print the id of the job."""
    import submitit

    executor = submitit.AutoExecutor(folder=folder / "submitit", cluster="slurm", slurm_max_num_timeout=10)
    executor.update_parameters(nodes=2, tasks_per_node=1, timeout_min=60, slurm_signal_delay_s=90)
    print(executor.submit(Training(), str(folder)).job_id)


def train_by_lightning(folder: Path) -> None:
    """Train the program's model with Lightning's Trainer on two Slurm nodes, as its documentation recommends."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))

        def training_step(self, index: torch.Tensor) -> torch.Tensor:
            step = self.global_step + 1
            batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            batch = batch[self.global_rank :: self.trainer.world_size]
            return (self.layers(batch) - batch).square().mean()

        def on_train_batch_end(self, *_: object) -> None:
            if not (folder / "hurry").exists():
                time.sleep(STEP_S)
            if self.global_rank == 0:
                with (folder / "steps.jsonl").open("a") as file:
                    file.write(json.dumps({"step": self.global_step, "time": time.time(), "start": START}) + "\n")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.set_num_threads(1)
    saves = ModelCheckpoint(folder, filename="newest", every_n_train_steps=SAVE_EVERY, enable_version_counter=False)
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=1,
        num_nodes=int(os.environ["SLURM_NNODES"]),
        max_steps=STEPS,
        default_root_dir=folder,
        callbacks=[saves],
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        plugins=[SLURMEnvironment(auto_requeue=True)],
    )
    module, newest = Module(), folder / "newest.ckpt"
    loader: Any = torch.utils.data.DataLoader(range(STEPS), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=str(newest) if newest.exists() else None)
    if trainer.is_global_zero:
        (folder / "end.tmp").write_text(json.dumps({"sum": weights_sum(module.layers), "pid": os.getpid()}))
        (folder / "end.tmp").replace(folder / "end.json")


def main() -> int:
    """Submit with submitit, or run as a rank of Lightning. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("submitit", "lightning"))
    parser.add_argument("--folder", type=Path, required=True, help="folder of the run, shared by all ranks")
    args = parser.parse_args()
    (submit if args.part == "submitit" else train_by_lightning)(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
