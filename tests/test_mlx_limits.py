"""MLX's limits of memory: what is free while an engine is open, and what they were before once it is closed."""

import os
from pathlib import Path

import mlx.core as mx
import psutil
import pytest
from engines import open_fresh
from tiny_models import write_llama


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


@pytest.mark.parametrize("on_cuda", [False, True])
def test_graphs_are_small_on_cuda_and_metals_are_left_alone(on_cuda: bool, tmp_path: Path, monkeypatch) -> None:
    name = "MLX_MAX_MB_PER_BUFFER"
    monkeypatch.setenv(name, "")
    monkeypatch.setattr(mx.cuda, "is_available", lambda: on_cuda)
    monkeypatch.delenv(name)
    open_fresh("mlx", write_llama(tmp_path)).close()
    assert os.environ.get(name) == ("50" if on_cuda else None)
    monkeypatch.setenv(name, "70")
    open_fresh("mlx", tmp_path).close()
    assert os.environ[name] == "70"
