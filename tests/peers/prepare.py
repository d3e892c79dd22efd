"""How fast data is prepared, beside what `tokenizers` alone does with as many processes, and in how much memory.

Run: python tests/peers/prepare.py [--examples 150000] [--repeat 16]; 2 million short examples take some minutes.
Examples are the quickstart's, each made different by a number, with a question of `--repeat` sentences: 16 make about
290 tokens, a chat of usual length, 1 makes 72. What Python does for an example costs both 40 to 60 microseconds.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil

from common.config import TrainConfig
from common.cpus import available_cpus
from common.data.chat import ChatTokenizer
from common.data.dataset import CHUNK_RECORDS, load_dataset

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m-instruct"
SAMPLE = 40_000  # examples that tokenizers alone is timed with


def main() -> None:
    """Make the data, prepare it twice, and print rates and memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=150_000)
    parser.add_argument("--repeat", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TWINTUNE_CACHE"] = f"{folder}/cache"
        path = Path(folder) / "train.jsonl"
        write_examples(path, options.examples, options.repeat)
        alone = tokenizers_rate(path, min(options.examples, SAMPLE))
        tokenizer, config = ChatTokenizer(MODEL), TrainConfig()
        with PeakMemory() as peak:
            began = time.perf_counter()
            data, _ = load_dataset(str(path), config, tokenizer)
            first = time.perf_counter() - began
        began = time.perf_counter()
        load_dataset(str(path), config, tokenizer)
        second = time.perf_counter() - began
        rate = len(data) / first
        print(
            f"{len(data):,} examples, {data.num_tokens / len(data):.0f} tokens each, "
            f"{path.stat().st_size / 1e6:,.0f} MB, {available_cpus()} processes\n"
            f"tokenizers alone     {alone:>10,.0f} examples/s\n"
            f"twintune, all of it  {rate:>10,.0f} examples/s  {rate / alone:.0%}\n"
            f"first start {first:.1f} s, second {second:.1f} s; peak memory {peak.bytes / 1e9:.2f} GB "
            f"of all processes (largest single one {peak.largest / 1e9:.2f} GB)"
        )


def write_examples(path: Path, number: int, repeat: int) -> None:
    """Write examples that no cache of a tokenizer has seen: each holds a number of its own."""
    with (ROOT / "configs/quickstart/train.jsonl").open() as file:
        chats = [json.loads(line)["messages"] for line in file]
    with path.open("w") as file:
        for index in range(number):
            messages = [dict(message) for message in chats[index % len(chats)]]
            question = messages[-2]["content"]
            messages[-2]["content"] = " ".join(f"{question} ({index + i})" for i in range(repeat))
            file.write(json.dumps({"messages": messages}) + "\n")


def tokenizers_rate(path: Path, number: int) -> float:
    """Return examples a second of encode_batch, in as many processes, on texts that are rendered already."""
    tokenizer = ChatTokenizer(MODEL)
    texts = []
    with path.open() as file:
        for line, _ in zip(file, range(number), strict=False):
            texts.append(tokenizer.render(json.loads(line)["messages"], None, add_generation_prompt=False))
    parts = [texts[start : start + CHUNK_RECORDS] for start in range(0, len(texts), CHUNK_RECORDS)]
    processes = available_cpus()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(encode_all, parts[: 2 * processes]))  # starts the processes
        seconds = sum(pool.map(encode_all, parts))
    return len(texts) / seconds * processes


def encode_all(texts: list[str]) -> float:
    """Return the seconds that tokenizers takes for some texts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    began = time.perf_counter()
    tokenizer.encode_batch(texts, add_special_tokens=False)
    return time.perf_counter() - began


class PeakMemory:
    """Sample the resident memory of this process and its children."""

    def __enter__(self) -> "PeakMemory":
        self.bytes = self.largest = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.2):
            sizes = []
            for each in [process, *process.children(recursive=True)]:
                try:
                    sizes.append(each.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            self.bytes, self.largest = max(self.bytes, sum(sizes)), max(self.largest, *sizes)


if __name__ == "__main__":
    main()
