r"""Train with DDP and know nothing of the launcher: print every step, go on from a checkpoint of one's own.

On one node and on two, typed in the root of the checkout; ends in a scaling table:

    python -m launch -m nodes=1,2 ranks_per_node=1 workload=script script.path=examples/plain_ddp.py \
        script.options.steps=2000 script.max_steps=2000 script.resumes=true script.work_per_step=64 \
        'script.progress=step (?P<step>\d+): loss (?P<loss>[\d.]+)'

The same file without the launcher: torchrun --nproc-per-node=2 examples/plain_ddp.py --steps 200
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a process group, which its functions would keep to Python's end
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--save-every", type=int, default=50)
args = parser.parse_args()

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(64, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 64))
model = DistributedDataParallel(layers.to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

newest = Path(os.environ.get("LAUNCH_CHECKPOINT_DIR", "checkpoints")) / "newest.pt"
done = 0
if newest.exists():
    state = torch.load(newest, map_location=device)
    layers.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    done = state["step"]

for step in range(done + 1, args.steps + 1):
    # 64 samples for all ranks together, the same ones at every number of ranks and after every restart.
    batch = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)).to(device)
    batch = batch[dist.get_rank() :: dist.get_world_size()]
    loss = (model(batch) - batch).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.6f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            newest.parent.mkdir(parents=True, exist_ok=True)
            state = {"step": step, "model": layers.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, newest.with_suffix(".tmp"))
            newest.with_suffix(".tmp").replace(newest)  # a kill in the middle leaves the one before whole
del model  # it holds the process group too, whose threads must end while Python is still there
dist.destroy_process_group()
