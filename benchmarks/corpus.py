"""Memory and disk that `calibrate` takes of a text that is read where it lies, for growing numbers of tokens.

    python -m benchmarks.corpus --model MODEL --text TRAIN.txt --millions 1 4 16

The text's lines, repeated and numbered, become parquet files in the embedded S3, half as many tokens again as the most that are asked for.
Each number of tokens is drawn by a process of its own, with its windows for the trainings sent to the store file by file. Memory is what
the process grew by; disk is the most that its folder held.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.memory import peak
from benchmarks.store import server
from components.calibrate.windows import calibrate
from components.lib.recipe.schema import Calibration, Corpus
from components.lib.sources.shards import SHARDS, list_shards
from components.lib.store.store import Store
from components.lib.training.journal import Silent
from components.lib.transformer.checkpoint import load_tokenizer

LENGTH = 512
SAMPLES = 128
MILLION = 10**6
_FILE_CHARACTERS = 8 * MILLION


def main() -> None:
    """Make the text, and print a line for each number of tokens."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, required=True, help="a checkpoint folder, for its tokenizer")
    arguments.add_argument("--text", type=Path, required=True, help="the text that is repeated")
    arguments.add_argument("--millions", type=float, nargs="+", default=[1, 4, 16], help="millions of tokens")
    arguments.add_argument("--drawn", type=float, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.drawn:
        print(json.dumps(draw(given.model, given.text, given.drawn)))
        return
    with tempfile.TemporaryDirectory() as scratch, server(None):
        listing = _upload(given.model, given.text, max(given.millions), Path(scratch))
        print("| tokens, millions | seconds | memory, MB | disk, MB |\n|---|---|---|---|")
        for millions in given.millions:
            command = [sys.executable, "-m", "benchmarks.corpus", "--model", str(given.model), "--text", str(listing)]
            answer = subprocess.run([*command, "--drawn", str(millions)], check=True, capture_output=True, text=True)
            found = json.loads(answer.stdout.splitlines()[-1])
            print(
                f"| {millions:g} | {found['seconds']:.0f} | {found['memory']:.0f} | {found['disk']:.1f} |", flush=True
            )


def _upload(model: Path, text: Path, millions: float, scratch: Path) -> Path:
    """Put parquet files of one and a half times so many tokens on S3, and return the file that lists them."""
    lines = [line for line in text.read_text().splitlines() if line.strip()]
    sample = "\n".join(lines[:2000])
    characters = 1.5 * millions * MILLION * len(sample) / len(load_tokenizer(model)(sample)["input_ids"])
    files = -(-int(characters) // _FILE_CHARACTERS)
    store, documents = Store.from_environment(), _numbered(lines)
    for number in range(files):
        rows, size = [], 0
        while size < _FILE_CHARACTERS:
            rows.append(next(documents))
            size += len(rows[-1])
        pq.write_table(pa.table({"text": rows}), scratch / "part.parquet", row_group_size=max(1, len(rows) // 4))
        (scratch / f"{number:05d}.parquet").symlink_to(scratch / "part.parquet")
        store.send(scratch, "corpus", f"{number:05d}.parquet")
    (scratch / SHARDS).write_text(list_shards(Corpus(path=store.uri("corpus"), stream=True), store).model_dump_json())
    return scratch / SHARDS


def _numbered(lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(cycle(lines)):
        yield f"{number}. {line}"


def draw(model: Path, listing: Path, millions: float) -> dict[str, float]:
    """Draw windows of so many tokens, and return the seconds, the growth of the memory and the most disk, both in MB."""
    further = int(millions * MILLION) // LENGTH
    settings = Calibration(data=Corpus(path="s3://corpus"), samples=SAMPLES, training_samples=further, length=LENGTH)
    store, most = Store.from_environment(), 0
    with tempfile.TemporaryDirectory() as folder:
        release, out = Path(folder) / "release", Path(folder) / "out"
        release.mkdir()
        (release / "model").symlink_to(model.resolve())
        out.mkdir()

        def send(path: Path) -> None:
            nonlocal most
            most = max(most, sum(file.stat().st_size for file in out.iterdir()))
            store.send(out, f"windows/{millions:g}", path.name)
            path.unlink()

        load_tokenizer(model)("Loaded before the memory is read.")
        before, start = peak(), time.perf_counter()
        calibrate(release, listing, calibration=settings, out=out, journal=Silent(), send=send)
        return {
            "seconds": time.perf_counter() - start,
            "memory": (peak() - before) / MILLION,
            "disk": most / MILLION,
        }


if __name__ == "__main__":
    main()
