"""Muon under every engine: the weights of torch.optim.Muon over whole matrices, and checkpoints that go on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import _muon
from torch.utils.flop_counter import FlopCounterMode

from gpt.accounting import count_hidden
from gpt.config import TrainConfig
from gpt.model.gpt import GPT, initialize
from gpt.parallel.modules import copy_shard
from gpt.parallel.optimizer import Chunk, share_out
from gpt.training.run import Run
from tests.support.distributed import run_distributed
from tests.support.learning import (
    MODELS,
    Chain,
    assert_followed,
    compose,
    follow,
    full_weights,
    held_as_planned,
    start,
    step,
)

MUON = ["optim.optimizer=muon", "model.tie_embeddings=false", "model.n_kv_head=2", "optim.max_micro_batch=4"]
DENSE = [*MUON, "model.n_layer=4", "model.ffn_hidden=42", "model.bias=true", "model.qk_norm=true"]
"""Rows of the feed-forward layer that four ranks do not divide."""
EXPERTS = [
    *MUON,
    *(*MODELS["experts"], "model.n_shared_expert=1", "model.expert_matmul=loop"),
]
FEW = [*EXPERTS, "model.n_expert=2", "model.n_expert_per_token=1"]
PP, FSDP_EP = "parallel=ddp parallel.pp=2", "parallel=fsdp_ep parallel.ep=2"
CASES = {
    1: [("parallel=ddp", DENSE), ("parallel=ddp", EXPERTS)],
    2: [
        *((f"parallel={engine}", DENSE) for engine in ("ddp", "zero1", "fsdp", "tp", "cp", "fsdp_cp")),
        *((f"parallel={engine}", EXPERTS) for engine in ("zero1", "fsdp", "tp", "ep parallel.ep=2")),
        *((f"{PP} parallel.schedule={schedule}", DENSE) for schedule in ("1f1b", "interleaved")),
        (FSDP_EP, EXPERTS),
    ],
    4: [
        *((words, DENSE) for words in ("parallel=fsdp", "parallel=hsdp parallel.dp_shard=2", "parallel=fsdp_tp")),
        *((words, DENSE) for words in ("parallel=tp", "parallel=pp_fsdp", "parallel=ddp parallel.pp=4")),
        (f"{FSDP_EP} parallel.tp=2", EXPERTS),
        (FSDP_EP, FEW),  # each expert sharded inside
    ],
}
"""Ranks -> engines, and the models that they step."""
STEPS, SKIPPED = 10, 4
"""The fourth step has gradients that are not finite, and is skipped."""


def gradient(name: str, shape: Sequence[int], number: int) -> Tensor:
    """Gradient of a whole parameter in a step, the same on all ranks and in the reference."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {number}".encode()))
    made = torch.randn(*shape, generator=generator)
    return made.fill_(torch.nan) if number == SKIPPED else made


def rates() -> Iterator[tuple[int, float]]:
    """Number and learning rate of each step."""
    return ((number, 0.01 / number) for number in range(1, STEPS + 1))


