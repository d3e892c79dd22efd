"""llama.cpp as the oracle, by the wheel `xllamacpp`: log-probabilities of the token after a text, over all tokens."""

from pathlib import Path

import numpy as np
import pytest

TOKENS = list(range(3, 53))
TEXT = 23  # the tiny tokenizer's "1"
# float32 throughout; llama.cpp sums in other blocks, and takes RoPE's sines in float32.
CLOSE = {"rtol": 0, "atol": 2e-3}


def log_probabilities(model: Path, adapter: Path | None = None) -> np.ndarray:
    """Compute log-probabilities (V,) of what follows TOKENS."""
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
    # Probabilities are those of the model; the bias chooses a token of some text, as none are told of an empty one.
    request = {"prompt": TOKENS, "n_predict": 1, "n_probs": 10**6, "temperature": 0.0, "logit_bias": [[TEXT, 1000.0]]}
    answer = xllamacpp.Server(params).handle_completions(request)
    (position,) = answer["choices"][0]["logprobs"]["content"]
    found = {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}
    return np.array([found[token] for token in range(len(found))])


def expected(logits: np.ndarray) -> np.ndarray:
    """Return the same of logits (..., T, V) of the first row."""
    last = logits[0, len(TOKENS) - 1].astype(np.float64)
    return last - np.log(np.exp(last - last.max()).sum()) - last.max()
