"""What each engine keeps of a micro-batch between forward and backward, counted from how its layers are written.

Units are elements a position: h is the hidden width, q and k those of queries and keys, i that of the MLP. What an
architecture does beside the plain decoder (norms after attention, q_norm) is not counted: some per cent. The formulas
were held against autograd's own list of saved tensors (torch) and against layers added one by one (MLX) on a CPU, and
against peaks on an H200; tests/test_estimate.py keeps them there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.estimate.shape import ModelShape
from common.logits import chunk_rows
from common.segments import bound

CHUNK_BYTES = {"torch": 3 * 2**26, "mlx": 2**27}  # CHUNK_BYTES of torch_backend/loss.py and mlx_backend/loss.py
# Bytes a logit of all rows where a trained head takes torch's plain way, in any dtype: measured on a CPU.
TRAINED_HEAD_BYTES = 12
# Float32 arrays of a chunk in mlx_backend/loss.py, and of all rows where a trained head takes the plain way: measured.
MLX_HEAD_ARRAYS = 4
# Of attention's backward where it has no kernel, beside the probabilities; 2.7 to 5 were measured for MLX on a CPU.
SCORES_PASSING = 3.5
# A task's result takes memory when MLX queues it, and ten tasks may wait: so many arrays of a chunk are there
# (mlx_backend/loss.py orders the chunks, which the queue runs ahead of). Measured on a CPU, 1,024 to 4,096 rows.
MLX_QUEUED_ARRAYS = 10
# Attention block by block (mlx_backend/blockwise.py): the size of its blocks, and how many of scores are there at once.
LONG, BLOCK, LARGEST_BLOCK = 512, 256, 512
BLOCKS_ALIVE = 10
# All blocks at once (mlx_backend/banded.py): the sizes of blocks, the scores that are computed at a time, and how many
# arrays like them are there, as counted on a CPU, compiled, in bfloat16: 5.3, with a soft cap 5.9.
SMALLEST_BAND, LARGEST_BAND = 128, 512
BANDED_SCORES, BANDED_ALIVE = 2**27, 5.5
HEAP_BLOCK = 2**25  # glibc never takes larger ones from its heap
# Below that, torch's freed activations leave holes: runs on a CPU hold 1.3 to 1.5 times what is alive, and 1.03
# to 1.07 with MALLOC_MMAP_THRESHOLD_ set, which forbids the heap.
TORCH_HEAP_HOLES = 1.5


@dataclass(frozen=True)
class Work:
    """Describe one micro-batch."""

    rows: int
    length: int  # positions of a row
    supervised: int  # positions whose logits are wanted
    longest: int  # of an example: what attends to itself
    seen: float = 1.0  # keys that examples see, for each position: more where they share a beginning

    @property
    def positions(self) -> int:
        """Count the positions computed."""
        return self.rows * self.length


@dataclass(frozen=True)
class Setting:
    """Describe how an engine computes: what decides the bytes of an activation."""

    engine: str
    device_type: str  # "cuda", "metal", "mps" or "cpu"
    bytes_each: int  # of an activation
    compiled: bool  # torch's layers
    packed: bool
    checkpointing: bool
    offloading: bool
    trained_head: bool
    dropout: bool = False  # of LoRA's: then torch's checkpointing is no part of a compiled layer
    streams: int = 1  # groups of rows that MLX computes side by side on a CPU


@dataclass(frozen=True)
class Activations:
    """Hold bytes: of the layers, of attention beside them, and of the head."""

    kept: float  # by all layers until the backward pass
    passing: float  # of the one layer that the backward pass is in
    attention: float
    logits: float


def activations(shape: ModelShape, work: Work, how: Setting) -> Activations:
    """Count what is alive at the turn from forward to backward."""
    size = work.positions * how.bytes_each
    layer: float = (_mlx_layer(shape, work, how) if how.engine == "mlx" else _torch_layer(shape, work, how)) * size
    scores, scores_passing = _scores(shape, work, how)
    # Of the MLP's backward: its result, that one's gradient, gate's and up's; the inputs' gradients. Those of attention
    # come when these are gone.
    passing = max((_inner_passing(shape, work, how) * shape.intermediate + 6 * shape.hidden) * size, scores_passing)
    kept: float = shape.layers * layer
    attention: float = shape.layers * scores
    if how.checkpointing:
        inputs = 2 if how.offloading else shape.layers  # one in use and one on its way
        kept, attention = inputs * shape.hidden * size, scores
        passing += layer - shape.hidden * size
        if how.offloading and how.compiled and not how.dropout:  # attention isn't computed again, q, k and v come last
            passing -= (shape.queries + _torch_keys(shape, work, how)) * size
    holes = how.engine == "torch" and how.device_type == "cpu" and shape.intermediate * size < HEAP_BLOCK
    factor = TORCH_HEAP_HOLES if holes else 1
    return Activations(factor * kept, factor * passing, attention, _logits(shape, work, how))


def _torch_layer(shape: ModelShape, work: Work, how: Setting) -> float:
    """Count what a layer keeps on torch."""
    h, q, i = shape.hidden, shape.queries, shape.intermediate
    keys = _torch_keys(shape, work, how)
    joined = q if how.packed and how.device_type == "cpu" else 0  # the examples' results, put together
    if how.compiled:  # input, q, k, v, result, middle, gate, up: norms and SwiGLU are computed again
        return 2 * h + 2 * q + keys + 2 * i
    if how.bytes_each == 4:  # norms' results and SwiGLU's two steps besides
        return 4 * h + 2 * q + keys + joined + 4 * i
    # Norms in float32, twice as wide, beside their results.
    return 6 * h + 2 * q + keys + joined + 4 * i


def _torch_keys(shape: ModelShape, work: Work, how: Setting) -> float:
    """Count a layer's keys and values on torch; packed rows have them repeated for each query head.

    Where examples share a beginning, each has a copy of all that it sees, on a CPU beside those of the row.
    """
    copies = work.seen + (work.seen > 1 and how.device_type == "cpu")
    return 2 * (shape.queries * copies if how.packed else shape.keys)


def _mlx_layer(shape: ModelShape, work: Work, how: Setting) -> float:
    """Count what a layer keeps on MLX: norms' results and gate, up and their product.

    Norms are computed again, and on a GPU the product (mlx_backend/recompute.py), but not of a layer that is computed
    again as a whole. A CPU keeps SwiGLU's two steps between besides, where it isn't in float32 (mlx_backend/swiglu.py),
    and for each example a copy of the beginning that it shares (mlx_backend/arrangement.py).
    """
    on_cpu = how.device_type == "cpu"
    inner = 5 if on_cpu and how.bytes_each < 4 else 3 if on_cpu or how.checkpointing else 2
    keys = 2 * shape.keys * (work.seen if on_cpu else 1)
    return (4 if how.checkpointing else 2) * shape.hidden + 2 * shape.queries + keys + inner * shape.intermediate


def _inner_passing(shape: ModelShape, work: Work, how: Setting) -> float:
    """Count the arrays as wide as the MLP that its backward pass holds; the steps of MLX's SwiGLU on a CPU queue up.

    On torch sums are made in place (torch_backend/in_place.py), and where a compiled layer has gate and up for itself,
    having computed them again, all beside the gradient of their product is written over them (overwrite.py there).
    """
    if how.engine == "torch":
        apart = any(name.endswith("gate_proj") for name in shape.linear)  # some have one matrix for gate and up
        return 1 if apart and how.compiled and how.checkpointing and not how.dropout else 4
    queued = how.device_type == "cpu" and how.bytes_each == 4
    return max(5, MLX_QUEUED_ARRAYS / _groups(work, how)) if queued else 5


def _groups(work: Work, how: Setting) -> int:
    """Count the groups of rows that MLX computes side by side."""
    return how.streams if how.packed else min(how.streams, work.rows)


def _scores(shape: ModelShape, work: Work, how: Setting) -> tuple[float, float]:
    """Count what attention keeps of a layer where it has no backward kernel, and passing: MPS, and MLX but for CUDA.

    Nor has MLX one on CUDA for packed rows, which are masked.
    """
    masked = how.engine == "mlx" and how.packed
    if (how.device_type == "cuda" and not masked) or (how.engine == "torch" and how.device_type == "cpu"):
        return 0, 0
    # A GPU masks whole packed rows, a CPU lays examples side by side (mlx_backend/arrangement.py).
    span = work.longest if how.device_type == "cpu" else work.length
    if how.engine == "mlx" and span > LONG:  # a logarithm a query, in float32
        return 4 * shape.heads * work.positions, 4 * _mlx_scores_passing(shape, work, how, span)
    kept = shape.heads * work.positions * span * how.bytes_each
    return kept, SCORES_PASSING * kept


def _mlx_scores_passing(shape: ModelShape, work: Work, how: Setting, span: int) -> float:
    """Count the scores, and numbers like them, that MLX holds of long rows: of some blocks, or on a GPU of all."""
    width = _band_width(work.longest)
    if how.packed and how.device_type != "cpu" and width < work.length:
        return BANDED_ALIVE * min(shape.heads * work.positions * width, BANDED_SCORES)
    block = bound(min(max(span // 16, BLOCK), LARGEST_BLOCK))
    return BLOCKS_ALIVE * work.positions / span * shape.heads * block**2


def _band_width(longest: int) -> int:
    """Count the keys of a block as mlx_backend/band.py does, less those that open a row for all."""
    reach = bound(longest)
    size = bound(min(max(reach // 4, SMALLEST_BAND), LARGEST_BAND))
    return size * (1 - (1 - reach) // size)


def _logits(shape: ModelShape, work: Work, how: Setting) -> float:
    """Count the head's arrays, of a chunk of rows where it is frozen, and its input with the gradient."""
    inputs = 2 * work.supervised * shape.hidden * how.bytes_each
    if how.engine == "mlx":
        chunk = chunk_rows(shape.vocabulary, CHUNK_BYTES["mlx"])
        return 4 * shape.vocabulary * _mlx_logit_rows(work, how, chunk) + inputs
    if how.trained_head:
        return work.supervised * shape.vocabulary * TRAINED_HEAD_BYTES + inputs
    rows = min(work.supervised, chunk_rows(shape.vocabulary, CHUNK_BYTES["torch"], how.bytes_each))
    each = how.bytes_each
    if how.device_type != "cuda" or not how.compiled:  # else one kernel does it all where the logits are
        each += 4 + (4 if how.bytes_each < 4 else 0)  # float32 exponentials, and values, where logits aren't float32
    return rows * shape.vocabulary * each + inputs


def _mlx_logit_rows(work: Work, how: Setting, chunk: int) -> int:
    """Count the rows of float32 logits, and of arrays like them, that MLX holds at once."""
    # Checkpointing has one stream's rows finished before the next one's begin (mlx_backend/__init__.py).
    rows = MLX_HEAD_ARRAYS * math.ceil(work.supervised / (_groups(work, how) if how.checkpointing else 1))
    return rows if how.trained_head else min(rows, MLX_QUEUED_ARRAYS * chunk)
