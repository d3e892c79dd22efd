"""MLX's limits of memory: what is free while an engine is open, and what they were before once it is closed."""

import os
from pathlib import Path

import mlx.core as mx
import psutil
import pytest
from engines import open_fresh
from tiny_models import write_llama

from common.config import TrainConfig
from common.engine import DeviceMemory
from mlx_backend import schedule


def test_mlx_stays_within_what_is_free_and_forgets_it_when_closed(tmp_path: Path) -> None:
    before = mx.get_memory_limit()
    cache = mx.set_cache_limit(2**60)  # larger than any memory
    engine = open_fresh("mlx", write_llama(tmp_path))
    free = psutil.virtual_memory().available
    assert 0.8 * free < mx.get_memory_limit() < free
    assert mx.set_cache_limit(mx.get_memory_limit()) == mx.get_memory_limit()
    engine.close()
    assert mx.get_memory_limit() == before
    assert mx.set_cache_limit(cache) == 2**60


def test_an_engine_sets_its_schedule_when_it_is_opened(tmp_path: Path, monkeypatch) -> None:
    name = "MLX_BFS_MAX_WIDTH"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    open_fresh("mlx", write_llama(tmp_path), device="cpu").close()
    assert os.environ.get(name) == "1000000"


@pytest.mark.parametrize(
    ("free", "checkpointing", "numbers"),
    [(150e9, False, "600"), (24e9, False, "96"), (8e9, False, "50"), (1e12, False, "1000"), (150e9, True, "50")],
)
def test_a_cuda_card_gets_portions_that_suit_its_memory(free, checkpointing, numbers, monkeypatch) -> None:
    name = "MLX_MAX_MB_PER_BUFFER"
    config = TrainConfig(device="gpu", gradient_checkpointing=checkpointing)
    monkeypatch.setattr(schedule, "device_memory", lambda _: DeviceMemory("cuda", "a card", int(free)))
    with pytest.MonkeyPatch.context() as patch:
        for each in (name, "MLX_MAX_OPS_PER_BUFFER", "MLX_BFS_MAX_WIDTH"):
            patch.setenv(each, "")
            del os.environ[each]
        monkeypatch.setattr(mx.cuda, "is_available", lambda: False)  # Metal's own numbers are small
        schedule.set_schedule(config)
        assert name not in os.environ
        monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
        schedule.set_schedule(config)
        assert os.environ[name] == numbers
        os.environ[name] = "70"
        schedule.set_schedule(config)
        assert os.environ[name] == "70"
