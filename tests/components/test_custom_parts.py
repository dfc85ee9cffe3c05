"""Parts of the user: counted as torch and autograd count them, refused in words, and parallelized as they state."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt.accounting import forward_flops, training_flops
from gpt.components import optimizer_state, owner_of, source_digest
from gpt.config import DataConfig, ModelConfig, Norm, Precision, Recompute
from gpt.conversion import choose_adapter
from gpt.data.spec import build_spec
from gpt.model.gpt import GPT, Sampling, generate_tokens, initialize, make_generators
from gpt.planning.rank_shards import activation_bytes, parameter_shards
from gpt.topology import ParallelDims
from gpt.topology.check_dims import check_parallel_dims
from launch.errors import ConfigError
from tests.accounting.test_counts import assert_counts_equal
from tests.support.commands import ROOT
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import Case, assert_all_same, learn_alone, learn_cases
from tests.support.planning import refused
from tests.support.small_models import kept_bytes, optim, random_tokens, small

EXAMPLE = ROOT / "examples" / "components"
NAMES = {
    "norm": "gpt_parts.norms:DynamicTanh",
    "position": "gpt_parts.positions:Sinusoids",
    "attention": "gpt_parts.attention:WindowAttention",
    "ffn": "gpt_parts.ffn:SquaredReluFfn",
}


@pytest.fixture(autouse=True)
def example_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))


def custom(**changes: Any) -> ModelConfig:
    return small(**{**NAMES, "options": {"window": 4}, **changes})


@pytest.mark.parametrize(
    ("keys", "qk_norm"), [(["norm", "ffn"], True), (["position"], False), (["attention"], True), ([*NAMES], False)]
)
def test_counts_are_those_of_the_model_that_is_built(keys: list[str], qk_norm: bool) -> None:
    config = small(**{key: NAMES[key] for key in keys}, qk_norm=qk_norm, n_kv_head=2)
    assert_counts_equal(config)
    model = GPT(config)
    initialize(model, seed=1)
    # A kernel of ours computes the scores once more in its backward pass, which is not counted; nor is that of a mask.
    if "attention" not in keys:
        config.attention = type(config.attention)["manual"]  # type: ignore[index]
        with FlopCounterMode(display=False) as counter:
            GPT(config)(random_tokens(config, 3)).sum().backward()
        assert training_flops(config, 3).palm == counter.get_total_flops()
    else:
        # torch's counter does not see the CPU's kernel with a mask, but the products of the plain one.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(random_tokens(config, 3))
        assert forward_flops(config, 3).palm == counter.get_total_flops()


def saved_by_a_block(config: ModelConfig, sequences: int) -> int:
    """Bytes that autograd keeps for the backward pass of a block, weights and tables not counted."""
    model = GPT(config)
    initialize(model, seed=1)
    x_BTD = torch.randn(sequences, config.block_size, config.n_embd, requires_grad=True)
    return kept_bytes(model, lambda: model.blocks[0](x_BTD))


@pytest.mark.parametrize("key", ["norm", "ffn", "attention"])
def test_planned_activations_are_what_autograd_keeps(key: str) -> None:
    config = small(**{key: NAMES[key]}, n_layer=1)
    planned = activation_bytes(config, 3, Precision.fp32, Recompute.none).block
    measured_bytes = saved_by_a_block(config, 3)
    assert measured_bytes <= planned <= 1.2 * measured_bytes, (planned, measured_bytes)
    half = activation_bytes(config, 3, Precision.bf16, Recompute.none).block
    selective = activation_bytes(config, 3, Precision.fp32, Recompute.selective)
    assert half < 1.5 * planned and selective.recomputed < planned


def test_values_begin_as_the_part_says_and_else_by_the_rule() -> None:
    models = [GPT(custom(options={"alpha": 0.7})) for _ in range(2)]
    for model in models:
        initialize(model, seed=1)
    state, again = (model.state_dict() for model in models)
    torch.testing.assert_close(again, state, rtol=0, atol=0)
    assert state["blocks.1.ffn_norm.alpha"].item() == pytest.approx(0.7)
    assert torch.equal(state["norm.gain"], torch.ones_like(state["norm.gain"]))
    assert not state["norm.bias"].any()
    assert 0 < state["blocks.0.ffn.up.weight"].std() < 0.05


def test_the_cache_of_an_attention_of_ones_own_changes_nothing() -> None:
    config = custom(block_size=16, options={"window": 5})
    model = GPT(config).eval()
    initialize(model, seed=3)
    prompt = random_tokens(config, 2)[:, :6]
    made = [
        torch.stack(list(islice(generate_tokens(model, prompt, 50, Sampling(0.8), make_generators(5, 2), cached), 9)))
        for cached in (True, False)
    ]
    assert torch.equal(*made)


BAD = """
import torch
from torch import nn

