"""From files to a data set: who tokenises, where the result is kept, and an account of what was lost on the way.

Small files are tokenised here and now. Large ones go to a process a core, chunk by chunk and in order, into a store
(token_store.py) that a second start opens in its place: memory holds some chunks, however much data there is.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from common.config import TrainConfig, WeightedPath
from common.cpus import available_cpus
from common.data.chat import ChatTokenizer
from common.data.readers import Raw, label, read_raw
from common.data.records import summarise
from common.data.sources import DataFile, Split, list_files
from common.data.token_store import new_store, open_store, store_folder
from common.data.tokenise import DataReport, Recipe, Tokeniser, tokenise
from common.data.tokens import Chunk, TokenDataset, join
from common.engine import Array
from common.errors import MachineError, UserError

SMALL_BYTES = 4 * 2**20  # files up to this are tokenised in a second or two: other processes would only start by then
CHUNK_RECORDS = 1000
AHEAD = 3  # chunks that are under way for each process

Advance = Callable[[int], None]  # is told how many records are done


def load_dataset(
    paths: str | Sequence[str | WeightedPath],
    config: TrainConfig,
    tokenizer: ChatTokenizer,
    split: Split = "train",
    advance: Advance = lambda done: None,
) -> tuple[TokenDataset, DataReport]:
    """Read and tokenise files; raises UserError for bad records (all of them) and where nothing is left to train."""
    files = list_files(paths, split)
    recipe = Recipe(tokenizer.directory, tuple(files), config.data.model_dump_json(), config.max_seq_length)
    labels = [label(file) for file in files]
    if _is_small(files):
        data, report = _in_memory(recipe, labels, tokenizer, advance)
    else:
        data, report = _in_store(recipe, labels, tokenizer, advance)
    if not len(data):
        raise UserError(
            f"{', '.join(file.path for file in files)}: no example with a supervised token is left "
            f"({report.truncated} were longer than max_seq_length {config.max_seq_length}); see `twintune preview`"
        )
    return data, report


def load_training(
    config: TrainConfig, tokenizer: ChatTokenizer, advance: Advance = lambda done: None
) -> tuple[TokenDataset, TokenDataset | None, DataReport]:
    """Read the training data; returns it weighted, what `data.validation_split` holds out of it, and the report."""
    data, report = load_dataset(config.data.train, config, tokenizer, "train", advance)
    held_out = None
    if config.data.validation_split:
        data, held_out = hold_out(data, config.data.validation_split, config.seed)
    weights = np.array([file.weight for file in list_files(config.data.train)])
    return (data if (weights == 1).all() else weighted(data, weights, config.seed)), held_out, report


def hold_out(data: TokenDataset, share: float, seed: int) -> tuple[TokenDataset, TokenDataset]:
    """Split off a share below 1, or a number, of the records by seed; returns what is left and what was split off.

    The pieces of one record stay together. Raises UserError where nothing would be left.
    """
    records, record_of = np.unique(
        np.stack([data.places.files, data.places.lines], axis=1), axis=0, return_inverse=True
    )
    number = int(share) if share >= 1 else max(1, round(share * len(records)))
    if number >= len(records):
        raise UserError(
            f"data.validation_split: {share:g}: there are {len(records)} examples, so none would be left to train; "
            "write a smaller one, or name a file in data.validation"
        )
    held = np.zeros(len(records), np.bool_)
    held[np.random.default_rng([seed, len(records)]).permutation(len(records))[:number]] = True
    is_held = held[record_of.reshape(-1)]
    return data.select(np.flatnonzero(~is_held)), data.select(np.flatnonzero(is_held))


def weighted(data: TokenDataset, weights: Array, seed: int) -> TokenDataset:
    """Repeat the examples of each file as often as its weight says; a fraction takes a seeded part once more."""
    chosen = []
    for file, weight in enumerate(weights):
        examples = np.flatnonzero(data.places.files == file)
        part = np.random.default_rng([seed, file]).permutation(examples)[: round(weight % 1 * len(examples))]
        chosen += [examples] * int(weight) + [np.sort(part)]
    return data.select(np.sort(np.concatenate(chosen), kind="stable"))


def report_lines(report: DataReport, config: TrainConfig) -> list[str]:
    """Say what was lost, one line each; nothing where nothing was."""
    lines = []
    if report.num_errors:
        lines.append(f"{report.num_errors:,} unusable records were left out, the first: {report.errors[0]}")
    if report.truncated:
        verb = {"truncate": "were cut", "drop": "were left out", "split": "were split"}[config.data.truncation]
        lost = f", {report.lost_loss_tokens:,} supervised tokens lost" if report.lost_loss_tokens else ""
        lines.append(f"{report.truncated:,} examples longer than max_seq_length {config.max_seq_length} {verb}{lost}")
    if report.dropped:
        lines.append(f"{report.dropped:,} examples without a supervised token were left out")
    return lines


def _is_small(files: Sequence[DataFile]) -> bool:
    paths = [Path(file.path) for file in files]
    return all(path.is_file() for path in paths) and sum(path.stat().st_size for path in paths) <= SMALL_BYTES


def _in_memory(
    recipe: Recipe, labels: Sequence[str], tokenizer: ChatTokenizer, advance: Advance
) -> tuple[TokenDataset, DataReport]:
    tokeniser = Tokeniser(recipe, tokenizer)
    chunks, report = [], DataReport()
    for chunk, part in map(tokeniser, _chunks(recipe)):
        chunks.append(chunk)
        report.add(part)
        advance(report.num_records)
    _refuse_errors(report, recipe)
    return join(chunks, labels), report


def _in_store(
    recipe: Recipe, labels: Sequence[str], tokenizer: ChatTokenizer, advance: Advance
) -> tuple[TokenDataset, DataReport]:
    folder = store_folder(recipe, tokenizer.files)
    found = open_store(folder, labels) if all(file.kind != "hub" for file in recipe.files) else None
    if found is None:
        report = DataReport()
        with new_store(folder) as writer:
            for chunk, part in _by_processes(recipe):
                writer.add(chunk)
                report.add(part)
                advance(report.num_records)
            _refuse_errors(report, recipe)
            writer.finish(report)
        found = open_store(folder, labels)
    assert found is not None, f"{folder} was written and is gone"
    return found


def _by_processes(recipe: Recipe) -> Iterator[tuple[Chunk, DataReport]]:
    """Tokenise with a process a core, a few chunks ahead of whoever takes the results, which come in order."""
    processes = available_cpus()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_begin_worker) as pool:
        pending: deque[Future[tuple[Chunk, DataReport]]] = deque()
        try:
            for raws in _chunks(recipe):
                pending.append(pool.submit(tokenise, recipe, raws))
                if len(pending) >= AHEAD * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise MachineError(
                "a process that tokenised data was killed, as systems do that run out of memory; "
                "close other programs, or split the longest records"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, the cores to the other processes, and look for garbage rarely."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.set_threshold(100_000)  # a chunk makes some thousand lists, none of them a cycle


def _chunks(recipe: Recipe) -> Iterable[list[Raw]]:
    records = read_raw(recipe.files)
    return iter(lambda: list(itertools.islice(records, CHUNK_RECORDS)), [])


def _refuse_errors(report: DataReport, recipe: Recipe) -> None:
    if report.num_errors and recipe.config().on_error == "stop":
        text = summarise(report.errors, report.num_errors)
        raise UserError(f"{text}\nmend them, or leave them out with data.on_error: skip")
