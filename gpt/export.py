"""Write the model of a run for other programs: ``python -m gpt.export RUN --format hf --output OUT``.

    python -m gpt.export outputs/gpt2_124m/default --format hf --output gpt2-mine   # a folder that transformers loads
    python -m gpt.export RUN --format peft --output adapter              # adapters (LoRA) alone, for peft
    python -m gpt.export RUN --format torch --output model.pt --dtype bf16          # one file of torch.save

Reads the newest undamaged checkpoint, or that of ``--step``, in one process without a GPU. The checkpoint may be of any
number of ranks and any strategy. An export gets its final name only when it is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt.accounting import count
from gpt.checkpoint import Manifest, read_manifest, sum_file, sync_folder
from gpt.config import ModelConfig, TokenizerKind
from gpt.conversion import ADAPTERS, StateDictAdapter, choose_adapter
from gpt.conversion.source import HF_CONFIG, PEFT_CONFIG, PEFT_WEIGHTS, SINGLE
from gpt.conversion.state_dict import find_checkpoint, merge_adapters, open_run, read_weights, to_hf, to_peft
from gpt.data.tokenizers import ABOUT, CHAT, CharTokenizer, HfTokenizer, Tokenizer, load_tokenizer
from gpt.model.gpt import GPT
from launch.errors import CommandParser, ConfigError, refusing
from launch.runs.folder import RunFolder, read_json

# Tokenizer of a run, as ``AutoTokenizer`` loads it: a tokenizer.json in the format of the tokenizers library.
#
# Byte and character tokenizers are converted, a tokenizer.json is copied. The other two kinds have a file format of
# their own library; this file is copied unchanged. These functions import no torch.


def write_tokenizer(tokenizer: Tokenizer, run: RunFolder, folder: Path, block_size: int) -> None:
    """Write the tokenizer of a run into ``folder``, in files that transformers loads. The files of a tokenizer of
    sentencepiece or tiktoken are copied unchanged into the subfolder ``tokenizer``, because only the libraries of these
    tokenizers read them.

    ``block_size`` is the number of tokens in a sequence of the model.
    """
    if tokenizer.kind in (TokenizerKind.sentencepiece, TokenizerKind.tiktoken):
        # Only the library of such a tokenizer reads its file.
        shutil.copytree(run.tokenizer, folder / "tokenizer")
        return
    write_json(folder / "tokenizer.json", tokenizer_content(tokenizer))
    about: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,  # true would drop spaces before punctuation when decoding
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if isinstance(tokenizer, HfTokenizer) and tokenizer.end_name is not None:
        about |= {"eos_token": tokenizer.end_name, **tokenizer.chat}
    write_json(folder / "tokenizer_config.json", about)


def tokenizer_content(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of tokenizer.json for a tokenizer of bytes, of characters, or of the tokenizers library."""
    if tokenizer.kind is TokenizerKind.byte:
        # A byte-pair encoding without any pair, whose ids are bytes.
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        vocab = {letter: byte for byte, letter in enumerate(byte_letters())}
        pairs: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": []}
        return tokenizer_json(pairs, level, level)
    if isinstance(tokenizer, CharTokenizer):
        # A tokenizer whose words are the characters. Any other character is an error.
        words = {"type": "WordLevel", "vocab": dict(tokenizer.ids), "unk_token": "<unk>"}
        each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        return tokenizer_json(words, each, {"type": "Fuse"})
    content: dict[str, Any] = json.loads(tokenizer.payload)
    content.pop(CHAT, None)  # in tokenizer_config.json
    return content


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON in UTF-8, in which characters are not escaped."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def byte_letters() -> list[str]:
    """Return for each of the 256 bytes the character that the tokenizers library uses for it: the character with the
    same number if it is printable, else one from U+0100 on.

    As in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, others = [], 0
    for byte in range(256):
        letters.append(chr(byte if byte in printable else 0x100 + others))
        others += byte not in printable
    return letters


def tokenizer_json(model: dict[str, Any], before: dict[str, Any], decoder: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a tokenizer.json. The three arguments become its sections ``model``, ``pre_tokenizer`` and
    ``decoder``."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


# Weights in one file, config.json, and the tokenizer.


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, name: str = SINGLE, **metadata: str
) -> None:
    """Write ``tensors``, pairs of name and tensor, into the safetensors file ``name`` in ``folder``. The tensors are
    converted to ``dtype``. ``metadata`` is written into the header of the file."""
    path = folder / name
    save_file({name: tensor.to(dtype) for name, tensor in tensors}, path, metadata={"format": "pt", **metadata})
    # The library creates files that only the owner can read. Use the permissions of the folder instead.
    path.chmod(folder.stat().st_mode & 0o666)


def write_configs(
    folder: Path,
    adapter: StateDictAdapter,
    config: ModelConfig,
    dtype: torch.dtype,
    eot: int | None,
    origin: dict[str, Any],
) -> None:
    """Write config.json and generation_config.json of a model for transformers.

    Args:
        folder: folder of the files.
        adapter: architecture of transformers.
        config: config of the model.
        dtype: dtype of the exported weights.
        eot: id of the token that ends a text; None if there is none.
        origin: run and checkpoint of the model, as plain JSON.
    """
    # Written even if None, because the defaults are ids of another tokenizer.
    special = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": None}
    described = {"architectures": [adapter.architecture], "model_type": adapter.name, **adapter.write_config(config)}
    name = str(dtype).removeprefix("torch.")
    extra = {"torch_dtype": name, "use_cache": True, "initializer_range": 0.02, "exported_from": origin}
    write_json(folder / "config.json", {**described, **special, **extra})
    write_json(folder / "generation_config.json", special)


def write_torch_file(
    path: Path, state: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype, origin: dict[str, Any]
) -> None:
    """Write a model into one file by ``torch.save``, and sync the file to disk. ``state`` has the weights of the model,
    which are converted to ``dtype``. The file also has ``config`` and ``origin``, a result of ``origin_of``."""
    contents = {
        "model_config": {key: getattr(value, "name", value) for key, value in dataclasses.asdict(config).items()},
        "exported_from": origin,
        "model": {name: tensor.to(dtype) for name, tensor in state.items()},
    }
    with path.open("wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = CommandParser(prog="python -m gpt.export", description="Write a run's model for other programs.")
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("--output", metavar="OUT", type=Path, help="folder (hf) or file (torch) to write; required")
    parser.add_argument(
        "--format",
        choices=("hf", "peft", "torch"),
        default="hf",
        help="hf: a folder that transformers loads, with adapters (LoRA) merged into the weights; "
        "peft: the adapters alone, as peft loads them; torch: one file with our own names (default: hf)",
    )
    parser.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights written (default: fp32)")
    args = parser.parse_args(argv)
    if args.output is None:  # checked after the options, because argparse would name an unknown option last
        parser.error("the following arguments are required: --output")
    return args


def export(args: argparse.Namespace) -> str:
    """Export the model of a run as the command line requests. Return the line to print.

    Raises:
        ConfigError: the checkpoint is missing, the format lacks a part of the model, or the output exists.
    """
    out = args.output.expanduser().absolute()
    if os.path.lexists(out):
        raise ConfigError(f"{out} is there already", "a path where nothing is", f"--output {out}-export")
    folder, config = open_run(args.run)
    adapter = choose_adapter(config.model) if args.format != "torch" else None
    if args.format == "peft" and not config.model.lora.rank:
        raise ConfigError(
            f"--format peft of {folder.path}, whose model has no adapters",
            "a run with model.lora.rank of at least 1",
            "--format hf",
        )
    checkpoint = find_checkpoint(folder, args.step)
    origin = origin_of(folder, checkpoint)
    model = read_weights(config, checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.saving_{secrets.token_hex(4)}")
    try:
        if adapter is None:
            write_torch_file(temporary, model.state_dict(), config.model, DTYPES[args.dtype], origin)
        elif args.format == "peft":
            adapter = write_peft(temporary, adapter, model, folder, origin, DTYPES[args.dtype])
        else:
            write_hf(temporary, adapter, model, folder, origin, args)
        temporary.replace(out)
        sync_folder(out.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
    kind = "torch" if adapter is None else f"{args.format} {adapter.architecture}".removeprefix("hf ")
    counted = count(config.model)
    numbers = {"hf": counted.frozen or counted.total, "peft": counted.trained, "torch": counted.total}[args.format]
    return f"wrote {out}: {kind}, {numbers:,} parameters of step {origin['step']} in {args.dtype}"


def write_hf(
    temporary: Path,
    adapter: StateDictAdapter,
    model: GPT,
    folder: RunFolder,
    origin: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Make the folder ``temporary``, which transformers can load: weights, configs and tokenizer. Sync it to disk.

    Args:
        temporary: the folder to make.
        adapter: the architecture of transformers as which the model is written.
        model: the model; its adapters (LoRA) are merged into the weights.
        folder: folder of the run, which has the tokenizer.
        origin: result of ``origin_of``.
        args: the parsed command line, which has the dtype.
    """
    temporary.mkdir()
    config, dtype = model.config, DTYPES[args.dtype]
    write_weights(temporary, to_hf(merge_adapters(model.state_dict(), config.lora), adapter, config), dtype)
    tokenizer: Tokenizer | None = load_tokenizer(folder.tokenizer) if (folder.tokenizer / ABOUT).is_file() else None
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, temporary, config.block_size)
    write_configs(temporary, adapter, config, dtype, None if tokenizer is None else tokenizer.eot, origin)
    sync_files(temporary)


