"""The benchmark's figures: what they count, by hand on a tiny model and by a clock that the test moves."""

import json
import platform
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from tiny_run import examples

import common.bench
from common.batches import BatchPlan
from common.bench import as_markdown, bench, flops_per_token, measure, setting, share
from common.config import DataConfig, LoraConfig, QuantizationConfig, TrainConfig
from common.engine import Handle, StepBatch, StepResult, TrainState
from common.initial import initial_weights

LAUNCH, COMPUTE, FIRST = 0.25, 2.0, 60.0


class Clock:
    """Stand for the time module: it moves when the engine says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class TimedEngine(FakeEngine):
    """Compute a step in 2 s behind the host, after a first one of a minute, as a GPU does."""

    clock: Clock
    busy_until = 0.0

    def train_step(self, batch: StepBatch, learning_rate: float) -> Handle:
        handle = super().train_step(batch, learning_rate)
        self.clock.now += LAUNCH
        begins = max(self.clock.now, self.busy_until)
        handle.ready = self.busy_until = begins + (FIRST if batch.step == 1 else COMPUTE)
        return handle

    def fetch(self, handle: Handle) -> StepResult:
        self.clock.now = max(self.clock.now, handle.ready)
        return super().fetch(handle)


def test_steps_are_timed_one_ahead_and_the_first_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, config = Clock(), TrainConfig(lora=LoraConfig(r=2, lora_alpha=4))
    monkeypatch.setattr(common.bench, "time", clock)
    engine = TimedEngine(config)
    engine.clock = clock
    engine.load_state(TrainState.fresh(initial_weights(engine.adapter_shapes(), 0)))
    plan = BatchPlan(examples(40), 4, 1, 0, 1)
    figures = measure(engine, plan, 5, 1e-3)
    timed = [plan.step_batch(step) for step in range(4, 9)]  # after the first and two that warm up
    assert figures["first_step_seconds"] == LAUNCH + FIRST
    assert figures["step_seconds"] == COMPUTE  # the launch is hidden behind the step before
    assert figures["host_seconds"] == LAUNCH
    seconds = LAUNCH + 5 * COMPUTE
    assert figures["tokens_per_second"] == sum(batch.num_tokens for batch in timed) / seconds
    assert figures["supervised_tokens_per_second"] == sum(batch.num_loss_tokens for batch in timed) / seconds
    assert figures["peak_memory_bytes"] == engine.memory().peak_bytes


def test_flops_are_those_of_the_products_with_weights(llama: Path) -> None:
    engine = FakeEngine(TrainConfig(lora=LoraConfig(r=2, lora_alpha=4)))
    adapter = 2 * 8 + 16 * 2  # A and B of the engine in NumPy
    layer = 48 * 64 + 2 * 48 * 32 + 64 * 48 + 3 * 48 * 80  # q; k and v; o; gate, up and down
    flops = flops_per_token(str(llama), engine)
    assert flops == (4 * 2 * layer + 6 * adapter, 4 * 416 * 48)
    figures = {"tokens_per_second": 10.0, "supervised_tokens_per_second": 4.0}
    assert share(figures, flops, 1e6) == pytest.approx((10 * flops[0] + 4 * flops[1]) / 1e6)


def test_a_shape_that_is_not_certain_has_no_share(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of another kind"}))
    assert flops_per_token(str(tmp_path), FakeEngine(TrainConfig())) is None
    assert share({}, None, 1e12) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "8 examples, r=16"),
        ({"packing": True, "max_seq_length": 512}, "8 x 512 packed, r=16"),
        ({"packing": True, "prefix_sharing": True}, "8 x 2048 packed, r=16, prefix_sharing"),
        (
            {
                "gradient_accumulation_steps": 4,
                "gradient_checkpointing": True,
                "quantization": QuantizationConfig(load_in_4bit=True),
            },
            "8 examples, x 4, r=16, load_in_4bit, gradient_checkpointing",
        ),
    ],
    ids=str,
)
def test_a_setting_is_said_in_few_words(settings: dict, expected: str) -> None:
    assert setting(TrainConfig(**settings)) == expected


def small_config(model: Path, folder: Path) -> TrainConfig:
    train = folder / "train.jsonl"
    train.write_text("".join(json.dumps({"text": f"some words and number {n}"}) + "\n" for n in range(30)))
    data = DataConfig(train=(str(train),))
    return TrainConfig(model_name_or_path=str(model), engine="torch", device="cpu", data=data, max_seq_length=64)


def test_json_has_every_figure(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bench(small_config(llama, tmp_path), "test", 2, as_json=True)
    figures = json.loads(capsys.readouterr().out)
    positive = ("open_seconds", "first_step_seconds", "step_seconds", "host_seconds", "tokens_per_second")
    positive += ("supervised_tokens_per_second", "peak_memory_bytes", "matmul_flops_per_second")
    assert all(figures[key] > 0 for key in positive)
    assert 0 < figures["matmul_share"] < 1
    assert figures["versions"]["torch"] and figures["machine"] and figures["setting"] == "8 examples, r=16"


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_a_mac_gets_lines_to_paste(
    system: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    bench(small_config(llama, tmp_path), "test", 1, as_json=False)
    printed = capsys.readouterr().out
    assert "matmul share" in printed and "host seconds" in printed
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == (3 if system == "Darwin" else 0)
    assert len({line.count("|") for line in lines}) <= 1


def test_markdown_leaves_a_share_out_that_is_not_known() -> None:
    figures = {
        "machine": "Apple M4, 16 GB",
        "versions": {"mlx": "0.32"},
        "model": "base",
        "dtype": "bfloat16",
        "setting": "8 examples, r=16",
        "tokens_per_second": 1234.5,
        "supervised_tokens_per_second": 600.4,
        "step_seconds": 0.5,
        "peak_memory_bytes": 3_210_000_000,
        "matmul_share": None,
    }
    row = "| Apple M4, 16 GB | mlx 0.32 | base, bfloat16 | 8 examples, r=16 | 1,234 | 600 | 0.5 | 3.21 |  |"
    assert as_markdown(figures).splitlines()[2] == row
