"""Fixtures of the whole suite: the fast BLAS first, tiny models once a session, and how `make test` spreads over CPUs.

Nothing here needs several processes: `pytest tests/test_x.py` runs in one, on all CPUs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
from hypothesis import settings
from patience import PATIENCE

# Before numpy and torch read it: beside other workers each keeps to one thread, as theirs would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anything imports Triton, where that is installed: without a card it is to interpret its kernels.
if os.environ.get("TWINTUNE_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

from common.base.weights import rope_in_both_forms
from common.cpus import available_cpus
from mlx_backend.blas import use_fast_blas

ROOT = Path(__file__).parent.parent
pytest_plugins = ["workplace"]
WORKER_BYTES = 4 * 10**9  # a worker grows to 2.2 GB, and a process that its test starts may take as much
MOST_WORKERS = 8  # each imports torch and MLX and makes the session's models again

use_fast_blas()  # before anything imports mlx.core


def let_mlx_walk_as_on_a_cpu() -> None:
    """Have MLX read now, at its first evaluation, how it walks its graphs: else the first test to compute decides.

    It is what mlx_backend/__init__.py sets for a CPU; peaks of memory depend on it.
    """
    import mlx.core as mx

    with pytest.MonkeyPatch.context() as patch:  # processes that tests start decide for themselves
        patch.setenv("MLX_BFS_MAX_WIDTH", "1000000")
        mx.eval(mx.array(1) + 1)


let_mlx_walk_as_on_a_cpu()

# The same examples every time: a run of the suite judges the change at hand, not its luck. To go looking for more:
# pytest --hypothesis-profile search
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("same")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers() -> int:
    """Say how many workers `-n auto` is: one a CPU, as far as the memory goes."""
    return max(1, min(available_cpus(), psutil.virtual_memory().total // WORKER_BYTES, MOST_WORKERS))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a head of its own, see tiny_models.py."""
    from tiny_models import write_llama

    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with tied embeddings."""
    from tiny_models import write_llama

    return write_llama(tmp_path_factory.mktemp("tied"), tied=True, seed=1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its theta of 50000 written in the old and in the new form, as our own conversion does."""
    from tiny_models import write_llama

    directory = write_llama(tmp_path_factory.mktemp("tiny"))
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | rope_in_both_forms(config), indent=2), encoding="utf-8")
    return directory


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where the files are written, so that messages hold bare file names."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def cli_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a first user: nothing set of the Hub's, ours or an engine's, an empty cache, no terminal."""
    set_by_others = ("HF_", "HUGGING", "TWINTUNE", "MLX_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(set_by_others)}
    cache = str(tmp_path_factory.mktemp("cache"))
    # One thread: on busy cores two wait for each other at every tiny operation, and a run takes ten times as long.
    return kept | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": cache,
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def cli(cli_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m common.cli` with some arguments in a process of its own; returns how it ended."""

    def run(
        *arguments: object, cwd: Path, stdin: str = "", env: Mapping[str, str] | None = None, timeout: float = PATIENCE
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "common.cli", *map(str, arguments)],
            cwd=cwd,
            env=cli_environment | dict(env or {}),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
