"""Weights between our model and ``transformers``, in both directions: the same logits, whoever wrote the files."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    PreTrainedConfig,
    Qwen3Config,
)

from gpt.config import Activation, Ffn, ModelConfig, Norm, RopeScaling, TrainConfig, compose_train
from gpt.conversion import choose_adapter
from gpt.conversion.source import find_source
from gpt.conversion.state_dict import State, VerifiedSource, read_source, to_hf, verify_source
from gpt.export import write_configs, write_weights
from gpt.model.attention import Cache
from gpt.model.gpt import GPT, Weights, initialize
from gpt.training import run as initial
from gpt.training.run import first_weights, zeros
from launch.errors import ConfigError
from launch.runs.compose import to_schema
from launch.runs.folder import RunFolder
from tests.support.commands import ROOT, TINY
from tests.support.distributed import run_distributed
from tests.support.learning import world_of
from tests.support.small_models import LLAMA, MOE, random_tokens, small


def shaken(model: nn.Module) -> Any:
    """Give ``model`` weights that leave no part without effect, gains and biases among them."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.dim() == 1))
    return model.eval()


def gpt2(**overrides: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 50, "n_positions": 12, "n_embd": 32, "n_layer": 2, "n_head": 4}
    ids = {"bos_token_id": None, "eos_token_id": None}
    return shaken(GPT2LMHeadModel(GPT2Config(**{**sizes, **ids, **overrides})))


def llama(**overrides: Any) -> LlamaForCausalLM:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 12}
    return shaken(LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **overrides})))


def mixtral(**overrides: Any) -> MixtralForCausalLM:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 12, "num_local_experts": 4}
    return shaken(MixtralForCausalLM(MixtralConfig(**{**sizes, **heads, **overrides})))


def imported(folder: Path, config: ModelConfig | None = None) -> GPT:
    """The model that ``init_from=folder`` makes; its config is that of the folder unless given."""
    source = find_source(str(folder))
    model = GPT(config or source.model).eval()
    model.load_state_dict(read_source(verify_source(source), model))
    return model


def exported(ours: GPT, folder: Path) -> Any:
    """The model that transformers loads from what is written for ``ours``, with nothing missing and nothing unknown."""
    adapter = choose_adapter(ours.config)
    folder.mkdir()
    write_weights(folder, to_hf(ours.state_dict(), adapter, ours.config), torch.float32)
    write_configs(folder, adapter, ours.config, torch.float32, None, {})
    theirs, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    assert type(theirs).__name__ == adapter.architecture and theirs.dtype == torch.float32
    return theirs.eval()


def assert_equal_logits(ours: GPT, theirs: Any) -> None:
    tokens_BT = random_tokens(ours.config, 3)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(tokens_BT), expected, rtol=1e-5, atol=1e-5)


