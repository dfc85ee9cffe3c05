"""Time that commands of the login node take: `python -m benchmarks.speed.commands` prints a Markdown table."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "python -m launch --help": ["--help"],
    "python -m launch -m nodes=1,2,4 dry_run=true": ["-m", "nodes=1,2,4", "dry_run=true"],
    "python -m launch nodes=3 (refused)": ["nodes=3"],
}
RUNS = 7


def seconds(words: list[str], folder: str) -> float:
    """Return the wall time of one command in seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "launch", *words], cwd=folder, capture_output=True, check=False)
    return time.perf_counter() - started


def main() -> None:
    """Run each command once without measuring it, then ``RUNS`` times, and print the table of its times."""
    print("| command | median | slowest |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, words in COMMANDS.items():
            seconds(words, folder)
            times = [seconds(words, folder) for _ in range(RUNS)]
            print(f"| `{name}` | {statistics.median(times):.2f} s | {max(times):.2f} s |")


if __name__ == "__main__":
    main()
