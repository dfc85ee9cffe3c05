"""Training programs of other people, unmodified: launched over nodes, preempted in the middle, resumed, reported.

    python -m benchmarks.faults.programs CHECKOUTS --python PYTHON            # all programs; as root
    python -m benchmarks.faults.programs CHECKOUTS --python PYTHON --only nanogpt,imagenet --write

Each program of programs.yaml runs from a checkout of its own repository, on a Slurm sandbox of two nodes without GPUs.
First one command launches all its points. Then the largest point runs again in a folder of its own, and Slurm preempts
its job after some steps. The program resumes from its own checkpoint. The script compares the last losses of both runs.
CHECKOUTS has a folder for each repository, and PYTHON the packages that the programs import.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.faults.storm import slurm_version
from benchmarks.page import chosen, cores, keep, merged, stamp
from launch.runs.events import last_event
from launch.runs.folder import RunFolder
from launch.runs.records import read_records, recent_records
from slurm.sandbox.cluster import Cluster, preempt
from slurm.sandbox.state import Settings
from tests.support.commands import ROOT, wait_for

ON_SLURM = ("workload=script", "cluster=slurm", "cluster.gpus_per_node=0", "ranks_per_node=1", "cluster.mem_gb=4")
TITLES = ("program", "commit", "nodes", "attempts", "resumed at step", "last loss", "undisturbed", "note")
END_S = 1200.0
"""Time limit of a run, in seconds."""

# Functions that write the data of a program; ``data`` in programs.yaml names one. Each receives the folder of the
# program in its checkout, and an empty folder for data.


def nanogpt_text(code: Path, _data: Path) -> None:
    """Write random words from a fixed seed into nanoGPT's checkout, as the text that its character-level preparation
    reads."""
    words(code / "data" / "shakespeare_char" / "input.txt")


def words(path: Path, count: int = 40_000) -> None:
    """Write a text of ``count`` random words from a fixed seed."""
    draw = random.Random(0)
    letters = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(500)]
    path.write_text("\n".join(" ".join(draw.choices(letters, k=12)) for _ in range(count // 12)))


def images(_code: Path, data: Path) -> None:
    """Write 128 JPEG images of 64 x 64 pixels in four classes into ``data/train`` and ``data/val``. Each class has a
    folder and a color of its own."""
    from PIL import Image

    draw = random.Random(0)
    for split, count in (("train", 24), ("val", 8)):
        for number in range(4):
            folder = data / split / f"class{number}"
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                color = bytes(60 * number * (channel == number % 3) for channel in range(3))
                pixels = bytes((draw.randrange(128) + color[i % 3]) % 256 for i in range(3 * 64 * 64))
                Image.frombytes("RGB", (64, 64), pixels).save(folder / f"{index}.jpg")


def boxes(code: Path, data: Path) -> None:
    """Write the data of YOLOv5 into ``data``: the images of ``images``, a label file with one box for each, the file
    that describes the dataset, and the font that YOLOv5 would download."""
    from matplotlib import get_data_path

    images(code, data)
    for path in data.glob("*/class*/*.jpg"):
        path.with_suffix(".txt").write_text(f"{path.parent.name[-1]} 0.5 0.5 0.6 0.6\n")
    names = [f"class{number}" for number in range(4)]
    dataset = {"path": str(data), "train": "train", "val": "val", "nc": len(names), "names": names}
    (data / "dataset.yaml").write_text(yaml.safe_dump(dataset))
    shutil.copy(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", data / "Arial.ttf")


def diffusers_files(code: Path, data: Path) -> None:
    """Write the data of diffusers' program into ``data``: the images of ``images``, and the config of a UNet with two
    blocks on each side."""
    images(code, data)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    sizes = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": [32, 32]}
    (data / "config.json").write_text(json.dumps({**blocks, **sizes}))


ACCURACY = """import datasets
import evaluate

