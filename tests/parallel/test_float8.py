"""Float8 products, and the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt.config import Float8, Recompute, TrainConfig
from gpt.model.gpt import GPT
from gpt.parallel.distributed import World
from gpt.parallel.modules import convert_linears, prepare_blocks
from gpt.parallel.optimizer import AdamW
from gpt.training.checkpoints import load
from gpt.training.execution import has_float8, settle_execution
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from tests.support.distributed import run_distributed
from tests.support.learning import MODELS, compose, control_group, save, start, step
from tests.support.planning import refused
from tests.support.small_models import LLAMA, MOE, loss_of, random_tokens, small

pytest.importorskip("torchao")
LARGEST = 448.0
"""Of float8_e4m3fn: four bits of exponent, three of mantissa, and no infinity."""


def rounded(values: Tensor, recipe: Float8) -> Tensor:
    """Scale the largest magnitude, of all or of each row, to the largest number of e4m3, round, and scale back.

    Rows are scaled by powers of two, which round nothing by themselves.
    """
    if recipe is Float8.tensorwise:
        scale = LARGEST / values.abs().max().double()
    else:
        scale = (LARGEST / values.abs().amax(dim=-1, keepdim=True).double()).log2().floor().exp2()
    return ((values * scale).to(torch.float8_e4m3fn).double() / scale).float()


@pytest.mark.parametrize("recipe", [Float8.tensorwise, Float8.rowwise])
def test_linear_layers_of_the_blocks_multiply_rounded_factors(recipe: Float8) -> None:
    model = GPT(small(**LLAMA))
    plain = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = list(model.state_dict())
    convert_linears(model, TrainConfig(float8=recipe, float8_emulate=True, model=model.config))
    assert list(model.state_dict()) == names, "a checkpoint is that of any precision"
    changed = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert changed == plain.keys() - {"head"} and len(changed) == 7 * model.config.n_layer
    torch.manual_seed(0)
    for name in sorted(changed)[:3]:
        layer = model.get_submodule(name)
        inputs = torch.randn(6, 32, plain[name].shape[1])
        expected = F.linear(rounded(inputs, recipe), rounded(plain[name].detach(), recipe))
        found, exact = layer(inputs), F.linear(inputs, plain[name])
        assert (found - expected).norm() < 2e-3 * expected.norm(), "only the sums are rounded otherwise"
        assert 1e-2 < (found - exact).norm() / exact.norm() < 0.1, "three bits of mantissa"


def test_routers_stay_exact_and_recomputation_changes_no_bit() -> None:
    def gradients(recompute: Recompute) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = GPT(small(**LLAMA | MOE))
        config = TrainConfig(float8=Float8.rowwise, float8_emulate=True, recompute=recompute, model=model.config)
        convert_linears(model, config)
        assert type(model.blocks[0].ffn.router) is nn.Linear
        prepare_blocks(model, config)
        tokens_BT = random_tokens(model.config, 3)
        loss_of(model, tokens_BT).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    kept = gradients(Recompute.none)
    for recompute in (Recompute.selective, Recompute.full):
        torch.testing.assert_close(gradients(recompute), kept, rtol=0, atol=0)


WORDS = ("float8_emulate=true", *MODELS["untied, grouped queries"])
ENGINES = {"ddp": "parallel=ddp", "zero1": "parallel=zero1", "fsdp": "parallel=fsdp", "pp": "parallel=pp parallel.pp=2"}


def losses(rank: int, size: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for recipe in ("none", "tensorwise", "rowwise"):
        emulate = WORDS[1:] if recipe == "none" else WORDS
        for name, words in ENGINES.items() if recipe == "rowwise" else [("ddp", ENGINES["ddp"])]:
            run = start(rank, size, folder / f"{recipe} {name}", *emulate, *words.split(), f"float8={recipe}")
            found[recipe, name] = [step(run)[0] for _ in range(3)]
    run = start(rank, size, folder / "rowwise fsdp", *WORDS, "parallel=fsdp", "float8=rowwise")
    step(run)
    save(run)
    further = [step(run)[0] for _ in range(2)]
    again = start(rank, size, folder / "rowwise fsdp", *WORDS, "parallel=fsdp", "float8=rowwise")
    load(again)
    found["resumed"] = further == [step(again)[0] for _ in range(2)]
    return found


def test_every_engine_learns_the_same_and_nearly_what_whole_precision_learns(tmp_path: Path) -> None:
    found, other = run_distributed(losses, 2, tmp_path / "runs")
    assert found == other and found["resumed"] is True
    exact, rowwise = torch.tensor(found["none", "ddp"]), torch.tensor(found["rowwise", "ddp"])
    for recipe in ("tensorwise", "rowwise"):
        learned = torch.tensor(found[recipe, "ddp"])
        assert 0 < (learned - exact).abs().max() < 1e-2 and learned[-1] < learned[0]
    assert found["tensorwise", "ddp"] != found["rowwise", "ddp"]
    for name in ENGINES:
        # Micro-batches of other sizes give other sums, whose last bits decide what a factor is rounded to.
        torch.testing.assert_close(torch.tensor(found["rowwise", name]), rowwise, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["precision=fp16"], "float8=rowwise with precision=fp16", "precision=bf16"),
        (["parallel=tp", "parallel.tp=2"], "with parallel.tp=2", "parallel.tp=1"),
        (["parallel=zero2"], "with DeepSpeed", "parallel=fsdp"),
        (["model.n_embd=40", "model.n_head=4"], "model.n_embd of 40", "whose model.n_embd is 48"),
        (["model.n_embd=48", "model.n_head=6", "model.n_kv_head=1"], "key-value heads of 8", "heads is 16"),
        (["float8=none", "float8_emulate=true"], "float8_emulate=true with float8=none", "float8=rowwise"),
    ],
)
def test_what_it_does_not_go_together_with_is_refused(words: list[str], found: str, fix: str) -> None:
    refused(compose, "float8=rowwise", *words, said=found, fix=fix)


def test_without_the_package_its_extra_is_named() -> None:
    with mock.patch("gpt.config.is_importable", return_value=False):
        assert "[float8]" in str(refused(compose, "float8=rowwise", said="package torchao is not installed"))


SETTLED = {
    "(8, 9)": ([(9, 0), (8, 9)], "false"),
    "(8, 6) emulated": ([(9, 0), (8, 6)], "true"),
    "(8, 6)": ([(9, 0), (8, 6)], "false"),
}
"""Compute capabilities of the ranks' GPUs, and whether float8 is emulated."""


