"""GGUF files of real models, converted and asked.

`make test-gguf` fetches two files and names their folder in TWINTUNE_GGUF: SmolLM2 135M Instruct, of llama.cpp's Llama
graph, Q4_1 and a byte-level vocabulary; Gemma 3 270M, of K-quants and SentencePiece. `make test` skips them.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import transformers
from conversions import convert_gguf
from gguf_files import TEXTS, as_gguf, load_model
from llama_cpp import expected, log_probabilities, tokenize

from common.config import TrainConfig
from common.engine import Engine, open_engine
from common.sampling import Sampling

QUICKSTART = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"
FOLDER = os.environ.get("TWINTUNE_GGUF")
fetched = pytest.mark.skipif(not FOLDER, reason="TWINTUNE_GGUF names no folder; make test-gguf fetches two real files")


@dataclass(frozen=True)
class Real:
    """Name a GGUF file, and what its model answers."""

    file: str
    prompt: str
    answer: str


MODELS = (
    Real(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
        "The capital of France is Paris.<|im_end|>",
    ),
    Real("gemma-3-270m-q4_k_m.gguf", "Monday, Tuesday, Wednesday,", " Thursday, Friday, Saturday, Sunday,"),
)


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.file)
def real(request: pytest.FixtureRequest) -> Real:
    return request.param


@pytest.fixture(scope="module")
def folder(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "folder"
    convert_gguf(Path(FOLDER) / real.file, output, "float32")
    return output


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["torch", "mlx"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    opened = open_engine(request.param, TrainConfig(engine=request.param, device="cpu", dtype="float32"), folder, None)
    yield opened
    opened.close()


@fetched
def test_its_tokens_are_llama_cpps(real: Real, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    texts = [*TEXTS, *("".join(TEXTS[start::7]) for start in range(7)), real.prompt]
    assert [tokenizer(text).input_ids for text in texts] == tokenize(Path(FOLDER) / real.file, texts)


@fetched
def test_both_engines_answer(real: Real, tokenizer: transformers.PreTrainedTokenizerBase, engine: Engine) -> None:
    wanted = tokenizer(real.answer, add_special_tokens=False).input_ids
    sampling = Sampling(max_new_tokens=len(wanted))
    found = [token for _, token in engine.generate([tokenizer(real.prompt).input_ids], sampling)]
    assert tokenizer.decode(found) == real.answer


@pytest.fixture(scope="module")
def oracle(real: Real, folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Let llama.cpp compute what follows the prompt, from the file and from its weights unpacked to float32."""
    tokens = tokenizer(real.prompt).input_ids
    files = Path(FOLDER) / real.file, as_gguf(folder.parent, folder)
    quantised, unpacked = (log_probabilities(file, tokens=tokens, text=tokens[-1]) for file in files)
    return quantised, unpacked


@fetched
def test_their_logits_are_llama_cpps_but_for_its_rounding(
    real: Real,
    tokenizer: transformers.PreTrainedTokenizerBase,
    engine: Engine,
    oracle: tuple[np.ndarray, np.ndarray],
) -> None:
    """llama.cpp rounds what it multiplies quantised weights by to 8 bits: in float32 it agrees on the same weights."""
    tokens = tokenizer(real.prompt).input_ids
    ours = expected(engine.logits(np.array([tokens], np.int32)), tokens)
    quantised, unpacked = oracle
    divergence = float((np.exp(quantised) * (quantised - ours)).sum())
    rounding, rest = np.abs(quantised - ours).max(), np.abs(unpacked - ours).max()
    print(f"\n{real.file}, {engine.name}: largest difference of {len(ours):,} log-probabilities {rounding:.2f},")
    print(f"divergence {divergence:.4f} nats; from its weights in float32 {rest:.4f}")
    assert rest < 2e-2  # llama.cpp's GELU is a table in float16
    assert divergence < 0.05
    assert quantised.argmax() == ours.argmax()


@pytest.mark.skipif(not QUICKSTART.exists(), reason="`make model` has not been run")
def test_the_quickstart_model_answers() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART)
    model = load_model(QUICKSTART)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    # llama.cpp's answer from the GGUF itself; the end token shows that generation stops there.
    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"