class Accuracy(evaluate.Metric):
    def _info(self):
        kinds = {name: datasets.Value("int32") for name in ("predictions", "references")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(kinds))

    def _compute(self, predictions, references):
        return {"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(references)}
"""


def glue_files(code: Path, data: Path) -> None:
    """Write labeled lines of text, a small BERT with its tokenizer, and the metric that the program would download."""
    from transformers import BertConfig, BertForSequenceClassification

    litgpt_text(code, data)
    lines = (data / "text" / "0.txt").read_text().splitlines()
    for split, part in (("train", lines[:512]), ("validation", lines[-64:])):
        labeled = [json.dumps({"sentence1": line, "label": len(line) % 2}) for line in part]
        (data / f"{split}.json").write_text("\n".join(labeled))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    BertForSequenceClassification(config).save_pretrained(data / "tokenizer")
    (data / "accuracy").mkdir()
    (data / "accuracy" / "accuracy.py").write_text(ACCURACY)


def llama2c_tokens(code: Path, _data: Path) -> None:
    """Write random tokens from a fixed seed where llama2.c looks for token files with a vocabulary of 512."""
    folder = code / "data" / "tok512"
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for number in range(3):
        draw.zipf(1.5, 20_000).clip(max=511).astype(np.uint16).tofile(folder / f"data{number:02d}.bin")


def litgpt_text(_code: Path, data: Path) -> None:
    """Write texts, and a byte-level BPE tokenizer that is trained on the first text."""
    from tokenizers import ByteLevelBPETokenizer

    for name in ("text", "tokenizer"):
        (data / name).mkdir(exist_ok=True)
    for number in range(4):
        words(data / "text" / f"{number}.txt")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(data / "text" / "0.txt")], vocab_size=500, special_tokens=["<s>", "</s>"])
    tokenizer.save(str(data / "tokenizer" / "tokenizer.json"))
    kinds = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (data / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(kinds))


def translation(_code: Path, data: Path) -> None:
    """Write the data of Sockeye into ``data``: a text to train on and a text to validate on. The task is to copy a
    line."""
    words(data / "train.txt", 24_000)
    words(data / "dev.txt", 1_200)


def nanochat_shards(_code: Path, data: Path) -> None:
    """Write two shards of texts, the second one for validation, and a tokenizer of single bytes."""
    import pyarrow
    import pyarrow.parquet
    import tiktoken

    for name in ("base_data_climbmix", "tokenizer"):
        (data / name).mkdir()
    words(data / "text.txt")
    lines = (data / "text.txt").read_text().splitlines()
    for number, texts in enumerate((lines[:3000], lines[3000:])):
        path = data / "base_data_climbmix" / f"shard_{number:05d}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100)
    ranks = {bytes([value]): value for value in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|bos|>": 256})
    (data / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    torch.save(torch.tensor([1] * 256 + [0]), data / "tokenizer" / "token_bytes.pt")


def easylm_text(code: Path, data: Path) -> None:
    """Write the texts and the tokenizer of ``litgpt_text`` into ``data``, and the first text also as lines of JSON."""
    litgpt_text(code, data)
    lines = (data / "text" / "0.txt").read_text().splitlines()
    (data / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))


def argon(_code: Path, data: Path) -> None:
    """Write 60 clusters of four argon atoms near a tetrahedron as ``argon.xyz`` (extended XYZ), with the energies and
    forces of a Lennard-Jones potential."""
    draw = np.random.default_rng(0)
    corners = np.array([(0, 0, 0), (3.8, 0, 0), (0, 3.8, 0), (0, 0, 3.8)])
    with (data / "argon.xyz").open("w") as file:
        for _ in range(60):
            atoms = corners + draw.normal(0, 0.2, corners.shape)
            apart = atoms[:, None] - atoms[None]
            squares = (apart**2).sum(-1) + np.diag([np.inf] * 4)
            sixth = (3.4**2 / squares) ** 3
            energy = 2 * 0.0104 * (sixth**2 - sixth).sum()  # each pair counts twice
            forces = (24 * 0.0104 * ((2 * sixth**2 - sixth) / squares)[..., None] * apart).sum(1)
            print(f'4\nProperties=species:S:1:pos:R:3:REF_forces:R:3 REF_energy={energy:.9f} pbc="F F F"', file=file)
            for place, force in zip(atoms, forces, strict=True):
                print("Ar", *(f"{value:.9f}" for value in (*place, *force)), file=file)


def digits(_code: Path, data: Path) -> None:
    """Write files in MNIST's format with random images from a fixed seed: 2,048 for training and 256 for validation."""
    folder = data / "MNIST" / "raw"
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for split, count in (("train", 2048), ("t10k", 256)):
        labels = draw.integers(10, size=count, dtype=np.uint8)
        pixels = draw.integers(64, size=(count, 28, 28), dtype=np.uint8) + 15 * labels[:, None, None]
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            sizes = np.array(values.shape, dtype=">u4").tobytes()
            header = bytes((0, 0, 8, values.ndim))
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + sizes + values.tobytes())