def settled_on(rank: int, size: int, folder: Path) -> dict[str, str]:
    """What a rank settles ``float8`` on, or its refusal, in each case."""
    found = {}
    world = World(rank, size, rank, size, 0, torch.device("cuda", rank), control_group())
    for name, (capabilities, emulate) in SETTLED.items():
        config = compose("precision=bf16", "tf32=false", "float8=rowwise", f"float8_emulate={emulate}")
        with mock.patch.object(torch.cuda, "get_device_capability", lambda device, of=capabilities: of[device.index]):
            try:
                found[name] = settle_execution(config, RunFolder(folder), world).float8.name
            except ConfigError as refusal:
                found[name] = str(refusal)
    return found


def test_ranks_whose_gpus_were_not_known_refuse_it_together(tmp_path: Path) -> None:
    told, other = run_distributed(settled_on, 2, tmp_path)
    assert told == other and [told["(8, 9)"], told["(8, 6) emulated"]] == ["rowwise", "rowwise"]
    assert "2 ranks, of which 1 have GPUs that do not compute in it" in told["(8, 6)"]


@pytest.mark.parametrize(
    ("architecture", "expected"), [("gfx90a:sramecc+:xnack-", False), ("gfx942:sramecc+", True), ("gfx950", True)]
)
def test_gpus_of_amd_are_told_by_their_architecture(architecture: str, expected: bool) -> None:
    device = mock.Mock(gcnArchName=architecture)
    with (
        mock.patch.object(torch.version, "hip", "6.4"),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=device),
    ):
        assert has_float8(torch.device("cuda", 0)) is expected


# AdamW steps the shards of DTensors bit for bit as torch steps the DTensors, and plain parameters beside them.


SHAPES = {"rows": (6, 5), "uneven rows": (5, 3), "replica": (4,)}
OURS, TORCHS = AdamW, torch.optim.AdamW


class FusedSteps(TorchDispatchMode):
    """Counts the fused steps, and those among them that were given a DTensor."""

    made, on_dtensors = 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation._schema.name.startswith("aten::_fused_adam"):
            self.made += 1
            self.on_dtensors += any(isinstance(tensor, DTensor) for tensor in tree_leaves((args, kwargs)))
        return operation(*args, **(kwargs or {}))


def steps(
    kind: type[torch.optim.AdamW], with_plain: bool, sum_is_due: bool = False
) -> tuple[dict[str, list[Tensor]], FusedSteps]:
    """Parameter and moments after three steps, by name, each whole."""
    mesh = init_device_mesh("cpu", (2,))
    drawn = torch.Generator().manual_seed(7)
    placements = {name: Replicate() if name == "replica" else Shard(0) for name in SHAPES}

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=drawn)
        return distribute_tensor(values, mesh, [placements[name]]) if name in placements else values

    shapes = SHAPES | ({"plain": (3, 3)} if with_plain else {})
    parameters = {name: nn.Parameter(draw(name, shape)) for name, shape in shapes.items()}
    optimizer = kind(parameters.values(), lr=0.01, weight_decay=0.1, fused=True)
    with FusedSteps() as seen:
        for _ in range(3):
            for name, parameter in parameters.items():
                parameter.grad = draw(name, shapes[name])
                if sum_is_due and name == "replica":  # one half is each rank's, and no bit is lost
                    half = 0.5 * parameter.grad.to_local()  # type: ignore[attr-defined]
                    parameter.grad = DTensor.from_local(half, mesh, [Partial()])
            optimizer.step()
    found = {}
    for name, parameter in parameters.items():
        tensors = [parameter, *(optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq"))]
        assert [isinstance(tensor, DTensor) for tensor in tensors] == [name in placements] * 3
        found[name] = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    return found, seen


def step_both(rank: int, size: int) -> None:
    theirs, seen_by_torch = steps(TORCHS, False)
    ours, seen = steps(OURS, False)
    assert (seen_by_torch.made, seen.made) == (seen_by_torch.on_dtensors, 3), "it is DTensors that torch steps"
    assert seen.on_dtensors == 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    due, _ = steps(OURS, False, sum_is_due=True)
    torch.testing.assert_close(due["replica"], theirs["replica"], rtol=0, atol=0)
    beside, seen = steps(OURS, True)
    assert (seen.made, seen.on_dtensors) == (3, 0), "one step for all"
    assert all(tensor.any() for tensor in beside["plain"])


def test_shards_are_stepped_as_torch_steps_dtensors() -> None:
    run_distributed(step_both, 2)
