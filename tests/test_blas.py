"""OpenBLAS under MLX: in fresh processes, as a library can be put under MLX only before its first import."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path

import pytest

from common.cpus import available_cpus
from mlx_backend.blas import gemm_calls, set_blas_threads, use_fast_blas

mlx_cpu_only = pytest.mark.skipif(
    sys.platform != "linux" or not list(distributions(name="mlx-cpu")),
    reason="only the mlx-cpu wheel for Linux links the reference BLAS",
)

MATMULS = """
import mlx.core as mx
import numpy as np
rng = np.random.default_rng(0)
def draw(*shape):
    return rng.standard_normal(shape, dtype=np.float32)
CASES = {
    "plain": (draw(7, 5), draw(5, 9)),
    "right transposed": (draw(33, 16), draw(24, 16).T),
    "left transposed": (draw(16, 33).T, draw(16, 24)),
    "both transposed": (draw(16, 33).T, draw(24, 16).T),
    "sliced": (draw(40, 64)[::2, :32], draw(64, 48)[32:, 5:29]),
    "batched": (draw(3, 4, 17, 8), draw(3, 4, 8, 13)),
    "broadcast": (draw(3, 4, 17, 8), draw(3, 1, 13, 8).swapaxes(-1, -2)),
    "large": (draw(512, 576), draw(576, 1536)),
}
for name, (a, b) in CASES.items():
    found = np.array(mx.array(a) @ mx.array(b))
    # Sums of up to 576 float32 products of unit size: rounding stays well under 1e-3.
    np.testing.assert_allclose(found, a.astype(np.float64) @ b.astype(np.float64), atol=1e-3, err_msg=name)
