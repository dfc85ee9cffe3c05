r"""Train with DDP and talk to the launcher: record steps, stop when asked, save on request, resume.

On one node and on two, typed in the root of the checkout; ends in a scaling table:

    python -m launch -m nodes=1,2 ranks_per_node=1 workload=script script.path=examples/ddp_with_worker.py \
        script.options.steps=2000 script.max_steps=2000 script.resumes=true

While it runs: python -m launch.status outputs;  touch outputs/ddp_with_worker/POINT/SAVE (or STOP)
The same file without the launcher: torchrun --nproc-per-node=2 examples/ddp_with_worker.py --steps 200
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a process group, which its functions would keep to Python's end
from torch.nn.parallel import DistributedDataParallel

from launch import worker

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--save-every", type=int, default=50)
args = parser.parse_args()

run = worker.attach()  # first: from here on a request to stop is heard, and ends nothing
run.phase("starting")
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", run.local_rank) if torch.cuda.is_available() else torch.device("cpu")
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
model = DistributedDataParallel(layers.to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

newest = (run.checkpoint_dir or Path("checkpoints")) / "newest.pt"
done = 0
if newest.exists():
    state = torch.load(newest, map_location=device)
    layers.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    done = state["step"]


def save(step: int) -> None:
    """Write a checkpoint on rank 0, and say so on every rank once it is there."""
    run.phase("saving", step)
    if run.is_first:
        newest.parent.mkdir(parents=True, exist_ok=True)
        state = {"step": step, "model": layers.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, newest.with_suffix(".tmp"))
        if run.is_current():  # otherwise a later start of the run owns the folder
            newest.with_suffix(".tmp").replace(newest)
    dist.barrier()
    run.saved(step)


for step in range(done + 1, args.steps + 1):
    # 64 samples for all ranks together, the same ones at every number of ranks and after every restart.
    batch = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)).to(device)
    batch = batch[run.rank :: run.world_size]
    loss = (model(batch) - batch).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.record(step, loss=loss.item(), samples=len(batch))
    stop, save_now = run.stop_requested(), run.save_requested()
    if not run.agrees:  # torchrun has no agents that agree on a step; the ranks do so by themselves
        flags = torch.tensor([stop, save_now], dtype=torch.uint8, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, save_now = (bool(flag) for flag in flags)
    if stop or save_now or step % args.save_every == 0 or step == args.steps:
        save(step)
    if stop:
        break
del model  # it holds the process group too, whose threads must end while Python is still there
dist.destroy_process_group()
