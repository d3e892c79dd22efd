"""Every architecture we name: trained by both engines alike, its adapter the other's and PEFT's, and listed in README.

`TWINTUNE_WRITE_TABLE=1 pytest tests/test_architectures.py` writes what passes into README.md.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from engines import ENGINES, make_batches, open_fresh
from test_engine_contract import random_state
from tiny_models import FAMILIES, YARN, write_family

from common.adapters.adapter import peft_config, write_adapter
from common.batches import BatchPlan
from common.config import LoraConfig
from common.engine import Engine, TrainState
from common.errors import MachineError, UserError
from common.sampling import Sampling

LOSS_TOLERANCE = 1e-4  # DESIGN.md section 3
# Relative to the largest logit; a delta net of four layers has 2e-5, all others 5e-6.
LOGIT_TOLERANCE = 1e-4
STEPS = 4
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- architectures: written by tests/test_architectures.py -->", "<!-- end of architectures -->"


@dataclass(frozen=True)
class Measured:
    """Hold what comparing the two engines and PEFT gave, each the largest relative difference."""

    losses: float
    logits: float
    peft_logits: float


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory):
    """Measure a family once, whichever test asks first."""
    found: dict[str, Measured] = {}

    def measure(name: str) -> Measured:
        if name not in found:
            found[name] = compare(name, tmp_path_factory.mktemp(name))
        return found[name]

    return measure


def compare(name: str, folder: Path) -> Measured:
    """Train on both engines from one start, exchange the trained adapters, and load them into PEFT."""
    model = write_family(folder / "model", name)
    settings = {"max_seq_length": FAMILIES[name].max_seq_length}
    mlx, torch = (open_fresh(engine, model, **settings) for engine in ("mlx", "torch"))
    assert mlx.adapter_shapes() == torch.adapter_shapes()
    assert mlx.target_modules() == torch.target_modules()
    start = random_state(torch)
    losses = [train(engine, start) for engine in (mlx, torch)]
    token_ids = np.random.default_rng(0).integers(0, 400, (8, 24)).astype(np.int32)
    # A token to which two experts are equal but for rounding may go to the one or the other: one row of eight, then.
    spared = int("num_experts_per_tok" in FAMILIES[name].settings)
    logits, from_peft = [], []
    for giver, taker in ((mlx, torch), (torch, mlx)):
        state = giver.read_state()
        given = giver.logits(token_ids)
        taken = TrainState.fresh(state.weights)
        kept = taker.read_state()
        taker.load_state(taken)
        logits.append(difference(taker.logits(token_ids), given, spared))
        taker.load_state(kept)
        expected = peft_logits(model, giver, state, token_ids, folder / giver.name)
        from_peft.append(difference(given, expected, spared))
    return Measured(difference(*map(np.array, losses)), max(logits), max(from_peft))


def train(engine: Engine, start: TrainState) -> list[float]:
    """Train some steps; returns the losses a token."""
    engine.load_state(start)
    plan = BatchPlan(make_batches(), batch_size=3, accumulation=1, seed=7, num_train_epochs=1)
    results = [engine.fetch(engine.train_step(plan.step_batch(step), 2e-3)) for step in range(1, STEPS + 1)]
    assert engine.read_state().update_count == STEPS
    return [result.loss_sum / result.num_loss_tokens for result in results]


def peft_logits(model: Path, engine: Engine, state: TrainState, token_ids: np.ndarray, folder: Path) -> np.ndarray:
    """Let PEFT load the adapter as we write it, every tensor of it, and compute the logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder.mkdir()
    write_adapter(folder, state.weights, peft_config(LoraConfig(), engine.target_modules(), str(model), None))
    sees = json.loads((model / "config.json").read_text())["model_type"] == "mistral3"
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    loaded = PeftModel.from_pretrained(kind.from_pretrained(model, dtype=torch.float32), folder).eval()
    assert {name.replace(".default.", ".") for name in loaded.state_dict() if ".lora_" in name} == state.weights.keys()
    with torch.no_grad():
        return loaded(torch.from_numpy(token_ids.astype(np.int64))).logits.numpy()


def difference(found: np.ndarray, expected: np.ndarray, spared: int = 0) -> float:
    """Return the largest difference of a row, relative to the largest value; the worst rows may be spared."""
    rows = np.sort(np.abs(found - expected).reshape(len(found), -1).max(axis=1))
    return float(rows[-1 - spared] / np.abs(expected).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_both_engines_train_it_alike_and_exchange_adapters_with_each_other_and_peft(name, measured):
    figures = measured(name)
    assert figures.losses < LOSS_TOLERANCE
    assert figures.logits < LOGIT_TOLERANCE
    assert figures.peft_logits < LOGIT_TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_both_engines_generate_alike_past_the_windows_and_in_padded_batches(name, tmp_path):
    model = write_family(tmp_path, name)
    prompts = [list(range(30, 50)), [7, 8, 9]]
    engines = [open_fresh(engine, model, max_seq_length=FAMILIES[name].max_seq_length) for engine in ENGINES]
    rows = [sorted(engine.generate(prompts, Sampling(14))) for engine in engines]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 28


def test_half_precision_experts_are_refused_on_mlx_without_a_gpu(tmp_path):
    model = write_family(tmp_path, "mixtral")
    with pytest.raises(MachineError, match="dtype: float32"):
        open_fresh("mlx", model, dtype="bfloat16", device="cpu")


OLD_FORM = ["llama-scaled", "qwen2-yarn", "qwen3_moe", "gemma3_text", "gemma3", "phi3-longrope", "granite", "gpt_oss"]


@pytest.mark.parametrize("name", OLD_FORM)
def test_a_config_as_the_hub_has_it_means_the_same(name, tmp_path):
    family = FAMILIES[name]
    model = write_family(tmp_path, name)
    token_ids = np.random.default_rng(0).integers(0, 400, (2, 40)).astype(np.int32)
    logits = []
    for rewrite in (None, in_old_words):
        if rewrite:
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps(rewrite(config)))
            assert "rope_parameters" not in (model / "config.json").read_text()
        for engine in ENGINES:
            logits.append(open_fresh(engine, model, max_seq_length=family.max_seq_length).logits(token_ids))
    for found in logits[1:]:
        assert difference(found, logits[0]) < LOGIT_TOLERANCE