def drawn(kind: type[PreTrainedConfig], draw: random.Random, **overrides: Any) -> Any:
    """A model of ``kind`` whose sizes are drawn: heads of any even width, a window, factors, layers that differ."""
    heads = {"num_key_value_heads": (keys := draw.randint(1, 3)), "num_attention_heads": keys * draw.randint(1, 3)}
    sizes = {
        "vocab_size": draw.randint(30, 70),
        "hidden_size": heads["num_attention_heads"] * draw.randint(3, 9),
        "intermediate_size": draw.randint(20, 60),
        "num_hidden_layers": draw.randint(2, 5),
        "max_position_embeddings": draw.randint(10, 24),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.uniform(50, 1e5)},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"},
    }
    if kind not in (Phi3Config, GPT2Config, *DEEPSEEKS):
        sizes["head_dim"] = 2 * draw.randint(2, 9)
    if kind in GEMMAS:
        sizes["query_pre_attn_scalar"] = sizes["head_dim"]
    if kind is Gemma3TextConfig:
        bases = {"full_attention": 1e6, "sliding_attention": draw.uniform(50, 1e4)}
        sizes["rope_parameters"] = {key: {"rope_type": "default", "rope_theta": base} for key, base in bases.items()}
    if kind not in (Qwen3Config, LlamaConfig, GPT2Config, *DEEPSEEKS):
        sizes["sliding_window"] = draw.randint(1, 9)
    if kind is GPT2Config:
        sizes["n_inner"] = sizes.pop("intermediate_size")
        del sizes["rope_parameters"], heads["num_key_value_heads"]
    if kind in DEEPSEEKS:
        heads["num_key_value_heads"] = heads["num_attention_heads"]
        even = 1 + (kind is DeepseekV2Config)  # it views pairs of channels as complex numbers
        sizes |= {"kv_lora_rank": even * draw.randint(3, 30), "q_lora_rank": draw.choice([None, draw.randint(3, 20)])}
        sizes |= dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), even * draw.randint(1, 10))
        sizes |= {"qk_rope_head_dim": 2 * draw.randint(1, 8), "first_k_dense_replace": sizes["num_hidden_layers"]}
    if kind in (Qwen3Config, LlamaConfig, *DEEPSEEKS):
        scaled = {"factor": draw.uniform(1, 8), "original_max_position_embeddings": draw.randint(4, 10)}
        scalings = [{}, {"rope_type": "linear", **scaled}, {"rope_type": "yarn", **scaled}]
        scalings.append({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **scaled})
        sizes["rope_parameters"] |= draw.choice(scalings)
    if kind is MixtralConfig:  # the experts' matrices have rows of whole 16 bytes
        sizes |= {"hidden_size": 8 * heads["num_attention_heads"], "intermediate_size": 8 * draw.randint(2, 6)}
        sizes |= {"num_local_experts": (experts := draw.randint(2, 6)), "num_experts_per_tok": draw.randint(2, experts)}
    if kind is Phi3Config:
        sizes["hidden_size"] = heads["num_attention_heads"] * 2 * draw.randint(2, 9)
    model = shaken(AutoModelForCausalLM.from_config(kind(**{**sizes, **heads, **overrides})))
    with torch.no_grad():  # numbers of one size, with which fp32 rounds little
        for name, parameter in model.named_parameters():
            is_shift = kind in GEMMAS or name.endswith("bias")
            parameter.mul_(0.25) if parameter.dim() > 1 else parameter.sub_(float(is_shift))
    return model


GEMMAS = (Gemma2Config, Gemma3TextConfig)
"""Their norms add 1 to the stored gains."""
DEEPSEEKS = (DeepseekV2Config, DeepseekV3Config)