def write_peft(
    temporary: Path,
    adapter: StateDictAdapter,
    model: GPT,
    folder: RunFolder,
    origin: dict[str, Any],
    dtype: torch.dtype,
) -> StateDictAdapter:
    """Make the folder ``temporary``, which peft can load, with the adapters (LoRA) of a model. Sync it to disk.

    Args:
        temporary: the folder to make.
        adapter: an architecture of transformers that fits the model.
        model: the model with its adapters.
        folder: folder of the run.
        origin: result of ``origin_of``.
        dtype: dtype of the exported weights.

    Returns:
        The architecture whose tensor names the export uses. If the run has begun with the weights in a folder of
        transformers, it is the architecture of that folder. It is ``adapter`` if that folder is unknown or deleted.
    """
    temporary.mkdir()
    config, lora = model.config, model.config.lora
    started = (event for event in folder.read_events() if event["event"] == "initialised" and event["kind"] != "run")
    base = next((event["path"] for event in started), None)
    # The names are those of the base, whose matrices may be stacked: a Phi-3 is the same model as a Mistral.
    kind = base and read_json(Path(base) / HF_CONFIG).get("model_type")
    adapter = next((one for one in ADAPTERS if one.name == kind), adapter)
    tensors = to_peft(model.state_dict(), adapter, config)
    write_weights(temporary, tensors, dtype, PEFT_WEIGHTS, targets=",".join(lora.targets))
    described = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none"},
        "base_model_name_or_path": base,
        **{"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout},
        **adapter.peft_targets(config),
        "fan_in_fan_out": adapter.transposes,
    }
    write_json(temporary / PEFT_CONFIG, described)
    write_json(temporary / "exported_from.json", origin)
    sync_files(temporary)
    return adapter


def sync_files(folder: Path) -> None:
    """Sync a folder and all its files to disk."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def origin_of(folder: RunFolder, checkpoint: Path) -> dict[str, Any]:
    """Return the origin of an exported model as plain JSON: path of the run, step of the checkpoint, number of training
    samples, checksums of data and checkpoint, and git commit of the attempt that has saved the checkpoint. The commit
    is None if it is unknown."""
    manifest: Manifest = read_manifest(checkpoint)
    git = read_json(folder.environment(manifest.meta["attempt"])).get("git", {})
    return {
        "run": str(folder.path),
        "step": manifest.step,
        "samples": manifest.meta["samples"],
        "data_sha256": manifest.meta["data_sha256"],
        "checkpoint_sha256": sum_file(checkpoint / "manifest.json").sha256,
        "commit": git.get("commit"),
    }


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0 written, 2 refused."""
    print(export(parse(argv)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
