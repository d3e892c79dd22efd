"""GGUF files of tiny random models: Llamas written by hand as llama.cpp would, others by the writer of exports."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from tiny_models import write_family
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.base.tensor_files import TensorSpec
from common.base.tensors import model_tensors
from common.base.weights import read_model_config
from common.export.gguf_model import write_gguf_model
from common.export.gguf_vocabulary import vocabulary_metadata

CORPUS = [
    "the cat sat on the mat",
    "It's 12345 days, isn't it?",
    "def f(x):\n    return x + 1",
    "naïve café 😀",
] * 3
# What tokenizers trip over: spaces, line ends, digits, cases, scripts, joined characters, tokens written as text.
TEXTS = [
    *("", " ", "  ", " a ", "\n", "\n\n\n", " \n \n", "\t\t x", "\r\n", "      deep", "  \n\n    indented\n\t\ttabs"),
    *("Hello world", "It's 12345 days, isn't it? I'LL SAY'VE", "def f(x):\n    return x + 1\n\n\n"),
    *("1 22 333 4444 55555 3.14159e-10", "1,234,567.89 $5 €6 50%", "½ ² Ⅷ ٣٤", "!!!...???---___***", "<<>>[[]]{{}}"),
    *("aaaaaaaaaaaaaaaaaaaaaaaa", "=================", "http://a.b/c?d=e&f=g#h", "CamelCaseHTMLParserIOError"),
    *("naïve café", "你好，世界。こんにちは 안녕하세요 สวัสดี", "مرحبا بالعالم שלום", "नमस्ते दुनिया", "İı ß ẞ ſ", "𝔘𝔫𝔦 𐍈"),
    *("😀👨\u200d👩\u200d👧🇫🇷 ☃\ufe0f", "\u200b\ufeff\u00a0\u3000x\u2028y", "\x01\x7f", "ﬁ ﬂ", "'s 't 'RE '"),
    *("<bos>hi<eos><start_of_turn>user\nhi<end_of_turn>\n", "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>"),
    *("<|im_start", "▁▁a▁b", "<0x41><0xFF>", "[multimodal]<unused5><mask>", "a\n\nb\n \nc", "Ġthe Ċ", "</s><unk>"),
    *("e\u0301", "a\u0301\u0327 's", "\u1100\u1161\u11a8"),
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
# Rows, columns, head size and heads all differ, so that no transposition or mix-up goes unseen.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
# Of the K-quants: where a block has its scales, float16.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def trained_bpe(pre: pre_tokenizers.PreTokenizer, corpus: list[str] = CORPUS, size: int = 320) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def smollm_bpe() -> Tokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return trained_bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]))


def tiny_llama(**options: object) -> transformers.LlamaForCausalLM:
    rope = options.pop("rope_parameters", {"rope_type": "default", "rope_theta": 50000.0})
    config = transformers.LlamaConfig(**{"vocab_size": 320, "rope_parameters": rope, **SHAPE, **options})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        # Norms and biases too: at their usual ones and zeros, a missing one would not show.
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as llama.cpp's convert_hf_to_gguf.py does (`LlamaModel.permute`)."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def add_vocabulary(
    writer: GGUFWriter, tokenizer: Tokenizer, pre: str | None = "smollm", merges: list | None = None
) -> None:
    bpe = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIALS else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in merges or bpe["merges"]])
    writer.add_chat_template(TEMPLATE)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)


def write_gguf(
    path: Path,
    model: transformers.LlamaForCausalLM,
    *,
    arch: str = "llama",
    quantised: dict[str, str] | None = None,
    vocabulary: Callable[[GGUFWriter], None] = lambda writer: add_vocabulary(writer, smollm_bpe()),
    extra: Callable[[GGUFWriter], None] = lambda writer: None,
    leave_out: str = "",
) -> Path:
    """Write `model` as llama.cpp would, and round its own weights to what the quantised ones say."""
    writer = GGUFWriter(path, arch)
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary(writer)
    extra(writer)
    for name, weights in gguf_weights(model).items():
        if name == leave_out:
            continue
        part = name.split(".")[-2]
        kind = GGMLQuantizationType[(quantised or {}).get(part, "F32") if weights.ndim == 2 else "F32"]
        rounded = packed(weights.detach().numpy(), kind)
        weights.data.copy_(torch.from_numpy(dequantize(rounded, kind)))
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
        writer.add_tensor(name, permuted(rounded, heads) if heads else rounded, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(weights: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Quantise, or make up blocks of a kind that `gguf` can only undo: random bits under small scales."""
    if kind.name not in SCALES:
        return quantize(weights, kind)
    numbers, num_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (weights.size // numbers, num_bytes), np.uint8)
    for place in SCALES[kind.name]:
        blocks[:, place : place + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
    return blocks.reshape(len(weights), -1)


def gguf_weights(model: transformers.LlamaForCausalLM) -> dict[str, torch.nn.Parameter]:
    weights = dict(model.named_parameters())
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(model.config.num_hidden_layers):
        names |= {f"blk.{layer}.{part}": f"model.layers.{layer}.{target}" for part, target in PARTS.items()}
    pairs = ((f"{name}.{kind}", f"{target}.{kind}") for name, target in names.items() for kind in ("weight", "bias"))
    return {name: weights[target] for name, target in pairs if target in weights}


def logits(model: transformers.LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 103)[None]).logits


def load_model(folder: Path) -> transformers.LlamaForCausalLM:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


def write_exportable(directory: Path, model_type: str, **changes: object) -> Path:
    """Write a tiny checkpoint of an architecture that llama.cpp computes as it stands; returns the folder."""
    write_family(directory, model_type, **changes)
    if model_type in ("mistral", "phi3"):  # within its window alone does llama.cpp compute the same
        change_config(directory, sliding_window=128, max_position_embeddings=128)
    if model_type.startswith("gemma"):  # anything but the size of a head is refused
        change_config(directory, query_pre_attn_scalar=16)
    return directory


def change_config(directory: Path, **changes: object) -> None:
    config = read_model_config(directory) | changes
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def as_gguf(folder: Path, model: Path) -> Path:
    """Write a model as it is, by the writer of merged models; returns the file."""
    tensors = model_tensors(model)
    specs = [TensorSpec(name, tensors.shape(name), "float32") for name in tensors]
    config = read_model_config(model)
    vocabulary = vocabulary_metadata(model, [], config["vocab_size"])
    write_gguf_model(folder, config, vocabulary, specs, map(tensors.read, tensors), "float32", "base")
    return folder / "model-f32.gguf"
