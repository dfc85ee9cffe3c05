"""Weights that cannot be exchanged are refused in three parts, before a job is submitted where that can be known."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gpt.config import (
    Activation,
    ExpertBalance,
    ExpertMatmul,
    Ffn,
    ModelConfig,
    Norm,
    NormPosition,
    Position,
    TrainConfig,
    compose_train,
    rules,
)
from gpt.conversion import ADAPTERS, StateDictAdapter, architecture_fields, choose_adapter, find_adapter
from gpt.conversion.source import differences, find_source
from gpt.conversion.state_dict import VOCABULARY, from_hf, read_source, to_hf, verify_source
from gpt.model.gpt import GPT
from launch.errors import ConfigError
from launch.runs.compose import to_schema
from tests.conversion.test_transformers_both_ways import llama
from tests.support.commands import ROOT, environment
from tests.support.planning import refused
from tests.support.small_models import LLAMA, MOE, configs, small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in the files of transformers, several to the model."""
    llama().save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


PARTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "norm": (Norm.layernorm, Norm.layernorm_nobias),
        "position": (Position.learned,),
        "ffn": (Ffn.standard,),
        "activation": tuple(Activation),
    },
    "llama": {
        "norm": (Norm.rmsnorm,),
        "position": (Position.rope,),
        "ffn": (Ffn.swiglu, Ffn.geglu),
        "activation": (Activation.silu, Activation.gelu, Activation.gelu_tanh),
    },
}
PARTS["mixtral"] = PARTS["llama"] | {
    "ffn": (Ffn.moe,),
    "expert_ffn": (Ffn.swiglu, Ffn.geglu),
    "router_normalize": (True,),
    "expert_balance": (ExpertBalance.loss,),
    "bias": (False,),
}
PLAIN = PARTS["llama"] | {"bias": (False,)}
PARTS["deepseek_v2"] = PARTS["deepseek_v3"] = PLAIN
PARTS["qwen3"] = PLAIN | {"qk_norm": (True,)}
PARTS["mistral"] = PARTS["phi3"] = PLAIN | {"window": (None, *range(1, 10))}
PARTS["gemma3_text"] = PARTS["mistral"] | {
    **{"norm_position": (NormPosition.both,), "qk_norm": (True,), "scale_embedding": (True,)},
    **{"global_every": (None, 2, 3), "logit_softcap": (None, 3.0)},
}
PARTS["gemma2"] = PARTS["gemma3_text"] | {"qk_norm": (False,), "attention_softcap": (None, 2.0)}
"""Architecture of transformers -> field of ModelConfig that chooses a part -> choices that it has."""


def bent(config: ModelConfig, adapter: StateDictAdapter) -> ModelConfig:
    """``config`` with the parts that a format has, where it has others."""
    plain = {"norm_position": NormPosition.pre, "qk_norm": False, "parallel_residual": False, "n_shared_expert": 0}
    plain |= {"window": None, "global_every": None, "attention_softcap": None, "logit_softcap": None}
    plain |= {"attention_sinks": False, "kv_lora_rank": None, "q_lora_rank": None, "rope_head_width": None}
    plain |= {"scale_embedding": False} | ({"head_width": None} if adapter.name != "qwen3" else {})
    plain = {key: value for key, value in plain.items() if key not in PARTS[adapter.name]}
    if adapter.name == "gemma3_text" and config.window is not None:
        plain["rope_base_local"] = 100.0
    changes = {key: values[0] for key, values in PARTS[adapter.name].items() if getattr(config, key) not in values}
    if adapter.name.startswith("deepseek"):
        plain |= {"kv_lora_rank": 5, "q_lora_rank": config.q_lora_rank, "head_width": 7, "rope_head_width": 4}
        plain |= {"n_kv_head": None, "norm_eps": 1e-6}
    if adapter.name == "mixtral":
        experts = max(2, config.n_expert)
        plain |= {"n_expert": experts, "n_expert_per_token": 2, "expert_matmul": ExpertMatmul.loop}
    else:
        plain |= {"n_expert": 0, "capacity_factor": None, "expert_ffn": Ffn.swiglu, "n_expert_per_token": 2}
        plain |= {"expert_balance": ExpertBalance.loss, "expert_matmul": ExpertMatmul.grouped}
        changes.pop("expert_balance", None)
    if config.activation is None or adapter.name != "gpt2":
        changes["activation"] = None
    if adapter.name == "gpt2":
        changes["n_kv_head"] = None
    made = dataclasses.replace(config, **plain, **changes)
    rules.check_model(made)
    return made


