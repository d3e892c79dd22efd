"""The vocabulary inside a GGUF file: its tokens, their kinds, and the ids that have a role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from common.errors import UserError
from common.gguf.pre_tokenizers import PRE_TOKENIZERS, Rule

# Hugging Face's name of a token's role: llama.cpp's.
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# Roles of llama.cpp's whose tokens end a turn, like EOS.
OTHER_ENDS = ("eot", "eom")
# Control tokens that end a turn whatever the file says of them, as llama.cpp takes them.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")
# Names that vocabularies give a token that only pads, most telling first.
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class Vocabulary:
    """Hold a GGUF's vocabulary: ids are positions in `tokens`; `stops` are all that end a turn, EOS first."""

    metadata: Mapping[str, Any]
    where: Path
    tokens: list[str]
    types: list[int]
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    stops: tuple[int, ...]

    def setting(self, key: str, default: object = None) -> Any:
        """Read `tokenizer.ggml.<key>`."""
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    @property
    def adds_bos(self) -> bool:
        """Tell whether every text starts with BOS; where the file doesn't say, as llama.cpp decides."""
        usual = self.setting("model") == "llama" or PRE_TOKENIZERS.get(self.setting("pre"), Rule()).adds_bos
        return self.bos is not None and bool(self.setting("add_bos_token", usual))

    @property
    def adds_eos(self) -> bool:
        """Tell whether every text ends with EOS."""
        return self.eos is not None and bool(self.setting("add_eos_token", False))

    def generation_config(self) -> dict[str, Any]:
        """Build `generation_config.json`: generation ends at any token that ends a turn."""
        stops = list(self.stops) if len(self.stops) > 1 else self.eos
        return {"bos_token_id": self.bos, "eos_token_id": stops, "pad_token_id": self.pad}


def read_vocabulary(metadata: Mapping[str, Any], where: Path) -> Vocabulary:
    """Read the tokens and special ids of a GGUF's metadata, with a pad token that is not an end token.

    Raises `UserError` for a vocabulary that is missing or contradicts itself.
    """
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    if not tokens or len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise damaged(where, f"{len(tokens)} tokens, {len(set(tokens))} of them different, and {len(types)} types")
    named = {**ROLES, **{name: name for name in OTHER_ENDS}}
    found = {role: metadata.get(f"tokenizer.ggml.{name}_token_id") for role, name in named.items()}
    # Some files name an id past the vocabulary; llama.cpp takes it for none, and so do we.
    ids = {role: token for role, token in found.items() if isinstance(token, int) and token < len(tokens)}
    named_ends = [ids[role] for role in ("eos", *OTHER_ENDS) if role in ids]
    known_ends = [tokens.index(name) for name in TURN_ENDS if name in tokens]
    known_ends = [token for token in known_ends if types[token] == TokenType.CONTROL]
    stops = tuple(dict.fromkeys(named_ends + known_ends))
    # Padding is masked out of the loss. A pad token that also ends a turn (SmolLM2 ships <|im_end|> as both)
    # would hide the end from training, and the model would never learn to stop.
    pads = [ids.get("pad"), *(tokens.index(name) for name in PAD_NAMES if name in tokens)]
    pad = next((token for token in pads if token is not None and token not in stops), None)
    return Vocabulary(metadata, where, tokens, types, ids.get("bos"), ids.get("eos"), ids.get("unk"), pad, stops)


def damaged(where: Path, found: str) -> UserError:
    """Make the error for a vocabulary that contradicts itself."""
    return UserError(f"{where}: the vocabulary has {found}; expected a whole one; download the file again")
