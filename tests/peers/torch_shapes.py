"""The shapes that rivals and ours are compared on, made at random on the spot: models, tokenizer and tokens."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
LLAMA_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
COMMON = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}
COMMON |= {"max_position_embeddings": 131072}
MODELS = {
    "3b": COMMON  # Llama 3.2 3B
    | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    | {"tie_word_embeddings": True, "rope_parameters": LLAMA_ROPE | {"factor": 32.0}},
    "8b": COMMON  # Llama 3.1 8B
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"tie_word_embeddings": False, "rope_parameters": LLAMA_ROPE | {"factor": 8.0}},
}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 3  # steps that are not timed

Example = tuple[list[int], list[bool]]  # tokens, and which of them are supervised


@dataclass(frozen=True)
class Shape:
    """Describe one comparison."""

    about: str
    size: str
    rows: int
    length: int
    nf4: bool = False
    checkpointing: bool = False
    offloading: bool = False  # ours alone: Unsloth's checkpointing always offloads, plain PEFT's never does
    short: bool = False  # examples of the quickstart's lengths: ours packed, rivals padded
    r: int = 16


QLORA = "QLoRA NF4, double quantisation"
SHAPES = {
    "3b-bf16": Shape("3B bf16, 4 x 2048", "3b", 4, 2048),
    "3b-nf4": Shape(f"3B {QLORA}, 4 x 2048", "3b", 4, 2048, nf4=True),
    "3b-nf4-ckpt": Shape(f"3B {QLORA}, checkpointing, 4 x 2048", "3b", 4, 2048, nf4=True, checkpointing=True),
    "3b-nf4-ckpt-off": Shape(
        f"3B {QLORA}, checkpointing, offloading, 4 x 2048", "3b", 4, 2048, nf4=True, checkpointing=True, offloading=True
    ),
    "8b-bf16": Shape("8B bf16, 2 x 4096", "8b", 2, 4096),
    "8b-nf4-ckpt": Shape(f"8B {QLORA}, checkpointing, 2 x 4096", "8b", 2, 4096, nf4=True, checkpointing=True),
    "8b-nf4-ckpt-off": Shape(
        f"8B {QLORA}, checkpointing, offloading, 2 x 4096", "8b", 2, 4096, nf4=True, checkpointing=True, offloading=True
    ),
    "short": Shape("3B bf16, short examples: packed to 4 x 2048, else 8 padded", "3b", 4, 2048, short=True),
    "longest": Shape(
        f"8B {QLORA}, r=32, checkpointing, offloading: longest row in 24 GB",
        "8b",
        1,
        0,
        nf4=True,
        checkpointing=True,
        offloading=True,
        r=32,
    ),
}
PADDED_ROWS = 8  # short examples of an unpacked step


def model_folder(work: Path, size: str, tiny: bool) -> Path:
    """Write a random model in bfloat16 and a tokenizer of as many words; returns the folder."""
    folder = work / (f"{size}-tiny" if tiny else size)
    if (folder / "done").exists():
        return folder
    config = LlamaConfig(**(MODELS[size] | (TINY if tiny else {})), bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="5GB")
    write_tokenizer(folder, config.vocab_size)
    (folder / "done").touch()
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer of made-up words: rivals want one beside a model, though they get tokens."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{number}": number for number in range(3, vocabulary)}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), **special
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def full_examples(length: int, number: int, vocabulary: int) -> list[Example]:
    """Draw examples of `length` tokens, all of them supervised."""
    rng = np.random.default_rng(0)
    return [(rng.integers(3, vocabulary, length).tolist(), [True] * length) for _ in range(number)]


def short_examples(vocabulary: int) -> list[Example]:
    """Draw 2,400 examples of the lengths that the quickstart's have with SmolLM2's tokenizer, answers supervised.

    A prompt of c characters has about 0.22 c + 31 tokens, an answer 0.32 c + 4 (least squares).
    """
    rng, examples = np.random.default_rng(0), []
    with (ROOT / "configs/quickstart/train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            *prompt, answer = (len(message["content"]) for message in json.loads(line)["messages"])
            asked, answered = round(0.223 * sum(prompt) + 31.3), round(0.32 * answer + 4.4)
            tokens = rng.integers(3, vocabulary, asked + answered).tolist()
            examples.append((tokens, [False] * asked + [True] * answered))
    return examples