"""
COUNT = "from mlx_backend.blas import gemm_calls; print(gemm_calls())"
USE = "from mlx_backend.blas import use_fast_blas; print(use_fast_blas())"


def run_python(code: str, cache: Path, **environment: str) -> list[str]:
    """Run code in a fresh interpreter with its own cache folder; return the lines it printed."""
    settings = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    given = ("CC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # by a person, or by conftest.py
    settings = {name: value for name, value in settings.items() if name not in given} | environment
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def shims(cache: Path) -> list[Path]:
    return sorted((cache / "twintune").iterdir())


@mlx_cpu_only
@pytest.mark.parametrize(
    "before, after",
    [("", ""), ("import torch; torch.ones(9, 9) @ torch.ones(9, 9)", ""), ("", "import torch")],
    ids=["alone", "after torch", "before torch"],
)
def test_matmuls_equal_numpy_and_go_through_openblas(before: str, after: str, tmp_path: Path) -> None:
    said, calls = run_python("\n".join([before, USE, after, MATMULS, COUNT]), tmp_path)
    assert said.startswith("MLX uses OpenBLAS")
    assert int(calls) >= 8


@mlx_cpu_only
def test_torch_keeps_its_own_blas(tmp_path: Path) -> None:
    code = f"{USE}\nimport torch; torch.randn(64, 64) @ torch.randn(64, 64)\n{COUNT}"
    assert run_python(code, tmp_path)[-1] == "0"


@mlx_cpu_only
def test_a_second_call_and_a_second_process_reuse_the_shim(tmp_path: Path) -> None:
    first = run_python(f"{USE}\n{USE}", tmp_path)
    (shim,) = shims(tmp_path)
    written = shim.stat()
    second = run_python(USE, tmp_path, CC="/no/compiler")  # a rebuild would fail
    assert first == second * 2
    assert (shim.stat().st_ino, shim.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


@mlx_cpu_only
@pytest.mark.parametrize("kept_bytes", [0, 100, 9000], ids=["empty", "header", "torn"])
def test_a_damaged_shim_is_built_again(kept_bytes: int, tmp_path: Path) -> None:
    run_python(USE, tmp_path)
    (shim,) = shims(tmp_path)
    whole = shim.read_bytes()
    assert len(whole) > 9000
    shim.write_bytes(whole[:kept_bytes])
    said, calls = run_python(f"{USE}\n{MATMULS}\n{COUNT}", tmp_path)
    assert said.startswith("MLX uses OpenBLAS")
    assert int(calls) >= 8
    assert shim.read_bytes() == whole


@mlx_cpu_only
def test_processes_that_build_at_once_leave_one_whole_shim(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: run_python(USE, tmp_path), range(4)))
    assert all(output[0].startswith("MLX uses OpenBLAS") for output in outputs)
    assert len(shims(tmp_path)) == 1


@mlx_cpu_only
def test_a_cache_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    blocked = tmp_path / "a_file"
    blocked.write_text("")
    said, calls = run_python(f"{USE}\n{MATMULS}\n{COUNT}", blocked, TMPDIR=str(tmp_path))
    assert said.startswith("MLX uses OpenBLAS")
    assert int(calls) >= 8
    assert list(tmp_path.iterdir()) == [blocked]  # the temporary library is gone


@mlx_cpu_only
@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({"CC": "/no/compiler"}, "CC=/no/compiler is not found"),
        ({"CC": "false"}, "`false` failed"),
        ({"PATH": "/nowhere"}, "no C compiler (cc, gcc or clang); install one: apt install gcc"),
    ],
    ids=["wrong CC", "failing CC", "none"],
)
def test_no_compiler_is_a_warning_and_mlx_still_works(environment: dict[str, str], wanted: str, tmp_path: Path) -> None:
    said, calls = run_python(f"{USE}\n{MATMULS}\n{COUNT}", tmp_path, **environment)
    assert said.startswith("warning: ")
    assert "20 times slower" in said
    assert wanted in said
    assert calls == "None"


@mlx_cpu_only
def test_a_missing_openblas_is_a_warning_that_names_the_package(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['scipy_openblas32'] = None"
    (said,) = run_python(f"{hide}\n{USE}", tmp_path)
    assert said.startswith("warning: ")
    assert "pip install scipy-openblas32" in said


@mlx_cpu_only
def test_a_call_after_mlx_says_that_it_came_too_late(tmp_path: Path) -> None:
    said, calls = run_python(f"{MATMULS}\n{USE}\n{COUNT}", tmp_path)
    assert said.startswith("warning: ")
    assert "mlx.core was imported before use_fast_blas()" in said
    assert calls == "None"


@mlx_cpu_only
def test_importing_the_module_does_nothing(tmp_path: Path) -> None:
    code = "import sys, mlx_backend.blas; print('mlx.core' in sys.modules)"
    assert run_python(f"{code}\n{COUNT}", tmp_path) == ["False", "None"]
    assert list(tmp_path.iterdir()) == []


@mlx_cpu_only
def test_a_thread_count_of_the_environment_is_kept(tmp_path: Path) -> None:
    (said,) = run_python(USE, tmp_path, OPENBLAS_NUM_THREADS="1")
    assert said.endswith("with 1 threads.")


@mlx_cpu_only
def test_a_thread_count_can_be_set_later(tmp_path: Path) -> None:
    later = "from mlx_backend.blas import set_blas_threads; set_blas_threads(1)"
    assert run_python(f"{USE}\n{later}\n{USE}", tmp_path)[-1].endswith("with 1 threads.")


@mlx_cpu_only
@pytest.mark.parametrize(
    "files, cpus",
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "99900000 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_threads_follow_the_containers_quota(files: dict[str, str], cpus: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(tmp_path) == (cpus or len(os.sched_getaffinity(0)))


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # Linux alone has it
    assert use_fast_blas() == ""
    set_blas_threads(1)
    assert gemm_calls() is None
    assert available_cpus() == os.cpu_count()


@mlx_cpu_only
def test_a_cuda_build_is_left_alone(tmp_path: Path) -> None:
    package = tmp_path / "mlx_cuda_13-0.32.4.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: 0.32.4\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{USE}\n{COUNT}"
    assert run_python(code, tmp_path / "cache") == ["", "None"]