class Linear(nn.Module):
    def __init__(self, config, width):
        super().__init__()
        self.{name} = {value}
    def forward(self, x):
        return {result}

class NoWidth(Linear):
    def __init__(self, config):
        super().__init__(config, 4)

class NoInput(Linear):
    def forward(self):
        return 0

class Greedy(Linear):
    parallel = ("tp", "ep")

NUMBER = 3
class Plain: pass
"""


@pytest.mark.parametrize(
    ("name", "filled", "found", "fix"),
    [
        ("rmsnrm", {}, "model.norm=rmsnrm", "model.norm=rmsnorm"),
        ("nowhere.at:All", {}, "there is no module nowhere", "PYTHONPATH=FOLDER"),
        ("{module}:Linea", {}, "has no Linea", "{module}:Linear"),
        ("{module}:NUMBER", {}, "a int", "MODULE:CLASS"),
        ("{module}:Plain", {}, "the class Plain", "MODULE:CLASS"),
        ("{module}:NoWidth", {}, "takes 2 positional arguments but 3 were given", "docs/components.md"),
        ("{module}:NoInput", {}, "takes 1 positional argument but 2 were given", "docs/components.md"),
        ("{module}:Linear", {"result": "x.sum()"}, "it gives ()", "docs/components.md"),
        ("{module}:Linear", {"result": "x * x.max().item()"}, "fails on a tensor", "docs/components.md"),
        ("{module}:Linear", {"value": "nn.Parameter(torch.ones(()))"}, "without a dimension", "torch.empty(1)"),
        ("{module}:Linear", {"value": "nn.Buffer(torch.ones(3), persistent=False)"}, "no checkpoint holds", "reset_"),
        ("{module}:Greedy", {}, "parallel = ('tp', 'ep')", "parallel = ('tp',)"),
        ("{module}:Linear", {"value": "1/0"}, "ZeroDivisionError", "docs/components.md"),
    ],
)
def test_a_part_that_cannot_be_used_is_refused_in_three_parts(
    name: str, filled: dict[str, str], found: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"bad_{abs(hash((name, *filled.values())))}"
    (tmp_path / f"{module}.py").write_text(BAD.format(**{"name": "weight", "value": "1", "result": "x", **filled}))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = config_from([])
    config.model.norm = name.format(module=module)

    def check() -> None:
        config.validate()
        check_parallel_dims(config, 1)

    refused(check, found=found, fix=fix.format(module=module))


@pytest.mark.parametrize(
    ("words", "parallel", "part"),
    [
        ([f"model.attention={NAMES['attention']}"], "parallel=tp", "which of attention only ours can"),
        ([f"model.position={NAMES['position']}"], "parallel=pp", 'parallel = ("pp",) in the class'),
    ],
)
def test_parallelism_that_a_part_says_nothing_of_is_refused(words: list[str], parallel: str, part: str) -> None:
    config = config_from([*words, parallel, "model.n_kv_head=4"])
    assert part in refused(check_parallel_dims, config, 2, fix="parallel=fsdp").expected


def test_deepspeed_float8_and_transformers_refuse_in_words() -> None:
    with pytest.raises(ConfigError, match=r"float8=rowwise with model\.ffn=gpt_parts\.ffn:SquaredReluFfn"):
        config_from(["float8=rowwise", f"model.ffn={NAMES['ffn']}"]).validate()
    config = config_from(["optim.optimizer=gpt_parts.optim:Lion", "parallel=zero2"])
    with pytest.raises(ConfigError, match=r"optim\.optimizer=gpt_parts\.optim:Lion with parallel\.strategy=deepspeed"):
        check_parallel_dims(config, 2)
    ours = custom(norm=Norm.layernorm, position="learned", attention="sdpa", options={})
    refused(choose_adapter, ours, said="model.ffn=gpt_parts.ffn:SquaredReluFfn", fix="--format torch")


def test_state_of_an_optimizer_is_that_of_a_step_and_its_arguments_are_checked() -> None:
    lion = optim(optimizer="gpt_parts.optim:Lion")
    assert optimizer_state(lion).per_element == 4 and optimizer_state(lion).per_tensor == 0
    theirs = optim(optimizer="torch.optim:AdamW", options={"amsgrad": True})
    assert optimizer_state(theirs).per_element == 12, "two moments, and the largest of the second"
    with pytest.raises(ConfigError, match="unexpected keyword argument 'momentum'"):
        optimizer_state(optim(optimizer="gpt_parts.optim:Lion", options={"momentum": 0.5}))
    with pytest.raises(ConfigError, match="expected: arguments for muon, or for an optimizer of your own"):
        optim(options={"momentum": 0.5}).validate()
    with pytest.raises(ConfigError, match=r"type next: optim\.optimizer=adamw"):
        optim(optimizer="adam").validate()


def test_a_name_may_be_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = tmp_path / "gpt_parts-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: gpt-parts\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text("[gpt.norm]\ndynamic_tanh = gpt_parts.norms:DynamicTanh\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = config_from(["model.norm=dynamic_tanh"])
    config.validate()
    assert type(GPT(config.model).norm).__name__ == "DynamicTanh"


def test_parts_own_their_tensors_and_keep_them_whole_under_tp() -> None:
    config = custom()
    assert owner_of("blocks.3.ffn.up.weight", config) == ("ffn", "up.weight")
    assert owner_of("blocks.0.attention.query_norm.gain", config) == ("attention", "query_norm.gain")
    assert owner_of("blocks.0.attention.query_norm.gain", small(norm=NAMES["norm"])) == ("norm", "gain")
    assert owner_of("token_embedding.weight", config) is None
    dims = ParallelDims("fsdp", 1, 1, tp=2)
    shards = {shard.name: shard.shape for shard in parameter_shards(small(ffn=NAMES["ffn"]), dims).block}
    assert shards["ffn.up.weight"] == (small().ffn_width, small().n_embd)
    assert shards["attention.query.weight"] == (small().n_embd // 2, small().n_embd)


def test_other_code_of_a_data_source_is_another_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "my_words.py"
    module.write_text("def words(config):\n    yield 'a'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = DataConfig(source="my_words:words")
    config.validate()
    first = build_spec(config, tmp_path)
    module.write_text("def words(config):\n    yield 'b'\n")
    second = build_spec(config, tmp_path)
    assert first.key.startswith("words-") and first.key != second.key
    assert source_digest("data.source", "my_words:words") == second.identity["source_sha256"]
    assert "my_words" not in sys.modules, "looked at, and not run"
    with pytest.raises(ConfigError, match="there is no module nowhere"):
        build_spec(DataConfig(source="nowhere:words"), tmp_path)


PARALLEL = {
    "norm and ffn": [
        *(f"model.norm={NAMES['norm']}", f"model.ffn={NAMES['ffn']}", "model.tie_embeddings=true"),
        *("model.position=rope", "model.n_head=4", "optim.optimizer=torch.optim:AdamW"),
    ],
    "all": [
        *(f"model.{key}={name}" for key, name in NAMES.items()),
        *("++model.options.window=5", "model.tie_embeddings=false"),
    ],
}
CASES = [
    Case("parallel=tp", "norm and ffn", 1),
    Case("parallel=fsdp", "norm and ffn", 2),
    Case("parallel=fsdp", "all", 1),
    Case("parallel=zero1", "all", 2),
]


def with_parts(rank: int, size: int, function: Any, *arguments: Any) -> Any:
    sys.path.insert(0, str(EXAMPLE))
    return function(rank, size, *arguments)


def test_two_ranks_learn_with_them_what_one_learns(tmp_path: Path) -> None:
    alone, found = (
        run_distributed(with_parts, size, function, tmp_path / str(size) / "runs", *arguments, timeout_s=400)[0]
        for size, function, *arguments in ((1, learn_alone, PARALLEL), (2, learn_cases, CASES, PARALLEL))
    )
    assert_all_same(CASES, found, alone)