def stepped_by_torch(config: TrainConfig) -> list[dict[str, Tensor]]:
    """Weights after the first and the last step of torch's optimizers, each expert being a parameter of its own."""
    model = GPT(config.model)
    initialize(model, config.seed)
    values = {name: p.detach() for name, p in model.named_parameters()}
    blocks = {name for name, value in values.items() if name.startswith("blocks.") and value.dim() > 1}
    hidden = {
        (name, number): nn.Parameter(matrix.clone())
        for name in blocks
        for number, matrix in enumerate(values[name].unbind() if values[name].dim() > 2 else [values[name]])
    }
    rest = {name: nn.Parameter(value.clone()) for name, value in values.items() if name not in blocks}
    decays = [[p for p in rest.values() if (p.dim() > 1) is is_matrix] for is_matrix in (True, False)]
    optim = config.optim
    adamw = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(decays, (0.1, 0.0), strict=True)],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    muon = torch.optim.Muon(hidden.values(), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    found = []
    for number, lr in rates():
        for optimizer in (adamw, muon):
            for group in optimizer.param_groups:
                group["lr"] = lr
        for name, p in rest.items():
            p.grad = gradient(name, p.shape, number)
        for (name, expert), p in hidden.items():
            whole = gradient(name, values[name].shape, number)
            p.grad = whole[expert] if whole.dim() > 2 else whole
        for optimizer in (adamw, muon) if number != SKIPPED else ():
            optimizer.step()
        if number in (1, STEPS):
            matrices = {name: [p for (of, _), p in hidden.items() if of == name] for name in blocks}
            joined = {n: torch.stack(m).view_as(values[n]).detach().clone() for n, m in matrices.items()}
            found.append(joined | {name: p.detach().clone() for name, p in rest.items()})
    return found


def stepped_by_engine(run: Run) -> list[dict[str, Tensor]]:
    """Weights after the first and the last step with the same gradients."""
    found = []
    for number, lr in rates():
        for name, p in run.engine.trained.named_parameters():  # type: ignore[attr-defined]
            p.grad = torch.zeros_like(p)
            copy_shard(p.grad, gradient(name.removeprefix("module."), p.shape, number))
        run.engine.update(lr, torch.tensor(number == SKIPPED))
        if number in (1, STEPS):
            found.append(full_weights(run))
    return found


def differences(rank: int, size: int, folder: Path) -> list[str]:
    """Return how each engine differs from torch's optimizers, and from the plan of its memory."""
    wrong = []
    for number, (words, model) in enumerate(CASES[size]):
        run = start(rank, size, folder / str(number), *model, *words.split())
        found = stepped_by_engine(run)
        held = held_as_planned(run)
        if rank:
            continue
        if held:
            wrong.append(f"{words}: {held}")
        for after, mine, theirs in zip((1, STEPS), found, stepped_by_torch(run.config), strict=True):
            assert mine.keys() == theirs.keys()
            far = {n: (mine[n] - theirs[n]).abs().max().item() for n in theirs}
            wrong += [f"{words}, step {after}: {name} by {by:.1e}" for name, by in far.items() if not by <= 1e-6]
    return wrong


@pytest.mark.parametrize("ranks", CASES)
def test_every_engine_steps_as_torchs_muon_over_whole_matrices(ranks: int, tmp_path: Path) -> None:
    assert run_distributed(differences, ranks, tmp_path / "runs", timeout_s=300)[0] == []


CHAIN: dict[str, Chain] = {
    "muon": (
        EXPERTS,
        ["parallel=fsdp", "parallel=hsdp parallel.dp_shard=2", "parallel=zero1", "parallel=tp", f"{FSDP_EP}"],
    )
}


def losses(rank: int, size: int, folder: Path, engine: str) -> list[float]:
    """Losses of three steps, or of the next steps of a run in the folder."""
    run = start(rank, size, folder, *EXPERTS, f"parallel={engine}")
    return [step(run)[0] for _ in range(2)]


def test_checkpoints_go_on_bit_for_bit_and_under_another_engine_or_number_of_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    found = run_distributed(follow, 4, folder, CHAIN, timeout_s=300)[0]
    assert_followed(CHAIN["muon"][1], found["muon"])
    for ranks, engine in ((1, "ddp"), (2, "fsdp")):
        followed = run_distributed(losses, ranks, folder / "muon", engine)[0]
        assert followed == pytest.approx(found["muon"].to_come[0][::2], rel=1e-5)


def test_each_replica_shares_its_matrices_out_evenly() -> None:
    def chunk(name: str, row: int) -> Chunk:
        return name, [4, 3], [row, 0], [2, 3]

    names = ["a", "b", "c", "d"]
    parts = share_out([[chunk(name, row) for name in names] for row in (0, 2, 0, 2)])  # two replicas of two ranks
    owners = {(p.matrix.parameter, p.rank): p.owner for p in parts}
    assert [owners[name, 0] for name in names] == [owners[name, 1] for name in names] == [0, 1, 0, 1]
    assert [owners[name, 2] for name in names] == [owners[name, 3] for name in names] == [2, 3, 2, 3]
    assert [p.place for p in parts if p.rank == 3] == [(slice(2, 4), slice(0, 3))] * 4
    assert all((p.elements, p.whole) == (6, (4, 3)) for p in parts)


def test_the_plan_counts_what_torch_multiplies() -> None:
    config = compose(*EXPERTS).model
    with torch.device("meta"):
        blocks = GPT(config).blocks
    matrices = [m for p in blocks.parameters() if p.dim() > 1 for m in (p.unbind() if p.dim() > 2 else [p])]
    with FlopCounterMode(display=False) as counter:
        for matrix in matrices:
            _muon._zeropower_via_newtonschulz(matrix.detach(), (3.4445, -4.7750, 2.0315), 1, 1e-7)
    assert count_hidden(config) == (sum(m.numel() for m in matrices), counter.get_total_flops())
