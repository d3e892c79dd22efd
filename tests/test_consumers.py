"""`make test-consumers`: vLLM serves an exported adapter, and answers greedily as PEFT does.

It runs where TWINTUNE_VLLM names a Python that has vLLM; `make test` skips it.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from exports import TARGETS, load_base, run_export
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

MODEL = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"
VLLM = os.environ.get("TWINTUNE_VLLM")
TOKENS = 12
PROMPTS = [
    f"{start} {subject}"
    for start in ("Tell me about", "The history of", "How to cook", "A short poem on")
    for subject in ("rice", "the sea", "winter", "trains", "bread")
]
SERVE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
request = json.load(sys.stdin)
lora = {"enable_lora": True, "max_lora_rank": request["rank"]}
llm = LLM(request["model"], dtype="float32", max_model_len=256, enforce_eager=True, **lora)
prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
answers = llm.generate(prompts, sampling, lora_request=LoRARequest("tuned", 1, request["adapter"]))
print("ANSWERS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


@pytest.mark.skipif(not VLLM, reason="TWINTUNE_VLLM names no Python with vLLM; make test-consumers sets one up")
def test_vllm_answers_as_peft_does(tmp_path: Path):
    run_export(make_gentle_adapter(tmp_path / "adapter"), tmp_path / "out", None, reader="vllm")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    request = {"model": str(MODEL), "adapter": str(tmp_path / "out"), "rank": 8, "prompts": prompts, "tokens": TOKENS}
    done = subprocess.run(
        [str(VLLM), "-c", SERVE],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},  # in GB; by default half of the machine's memory
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    assert json.loads(line.removeprefix("ANSWERS ")) == peft_answers(tmp_path / "out", prompts)


def make_gentle_adapter(directory: Path) -> Path:
    """Write a random adapter that changes answers and leaves a model; returns the folder."""
    torch.manual_seed(1)
    tuned = get_peft_model(load_base(MODEL), LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    tuned.save_pretrained(directory)
    return directory


def peft_answers(adapter: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = PeftModel.from_pretrained(load_base(MODEL), adapter).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):  # not by generate, which stops at an end token
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers
