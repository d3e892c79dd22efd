"""A fast BLAS under MLX on a Linux CPU: OpenBLAS in the place of the reference BLAS that `mlx-cpu` links.

libmlx calls cblas_sgemm (also d and c), and Python loads libmlx with every symbol bound at once, first match
in the process's global scope. So a library that defines those three names and is global before the first
`import mlx.core` takes every float matmul. PyPI's OpenBLAS prefixes its names with `scipy_`; a small C file,
compiled once into a cache folder, forwards to it.

Only the cblas_ names are taken, never `sgemm_`: torch exports and calls its own `sgemm_`, which stays as it
is. The cost: a C compiler, which MLX's `mx.compile` needs on a CPU anyway, and 50 ms at the first use.
"""

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.cpus import available_cpus

CALLS_SYMBOL = "twintune_gemm_calls"
SHIM_SOURCE = r"""
#define FORWARD(name, scalar, pointer)                                                              \
    typedef void (*name##_function)(int, int, int, int, int, int, scalar, const pointer *, int,     \
                                    const pointer *, int, scalar, pointer *, int);                  \
    name##_function twintune_##name;                                                                \
    void cblas_##name(int order, int trans_a, int trans_b, int m, int n, int k, scalar alpha,       \
                      const pointer *a, int lda, const pointer *b, int ldb, scalar beta,            \
                      pointer *c, int ldc) {                                                        \
        __atomic_fetch_add(&twintune_gemm_calls, 1, __ATOMIC_RELAXED);                              \
        twintune_##name(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);     \
    }

long twintune_gemm_calls;
FORWARD(sgemm, float, float)
FORWARD(dgemm, double, double)
FORWARD(cgemm, const void *, void)
"""
DIGEST_BYTES = hashlib.sha256().digest_size
COMPILE_SECONDS = 60


class BlasUnavailableError(Exception):
    """Carry why OpenBLAS can't be put under MLX, and what to do about it."""


def use_fast_blas() -> str:
    """Put OpenBLAS under MLX's float matmuls; call it before the first `import mlx.core`.

    Return one line for the person: what is in use, or `warning: ...` where training stays about 20 times
    slower and how to mend it; an empty string where there is nothing to do (macOS, CUDA, an MLX built from
    source). Raise nothing: training without it is slow, not wrong. A second call changes nothing.
    """
    if not _links_reference_blas():
        return ""
    try:
        if gemm_calls() is None:
            _refuse_after_mlx()
            _load_shim(_load_openblas())
            set_blas_threads(available_cpus())  # it sees no container's quota by itself
        openblas = _load_openblas()
    except BlasUnavailableError as error:
        return f"warning: MLX's matmuls use the reference BLAS, training is about 20 times slower: {error}"
    threads = openblas.scipy_openblas_get_num_threads()
    return f"MLX uses OpenBLAS {_openblas_version()} with {threads} threads."


def set_blas_threads(count: int) -> None:
    """Let each matmul use `count` threads, where OpenBLAS is in place and the environment doesn't say how many."""
    if gemm_calls() is not None and not _threads_given():
        _load_openblas().scipy_openblas_set_num_threads(count)


def gemm_calls() -> int | None:
    """Count the matmuls of this process that went through OpenBLAS; None where it isn't in place."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.c_long.in_dll(ctypes.CDLL(None), CALLS_SYMBOL).value
    except ValueError:
        return None


def _links_reference_blas() -> bool:
    if sys.platform != "linux":
        return False
    names = {(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
    return "mlx-cpu" in names and not any(name.startswith("mlx-cuda") for name in names)


def _refuse_after_mlx() -> None:
    if "mlx.core" in sys.modules:  # its calls are bound already; a later library changes nothing
        raise BlasUnavailableError("mlx.core was imported before use_fast_blas() was called; call it first")


def _load_openblas() -> ctypes.CDLL:
    """Load OpenBLAS, private to us; the second time it is the same library."""
    spec = importlib.util.find_spec("scipy_openblas32")  # its own import would load it into the global scope
    folders = (spec.submodule_search_locations or []) if spec else []
    paths = [path for folder in folders for path in Path(folder).glob("lib/libscipy_openblas*.so")]
    if not paths:
        raise BlasUnavailableError("no scipy-openblas32; install it: pip install scipy-openblas32")
    try:
        openblas = ctypes.CDLL(str(paths[0]))
    except OSError as error:
        raise BlasUnavailableError(f"{error}; reinstall scipy-openblas32") from None
    return openblas


def _threads_given() -> bool:
    return bool({"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys())


def _openblas_version() -> str:
    return ".".join(importlib.metadata.version("scipy-openblas32").split(".")[:3])


def _load_shim(openblas: ctypes.CDLL) -> None:
    """Make the forwarding library global, from the cache folder or else from a temporary one."""
    failures = []
    for folder in _shim_folders():
        try:
            shim = ctypes.CDLL(str(_built_shim(folder)), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:  # a read-only or full home, or one mounted noexec
            failures.append(str(error))
            continue
        for name in ("sgemm", "dgemm", "cgemm"):
            target = ctypes.cast(openblas[f"scipy_cblas_{name}"], ctypes.c_void_p)
            ctypes.c_void_p.in_dll(shim, f"twintune_{name}").value = target.value
        return
    raise BlasUnavailableError(f"no folder takes a library: {'; '.join(failures)}; set XDG_CACHE_HOME")


def _shim_folders() -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # a user without a home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twintune"
    # Private to this process: nobody else can put a library there. A loaded file may be deleted.
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix="twintune-") as folder:
        yield Path(folder)


def _built_shim(folder: Path) -> Path:
    """Return the shim's path in a folder, compiling it where it is missing or damaged."""
    key = hashlib.sha256(f"{platform.machine()}\n{SHIM_SOURCE}".encode()).hexdigest()[:16]
    path = folder / f"blas-{key}.so"
    if not _intact(path):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as build:
            library = _compile(Path(build))
            with library.open("ab") as file:  # _intact checks it: loading a torn library kills us
                file.write(hashlib.sha256(library.read_bytes()).digest())
            library.replace(path)  # at once, so another process sees a whole file or none
    return path


def _intact(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _compile(folder: Path) -> Path:
    source, library = folder / "blas.c", folder / "blas.so"
    source.write_text(SHIM_SOURCE)
    command = [*_compiler(), "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise BlasUnavailableError(f"`{command[0]}` took over {COMPILE_SECONDS} s; set CC") from None
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no message"])[0]
        raise BlasUnavailableError(f"`{command[0]}` failed: {reason}; install gcc, or set CC")
    return library


def _compiler() -> list[str]:
    """Return the command of the C compiler: $CC where set, else the first of cc, gcc, clang."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    wanted = f"CC={chosen[0]} is not found" if chosen else "no C compiler (cc, gcc or clang)"
    raise BlasUnavailableError(f"{wanted}; install one: apt install gcc, or dnf install gcc")
