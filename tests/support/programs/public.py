"""Failures from public issues of training programs and libraries, replayed in the training of held_out.py.

``public.py FAULT STEP RANK FOLDER``, as held_out.py. Each function makes the mistake that an issue describes. Its
docstring has the address of the issue and what the thread found. GPUs, NCCL and the libraries themselves take no part,
except for tokenizers: ``optimizer_exceeds_device`` and ``save_exceeds_watchdog`` replay what is printed there.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import socket
import sys
import time
from datetime import timedelta
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.planted import Fault, Scene, register
from tests.support.programs.held_out import WIDTH, train

FAULTS: dict[str, Fault] = {}
fault = partial(register, FAULTS)


@fault("left_early", options={"uneven": True})
def fewer_batches(scene: Scene) -> None:
    """https://github.com/deepspeedai/DeepSpeed/issues/2223

    Each process reads a shard of another length, so the numbers of batches differ. The process with more batches hangs
    in ``step()``. It goes away with equal numbers. The program ends the loop of this rank here.
    """


@fault("mismatched_collective", has_rank=False)
def main_process_saves_alone(scene: Scene) -> None:
    """https://github.com/deepspeedai/DeepSpeed/issues/797

    ``save_checkpoint`` was called on rank 0 only, and hung after its files were written. It has collectives, so all
    processes have to call it.
    """
    torch.save(scene.model.state_dict(), scene.folder / "model.pt")
    dist.barrier()


@fault("slow_cpu", "elsewhere", when="all", options={"group_timeout_s": 3}, line="length +=|for number")
def tokenizes_longer_than_timeout(scene: Scene) -> None:
    """https://github.com/hiyouga/LlamaFactory/issues/662

    The main process tokenizes a large data set while the others wait in a barrier, whose timeout ends them.
    """
    if scene.is_faulty:
        length = 0
        for number in range(1 << 60):
            length += len(str(number).split("7"))
    dist.barrier()


@fault("missing_file", line=".read_bytes()")
def index_on_first_node_only(scene: Scene) -> None:
    """https://github.com/NVIDIA/Megatron-LM/issues/907

    Only the first rank builds the indices of the data set. On a node with a disk of its own there is no such file.
    """
    own_disk = scene.folder / f"disk_of_{scene.run.rank}"
    own_disk.mkdir()
    (own_disk / "GPTDataset-train-document_index.npy").read_bytes()


@fault("dead_loader_worker", when="sample", options={"workers": 2}, needs="small_disk")
def shared_memory_is_full(scene: Scene) -> None:
    """https://github.com/pytorch/pytorch/issues/5040

    A worker of the loader gets SIGBUS, as /dev/shm of a container has 64 MB by default. Here a disk of 16 MiB is full.
    """
    with (scene.folder / f"torch_{os.getpid()}").open("w+b") as file:
        file.truncate(64 << 20)
        with mmap.mmap(file.fileno(), 0) as batch:
            batch.write(bytes(64 << 20))


def tokenize() -> None:
    """Call the tokenizers library, which keeps a pool of threads in the process."""
    from tokenizers import Tokenizer, models  # after RAYON_NUM_THREADS

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.encode_batch(["a", "b"] * 1000)


@fault("data", when="all", line="in loader")
def tokenizer_before_fork(scene: Scene) -> None:
    """https://github.com/huggingface/tokenizers/issues/187

    A tokenizer used before the fork of a loader's worker hangs in the worker: the threads of its pool are not there.
    """
    if not scene.is_faulty:
        return
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS="2")
    tokenize()

    class Texts(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            tokenize()
            return index

    loader = torch.utils.data.DataLoader(Texts(), num_workers=1)
    for _ in loader:
        pass


@fault("mismatched_collective", has_rank=False, when="all")
def skips_batch_after_error(scene: Scene) -> None:
    """https://github.com/pytorch/pytorch/issues/44353

    One process catches that memory ran out, and goes on with its next batch. It skips collectives of the batch, so the
    processes are out of step from then on, and hang.
    """
    statistics = [torch.zeros(2 * WIDTH) for _ in range(scene.run.world_size)]
    for batch in range(2):
        dist.all_gather(statistics, torch.ones(2 * WIDTH))  # of a synchronised batch norm
        try:
            if batch == 0 and scene.is_faulty:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            dist.all_reduce(torch.ones(WIDTH * WIDTH))
        except RuntimeError as error:
            print(f"skip a batch: {error}", file=sys.stderr)


@fault("mismatched_collective", has_rank=False, when="all")
def gathers_other_shapes(scene: Scene) -> None:
    """https://github.com/Lightning-AI/pytorch-lightning/issues/7773

    ``all_gather`` of tensors that differ in their first dimension freezes without an error.
    """
    mine = torch.ones(2000 if scene.is_faulty else 1000, 8)
    dist.all_gather([torch.empty_like(mine) for _ in range(scene.run.world_size)], mine)


@fault("exception", when="all", line="replica(")
def branch_without_loss(scene: Scene) -> None:
    """https://github.com/open-mmlab/mmdetection/issues/2153

    A part of the model gets no gradient for some batches. DistributedDataParallel raises in the next forward pass.
    """

    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.boxes, self.masks = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.boxes(x) if scene.is_faulty else self.boxes(x) + self.masks(x)

    scene.run.phase("starting")  # the first model under DDP imports for seconds
    replica = torch.nn.parallel.DistributedDataParallel(Heads())
    scene.run.phase("training", scene.step - 1)
    for _ in range(2):
        replica(torch.ones(1, 2)).sum().backward()


@fault("not_finite", when="loss")
def all_labels_are_truncated(scene: Scene) -> torch.Tensor:
    """https://github.com/hpcaitech/ColossalAI/issues/5370

    A context longer than the limit leaves only ignored labels (-100). Their mean loss is 0 / 0.
    """
    scores = scene.model(torch.ones(4, WIDTH))
    return torch.nn.functional.cross_entropy(scores, torch.full((4,), -100))


@fault("full_disk", needs="small_disk", line="torch.save(")
def disk_is_full_in_save(scene: Scene) -> None:
    """https://github.com/pytorch/pytorch/issues/10577

    A save that worked before fails with an error of input and output: the disk of the server was full. Here torch
    writes its older format.
    """
    path = scene.folder / "best_model.pt"
    torch.save({"weight": torch.zeros(8 << 20)}, path, _use_new_zipfile_serialization=False)


@fault("missing_file", "exception", when="all", line="staging.rename(")
def two_ranks_rename_checkpoint(scene: Scene) -> None:
    """https://github.com/huggingface/transformers/issues/27925

    All processes rename the temporary folder of a checkpoint. The first one succeeds, the next ones do not find it.
    """
    staging = scene.folder / "tmp-checkpoint-49"
    staging.mkdir(exist_ok=True)
    dist.barrier()
    if scene.is_faulty:  # the slower of two
        while staging.exists():
            time.sleep(0.01)
        staging.rename(scene.folder / "checkpoint-49")
    with contextlib.suppress(FileNotFoundError):  # one of the others, whichever comes first
        staging.rename(scene.folder / "checkpoint-49")


@fault("missing_file", "exception", when="start", line="import_module(")
def module_on_some_nodes_only(scene: Scene) -> None:
    """https://github.com/deepspeedai/DeepSpeed/issues/3489

    The virtual environment was activated in the job script, and is not there on all nodes.
    """
    importlib.import_module("flash_attention_of_first_node")


@fault("exception", "network", when="start", line="dist.TCPStore(")
def port_of_another_run(scene: Scene) -> None:
    """https://github.com/Lightning-AI/pytorch-lightning/issues/401

    A second training on the same machine takes the same port for its processes to meet.
    """
    with socket.socket() as other_run:
        other_run.bind(("", 0))
        other_run.listen()
        dist.TCPStore("127.0.0.1", other_run.getsockname()[1], scene.run.world_size, is_master=True)


@fault("network", "exception", when="start", line="dist.TCPStore(")
def other_master_address(scene: Scene) -> None:
    """https://github.com/pytorch/pytorch/issues/76367

    The nodes were started with different addresses of the master, and one waits where nobody listens.
    """
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        limit = timedelta(seconds=2)
        dist.TCPStore("127.0.0.1", nobody.getsockname()[1], scene.run.world_size, is_master=False, timeout=limit)


@fault("exception", when="start", line="SharedMemory(name=name, create=True, size=8)")
def shared_memory_of_killed_run(scene: Scene) -> None:
    """https://github.com/mosaicml/streaming/issues/781

    A run that was interrupted left its shared memory, and the next run cannot create it.
    """
    name = f"locals_{os.getpid()}"
    left = SharedMemory(name, create=True, size=8)
    try:
        SharedMemory(name=name, create=True, size=8)
    finally:
        left.unlink()


@fault("gpu_memory", line="raise torch.OutOfMemoryError")
def optimizer_exceeds_device(scene: Scene) -> None:
    """https://github.com/karpathy/nanoGPT/issues/88

    The batch does not fit into the memory of the GPU; a smaller one does. Only the error is replayed.
    """
    free = "GPU 0 has a total capacity of 15.78 GiB of which 8.68 MiB is free."
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 394.00 MiB. {free}")


@fault("slow_disk", "slow_cpu", "elsewhere", "network", when="all", line="torch.save(")
def save_exceeds_watchdog(scene: Scene) -> None:
    """https://github.com/meta-pytorch/torchtune/issues/2093

    One rank writes the checkpoint for longer than the timeout of NCCL, whose watchdog aborts the ranks that wait. A
    longer timeout helps. Only the line and the abort of the watchdog are replayed.
    """
    end = time.monotonic() + 3
    while scene.is_faulty or time.monotonic() < end:
        if scene.is_faulty:
            torch.save({"weight": torch.zeros(1 << 20)}, scene.folder / "model.pt")
        else:
            time.sleep(0.1)
    work = "WorkNCCL(SeqNum=28956, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000)"
    rank = f"[Rank {scene.run.rank}]"
    said = f"{rank} Watchdog caught collective operation timeout: {work} ran for 600058 milliseconds before timing out."
    print(f"[rank{scene.run.rank}]:[E ProcessGroupNCCL.cpp:618] {said}", file=sys.stderr, flush=True)
    os.abort()


if __name__ == "__main__":
    train(FAULTS[sys.argv[1]], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
