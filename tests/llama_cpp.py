"""llama.cpp as the oracle, by the wheel `xllamacpp`: log-probabilities of the token after a text, and its tokens."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest

TOKENS = list(range(3, 53))
TEXT = 23  # the tiny tokenizer's "1"
# float32 throughout; llama.cpp sums in other blocks, and takes RoPE's sines in float32.
CLOSE = {"rtol": 0, "atol": 2e-3}


def open_server(model: Path, adapter: Path | None = None) -> Any:
    """Load a model on one thread with a float32 cache."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.verbosity = 128, 1, -1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    return xllamacpp.Server(params)


def log_probabilities(
    model: Path, adapter: Path | None = None, tokens: Sequence[int] = TOKENS, text: int = TEXT
) -> np.ndarray:
    """Compute log-probabilities (V,) of what follows some tokens; `text` is any token that is text."""
    # Probabilities are those of the model; the bias chooses a token of some text, as none are told of an empty one.
    request = {"prompt": list(tokens), "n_predict": 1, "n_probs": 10**6, "temperature": 0.0}
    answer = open_server(model, adapter).handle_completions(request | {"logit_bias": [[text, 1000.0]]})
    (position,) = answer["choices"][0]["logprobs"]["content"]
    found = {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}
    return np.array([found[token] for token in range(len(found))])


def tokenize(model: Path, texts: Iterable[str]) -> list[list[int]]:
    """Encode texts with the vocabulary of a model, special tokens where they are written, and BOS where it is usual."""
    server = open_server(model)
    settings = {"add_special": True, "parse_special": True}
    found = []
    for text in texts:
        request = Request(f"{server.listening_address}/tokenize", json.dumps({"content": text, **settings}).encode())
        with urlopen(request) as answer:
            found.append(json.load(answer)["tokens"])
    return found


def expected(logits: np.ndarray, tokens: Sequence[int] = TOKENS) -> np.ndarray:
    """Return the log-probabilities of logits (..., T, V) of the first row."""
    last = logits[0, len(tokens) - 1].astype(np.float64)
    return last - np.log(np.exp(last - last.max()).sum()) - last.max()
