"""Experts against plain loops, their losses against the sums they stand for, and the balance of a step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpt.config import ExpertBalance, ExpertMatmul, Ffn
from gpt.model.ffn import (
    AuxiliaryLoss,
    MixtureOfExperts,
    even_product,
    expert_counts,
    move_balance_bias,
    reset_counts,
    set_auxiliary_scale,
)
from gpt.model.gpt import GPT, initialize
from tests.support.learning import Operations
from tests.support.small_models import LLAMA, MINIMAL, MOE, check_gradients, random_tokens, small

KINDS = (Ffn.standard, Ffn.swiglu, Ffn.geglu)


def mixture(**overrides: Any) -> MixtureOfExperts:
    """A layer whose router tells the experts well apart."""
    torch.manual_seed(0)
    layer = MixtureOfExperts(small(**{**MOE, **overrides}))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
        if layer.balance_bias is not None:
            layer.balance_bias.normal_(std=0.1)
    return layer


def one_expert(layer: MixtureOfExperts, expert: int, x_D: Tensor) -> Tensor:
    e, kind = layer.experts, layer.config.expert_ffn
    up_F = e.up[expert] @ x_D
    if kind is Ffn.standard:
        return e.down[expert] @ F.gelu(up_F)
    gate = {Ffn.swiglu: F.silu, Ffn.geglu: F.gelu}[kind]
    return e.down[expert] @ (gate(e.gate[expert] @ x_D) * up_F)


def by_hand(layer: MixtureOfExperts, x_BTD: Tensor) -> Tensor:
    """Token by token, in order, with queues that fill up."""
    config = layer.config
    time, chosen = x_BTD.size(1), config.n_expert_per_token
    limited = layer.training and config.capacity_factor is not None
    places = math.ceil(config.capacity_factor * time * chosen / config.n_expert) if limited else time
    bias = 0 if layer.balance_bias is None else layer.balance_bias
    y_BTD = torch.zeros_like(x_BTD)
    for b, sequence_TD in enumerate(x_BTD):
        queue = [0] * config.n_expert
        for t, x_D in enumerate(sequence_TD):
            scores = (layer.router.weight @ x_D).softmax(0)
            order = (scores.detach() + bias).tolist()
            best = sorted(range(config.n_expert), key=lambda e: -order[e])[:chosen]
            total = sum(scores[e] for e in best) if config.normalizes_experts else 1
            for e in best:
                queue[e] += 1
                if queue[e] <= places:
                    y_BTD[b, t] += scores[e] / total * one_expert(layer, e, x_D)
            if layer.shared is not None:
                y_BTD[b, t] += layer.shared(x_D)
    return y_BTD


CASES = [
    {"expert_ffn": kind, "expert_matmul": matmul, "capacity_factor": capacity}
    for kind, matmul, capacity in itertools.product(KINDS, ExpertMatmul, (None, 0.5, 1.0))
]
MORE = [
    {"n_expert_per_token": 1},
    {"n_expert_per_token": 4},
    {"n_shared_expert": 2},
    {"expert_balance": ExpertBalance.bias},
    {"router_normalize": False, "capacity_factor": 0.25},
    {"n_expert": 1, "n_expert_per_token": 1},
    {"n_expert": 11, "n_expert_per_token": 3, "capacity_factor": 2.0},
]


@pytest.mark.parametrize("parts", CASES + MORE, ids=str)
def test_output_is_that_of_a_plain_loop(parts: dict) -> None:
    layer = mixture(**parts)
    x_BTD = torch.randn(3, 12, 32)
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(layer(x_BTD), by_hand(layer, x_BTD), rtol=1e-4, atol=1e-4)


BATCHED = {"capacity_factor": 0.5, "expert_matmul": ExpertMatmul.grouped, "ffn_hidden": 8}


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (Ffn.swiglu, {}),
        (Ffn.standard, {"capacity_factor": 0.5}),
        (Ffn.geglu, BATCHED),
    ],
    ids=["dropless", "capacity", "batched"],
)
def test_gradient(kind: Ffn, parts: dict) -> None:
    torch.manual_seed(1)
    parts = {**MOE, **MINIMAL, "expert_matmul": ExpertMatmul.loop, **parts, "expert_ffn": kind, "n_shared_expert": 1}
    layer = MixtureOfExperts(small(**parts, balance_coefficient=0.0, z_coefficient=0.0))
    with torch.no_grad():
        layer.router.weight.normal_(std=3)  # far from where a finite difference would change the choice
    check_gradients(layer, torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("parts", [{}, {"capacity_factor": 1.0}], ids=["dropless", "capacity"])
def test_grouped_and_looped_products_have_the_same_gradients(parts: dict) -> None:
    x_BTD = torch.randn(2, 12, 32)
    gradients = []
    for matmul in ExpertMatmul:
        layer = mixture(**parts, expert_matmul=matmul)
        layer(x_BTD).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_equally_many_rows_are_multiplied_without_reading_how_many(precision: torch.dtype) -> None:
    """A grouped product reads that on the host, on most GPUs."""
    layer, x_BTD = mixture(capacity_factor=1.0), torch.randn(2, 12, 32)
    with Operations(lambda name, *_: "grouped_mm" in name) as seen:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            y_BTD = layer(x_BTD)
        y_BTD.float().square().sum().backward()
        assert not seen.found
        layer.eval()(x_BTD)
        assert seen.found, "where a token always finds its experts, these have as many rows as chose them"


def test_gradients_of_a_batched_product_lie_as_the_matrices_do() -> None:
    weight_EOI = torch.randn(4, 16, 32, requires_grad=True)
    ends_E = torch.arange(1, 5, dtype=torch.int32) * 3
    (gradient,) = torch.autograd.grad(even_product(torch.randn(12, 32), weight_EOI, ends_E).sum(), weight_EOI)
    assert gradient.is_contiguous()


def test_no_token_sees_a_later_one() -> None:
    layer = mixture(capacity_factor=0.5)
    x_BTD = torch.randn(2, 12, 32)
    y_BTD = layer(x_BTD)
    changed = x_BTD.clone()
    changed[:, 7:] = torch.randn(2, 5, 32)
    torch.testing.assert_close(layer(changed)[:, :7], y_BTD[:, :7])


def test_the_router_computes_in_fp32_under_autocast() -> None:
    layer, x_BTD = mixture(), torch.randn(2, 12, 32)
    logits_BTE = x_BTD @ layer.router.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.route(x_BTD), logits_BTE)
        assert layer(x_BTD).dtype is torch.bfloat16
        looped = mixture(expert_matmul=ExpertMatmul.loop)(x_BTD)
        torch.testing.assert_close(layer(x_BTD), looped, rtol=3e-2, atol=3e-2)


def losses_by_hand(layer: MixtureOfExperts, x_BTD: Tensor) -> Tensor:
    """Balance and z-loss of every sequence, as the papers have them, summed over the sequences."""
    total = torch.zeros(())
    config = layer.config
    for x_TD in x_BTD:
        logits_TE = x_TD @ layer.router.weight.T
        scores_TE = logits_TE.softmax(-1)
        chosen_TK = scores_TE.topk(config.n_expert_per_token).indices
        for e in range(config.n_expert):
            fraction = config.n_expert / config.n_expert_per_token * (chosen_TK == e).sum() / len(x_TD)
            total = total + config.balance_weight * fraction * scores_TE[:, e].mean()
        total = total + config.z_coefficient * torch.log(logits_TE.exp().sum(-1)).square().mean()
    return total


@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_losses_of_routing_enter_the_gradient(scale: float | None) -> None:
    parts: dict[str, Any] = {"balance_coefficient": 0.3, "z_coefficient": 0.2}
    layer, plain = mixture(**parts), mixture(balance_coefficient=0.0, z_coefficient=0.0)
    if scale is not None:
        set_auxiliary_scale(layer, scale)
    x_BTD = torch.randn(4, 12, 32, requires_grad=True)
    objective = layer(x_BTD).square().mean()
    ours = torch.autograd.grad(objective, [x_BTD, *layer.parameters()])
    theirs_objective = plain(x_BTD).square().mean()
    torch.testing.assert_close(objective, theirs_objective)  # the output does not change
    extra = losses_by_hand(mixture(**parts), x_BTD.detach())
    assert extra > 0.3
    plain.config = layer.config  # for the coefficients
    total = theirs_objective + (1 / 4 if scale is None else scale) * losses_by_hand(plain, x_BTD)
    theirs = torch.autograd.grad(total, [x_BTD, *plain.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def gradients(model: GPT, tokens_BT: Tensor, passes: int, recompute: bool = False) -> tuple[list[Tensor], Tensor]:
    """Gradients of a step over all sequences in so many passes, and the tokens of every expert."""
    sequences = len(tokens_BT)
    set_auxiliary_scale(model, 1 / sequences)
    reset_counts(model)
    model.zero_grad()
    for part_BT in tokens_BT.chunk(passes):
        logits_BTV = through_checkpoints(model, part_BT) if recompute else model(part_BT)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), part_BT.flatten(), reduction="sum")
        (loss / tokens_BT.numel()).backward()
    return [p.grad for p in model.parameters() if p.grad is not None], expert_counts(model).clone()


def through_checkpoints(model: GPT, tokens_BT: Tensor) -> Tensor:
    x_BTD = model.token_embedding(tokens_BT)
    for block in model.blocks:
        x_BTD = checkpoint(block, x_BTD, use_reentrant=False)
    return model.head(model.norm(x_BTD))


def lively(**overrides: Any) -> GPT:
    model = GPT(small(**{**LLAMA, **MOE, **overrides}))
    initialize(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


@pytest.mark.parametrize("parts", [{}, {"capacity_factor": 1.0}], ids=["dropless", "capacity"])
def test_a_step_does_not_depend_on_passes_or_recomputation(parts: dict) -> None:
    model = lively(**parts, balance_coefficient=0.5, z_coefficient=0.5)
    tokens_BT = random_tokens(model.config, 6)
    whole, counts_LE = gradients(model, tokens_BT, passes=1)
    assert counts_LE.sum(1).tolist() == [6 * 12 * 2] * 2
    for passes, recompute in ((3, False), (2, True)):
        others, others_LE = gradients(model, tokens_BT, passes, recompute)
        assert torch.equal(counts_LE, others_LE)
        torch.testing.assert_close(others, whole, rtol=1e-4, atol=1e-6)


def test_compiled_blocks_have_the_same_gradients_and_counts() -> None:
    model = lively(n_layer=1)
    tokens_BT = random_tokens(model.config, 2)
    whole, counts_LE = gradients(model, tokens_BT, passes=1)
    model.blocks[0].compile(backend="aot_eager")
    compiled, compiled_LE = gradients(model, tokens_BT, passes=1)
    assert torch.equal(counts_LE, compiled_LE)
    torch.testing.assert_close(compiled, whole, rtol=1e-4, atol=1e-6)


def test_compiled_passes_count_each_though_two_go_forward_before_one_goes_back() -> None:
    """As in a pipeline. By inductor, which moves what it can from the backward pass to the forward one."""
    total_E = torch.zeros(3)

    def count(x_TE: torch.Tensor, weight_E: torch.Tensor) -> torch.Tensor:
        y_TE = x_TE * weight_E
        return AuxiliaryLoss.apply(y_TE, y_TE.sum(), (y_TE > 0).sum(0).to(torch.int32), total_E)

    weight_E = torch.ones(3, requires_grad=True)
    compiled = torch.compile(count)
    passes = [compiled(torch.tensor(row).repeat(4, 1), weight_E) for row in ([1.0, 1, -1], [1.0, -1, 1])]
    for y_TE in passes:
        y_TE.sum().backward()
    assert total_E.tolist() == [8, 4, 4]


def test_evaluation_counts_nothing_and_drops_nothing() -> None:
    model = lively(capacity_factor=0.25)
    tokens_BT = random_tokens(model.config, 2)
    model.eval()
    dropless = lively().eval()(tokens_BT)
    torch.testing.assert_close(model(tokens_BT), dropless)
    model(tokens_BT).sum().backward()
    assert expert_counts(model).sum() == 0
    assert not torch.allclose(model.train()(tokens_BT), dropless)


def test_biases_move_towards_the_experts_that_were_left_alone() -> None:
    model = lively(expert_balance=ExpertBalance.bias, balance_bias_rate=0.5)
    move_balance_bias(model, torch.tensor([[4.0, 0, 2, 2], [1, 1, 1, 5]]))
    biases = [m.balance_bias.tolist() for m in model.modules() if isinstance(m, MixtureOfExperts)]
    assert biases == [[-0.5, 0.5, 0, 0], [0.5, 0.5, 0.5, -0.5]]
    assert {name for name in model.state_dict() if "balance_bias" in name} == {
        f"blocks.{layer}.ffn.balance_bias" for layer in (0, 1)
    }
    assert not any("counts" in name for name in model.state_dict())


def test_biases_even_out_a_router_that_prefers_one_expert() -> None:
    layer = mixture(expert_balance=ExpertBalance.bias, balance_bias_rate=0.02)
    x_BTD = torch.randn(8, 12, 32)
    x_BTD += layer.router.weight[0].detach() * 0.4
    uneven = []
    for _ in range(60):
        reset_counts(layer)
        layer(x_BTD).sum().backward()
        counts_LE = expert_counts(layer)
        uneven.append((counts_LE.max() / counts_LE.mean()).item() - 1)
        move_balance_bias(layer, counts_LE)
    assert uneven[0] > 0.5
    assert sum(uneven[-10:]) / 10 < uneven[0] / 3


def test_an_expert_starts_the_same_however_many_there_are() -> None:
    few, many = (GPT(small(**{**LLAMA, **MOE, "n_expert": n})) for n in (2, 5))
    for model in (few, many):
        initialize(model, seed=1)
    name = "blocks.0.ffn.experts.down"
    assert torch.equal(few.get_parameter(name), many.get_parameter(name)[:2])
    assert not torch.equal(few.get_parameter(name)[0], few.get_parameter(name)[1])
    assert many.get_parameter(name).std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.1)
    assert many.get_parameter("blocks.0.ffn.experts.up").std().item() == pytest.approx(0.02, rel=0.1)
