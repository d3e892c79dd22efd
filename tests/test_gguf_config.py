"""The settings of GGUF files as config.json has them; what it can't say is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf_files import SHAPE, add_vocabulary, load_model, logits, smollm_bpe, tiny_llama, write_gguf

from common.errors import UserError
from common.gguf.convert import convert_gguf


def llama3_rope() -> tuple[dict, np.ndarray]:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = transformers.LlamaConfig(**{**SHAPE, "max_position_embeddings": 131072}, rope_parameters=scaling)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 500000.0 ** -(np.arange(0, SHAPE["head_dim"], 2) / SHAPE["head_dim"])
    return scaling, (plain / scaled.numpy()).astype(np.float32)


def test_llama3_rope_scaling_is_recovered_from_its_frequency_factors(tmp_path: Path) -> None:
    scaling, factors = llama3_rope()
    model = tiny_llama(rope_parameters=scaling)
    source = write_gguf(
        tmp_path / "model.gguf", model, extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors)
    )
    convert_gguf(source, tmp_path / "folder", "float32")
    loaded = load_model(tmp_path / "folder")
    assert loaded.config.rope_parameters == scaling
    assert torch.equal(logits(loaded), logits(model))


def test_a_rope_scaling_other_than_llama3s_is_refused(tmp_path: Path) -> None:
    scaling, factors = llama3_rope()
    factors[(factors > 1.5) & (factors < 30)] *= 1.01
    source = write_gguf(
        tmp_path / "model.gguf",
        tiny_llama(rope_parameters=scaling),
        extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors),
    )
    with pytest.raises(UserError, match=r"rope_freqs\.weight has a scaling that differs"):
        convert_gguf(source, tmp_path / "folder")


def test_mlx_lm_and_transformers_read_the_same_theta(tmp_path: Path) -> None:
    llama = pytest.importorskip("mlx_lm.models.llama")
    convert_gguf(write_gguf(tmp_path / "model.gguf", tiny_llama()), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    arguments = llama.ModelArgs.from_dict(config)
    assert (arguments.rope_theta, arguments.rope_scaling) == (50000.0, None)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    assert loaded.rope_parameters == config["rope_parameters"] == {"rope_theta": 50000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "mamba"}, "the architecture is 'mamba'; expected llama or qwen2"),
        ({"extra": lambda writer: writer.add_expert_count(8)}, r"llama\.expert_count is 8"),
        ({"extra": lambda writer: writer.add_sliding_window(64)}, r"llama\.attention\.sliding_window is 64"),
        (
            {"extra": lambda writer: writer.add_tensor("blk.0.ffn_gate_inp.weight", np.ones(4, np.float32))},
            r"tensor blk\.0\.ffn_gate_inp\.weight has no Hugging Face name",
        ),
        (
            {"leave_out": "blk.1.attn_v.weight"},
            r"tensor blk\.1\.attn_v\.weight is missing; expected \(48, 64\)",
        ),
        ({"vocabulary": lambda writer: None}, "the vocabulary has 0 tokens"),
        (
            {"vocabulary": lambda writer: add_vocabulary(writer, smollm_bpe(), "viking")},
            r"tokenizer\.ggml\.pre is 'viking'; expected smollm, ",
        ),
        (
            {"vocabulary": lambda writer: add_vocabulary(writer, smollm_bpe(), None)},
            r"tokenizer\.ggml\.pre is None; expected smollm, ",
        ),
    ],
    ids=[
        "architecture",
        "experts",
        "window",
        "extra tensor",
        "missing tensor",
        "no vocabulary",
        "pre",
        "no pre",
    ],
)
def test_what_the_folder_cannot_represent_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    source = write_gguf(tmp_path / "model.gguf", tiny_llama(), **options)
    with pytest.raises(UserError, match=f"model.gguf: {message}"):
        convert_gguf(source, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
