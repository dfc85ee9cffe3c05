"""Prepare a corpus before training: ``python -m gpt.prepare data=NAME``.

    python -m gpt.prepare data=shakespeare data.tokenizer=char
    python -m gpt.prepare data=tinystories data.tokenizer=sentencepiece --workers 16
    python -m gpt.prepare data=files 'data.path=FOLDER/*.jsonl.gz' data.tokenizer=tiktoken --output corpora/mine

Writes the folder that training with the same data.* keys reads. The same command resumes a preparation that was killed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt.checkpoint import sum_file
from gpt.config import DataConfig, Source, TrainConfig, compose_train
from gpt.data.corpus import unwritable_folder_error
from gpt.data.preparation import prepare_folder
from gpt.data.prepared import MANIFEST, TokenSource, open_folder, read_corpus_manifest
from gpt.data.spec import PreprocessingSpec, build_spec, download_shakespeare
from launch.errors import CommandParser, ConfigError, refusing, require_positive
from launch.runs import compose


def prepare_corpus(config: DataConfig, cache: Path, output: Path | None, workers: int) -> TokenSource:
    """Write the token files of a corpus with ``workers`` processes. Return the corpus as a token source.

    The files are written into the folder ``output``. If ``output`` is None, they are written into a folder in
    ``cache`` whose name follows from the config. If the corpus is prepared already, its files are verified instead.

    Raises:
        ConfigError: the config needs no preparation, the text is unavailable, a prepared file is damaged, or ``output``
            has other content.
    """
    if config.source is Source.tokens or config.stream:
        found = "data.stream=true, which needs no preparation" if config.stream else "data=tokens, which are prepared"
        raise ConfigError(
            found,
            "a corpus of text to write into token files",
            "python -m gpt.prepare data=text data.path=FILE data.stream=false",
        )
    spec = build_spec(config, cache)
    if spec is None:  # training never downloads data: compute nodes often have no network
        download_shakespeare(cache)
        spec = build_spec(config, cache)
        assert spec is not None, "it was just downloaded"
    folder = output or cache / spec.key
    _refuse_damage(spec, folder)
    return prepare_folder(spec, folder, workers, progress=True, replace=output is None)


def _refuse_damage(spec: PreprocessingSpec, folder: Path) -> None:
    """Raise ConfigError if a file of a prepared corpus is damaged: its checksum differs from that in the manifest.
    ``folder`` has the corpus. Do nothing if the folder has no corpus of ``spec``."""
    manifest = read_corpus_manifest(folder)
    if manifest is None or open_folder(folder, spec.identity) is None:
        return
    for file in (file for split in manifest["splits"].values() for file in split["files"]):
        if sum_file(folder / file["name"]).sha256 != file["sha256"]:
            raise ConfigError(
                f"{file['name']} in {folder} is not what was written there (its checksum differs)",
                "the file as it was prepared",
                f"rm {folder / MANIFEST}, and the same command again",
            )


def report_prepared(source: TokenSource, output: Path | None) -> str:
    """Return text of several lines on a prepared corpus: its sizes, and the overrides with which to train on it.
    ``output`` is the value of the option ``--output``; None if it was not given."""
    assert source.folder is not None and source.vocab_size is not None
    name = "synthetic" if source.tokenizer is None else source.tokenizer["kind"]
    lines = [str(source.folder)]
    manifest = read_corpus_manifest(source.folder)
    assert manifest is not None, "it was just written or opened"
    for split, about in manifest["splits"].items():
        counts = [f"{about[key]:,} {key}" for key in ("tokens", "bytes", "documents") if about[key] is not None]
        lines.append(f"{split}: {', '.join(counts)}")
        if source.conversation_tokens is not None:
            lines[-1] += f"; cut at {source.conversation_tokens:,} tokens: {about['cut']:,}"
            lines[-1] += f"; left out without an answer: {about['without_answer']:,}"
    lines.append(f"tokenizer: {name}, {source.vocab_size:,} ids; sha256 of the tokens {source.sha256[:12]}")
    if source.entropy is not None:
        lines.append(f"entropy: {source.entropy:.4f} nats per token, which no loss goes below")
    keys = f"data=tokens data.path={source.folder}" if output else "the same data.* keys"
    if output and source.conversation_tokens is not None:
        keys += " data.pack=documents"
    lines.append(f"train with {keys} and model.vocab_size={source.vocab_size} (or more)")
    return "\n".join(lines)


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 if the command was refused."""
    parser = CommandParser(
        prog="python -m gpt.prepare",
        description="Turn a corpus into tokens, once, before training. Goes on where it was killed.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="data=NAME and data.* keys, as for training")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write here, for data=tokens data.path=FOLDER")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: the cores there are")
    args = parser.parse_args(argv)
    output = args.output.expanduser().absolute() if args.output else None
    config = compose.to_schema(compose_train(args.overrides), TrainConfig)
    config.data.validate()
    cores = len(os.sched_getaffinity(0))  # not cpu_count: Slurm gives a job only some of a node's cores
    workers = cores if args.workers is None else args.workers
    require_positive("--workers", workers)
    cache = config.data_cache
    try:
        source = prepare_corpus(config.data, cache, output, workers)
    except (OSError, NotImplementedError) as error:
        raise unwritable_folder_error(output or cache, error) from error
    print(report_prepared(source, output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
