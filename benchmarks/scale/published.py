"""Published throughput compared with the prediction of the cost model at its defaults.

    python -m benchmarks.scale.published          # half a minute on one core; trains nothing
    python -m benchmarks.scale.published --write  # and write published.md

Nothing is fitted. Devices and links have the figures of the vendors' data sheets (gpt/accounting/accelerators.csv), and
a rank computes at half of its peak in every shape. The error is predicted over published, minus one. A projection of
your own sweep measures this rate on the smallest point of the sweep, so that only the error of the scaling remains.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.page import keep, stamp
from launch.config.compose import compose_launch, typed_config, workload_of
from launch.runs.folder import RunFolder
from launch.workload import PlanRequest, StepTime

MEGATRON = (
    (24, 2304, 24, 1, 1, 32, 512, 137),
    (32, 3072, 30, 2, 1, 64, 512, 138),
    (32, 4096, 36, 4, 1, 128, 512, 142),
    (48, 6144, 40, 8, 1, 256, 1024, 135),
    (64, 8192, 48, 8, 2, 512, 1536, 138),
    (80, 10240, 60, 8, 4, 1024, 1792, 140),
    (96, 12288, 80, 8, 8, 1536, 2304, 148),
    (128, 16384, 96, 8, 16, 1920, 2160, 155),
    (128, 20480, 105, 8, 35, 2520, 2520, 163),
    (160, 25600, 128, 8, 64, 3072, 3072, 163),
)
"""Rows of table 1 of Narayanan et al., Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM,
arXiv 2104.04473: heads, width, layers, tensor parallel size, pipeline parallel size, number of A100s, batch, and
TFLOP/s of a GPU with recomputation included.
"""
SEQUENCE, VOCABULARY = 2048, 51200
"""Sequence length and vocabulary size of all models in ``MEGATRON`` (section 5.1 of the paper)."""
TORCHTITAN = {"eager": {8: 5762, 128: 5605}, "torch.compile": {8: 6667, 128: 6514}}
"""Mode -> number of H100s -> published tokens per second and GPU of Llama 3.1 8B with FSDP, two sequences of 8192
tokens on each GPU, selective recomputation, bf16. Source: github.com/pytorch/torchtitan,
benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3. These H100s have 96 GB and draw at most 500 W.
"""
LLAMA_8B = (
    *("model=llama_1p36b", "model.n_layer=32", "model.n_embd=4096", "model.n_head=32", "model.n_kv_head=8"),
    *("model.ffn_hidden=14336", "model.vocab_size=128256", "model.block_size=8192", "parallel=fsdp"),
    *("recompute=selective", "optim.max_micro_batch=2"),
)
SMALL = {1: (100.0, 68), 2: (96.0, 36), 4: (92.0, 19), 8: (89.0, 10)}
"""Number of GPUs -> efficiency in percent, and days of training, of a GPT with 117 million parameters. The projects
that this one grew from report these figures; devices and batch are not known.
"""
SEQUENCES_EACH = (1, 2, 4, 8)
SMALL_GPUS = ("Tesla V100-SXM2-16GB", "NVIDIA A100-SXM4-40GB", "NVIDIA GeForce RTX 3090")


UNKNOWN = """## What remains unknown

- A rate by the shape of matrix products is not in the model: half of the peak is too fast for narrow models (1.7 B with
  a width of 2304) and for the H100s of torchtitan, and too slow for the widest. No GPU was there to measure rates by
  size; a projection of a sweep takes that of its smallest
  point.
- Overlap is taken as whole: kernels of collectives take nothing from those that compute. Of the losses of the small
  model the cost model finds none where the backward pass is longer than the all-reduce; it comes to what was published
  only without NVLink and with one or two sequences a step. Slow ranks, input and host are not in it.
