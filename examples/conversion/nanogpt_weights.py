"""Write the weights of a nanoGPT checkpoint as a folder of the transformers library, from which a run can start:

    python examples/conversion/nanogpt_weights.py out/ckpt.pt weights
    python -m gpt.train init_from=weights ...

The folder describes the same model: a GPT-2 with the exact GELU. nanoGPT without biases gets biases of zeros. A first
start with another model names the overrides that fit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
"""Ends of the names of the matrices that transformers stores as (in, out), and nanoGPT as (out, in)."""
WITH_BIAS = (*TRANSPOSED, "ln_1.weight", "ln_2.weight", "ln_f.weight")


def convert(checkpoint: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors under their names in transformers, fp32, and the content of config.json."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in checkpoint["model"].items():
        name = name.removeprefix("_orig_mod.")  # of torch.compile
        if not name.endswith((".attn.bias", "lm_head.weight")):  # the causal mask, and the embedding once more
            tensors[name] = (tensor.mT if name.endswith(TRANSPOSED) else tensor).float().contiguous()
    for name in [name for name in tensors if name.endswith(WITH_BIAS)]:
        rows = tensors[name].shape[-1]
        tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros(rows))
    sizes = checkpoint["model_args"]
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": sizes["vocab_size"],
        "n_positions": sizes["block_size"],
        **{key: sizes[key] for key in ("n_layer", "n_head", "n_embd")},
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), sizes["dropout"]),
        "activation_function": "gelu",
    }
    return tensors, config


def main() -> None:
    """Convert a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="ckpt.pt of nanoGPT")
    parser.add_argument("folder", type=Path, help="new folder for config.json and model.safetensors")
    args = parser.parse_args()
    tensors, config = convert(torch.load(args.checkpoint, map_location="cpu", weights_only=True))
    args.folder.mkdir(parents=True)
    save_file(tensors, args.folder / "model.safetensors", metadata={"format": "pt"})
    (args.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
