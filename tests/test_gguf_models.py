"""GGUF files of real models, converted and asked."""

from pathlib import Path

import pytest
import transformers
from gguf_files import load_model

REAL_MODEL = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"


@pytest.mark.skipif(not REAL_MODEL.exists(), reason="`make model` has not been run")
def test_the_quickstart_model_answers() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(REAL_MODEL)
    model = load_model(REAL_MODEL)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    # llama.cpp's answer from the GGUF itself; the end token shows that generation stops there.
    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"