def in_old_words(config: dict) -> dict:
    """Say RoPE, patterns and experts as configs did before transformers 5."""
    if "text_config" in config:
        return config | {"text_config": in_old_words(config["text_config"])}
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")}
    rope = config["rope_parameters"]
    if "sliding_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    old["rope_theta"] = rope.pop("rope_theta")
    old["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else rope | {"type" if kind == "longrope" else "rope_type": kind}
    if "num_experts_per_tok" in old and config["model_type"] != "gpt_oss":
        old["num_experts"] = old.pop("num_local_experts")
    return old


@dataclass(frozen=True)
class Refused:
    """Describe a checkpoint that transformers runs and mlx-lm would run otherwise: what it is, and what MLX says."""

    what: str
    family: str
    changes: dict[str, object]
    reason: str
    max_seq_length: int = 64


LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}}
FACTOR = {"rope_parameters": YARN | {"attention_factor": 2.0}}
UNEVEN = {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]}
REFUSED = [
    Refused("Phi 3 128K past 4,096 tokens", "phi3-longrope", {}, "can't change from short_factor to long_factor", 65),
    Refused("with attention_factor", "qwen2-yarn", FACTOR, "reads no attention_factor"),
    Refused(
        "with normalised experts", "qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob: True is not what mlx-lm"
    ),
    Refused("with scaled RoPE", "qwen2_moe", LINEAR, "no rotary embeddings of type linear"),
    Refused("with scaled RoPE", "gemma2", LINEAR, "no rotary embeddings of type linear"),
    Refused("of another activation", "llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' is not what mlx-lm computes"),
    Refused("of partly rotated heads", "llama", PARTIAL, "rotates whole heads"),
    Refused("of another clamp", "gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit: 5.0 is not what mlx-lm computes"),
    Refused("of uneven layers", "qwen3_5_text", UNEVEN, "needs full attention at a fixed interval"),
    Refused(
        "EmbeddingGemma", "gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case.family} {case.what}")
def test_what_mlx_would_compute_otherwise_is_refused_before_its_weights_are_read(case, tmp_path):
    model = write_family(tmp_path, case.family, **case.changes)
    open_fresh("torch", model, max_seq_length=case.max_seq_length).close()
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(UserError, match=case.reason):
        open_fresh("mlx", model, max_seq_length=case.max_seq_length)


def test_readme_lists_what_passes(measured):
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    written, _, after = rest.partition(END)
    rows = [passing_row(name, measured(name)) for name in FAMILIES] + [refused_row(case) for case in REFUSED]
    head = [
        "| architecture | models | MLX | torch | difference of losses, of logits |",
        "| --- | --- | --- | --- | --- |",
    ]
    table = "\n".join(["", *head, *rows, ""])
    if os.environ.get("TWINTUNE_WRITE_TABLE"):
        README.write_text(f"{before}{BEGIN}{table}{END}{after}", encoding="utf-8")
        return
    for row, found in zip(table.splitlines(), written.splitlines(), strict=True):
        cells, found_cells = row.split("|"), found.split("|")
        assert found_cells[:5] == cells[:5], "run TWINTUNE_WRITE_TABLE=1 pytest tests/test_architectures.py"
        # Rounding differs from one machine's BLAS to another's.
        for figure, found_figure in zip(powers(row), powers(found), strict=True):
            assert abs(figure - found_figure) <= 2


def passing_row(name: str, figures: Measured) -> str:
    family = FAMILIES[name]
    assert figures.losses < LOSS_TOLERANCE and max(figures.logits, figures.peft_logits) < LOGIT_TOLERANCE
    worst = (figures.losses, max(figures.logits, figures.peft_logits))
    bounds = ", ".join(f"1e{math.ceil(math.log10(max(each, 1e-7)))}" for each in worst)
    mlx, torch = ("yes" if engine in family.packs_on else "yes, unpacked" for engine in ENGINES)
    return f"| {family.model_type} | {family.examples} | {mlx} | {torch} | below {bounds} |"


def refused_row(case: Refused) -> str:
    family = FAMILIES[case.family]
    return f"| {family.model_type} | {case.what} | refused | yes | {case.reason} |"


def powers(row: str) -> list[int]:
    """Find the powers of ten that a row states."""
    return [int(each.partition("1e")[2].strip(" ,|")) for each in row.split(",") if "1e-" in each]