@given(configs(), st.sampled_from(ADAPTERS) | st.none())
def test_every_model_is_refused_or_comes_back_as_it_was(config: ModelConfig, wanted: StateDictAdapter | None) -> None:
    config = config if wanted is None else bent(config, wanted)
    try:
        adapter = choose_adapter(config)
    except ConfigError as refusal:
        assert wanted is None
        assert "model." in refusal.found and "gpt2 (norm=layernorm" in refusal.expected and "torch" in refusal.fix
        return
    hf = json.loads(json.dumps({"model_type": adapter.name, **adapter.write_config(config)}))
    back = find_adapter(hf).read_config(hf)
    bias = {"bias": True, "norm": Norm.layernorm} if adapter.requires_bias else {}
    assert architecture_fields(back) == architecture_fields(config) | bias
    state = GPT(config).state_dict()
    theirs = dict(to_hf(state, adapter, config))
    assert set(theirs) == {name for rule in adapter.rules(config) for name in rule.hf_names}
    again = from_hf(theirs.__getitem__, adapter.rules(back), {k: v.shape for k, v in GPT(back).state_dict().items()})
    assert again.keys() >= state.keys()
    assert all(torch.equal(again[name], state[name][: len(again[name])]) for name in state)
    assert all(len(again[name]) == config.vocab_size for name in VOCABULARY if name in again)
    assert not any(again[name].any() for name in again.keys() - state.keys())


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ({"norm": Norm.rmsnorm}, "model.norm=rmsnorm"),
        ({"position": Position.none}, "model.position=none"),
        ({"n_kv_head": 2}, "model.n_kv_head=2"),
        ({**LLAMA, "ffn": Ffn.standard}, "model.ffn=standard"),
        ({**LLAMA, "parallel_residual": True}, "model.parallel_residual=true"),
        ({**LLAMA, "scale_embedding": True}, "model.scale_embedding=true"),
        ({**LLAMA, **MOE, "n_shared_expert": 1}, "model.n_shared_expert=1"),
        ({**LLAMA, **MOE, "router_normalize": False}, "model.router_normalize=false"),
    ],
)
def test_a_part_without_a_place_is_named(parts: dict[str, Any], found: str) -> None:
    refusal = refused(choose_adapter, small(**parts))
    assert refusal.found.startswith(found)
    assert "llama (norm=rmsnorm, position=rope, ffn=swiglu|geglu" in refusal.expected


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"model_type": "bert"}, "model_type=bert"),
        ({"hidden_act": "relu"}, "hidden_act=relu"),
        ({"model_type": "gemma2", "head_dim": 8}, "query_pre_attn_scalar=256"),
        ({"model_type": "gemma2", "head_dim": 256, "layer_types": ["full_attention"]}, "layer_types=["),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type=longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_size": None}, "without hidden_size"),
        ({"num_hidden_layers": 3}, "no model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "unknown model.layers.1.input_layernorm.weight"),
        ({"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, "q_proj.bias"),
    ],
)
def test_a_folder_that_is_no_model_of_ours_is_refused(folder: Path, values: dict[str, Any], found: str) -> None:
    change_config(folder, **values)
    refused(find_source, str(folder), found=found)


def test_a_missing_shard_and_a_cut_one_are_found(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=f"{shard.name} cannot be used"):
        find_source(str(folder))
    shard.unlink()
    with pytest.raises(ConfigError, match=f"{shard.name} cannot be used"):
        find_source(str(folder))


def test_a_wrong_shape_is_named(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    save_file({**tensors, "model.norm.weight": torch.ones(31)}, shard)
    source = find_source(str(folder))
    with pytest.raises(ConfigError, match=r"norm\.weight is \(31,\) instead of \(32,\)"):
        read_source(verify_source(source), GPT(source.model))


def test_what_is_no_source_is_refused(tmp_path: Path, folder: Path) -> None:
    for path in (tmp_path / "gpt2", folder / "generation_config.json"):
        with pytest.raises(ConfigError, match="hf download NAME"):
            find_source(str(path))
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"holds neither model.safetensors(.|\n)*save_pretrained"):
        find_source(str(folder))


def test_the_overrides_to_type_make_the_model_fit() -> None:
    asked, found = small(), small(**LLAMA, n_layer=3, n_kv_head=2, rope_base=500.0)
    typed = differences(asked, found)
    assert {"model.n_layer=3", "model.norm=rmsnorm", "model.rope_base=500.0", "model.tie_embeddings=false"} <= set(
        typed
    )
    assert differences(small(**LLAMA, n_layer=3, n_kv_head=2, rope_base=500.0, ffn_hidden=found.ffn_width), found) == []
    mixture = small(**{**LLAMA, **MOE})
    typed = differences(small(), mixture)
    assert {"model.ffn=moe", "model.n_expert=4", "model.ffn_hidden=24"} < set(typed)
    assert not [word for word in typed if "activation" in word or "router" in word]
    for start in ([], ["model=gpt2_124m"]):
        typed = differences(to_schema(compose_train(start), TrainConfig).model, mixture)
        assert differences(to_schema(compose_train([*start, *typed]), TrainConfig).model, mixture) == []
    assert differences(dataclasses.replace(mixture, n_expert=8), mixture) == ["model.n_expert=4"]
    assert differences(small(vocab_size=64, block_size=6, dropout=0.1), small()) == []
    assert differences(small(vocab_size=48), small()) == ["model.vocab_size=50"]
    assert differences(small(block_size=14), small()) == ["model.block_size=12"]


def test_the_login_node_needs_no_torch_for_it(folder: Path) -> None:
    look = "import sys; from gpt.workload import check_init_from; from gpt.conversion.source import find_source\n"
    look += "print(find_source(sys.argv[1]).model.n_layer, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", look, str(folder)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.stdout == "2 False\n", done.stderr


def test_hf_accepts_a_folder_of_transformers_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (init_from,) = {
        compose_train(["init_from=hf:llama"]).init_from,
        compose_train([f"init_from=hf:{folder}"]).init_from,
    }
    assert init_from == f"hf:{folder}" and find_source(init_from) == find_source(str(folder))
    config = tmp_path / "run" / ".hydra" / "config.yaml"  # what makes a folder a run to init_from=FOLDER
    config.parent.mkdir(parents=True)
    config.write_text("name: run\n")
    refusal = refused(
        find_source, f"hf:{tmp_path / 'run'}", said="no folder with config.json", fix="init_from=hf:FOLDER"
    )
    (tmp_path / "ckpt.pt").touch()
    refused(find_source, str(tmp_path / "ckpt.pt"), fix=f"nanogpt_weights.py {tmp_path / 'ckpt.pt'} FOLDER")
    assert "save_pretrained" in refusal.expected
