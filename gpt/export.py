"""Write the model of a run for other programs: ``python -m gpt.export RUN --format hf --output OUT``.

    python -m gpt.export outputs/gpt2_124m/default --format hf --output gpt2-mine   # a folder that transformers loads
    python -m gpt.export RUN --format torch --output model.pt --dtype bf16          # one file of torch.save

Reads the newest whole checkpoint, of any number of ranks and any strategy, in one process without a GPU. An export gets
its final name only when it is complete.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint import folders
from gpt.checkpoint.folders import Manifest, read_manifest, sum_file, sync_folder
from gpt.config import TrainConfig
from gpt.conversion.adapter import StateDictAdapter
from gpt.conversion.hf_folder import write_configs, write_sums, write_tokenizer, write_torch_file, write_weights
from gpt.conversion.registry import choose_adapter
from gpt.conversion.state_dict import find_checkpoint, open_run, read_weights, to_hf
from gpt.data.tokenizers import ABOUT, Tokenizer
from gpt.data.tokenizers.registry import load_run_tokenizer
from gpt.model.gpt import GPT
from launch.errors import CommandParser, ConfigError, refusing, require_positive
from launch.runs.files import read_json
from launch.runs.folder import RunFolder

GB = 10**9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandParser(prog="python -m gpt.export", description="Write a run's model for other programs.")
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("--output", metavar="OUT", type=Path, help="folder (hf) or file (torch) to write; required")
    parser.add_argument(
        "--format",
        choices=("hf", "torch"),
        default="hf",
        help="hf: a folder that transformers loads; torch: one file with our own names (default: hf)",
    )
    parser.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights written (default: fp32)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="most GB in a file of weights (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    args = parser.parse_args(argv)
    if args.output is None:  # checked after the options, because argparse would name an unknown option last
        parser.error("the following arguments are required: --output")
    return args


def export(args: argparse.Namespace) -> str:
    """Export the model of a run. Return the line to print.

    Raises:
        ConfigError: the checkpoint is missing, the format lacks a part of the model, or the output exists.
    """
    require_positive("--max-shard-gb", args.max_shard_gb)
    out = args.output.expanduser().absolute()
    refuse_existing(out, args.format, args.overwrite)
    folder, config = open_run(args.run)
    adapter = choose_adapter(config.model) if args.format == "hf" else None
    checkpoint = find_checkpoint(folder, args.step)
    origin = origin_of(folder, checkpoint)
    model = read_weights(config, checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.saving_{secrets.token_hex(4)}")
    try:
        if adapter is None:
            write_torch_file(temporary, model.state_dict(), config.model, DTYPES[args.dtype], origin)
        else:
            write_hf(temporary, adapter, model, folder, config, origin, args)
        replace(out, temporary)
    except BaseException:
        remove(temporary)
        raise
    kind = "torch" if adapter is None else adapter.architecture
    numbers = sum(p.numel() for p in model.parameters())
    return f"wrote {out}: {kind}, {numbers:,} parameters of step {origin['step']} in {args.dtype}"


def write_hf(
    temporary: Path,
    adapter: StateDictAdapter,
    model: GPT,
    folder: RunFolder,
    config: TrainConfig,
    origin: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Write a complete folder of transformers, synced to disk."""
    temporary.mkdir()
    dtype = DTYPES[args.dtype]
    write_weights(temporary, to_hf(model.state_dict(), adapter, config.model), dtype, int(args.max_shard_gb * GB))
    tokenizer: Tokenizer | None = load_run_tokenizer(folder) if (folder.tokenizer / ABOUT).is_file() else None
    about = "not known" if tokenizer is None else write_tokenizer(tokenizer, folder, temporary, config.model.block_size)
    write_configs(temporary, adapter, config.model, dtype, None if tokenizer is None else tokenizer.eot, origin)
    (temporary / "README.md").write_text(card(config, origin, about))
    write_sums(temporary)
    for path in temporary.rglob("*"):
        sync(path)
    sync_folder(temporary)


def origin_of(folder: RunFolder, checkpoint: Path) -> dict[str, Any]:
    """Return run, step, data, checkpoint and commit of an export, as far as the run folder records them."""
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


def card(config: TrainConfig, origin: dict[str, Any], tokenizer: str) -> str:
    """Write the README.md of an export: a model card in the format of the Hugging Face hub."""
    tokens = origin["samples"] * config.model.block_size
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {config.model.name}

Exported from `{origin["run"]}`, step {origin["step"]}: {tokens:,} tokens of training data.

- training data: sha256 `{origin["data_sha256"]}`
- trained with commit: {origin["commit"] or "not known"}
- checkpoint: sha256 `{origin["checkpoint_sha256"]}` of its manifest
- sequence length: {config.model.block_size} tokens
- tokenizer: {tokenizer}
- `sha256sum -c SHA256SUMS` checks the files
"""


def refuse_existing(out: Path, kind: str, overwrite: bool) -> None:
    """Raise ConfigError if ``out`` exists, unless it is an earlier export that may be replaced."""
    if not os.path.lexists(out):
        return
    if kind == "torch":
        replaceable = out.is_file() and out.suffix in (".pt", ".pth")
    else:
        replaceable = out.is_dir() and "exported_from" in read_json(out / "config.json")
    if not replaceable:
        earlier = "a .pt file" if kind == "torch" else "a folder of gpt.export"
        raise ConfigError(f"{out} is there already, and is not {earlier}", "a path where nothing is", f"{out}-export")
    if not overwrite:
        raise ConfigError(f"{out} is there already", "a path where nothing is", "--overwrite, or another path")


def replace(out: Path, temporary: Path) -> None:
    """Give the finished export its name. An earlier export is renamed first and deleted last."""
    if temporary.is_dir() and out.is_dir():
        old = out.with_name(f".{out.name}.deleting_{secrets.token_hex(4)}")
        out.rename(old)
        temporary.rename(out)
        folders.remove(old)
    else:
        temporary.replace(out)
    sync_folder(out.parent)


def remove(temporary: Path) -> None:
    """Delete the files of a failed export."""
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush the content of a file to disk."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0 written, 2 refused."""
    print(export(parse(argv)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
