"""What memory a 3B takes while it is loaded to 4 bits: 6.4 GB of bfloat16 in files, made at random on the spot.

    PYTHONPATH=.:tests:tests/peers python tests/peers/loading.py [--engines mlx torch] [--work FOLDER]

Each engine loads in a process of its own. Counted is its own memory, looked at every 5 ms, libraries included; of files
mapped into memory, which transformers reads weights from, the system takes pages back as it likes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

NF4 = {"load_in_4bit": True, "use_double_quant": True}


def main() -> None:
    """Write the model and let each engine load it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=("mlx", "torch"), default=["mlx", "torch"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "twintune-peers")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "write":
        from torch_shapes import model_folder

        options.work.mkdir(parents=True, exist_ok=True)
        model_folder(options.work, "3b", False)
    elif options.child:
        load(options.child, options.work / "3b")
    else:
        for child in ("write", *options.engines):
            subprocess.run([sys.executable, __file__, "--child", child, "--work", options.work], check=True)


def load(name: str, model: Path) -> None:
    """Load in this process and print the memory before, at its highest and after."""
    from common.config import load_config
    from common.engine import open_engine

    with tempfile.TemporaryDirectory() as folder:
        settings = {"model_name_or_path": str(model), "output_dir": folder, "data": {"train": "none"}}
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(settings | {"dtype": "bfloat16", "quantization": NF4}))
        config = load_config(path)
    if name == "mlx":
        from mlx_backend.blas import use_fast_blas

        use_fast_blas()
    began, seen, done = time.perf_counter(), [own_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(own_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    open_engine(name, config, model, config.lora)
    done.set()
    watching.join()
    figures = [f"{each / 1e9:.2f} GB" for each in (seen[0], max(seen), own_bytes())]
    print(f"{name}: {time.perf_counter() - began:.0f} s; before {figures[0]}, at most {figures[1]}, after {figures[2]}")


def own_bytes() -> int:
    """Count resident memory that is no file's."""
    held = psutil.Process().memory_info()
    return held.rss - held.shared


if __name__ == "__main__":
    main()
