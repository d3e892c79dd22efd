"""Made-up token data sets for tests of what is laid out and batched, and how to read examples out of a batch again."""

import numpy as np
from hypothesis import strategies as st

from common.data.tokens import TokenDataset, build_dataset
from common.engine import Array, MicroBatch
from common.layout import make_micro_batch


@st.composite
def datasets(draw) -> TokenDataset:
    """Draw examples of 2 to 40 tokens, none of which is 0 (the padding), each with a supervised token."""
    examples = []
    for number in range(draw(st.integers(1, 12))):
        ids = draw(st.lists(st.integers(1, 99), min_size=2, max_size=40))
        mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        mask[draw(st.integers(1, len(ids) - 1))] = True
        examples.append((ids, mask, f"file:{number + 1}"))
    return build_dataset(examples)


@st.composite
def alike_datasets(draw) -> TokenDataset:
    """Draw examples that begin with more or less of a few beginnings, which begin alike themselves."""
    random = np.random.default_rng(draw(st.integers(0, 999)))
    trunk = random.integers(1, 99, draw(st.integers(0, 30)))
    branches = [np.append(trunk, random.integers(1, 99, draw(st.integers(0, 20)))) for _ in range(3)]
    examples = []
    for number in range(draw(st.integers(1, 30))):
        beginning = branches[random.integers(draw(st.integers(1, 3)))]
        beginning = beginning if draw(st.booleans()) else beginning[: random.integers(len(beginning) + 1)]
        ids = np.append(beginning, random.integers(1, 99, random.integers(2, 9)))
        trained = random.integers(1, len(ids)) if draw(st.booleans()) else len(ids) - 1
        examples.append((ids.tolist(), (np.arange(len(ids)) >= trained).tolist(), f"file:{number + 1}"))
    return build_dataset(examples)


@st.composite
def packed_batches(draw) -> tuple[TokenDataset, list[list[int]], MicroBatch]:
    """Draw a data set and deal its examples out to rows in any way, each of which may share what all of it have."""
    data = draw(datasets() | alike_datasets())
    rows: list[list[int]] = []
    for example in range(len(data)):
        if not rows or draw(st.booleans()):
            rows.append([])
        rows[-1].append(example)
    shared = np.zeros(len(data), np.int64)
    for row in rows:
        shared[row] = draw(st.integers(0, common_beginning(data, row)))
    return data, rows, make_micro_batch(data, rows, shared)


def common_beginning(data: TokenDataset, examples: list[int] | Array) -> int:
    """Count the first tokens that examples may share, one after the other."""
    first, number = data.tokens(examples[0]), 0
    while all(
        len(data.tokens(each)) >= number + 3
        and data.tokens(each)[number] == first[number]
        and not data.mask(each)[number + 1]
        for each in examples
    ):
        number += 1
    return number


def places_of(batch: MicroBatch) -> list[tuple[int, Array, int]]:
    """Return the row and the columns of every example, with what it shares, and the number of columns it shares."""
    found = []
    for row, (segments, positions) in enumerate(zip(batch.segment_ids, batch.position_ids, strict=True)):
        spans = [np.flatnonzero(segments == number) for number in range(1, segments.max() + 1)]
        begins = [positions[span[0]] for span in spans] + [0]
        opening = spans[0][:0]
        for number, span in enumerate(spans):
            opening = span if begins[number] == 0 else opening
            if begins[number] or not begins[number + 1]:
                shared = opening[:0] if begins[number] == 0 else opening
                found.append((row, np.append(shared, span), len(shared)))
    return found


def examples_of(batch: MicroBatch) -> list[tuple]:
    """Read every example out of a batch again: tokens, targets where they are trained, positions, mask."""
    arrays = (batch.token_ids, np.where(batch.loss_mask, batch.targets, 0), batch.position_ids, batch.loss_mask)
    return [tuple(tuple(array[row][columns].tolist()) for array in arrays) for row, columns, _ in places_of(batch)]


def examples_in(data: TokenDataset) -> list[tuple]:
    """Give the same of the data set itself."""
    return [
        (
            tuple(data.tokens(i)[:-1].tolist()),
            tuple((data.tokens(i) * data.mask(i))[1:].tolist()),
            tuple(range(len(data.tokens(i)) - 1)),
            tuple(data.mask(i)[1:].tolist()),
        )
        for i in range(len(data))
    ]
