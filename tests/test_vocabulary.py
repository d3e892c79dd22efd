"""A base with more tokens, with transformers' own resizing and both engines as the oracle."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import ENGINES, open_fresh
from safetensors.numpy import load_file
from tiny_models import VOCABULARY, write_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.base.vocabulary import add_tokens
from common.config import LoraConfig
from common.data.chat import ChatTokenizer
from common.data.tokens import build_dataset
from common.engine import StepBatch
from common.errors import UserError
from common.layout import make_micro_batch

NEW = ["<call>", "</call>", "kitchen light"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_old_tokens_mean_the_same_and_new_ones_are_the_mean(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", tied=tied)
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    growth = add_tokens(base, tmp_path / "grown", NEW)
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in (base, tmp_path / "grown"))
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected, found = old(tokens).logits, new(tokens).logits
    kept = [row for row in range(VOCABULARY) if row not in growth.new_ids]
    assert torch.equal(found[..., kept], expected[..., kept])
    for weight, whole in (
        (new.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (new.lm_head.weight, old.lm_head.weight),
    ):
        assert weight.shape[0] == growth.rows == new.config.vocab_size
        mean = whole[: growth.old_tokens].detach().double().mean(0).to(dtype)
        for row in growth.new_ids:
            assert torch.equal(weight[row], mean)


def test_rows_beyond_the_tokenizers_are_used_before_the_matrix_grows(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    spare = VOCABULARY - ChatTokenizer(base).vocabulary_size
    growth = add_tokens(base, tmp_path / "few", NEW)
    assert spare > len(NEW) and growth.rows == VOCABULARY
    many = [f"<{number}>" for number in range(spare + 5)]
    assert add_tokens(base, tmp_path / "many", many).rows == VOCABULARY + 5


def test_the_tokenizer_makes_one_token_of_each(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    growth = add_tokens(base, tmp_path / "grown", NEW)
    text = "The <call>weather</call> in the kitchen lights is good."
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "grown")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert [token for token in ids if token in growth.new_ids] == list(growth.new_ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ChatTokenizer(tmp_path / "grown").text_ids(text) == ids


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_are_learnt(name: str, tied: bool, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base", tied=tied)
    growth = add_tokens(base, tmp_path / "grown", [f"<{number}>" for number in range(60)])
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    engine = open_fresh(name, tmp_path / "grown", lora)
    row = [3, growth.new_ids[-1], 7, growth.new_ids[-1]]
    micro = make_micro_batch(build_dataset([(row, [True] * 4, "made:1")]), [[0]])
    losses = [
        engine.fetch(engine.train_step(StepBatch(step, 0.0, (micro,), 3, 4, (0,)), 1e-2)).loss_sum
        for step in range(1, 16)
    ]
    assert losses[-1] < 0.2 * losses[0]


def test_shards_without_embeddings_are_linked_and_the_index_is_right(tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="90KB")
    shards = sorted(base.glob("model-*.safetensors"))
    add_tokens(base, tmp_path / "grown", [f"<{number}>" for number in range(60)])
    linked = [path for path in shards if (tmp_path / "grown" / path.name).samefile(path)]
    assert 0 < len(linked) < len(shards)
    index = json.loads((tmp_path / "grown/model.safetensors.index.json").read_text())
    tensors = [load_file(path) for path in (tmp_path / "grown").glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(array.nbytes for part in tensors for array in part.values())
    np.testing.assert_array_equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "grown").model.norm.weight.detach(),
        model.model.norm.weight.detach(),
    )


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|im_end|>"], "is a token of this model already"),
        (["<new>", " "], "' ': is empty"),
        (["Zürich"], "tokenizer writes it as 'Z.rich'"),
    ],
)
def test_a_token_that_is_none_is_refused(tokens: list[str], message: str, tmp_path: Path) -> None:
    base = write_llama(tmp_path / "base")
    with pytest.raises(UserError, match=message):
        add_tokens(base, tmp_path / "grown", tokens)
    assert not (tmp_path / "grown").exists()
