"""Runs of ``benchmarks.faults.league`` whose engine is a library: submitit, torchft, or Lightning's Trainer."""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.faults.league_program import (
    SAVE_EVERY,
    START,
    STEPS,
    new_layers,
    pause,
    record,
    record_end,
    samples_of,
    train,
)


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
            self.layers = new_layers()

        def training_step(self, index: torch.Tensor) -> torch.Tensor:
            batch = samples_of(self.global_step + 1)[self.global_rank :: self.trainer.world_size]
            return (self.layers(batch) - batch).square().mean()

        def on_train_batch_end(self, *_: object) -> None:
            pause(folder, self.global_rank)
            if self.global_rank == 0:
                record(folder, self.global_step, START)

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
        record_end(folder, module.layers)


def train_by_torchft(folder: Path) -> None:
    """Train the program's model as one of three replicas of torchft, of which two take part in each step."""
    import torch
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
    from torchft.manager import WorldSizeMode

    class Group(ProcessGroupGloo):
        since = START
        """Unix time at which the set of replicas that train together last changed; before a change, the start of the
        process."""

        def reconfigure(self, *args: Any, **options: Any) -> Any:
            self.since = time.time()
            return super().reconfigure(*args, **options)

    torch.set_num_threads(1)
    replica, newest = int(os.environ["REPLICA_GROUP_ID"]), folder / "newest.pt"
    layers = new_layers()
    inner = torch.optim.AdamW(layers.parameters(), lr=1e-3)

    def state() -> dict[str, Any]:
        return {"model": layers.state_dict(), "optimizer": inner.state_dict()}

    def load(state: dict[str, Any]) -> None:
        layers.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    group = Group(timeout=timedelta(seconds=5))
    manager = Manager(
        pg=group,
        min_replica_size=2,
        load_state_dict=load,
        state_dict=state,
        replica_id=f"replica_{replica}",
        timeout=timedelta(seconds=30),
        world_size_mode=WorldSizeMode.FIXED_WITH_SPARES,
        init_sync=False,  # all replicas begin with the same weights
    )
    if newest.exists():
        saved = torch.load(newest)
        load(saved)
        manager.load_state_dict(saved["manager"])
    model, optimizer = DistributedDataParallel(manager, layers), Optimizer(manager, inner)
    while manager.current_step() < STEPS:
        optimizer.zero_grad()  # asks the other replicas who takes part
        rank = manager.participating_rank()  # None for a spare
        step = manager.current_step() + 1
        batch = samples_of(step)[(rank or 0) :: 2]
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
        pause(folder, replica)
        if manager.current_step() == step and rank == 0:  # false if a replica was lost in this step
            record(folder, step, group.since)
            if step % SAVE_EVERY == 0:
                torch.save(state() | {"manager": manager.state_dict()}, newest.with_suffix(".tmp"))
                newest.with_suffix(".tmp").replace(newest)
    if rank == 0:
        record_end(folder, layers)
    manager.shutdown()


def main() -> int:
    """Do the part that the command line names: submit with submitit, or run as a rank of Lightning or torchft. Returns
    the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("submitit", "lightning", "torchft"))
    parser.add_argument("--folder", type=Path, required=True, help="folder of the run, shared by all ranks")
    args = parser.parse_args()
    {"submitit": submit, "lightning": train_by_lightning, "torchft": train_by_torchft}[args.part](args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
