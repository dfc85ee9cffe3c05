r"""Train with DeepSpeed's ZeRO and talk to the launcher; on GPUs, or on CPUs over gloo.

On one node and on two, typed in the root of the checkout; ends in a scaling table:

    python -m launch -m nodes=1,2 ranks_per_node=1 workload=script script.path=examples/deepspeed_zero.py \
        script.options.stage=2 script.options.steps=500 script.max_steps=500 script.resumes=true

A checkpoint of ZeRO is loaded by as many ranks as wrote it.
"""

import argparse
import os
from pathlib import Path

import torch

from launch import worker

run = worker.attach()  # before the slow import: a request to stop that comes meanwhile is kept
on_gpu = torch.cuda.is_available()
os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")  # read when deepspeed is imported
import deepspeed  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--stage", type=int, default=1)
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--save-every", type=int, default=50)
args = parser.parse_args()

# DeepSpeed's shared-memory collectives would take a minute to compile at the first start; gloo does without them.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("nccl" if on_gpu else "gloo")
device = torch.device("cuda", run.local_rank) if on_gpu else torch.device("cpu")
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).to(device)
engine, *_ = deepspeed.initialize(
    model=layers,
    optimizer=torch.optim.AdamW(layers.parameters(), lr=1e-3),  # DeepSpeed's own Adam is compiled at the first start
    config={
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 64 // run.world_size,
        "zero_optimization": {"stage": args.stage, "reduce_bucket_size": 1_000_000},  # allocated whole: 2 GB by default
    },
)

checkpoints = run.checkpoint_dir or Path("checkpoints")
done = 0
if (checkpoints / "latest").exists():
    _, state = engine.load_checkpoint(str(checkpoints))
    done = state["step"]

for step in range(done + 1, args.steps + 1):
    batch = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)).to(device)
    batch = batch[run.rank :: run.world_size]
    loss = (engine(batch) - batch).square().mean()
    engine.backward(loss)
    engine.step()
    run.record(step, loss=loss.item(), samples=len(batch), grad_norm=float(engine.get_global_grad_norm() or 0))
    stop, save_now = run.stop_requested(), run.save_requested()
    if stop or save_now or step % args.save_every == 0 or step == args.steps:
        run.phase("saving", step)
        engine.save_checkpoint(str(checkpoints), tag=f"step_{step}", client_state={"step": step})  # on every rank
        run.saved(step)
    if stop:
        break