def sounds(_code: Path, data: Path) -> None:
    """Write files with half a second of a tone each, noises to add to the tones, and manifests, for SpeechBrain's
    template.
    """
    draw = np.random.default_rng(0)
    (data / "noise").mkdir()
    (data / "noise" / "data.zip").touch()  # with this file, the template downloads no noises
    for split, count in (("train", 96), ("valid", 8), ("test", 8), ("noise", 4)):
        manifest = {}
        for number in range(count):
            tone = np.sin(draw.uniform(0.1, 1.0) * np.arange(8_000))
            values = draw.standard_normal(8_000) / 4 if split == "noise" else tone
            path = data / ("noise" if split == "noise" else "") / f"{split}{number}.wav"
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(16_000)
                file.writeframes((8_000 * values).astype("<i2").tobytes())
            manifest[f"{split}{number}"] = {"wav": str(path), "length": 0.5}
        (data / f"{split}.json").write_text(json.dumps(manifest))


def llama(folder: Path, vocab_size: int) -> None:
    """Write an untrained Llama of two layers and ``vocab_size`` tokens into ``folder``, in transformers's format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def peft_files(code: Path, data: Path) -> None:
    """Write the data of PEFT's program into ``data``: lines of text to train and to test on, and a Llama of two layers
    with its tokenizer."""
    litgpt_text(code, data)
    lines = (data / "text" / "0.txt").read_text().splitlines()
    (data / "lines").mkdir()
    for split, part in (("train", lines[:1024]), ("test", lines[-16:])):
        (data / "lines" / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in part))
    llama(data / "tokenizer", 500)


def torchtune_files(_code: Path, data: Path) -> None:
    """Write the data of torchtune into ``data``: lines of text, a SentencePiece tokenizer that is trained on this text,
    a Llama of two layers, and the config of a recipe."""
    import sentencepiece

    words(data / "text.txt", 3_000)
    lines = (data / "text.txt").read_text().splitlines()
    (data / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines[:128]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(data / "text.txt"), model_prefix=str(data / "tokenizer"), vocab_size=300, minloglevel=2
    )
    llama(data / "model", 300)
    text = (Path(__file__).parent / "torchtune.yaml").read_text()
    (data / "config.yaml").write_text(text.replace("{data}", str(data)))


def last_loss(folder: RunFolder) -> float | None:
    """Return the loss of the last step of rank 0; None if the program prints none."""
    return next((record["loss"] for record in reversed(read_records(folder.metrics(0))) if "loss" in record), None)


def last_step(folder: RunFolder) -> int:
    """Return the last step that rank 0 has printed; 0: none."""
    recent = recent_records(folder.metrics(0))
    return recent[-1]["step"] if recent else 0


class Trial:
    """One program with its checkout, its data and its runs on the sandbox.

    Args:
        name: name of the program.
        about: entry of the program in programs.yaml.
        checkouts: folder of the checkouts.
        python: interpreter that has the packages of the program.
        scratch: folder for data and runs.
        sandbox: the cluster.
    """

    def __init__(
        self, name: str, about: Mapping[str, Any], checkouts: Path, python: str, scratch: Path, sandbox: Cluster
    ) -> None:
        self.name, self.about, self._python, self._sandbox = name, about, python, sandbox
        self._code = checkouts / about["repository"].rpartition("/")[2] / about.get("folder", ".")
        self._scratch = scratch / name
        self._data = self._scratch / "data"
        self._data.mkdir(parents=True)

    def row(self) -> tuple[str, ...]:
        """Run the program once without a preemption and once with one. Return the table row.

        Raises:
            AssertionError: the checkout has another commit or local changes, or a run does not finish or resume.
        """
        commit = self._git("rev-parse", "HEAD")
        assert commit.startswith(self.about["commit"]), f"a checkout of {commit}, not of {self.about['commit']}"
        changed = self._git("diff", "--name-only", "--diff-filter=M", "HEAD")
        assert not changed, f"the checkout has changes: {changed}"
        if "data" in self.about:
            globals()[self.about["data"]](self._code, self._data)
        if "prepare" in self.about:
            line = [self._python, *self._filled(self.about["prepare"])]
            subprocess.run(line, cwd=self._code, check=True, capture_output=True)
        points = self.about["nodes"]
        self._launch("quiet", "-m", f"nodes={','.join(map(str, points))}")
        log = (self._scratch / "quiet.log").read_text()
        print(log[log.find("\npoint") : log.find("\nwrote")], flush=True)
        (quiet,) = (self._scratch / "outputs" / f"{self.name}_quiet").glob(f"nodes={points[-1]},*")
        stormy = RunFolder(self._scratch / "stormy")
        self._launch("stormy", f"nodes={points[-1]}", f"run_dir={stormy.path}", preempted=stormy)
        records = [record for record in read_records(stormy.metrics(0)) if record["attempt"] > 1]
        assert records, "no attempt after the first made a step"
        losses, same = (last_loss(stormy), last_loss(RunFolder(quiet))), self.about["same"]
        assert losses[0] == losses[1] or same is not True, f"losses {losses} differ"
        notes = "; ".join(text for text in (self.about["note"], same) if isinstance(text, str) and text)
        figures = (len(stormy.attempts()), records[0]["step"], *losses)
        return self.name, commit[:7], ", ".join(map(str, points)), *map(str, figures), notes

    def _git(self, *words: str) -> str:
        done = subprocess.run(["git", "-C", str(self._code), *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def _filled(self, words: Sequence[str]) -> list[str]:
        return [word.replace("{data}", str(self._data)).replace("{code}", str(self._code)) for word in words]

    def _launch(self, kind: str, *words: str, preempted: RunFolder | None = None) -> None:
        """Launch the program, and wait for its end.

        Args:
            kind: part of the names of the sweep and of its log.
            words: overrides of the launch.
            preempted: folder of a run that is preempted in the middle; None preempts no run.

        Raises:
            AssertionError: the launch fails, or the run ends before it is preempted.
        """
        given = [f"script.python={self._python}", *self._filled(self.about["words"])]
        line = [sys.executable, "-m", "gpt_launch", *words, *ON_SLURM, *given]
        env = {**os.environ, **self._sandbox.env, "PYTHONPATH": str(ROOT)}
        path = self._scratch / f"{kind}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [*line, f"name={self.name}_{kind}"], cwd=self._scratch, env=env, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            if preempted is not None:
                at = self.about["preempt_at"]
                wait_for(lambda: process.poll() is not None or last_step(preempted) >= at, f"step {at}", END_S)
                assert process.poll() is None, f"the run ended before step {at}: {path.read_text()}"
                preempt(self._sandbox, str(last_event(preempted.read_events(), "submitted")["job_id"]), seconds=1)
            assert process.wait(END_S) == 0, path.read_text()
        finally:
            process.terminate()


def main() -> int:
    """Run the chosen programs and print the result of each. Returns the exit status: 1 if a program fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkouts", type=Path, help="folder of the checkouts")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the packages of the programs")
    parser.add_argument("--only", default="", metavar="NAMES", help="these programs: NAME,NAME")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # takes the sandbox down
    known = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    names = chosen(args.only, list(known))
    scratch, rows, failed = Path(tempfile.mkdtemp()), [], 0
    with Cluster(scratch / "sandbox") as sandbox:
        sandbox.up(Settings(nodes=2, gpus_per_node=0), timeout_s=180.0)
        for number, name in enumerate(names, start=1):
            began = time.monotonic()
            try:
                trial = Trial(name, known[name], args.checkouts.absolute(), args.python, scratch, sandbox)
                rows.append(trial.row())
                outcome = ", ".join(rows[-1][1:])
            except (AssertionError, KeyError, OSError, subprocess.SubprocessError) as error:
                failed += 1
                outcome = f"failed: {error}"
            print(f"{number}/{len(names)}  {name}: {outcome}; {time.monotonic() - began:.0f} s", flush=True)
    if args.write and rows:
        machine = f"{cores()}, Slurm {slurm_version()} in network namespaces"
        text = f"{stamp(machine)}\n\n{merged(Path(__file__), TITLES, rows)}"
        keep(Path(__file__), "Programs of other people", __doc__, text)
    print(f"runs are kept in {scratch}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