@pytest.mark.parametrize("has_bias", [True, False])
def test_weights_of_nanogpt_give_the_same_logits(has_bias: bool, tmp_path: Path) -> None:
    """nanoGPT has the tensors of GPT-2, but stores matrices as (out, in), repeats the embedding, and has a mask."""
    theirs = gpt2(activation_function="gelu")
    if not has_bias:
        with torch.no_grad():
            for name, tensor in theirs.named_parameters():
                tensor.mul_(not name.endswith("bias"))
    compiled = {}
    for name, tensor in theirs.state_dict().items():
        is_matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        if has_bias or not name.endswith("bias"):
            compiled[f"_orig_mod.{name}"] = tensor.mT if is_matrix else tensor
    compiled["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    sizes = {
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "block_size": 12,
        "vocab_size": 50,
        "bias": has_bias,
        "dropout": 0.1,
    }
    torch.save({"model": compiled, "model_args": sizes, "config": {"dtype": "bfloat16"}}, tmp_path / "ckpt.pt")
    command = [sys.executable, ROOT / "examples" / "conversion" / "nanogpt_weights.py", "ckpt.pt", "weights"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert_equal_logits(imported(tmp_path / "weights"), theirs)


SHARDED = ("gpt2 untied", "llama", "mixtral")
"""Models that transformers writes into several files."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 6}

THEIRS = {
    "gpt2": lambda: gpt2(),
    "gpt2 untied": lambda: gpt2(
        tie_word_embeddings=False, activation_function="gelu", n_inner=40, layer_norm_epsilon=1e-3
    ),
    "gpt2 relu": lambda: gpt2(activation_function="relu"),
    "llama": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3),
    "llama tied": lambda: llama(tie_word_embeddings=True, num_key_value_heads=1),
    "llama 3.1": lambda: llama(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, **LLAMA3}),
    "llama linear": lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama geglu": lambda: llama(hidden_act="gelu_pytorch_tanh"),
    "mixtral": lambda: mixtral(),
    "mixtral tied": lambda: mixtral(tie_word_embeddings=True, num_experts_per_tok=3, num_key_value_heads=4),
    "llama with biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=4),
}


DRAWN: list[tuple[type[PreTrainedConfig], dict[str, Any]]] = [
    (GPT2Config, {}),
    (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    (MixtralConfig, {}),
    (Qwen3Config, {"tie_word_embeddings": True}),
    *((kind, {}) for kind in DEEPSEEKS),
    (MistralConfig, {}),
    (Phi3Config, {}),
    (Gemma3TextConfig, {"sliding_window_pattern": 2}),
    (Gemma3TextConfig, {"final_logit_softcapping": 1.5, "sliding_window_pattern": 3, "tie_word_embeddings": False}),
    (Gemma2Config, {"attn_logit_softcapping": 0.3, "final_logit_softcapping": 2.0}),
    (Gemma2Config, {"attn_logit_softcapping": None, "layer_types": ["sliding_attention"] * 3, "num_hidden_layers": 3}),
]


@pytest.mark.parametrize(("kind", "overrides"), DRAWN, ids=str)
@settings(max_examples=3 if settings.get_current_profile_name() == "same" else 30)
@given(draw=st.randoms(use_true_random=False))
def test_drawn_shapes_both_ways(
    tmp_path_factory: pytest.TempPathFactory,
    kind: type[PreTrainedConfig],
    overrides: dict[str, Any],
    draw: random.Random,
) -> None:
    """Logits are equal to 1e-6 of the largest one, also from a cache. In Gemma to 5e-6: a norm after each layer makes
    small results large, and their rounding with them.

    HYPOTHESIS_PROFILE=random draws ten times as many; --hypothesis-show-statistics prints the size of differences.
    """
    folder = tmp_path_factory.mktemp("drawn")
    theirs = drawn(kind, draw, **overrides)
    theirs.save_pretrained(folder)
    ours = imported(folder)
    again = exported(ours, folder / "out")
    written = {Phi3Config: "Mistral", DeepseekV2Config: "DeepseekV3"}.get(kind, kind.__name__)
    assert type(again).__name__.startswith(written.removesuffix("Config").removesuffix("Text"))
    again.set_attn_implementation("eager")  # torch's fused attention has no bound of the scores
    tokens_BT, cache = random_tokens(ours.config, 3), Cache(ours.config.block_size)
    pieces = (*tokens_BT[:, :-3].split(4, dim=1), *tokens_BT[:, -3:].split(1, dim=1))
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        continued = torch.cat([ours(piece_BT, cache) for piece_BT in pieces], dim=1)
        largest, limit = expected.abs().max(), 5e-6 if kind in GEMMAS else 1e-6
        found = {"here": ours(tokens_BT), "written again": again(tokens_BT).logits, "from a cache": continued}
    for way, logits_BTV in found.items():
        difference = ((logits_BTV - expected).abs().max() / largest).item()
        event(f"{kind.model_type} {way}: {difference:.0e}")
        assert difference <= limit, way


@pytest.mark.parametrize("kind", THEIRS)
def test_what_transformers_wrote_gives_the_same_logits_here_and_written_again_there(kind: str, tmp_path: Path) -> None:
    theirs, is_sharded = THEIRS[kind](), kind in SHARDED
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if is_sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == is_sharded
    ours = imported(tmp_path)
    for model in (theirs, exported(ours, tmp_path / "out")):
        assert_equal_logits(ours, model)


OURS = {
    "gpt2 without biases": small(bias=False, activation=Activation.gelu, norm=Norm.layernorm_nobias),
    "gpt2 padded": small(activation=Activation.leaky_relu, vocab_multiple=16, bias=False),
    "llama ntk": small(**LLAMA, rope_scaling=RopeScaling.ntk, rope_factor=4.0),
    "llama geglu padded": small(**{**LLAMA, "ffn": Ffn.geglu}, activation=Activation.gelu_tanh, vocab_multiple=16),
    "mixtral geglu": small(**{**LLAMA, **MOE, "n_expert_per_token": 3}, expert_ffn=Ffn.geglu),
}
"""Settings that no new model of transformers has, or that no test of its own shows."""


@pytest.mark.parametrize("kind", OURS)
def test_what_is_written_gives_the_same_logits_in_transformers(kind: str, tmp_path: Path) -> None:
    ours = shaken(GPT(OURS[kind]))
    theirs = exported(ours, tmp_path / "out")
    assert_equal_logits(ours, theirs)
    assert_equal_logits(imported(tmp_path / "out"), theirs)


def test_files_of_the_bare_model_and_masks_of_old_versions_are_read(tmp_path: Path) -> None:
    theirs = gpt2()
    theirs.transformer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "wte.weight" in tensors  # as in the files that GPT-2 was published in
    mask, head = torch.ones(12, 12).tril(), tensors["wte.weight"].clone()
    save_file({**tensors, "h.0.attn.bias": mask, "lm_head.weight": head}, file)
    assert_equal_logits(imported(tmp_path), theirs)
    save_file({**tensors, "lm_head.weight": head + 1}, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        imported(tmp_path)


def test_a_longer_vocabulary_takes_little_and_a_shorter_text_nothing_away(tmp_path: Path) -> None:
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    wider = small(activation=Activation.gelu_tanh, vocab_size=64, block_size=8)
    ours = imported(tmp_path, wider)
    tokens_BT = random_tokens(small(block_size=8), 3)
    with torch.no_grad():
        expected, found = theirs(tokens_BT).logits, ours(tokens_BT)
    torch.testing.assert_close(found[..., :50], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found[..., 50:], expected.mean(-1, keepdim=True).expand(-1, -1, 14), rtol=1e-4, atol=1e-4
    )


def starts(rank: int, world_size: int, folder: str) -> list[tuple[str, bool]]:
    """For each fault of rank 1: what a rank was told, and whether its model has the weights of the folder."""
    world = world_of(rank, world_size)
    config = to_schema(compose_train([*TINY, f"init_from={folder}"]), TrainConfig)
    expected = read_source(verify_source(find_source(folder)), GPT(config.model))

    def unreadable(verified: VerifiedSource, model: GPT) -> State:
        raise FileNotFoundError("no such file here")

    def different(verified: VerifiedSource, model: GPT) -> State:
        return {name: tensor + (name == "norm.weight") for name, tensor in read_source(verified, model).items()}

    answers = []
    for reader in (read_source, unreadable, different):
        initial.read_source = reader if rank == 1 else read_source
        weights: Weights = zeros
        with torch.device("meta"):
            model = GPT(config.model)
        try:
            weights, source = first_weights(model, config, RunFolder(Path(folder).parent / "run"), world)
            told = str(source)
        except ConfigError as error:
            told = error.found
        state = model.state_dict()
        is_loaded = all(torch.equal(weights(name, tensor.shape), expected[name]) for name, tensor in state.items())
        answers.append((told, is_loaded))
    return answers


def test_every_rank_has_the_same_or_refuses(tmp_path: Path) -> None:
    config = to_schema(compose_train(TINY), TrainConfig)
    model, folder = GPT(config.model), tmp_path / "model"
    initialize(model, seed=2)
    exported(model, folder)
    first, second = run_distributed(starts, 2, str(folder))
    assert first == second
    words = ("'kind': 'hf'", "no such file here", "other weights")
    assert all(word in told for word, (told, _) in zip(words, first, strict=True))
    assert [loaded for _, loaded in first] == [True, False, False]
