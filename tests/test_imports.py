"""Who imports whom: mlx_backend -> common <- torch_backend, nothing heavy before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT / "common") for path in (ROOT / "common").rglob("*.py"))
MODULES = [".".join(path.with_suffix("").parts) for path in FILES if path.stem != "__init__"]
ENGINES = {
    *("mlx", "mlx_lm", "torch", "peft", "bitsandbytes", "transformers", "accelerate"),
    *("mlx_backend", "torch_backend"),
}
VERBS = (
    "train",
    "evaluate",
    "generate",
    "chat",
    "preview",
    "convert",
    "export",
    "doctor",
    "status",
    "report",
    "estimate",
)


def loaded_after(code: str) -> set[str]:
    """Run code in a fresh interpreter; returns the top-level packages it left loaded."""
    report = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.__stderr__)"
    done = subprocess.run([sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def imported_by(package: str) -> set[str]:
    """Collect the top-level packages that any file of a package names in an import, at whatever depth."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import, which this test doesn't follow"
                found.add(str(node.module).partition(".")[0])
    return found


def test_importing_all_of_common_loads_no_engine():
    loaded = loaded_after("import " + ", ".join(f"common.{module}" for module in MODULES))
    assert "common" in loaded and "numpy" in loaded
    assert not loaded & ENGINES


def test_common_names_no_engine_in_any_import():
    assert not imported_by("common") & ENGINES


def test_the_backends_never_meet():
    assert not imported_by("mlx_backend") & {"torch", "peft", "bitsandbytes", "transformers", "torch_backend"}
    assert not imported_by("torch_backend") & {"mlx", "mlx_lm", "mlx_backend"}


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]):
    code = f"import sys; sys.argv = ['twintune', *{arguments}]\nfrom common import cli\ntry: cli.main()\n"
    loaded = loaded_after(code + "except SystemExit: pass")
    heavy = {*("numpy", "rich", "yaml", "jinja2", "tokenizers", "safetensors", "huggingface_hub")}
    if arguments == ["--help"]:
        heavy.add("pydantic")  # typer itself asks it for the type of an option, but only within a verb
    assert "typer" in loaded
    assert not loaded & (heavy | ENGINES)


def test_opening_the_mlx_package_leaves_mlx_alone():
    """On Linux the fast BLAS has to be in place before the first `import mlx.core`."""
    assert not loaded_after("import mlx_backend") & {"mlx", "mlx_lm"}