- Megatron's table names neither micro-batches nor stages a rank. The small model's figures name neither devices, links
  nor batch, so that no assumption about it can be checked."""


@dataclass(frozen=True)
class Case:
    """A published run: overrides, numbers of nodes and of GPUs per node, and the name of the GPU. The config is
    composed as the launcher composes it."""

    words: tuple[str, ...]
    nodes: int
    gpus: int
    device: str

    def step(self) -> StepTime:
        """Return the step time that the cost model predicts."""
        words = [*self.words, f"nodes={self.nodes}", "cluster=slurm", f"cluster.gpus_per_node={self.gpus}"]
        config = typed_config(compose_launch([*words, f"cluster.gpu_name='{self.device}'"]))
        workload: Any = workload_of(config)
        request = PlanRequest(
            overrides=tuple(words),
            folder=RunFolder(Path("outputs") / "published"),
            is_local=False,
            nodes=self.nodes,
            ranks_per_node=self.gpus,
            cluster=config.cluster,
            local_gpus=0,
        )
        found = workload.step_time(config, request)
        assert isinstance(found, StepTime)
        return found


def table(titles: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows))


def error(predicted: float, published: float) -> str:
    """Return ``predicted / published - 1`` as text."""
    return f"{100 * (predicted / published - 1):+.0f} %"


WHOLE = ("parallel.sequence_parallel=false",)
"""Overrides for rows of ``MEGATRON`` without a pipeline: no sequence parallelism, which is newer than the paper."""


def interleaved(layers: int) -> tuple[str, ...]:
    """Return overrides for the interleaved schedule of the paper's section 5.1. ``layers`` is the number of layers of a
    rank. A rank gets the smallest number of stages, at least 2, that divides its layers.

    The overrides set sequence parallelism in place of the paper's scatter and gather between stages (section 4.1). With
    either of the two, a rank sends only its part of the hidden states to the next stage. The number of bytes for tensor
    parallelism is the same, too.
    """
    stages = next(count for count in range(2, layers + 1) if layers % count == 0)
    return ("parallel.schedule=interleaved", f"parallel.stages_per_rank={stages}", "parallel.sequence_parallel=true")


def megatron() -> str:
    """Return the table for ``MEGATRON``: TFLOP/s of a GPU, with the FLOPs of the paper's equation 3."""
    rows = []
    for heads, width, layers, tp, pp, gpus, batch, published in MEGATRON:
        words = (
            *("model=gpt2_124m", f"model.n_layer={layers}", f"model.n_embd={width}", f"model.n_head={heads}"),
            *(f"model.block_size={SEQUENCE}", f"model.vocab_size={VOCABULARY}", "recompute=full", "precision=bf16"),
            *(f"optim.global_batch={batch}", "optim.max_micro_batch=1", "parallel=ddp", f"parallel.tp={tp}"),
            *(f"parallel.pp={pp}", "model.dropout=0.0", *(interleaved(layers // pp) if pp > 1 else WHOLE)),
        )
        step = Case(words, gpus // 8, 8, "NVIDIA A100-SXM4-80GB").step()
        inside = 1 + SEQUENCE / (6 * width) + VOCABULARY / (16 * layers * width)
        flops = 96 * batch * SEQUENCE * layers * width**2 * inside
        predicted = flops / step.step_s / gpus / 1e12
        waits = sum(step.communication_s.values()) / step.step_s
        size = layers * width**2 * 12 * (1 + 13 / (12 * width) + (VOCABULARY + SEQUENCE) / (12 * layers * width))
        known = [f"{size / 1e9:.1f} B", str(gpus), f"{tp} x {pp}", str(published), f"{predicted:.0f}"]
        rows.append([*known, error(predicted, published), f"{step.bubble_s / step.step_s:.0%}", f"{waits:.0%}"])
    titles = ["model", "A100s", "tp x pp", "published TFLOP/s", "predicted", "error", "bubble", "links"]
    return table(titles, rows)


def torchtitan() -> str:
    """Return the table for ``TORCHTITAN``: tokens per second and GPU, and the ratio of this rate on 128 GPUs to that on
    8."""
    rates = {}
    for gpus in (8, 128):
        words = (*LLAMA_8B, f"optim.global_batch={2 * gpus}", "precision=bf16")
        step = Case(words, gpus // 8, 8, "NVIDIA H100 80GB HBM3").step()
        rates[gpus] = 2 * 8192 / step.step_s
    rows = []
    for name, published in TORCHTITAN.items():
        for gpus, rate in published.items():
            rows.append([name, str(gpus), f"{rate:,}", f"{rates[gpus]:,.0f}", error(rates[gpus], rate)])
        kept = [published[128] / published[8], rates[128] / rates[8]]
        rows.append([name, "128 over 8", f"{kept[0]:.1%}", f"{kept[1]:.1%}", error(kept[1], kept[0])])
    return table(["Llama 3.1 8B", "H100s", "published tokens/s a GPU", "predicted", "error"], rows)


def small() -> str:
    """Return the table for ``SMALL``: efficiency, and days in relation to one GPU."""
    rows = []
    for device in SMALL_GPUS:
        precision = "fp16" if "V100" in device else "bf16"
        words = ("model=gpt2_124m", "parallel=ddp", "optim.global_batch=512", f"precision={precision}")
        seconds = {gpus: Case(words, 1, gpus, device).step().step_s for gpus in SMALL}
        for gpus, (efficiency, days) in SMALL.items():
            if gpus == 1:
                continue
            predicted = seconds[1] / seconds[gpus] / gpus
            took = SMALL[1][1] * seconds[gpus] / seconds[1]
            shares = [f"{efficiency:.0f} %", f"{100 * predicted:.1f} %", error(100 * predicted, efficiency)]
            rows.append([device, str(gpus), *shares, str(days), f"{took:.1f}", error(took, days)])
    titles = [
        "assumed device",
        "GPUs",
        "published efficiency",
        "predicted",
        "error",
        "published days",
        "predicted",
        "error",
    ]
    return table(titles, rows)


def small_batches() -> str:
    """Return a table of the efficiency for several batch sizes, because the published batch is not known."""
    several = [gpus for gpus in SMALL if gpus > 1]
    rows = [["published", "unknown", *(f"{SMALL[gpus][0]:.0f} %" for gpus in several)]]
    for device in SMALL_GPUS:
        words = ("model=gpt2_124m", "parallel=ddp", f"precision={'fp16' if 'V100' in device else 'bf16'}")
        for each in SEQUENCES_EACH:
            seconds = {}
            for gpus in SMALL:
                batch = (f"optim.global_batch={each * gpus}", f"optim.max_micro_batch={each}")
                seconds[gpus] = Case((*words, *batch), 1, gpus, device).step().step_s
            rows.append([device, str(each), *(f"{seconds[1] / seconds[gpus]:.1%}" for gpus in several)])
    return table(["assumed device", "sequences a step and GPU", *(f"{gpus} GPUs" for gpus in several)], rows)


def main() -> int:
    """Print the tables. With ``--write``, also write the page. Returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--write", action="store_true", help="keep the result beside this program")
    given = parser.parse_args()
    parts = [
        f"{stamp('no device at all')}",
        "## Megatron-LM, 1.7 to 1008 billion parameters\n\narXiv 2104.04473, table 1: A100s of 80 GB, DGX systems with "
        "200 Gbit/s a GPU, sequences of 2048, all activations recomputed. Micro-batches are not in the table; here "
        "they are of one sequence. Pipelines are interleaved, with as few stages a rank as divide its layers, and send "
        "what tensor parallel ranks share in parts, as in its section 5.1.",
        megatron(),
        "## torchtitan, Llama 3.1 8B with FSDP\n\ngithub.com/pytorch/torchtitan, "
        "benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3.",
        torchtitan(),
        "## A GPT of 117M parameters on 1 to 8 GPUs\n\nThe figures of the projects that this one grew from, which name "
        "neither devices nor batch: the batch is GPT-2's (512 sequences of 1024), and three devices are tried.",
        small(),
        "With a batch that grows with the GPUs, and so much smaller steps:",
        small_batches(),
        UNKNOWN,
    ]
    text = "\n\n".join(parts)
    print(text)
    if given.write:
        keep(Path(__file__), "Published throughput, and what the cost model predicts", __doc__, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
