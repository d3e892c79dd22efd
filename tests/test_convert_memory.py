"""The memory of a conversion: some blocks, whatever the size of the model. Made of holes, the source takes no disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import write_llama

from common.base.tensor_files import header_of

ROOT = Path(__file__).parent.parent
LARGE = {"vocab_size": 12_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}
LARGEST = 12_000 * 512 * 4  # bytes: embeddings and head
ROOM = 16_000_000  # of blocks of 0.5 MB, read, decoded, encoded, compared, and what the allocator keeps

MEASURE = """
import json, sys
from pathlib import Path
from rich.console import Console
from common.base import tensors
from common.convert.convert import convert
from common.convert.request import Request, quantization_of
from common.memory import process_memory
tensors.BLOCK_NUMBERS = 1 << 17  # an eighth, as the model is small
def peak():
    return process_memory().peak_bytes
def run(model, to):
    quantization = quantization_of(4 if to == "mlx" else None, None, None, [])
    request = Request(model, Path(f"{model}_{to}"), to, dtype="float16", quantization=quantization, check=False)
    convert(request, Console(quiet=True))
for to in ("hf", "mlx", "bnb"):
    run("small", to)  # with all libraries
before, grown = peak(), {}
for to in ("hf", "mlx", "bnb"):
    run("large", to)
    grown[to] = peak() - before
print(json.dumps(grown))
"""


def write_hollow(folder: Path, small: Path) -> Path:
    """Write a Llama of 80 MB of zeros in two files that take no room on the disk."""
    folder.mkdir()
    config = json.loads((small / "config.json").read_text()) | LARGE | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    hidden, inner, heads = LARGE["hidden_size"], LARGE["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * heads, config["num_key_value_heads"] * heads
    shapes = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    layer = {f"self_attn.{name}_proj": shape for name, shape in shapes.items()}
    layer |= {f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")} | {"mlp.down_proj": (hidden, inner)}
    layer |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    vocabulary = (LARGE["vocab_size"], hidden)
    files = [
        {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (hidden,), "lm_head.weight": vocabulary},
        {
            f"model.layers.{number}.{name}.weight": shape
            for number in range(LARGE["num_hidden_layers"])
            for name, shape in layer.items()
        },
    ]
    index = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-00002.safetensors"
        sizes = {key: 4 * shape[0] * (shape[1] if len(shape) > 1 else 1) for key, shape in tensors.items()}
        header = header_of((key, "F32", shape, sizes[key]) for key, shape in tensors.items())
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(sizes.values()))
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def test_memory_grows_by_less_than_the_largest_tensor(tmp_path: Path):
    pytest.importorskip("mlx.core")
    small = write_llama(tmp_path / "small", hidden_size=128, intermediate_size=256)
    write_hollow(tmp_path / "large", small)
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert max(grown.values()) < ROOM < LARGEST, grown
