"""What bitsandbytes 0.50 makes of some weights, written to four_bit.json: python tests/golden/four_bit.py.

The weights come of integer arithmetic, the same on every machine, so that the file is enough where bitsandbytes can't
run (macOS). Those for double quantisation are bfloat16: only then is its float32 mean the same everywhere.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_suffix(".json")
CASES = {
    "plain": ((6, 64), 1.0),
    "rows of no whole blocks": ((5, 96), 0.02),
    "odd count": ((5, 7), 0.02),
    "short last block": ((3, 50), 0.02),
    "one number": ((1, 1), 3.0),
    "huge": ((2, 80), 1e37),
    "tiny": ((2, 80), 1e-30),
    "many": ((64, 1040), 0.02),
}


def made_weight(shape: tuple[int, int], scale: float) -> np.ndarray:
    """Return float32 weights that are exact in bfloat16, most of them small; every fifth block of 64 is one value."""
    index = np.arange(shape[0] * shape[1], dtype=np.uint64)
    uniform = ((index * np.uint64(2654435761) + np.uint64(12345)) % np.uint64(2**32)).astype(np.float64) / 2**31 - 1
    values = (uniform**3 * scale).astype(np.float32)
    values[(index // np.uint64(64)) % np.uint64(5) == 4] = np.float32(0.25 * scale)
    values[:: max(1, len(values) // 9)] = 0
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).reshape(shape)


def digest(array: np.ndarray) -> str:
    """Return a sha256 over the bytes of an array, -0 taken as 0."""
    plain = array + array.dtype.type(0) if array.dtype.kind == "f" else array
    return hashlib.sha256(np.ascontiguousarray(plain).tobytes()).hexdigest()


def by_bitsandbytes(weight: np.ndarray, quant_type: str, double: bool) -> dict[str, str]:
    """Quantise and dequantise with bitsandbytes on the CPU; returns digests of all that it makes."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        torch.from_numpy(weight).bfloat16(), quant_type=quant_type, compress_statistics=double
    )
    found = {"packed": digest(packed.reshape(-1).numpy()), "absmax": digest(state.absmax.numpy())}
    if double:
        found |= {"nested_absmax": digest(state.state2.absmax.numpy()), "nested_offset": digest(state.offset.numpy())}
    state.shape = torch.Size((1, weight.size))  # as one row: bitsandbytes/CPU misreads rows of no whole blocks
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        dense = dequantize_4bit(packed, state) if packed.shape[0] > 1 else dequantize_4bit(packed, state).t()
        found[str(dtype).removeprefix("torch.")] = digest(dense.float().numpy().reshape(-1))
    return found


if __name__ == "__main__":
    golden = {
        f"{name}, {quant_type}{', double' * double}": by_bitsandbytes(made_weight(*case), quant_type, double)
        for name, case in CASES.items()
        for quant_type in ("nf4", "fp4")
        for double in (False, True)
    }
    PATH.write_text(json.dumps(golden, indent=1) + "\n")
