"""Start training runs quickly: a process that has imported an engine and forks itself for each run it is asked for.

    fault_server.py ENGINE

Each line on its input is JSON: `config` (a path), `output_dir`, `resume`, `set`, `pause`, the seconds that each stage
of a save takes longer than it would, and `kill_after`, the seconds after which the run is killed, or null. It answers,
once the run has ended, with its status as waitpid gives it. What a run prints goes to run.log. Nothing that starts
threads is called before the fork.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import common.files
from common import launch
from common.config import load_config


def warm(engine: str) -> None:
    """Import all that a run needs."""
    if engine == "torch":
        import torch
        from transformers.models.llama import modeling_llama

        import torch_backend.engine

        torch.set_num_threads(1)
        assert modeling_llama and torch_backend.engine
        return
    from mlx_backend.blas import use_fast_blas

    use_fast_blas()
    from mlx_lm.models import llama

    import mlx_backend.engine

    assert llama and mlx_backend.engine


def slow_down(pause: float) -> None:
    """Let every stage of a save take its time, so that a kill may hit it: half a file, a sync, a rename."""
    sync, rename, write_bytes = common.files.sync, os.rename, Path.write_bytes

    def slow_sync(path: Path) -> None:
        time.sleep(pause)
        sync(path)

    def slow_rename(*names: object) -> None:
        time.sleep(pause)
        rename(*names)
        time.sleep(pause)

    def slow_write_bytes(path: Path, content: bytes) -> None:
        write_bytes(path, content[: len(content) // 2])
        time.sleep(pause)
        write_bytes(path, content)

    common.files.sync, os.rename, Path.write_bytes = slow_sync, slow_rename, slow_write_bytes


def run(asked: dict) -> None:
    """Train as asked, printing to run.log, and leave without cleaning up."""
    log = os.open("run.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        from rich.console import Console

        slow_down(asked["pause"])
        config = load_config(Path(asked["config"]), [f"output_dir={asked['output_dir']}", *asked["set"]])
        launch.train(config, launch.Request(asked["config"], asked["resume"]), Console())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def status_of(process: int, kill_after: float | None) -> int:
    """Wait for a process to end, by our hand if it takes too long."""
    deadline = time.monotonic() + kill_after if kill_after is not None else None
    while deadline is not None and time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.0005)
    if deadline is not None:
        os.kill(process, signal.SIGKILL)  # it is still ours: nobody has waited for it
    return os.waitpid(process, 0)[1]


def main() -> None:
    """Serve until the input ends."""
    warm(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        process = os.fork()
        if process == 0:
            run(asked)
        print(status_of(process, asked["kill_after"]), flush=True)


if __name__ == "__main__":
    main()
