"""A byte-level BPE tokenizer of at most 400 tokens with a chat template, written as a model folder holds it.

Small enough for tiny random models, real enough for everything a template and a tokenizer do: it is trained on
the few sentences below, which is deterministic and takes milliseconds.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
CORPUS = (
    "system\nYou are a helpful assistant.\n\nuser\nWhat is the answer?\nassistant\nThe answer is yes.\n",
    "Hello there, how are you? I am fine, thank you. And you?\n\n\nThe weather is good, the sun is out.",
    '{"name": "timer", "minutes": 10}\n{"name": "alarm", "time": "07:30"}\n',
) * 4
# How Llama 3 cuts a text before BPE: unlike GPT-2's, it keeps line ends together.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# Tools and tool calls, as Qwen's has them.
CHATML_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\nTools:\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content %}{{ message.content }}{% endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# Llama 3: a BOS that the template writes, headers, trimmed contents.
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Marks answers for Hugging Face's `return_assistant_tokens_mask`.
GENERATION = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# Rewrites its history, as templates of thinking models do: only the last answer keeps its thoughts.
REWRITES_HISTORY = """\
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- if message['role'] == 'assistant' and not loop.last %}
        {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# Gemma: there is no system role.
NO_SYSTEM = (
    """\
{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
"""
    + CHATML
)


def write_tokenizer(
    directory: Path,
    template: str | None = CHATML,
    eos: str = "<|im_end|>",
    adds_bos: bool = False,
    special: Sequence[str] = SPECIAL,
    bos: str = "<|begin_of_text|>",
    pad: str = "<|endoftext|>",
    added: Sequence[str] = (),
    pieces: bool = False,
) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into a folder that may exist.

    The end token is <|im_end|>, the padding <|endoftext|>. With `adds_bos` the tokenizer puts the BOS before every
    text by itself, cuts words and trims white space from offsets as Llama 3's does, else as GPT-2's. `added` tokens
    are whole, but not special. With `pieces` it is SentencePiece's kind: "▁" for spaces, <0xNN> for unknown bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _pieces(special) if pieces else _bytes(special, like_llama3=adds_bos)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    steps = [] if pieces else [processors.ByteLevel(trim_offsets=adds_bos)]
    if adds_bos:
        bos_id = (bos, tokenizer.token_to_id(bos))
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[bos_id]))
    tokenizer.post_processor = processors.Sequence(steps)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _bytes(special: Sequence[str], like_llama3: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    words = [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")] if like_llama3 else []
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not like_llama3)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _pieces(special: Sequence[str]) -> Tokenizer:
    """Train as Gemma's and Mistral's is built: no words, spaces as "▁", bytes for what the vocabulary lacks."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")  # line ends are tokens of their own
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=100, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(special))
    return tokenizer
