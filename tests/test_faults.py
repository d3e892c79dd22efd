"""A run killed with SIGKILL at any moment, in the middle of a save as well, ends as if nothing had been.

Four kills an engine by default; `make test-faults` makes 200 (TWINTUNE_FAULTS), with TWINTUNE_FAULT_SEED as the seed.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from engines import ENGINES
from patience import PATIENCE

from common.runs.checkpoint import checkpoints, damage
from common.view.metrics import read_metrics

KILLS = int(os.environ.get("TWINTUNE_FAULTS", "4"))
STEPS = 8
PAUSE = 0.0015  # seconds that each stage of a save takes longer: at least a third of the kills then hit one
STATE = ("adapter_model.safetensors", "optimizer.safetensors")
CONFIG = {
    "data": {"train": "train.jsonl"},
    "lora": {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.1},
    "device": "cpu",
    "learning_rate": 0.01,
    "max_steps": STEPS,
    "save_steps": 2,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
}


class Runs:
    """Start, kill and resume runs of one engine in a folder, and compare them with one that nobody disturbed."""

    def __init__(self, engine: str, path: Path, model: Path, environment: dict[str, str]) -> None:
        lines = (
            {"input_ids": [seed + 1, 7, 9 * seed + 3, 5], "labels": [-100, 7, 9 * seed + 3, 5]} for seed in range(9)
        )
        (path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = CONFIG | {"model_name_or_path": str(model), "engine": engine}
        (path / "config.json").write_text(json.dumps(config))
        self.path = path
        self.counts: Counter[str] = Counter()
        self.harmed: set[Path] = set()
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fault_server.py"), engine],
            cwd=path,
            env=environment | {"OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.server.stdout.readline() == "ready\n"
        self.whole = path / "whole"
        self.seconds = self.run("whole", settings=("save_total_limit=null",))
        assert self.seconds, self.log()

    def run(self, output: str, kill_after: float | None = None, settings: tuple[str, ...] = ()) -> float:
        """Run to the end, or kill after some seconds; returns how long it took to the end, 0 where it was killed."""
        resume = "auto" if (self.path / output).exists() else None
        asked = {"config": "config.json", "output_dir": output, "resume": resume, "set": list(settings)}
        began = time.monotonic()
        print(json.dumps(asked | {"pause": PAUSE, "kill_after": kill_after}), file=self.server.stdin, flush=True)
        status = int(self.server.stdout.readline())
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0, self.log()
        return 0.0 if killed else time.monotonic() - began

    def disturb(self, output: str, chance: random.Random) -> None:
        """Kill a run at a random moment of its whole length, once or more, and resume it to the end."""
        while True:
            killed = not self.run(output, chance.uniform(0, self.seconds))
            folder = self.path / output
            if killed:
                self.counts["kills"] += 1
                self.counts["kills in a save"] += any(".tmp-" in path.name for path in folder.glob(".*"))
                self.check_checkpoints(folder)
                if chance.random() < 0.25:
                    self.harm_newest(folder, chance)
            if chance.random() < 0.75:  # else the resumed run is killed too
                break
        assert self.run(output), self.log()
        self.check_end(folder)

    def harm_newest(self, folder: Path, chance: random.Random) -> None:
        """Damage a file of the newest checkpoint, as a bad disk may: the resume takes an earlier one, or none."""
        for checkpoint in checkpoints(folder)[:1]:
            path = chance.choice(sorted(checkpoint.iterdir()))
            content = bytearray(path.read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content[: chance.choice([len(content), len(content) // 2])])
            self.harmed.add(checkpoint)
            self.counts["checkpoints damaged"] += 1

    def check_checkpoints(self, folder: Path) -> None:
        """Every checkpoint that can be seen is whole, and the one that the undisturbed run wrote at that step."""
        for checkpoint in checkpoints(folder):
            if checkpoint in self.harmed and damage(checkpoint):
                continue  # by us, and not replaced yet
            assert damage(checkpoint) is None, checkpoint
            for name in STATE:
                assert (checkpoint / name).read_bytes() == (self.whole / checkpoint.name / name).read_bytes()

    def check_end(self, folder: Path) -> None:
        """A run that has come to its end is the undisturbed one, and nothing else is left."""
        for name in ("final/adapter_model.safetensors", *(f"checkpoint-{STEPS}/{each}" for each in STATE)):
            assert (folder / name).read_bytes() == (self.whole / name).read_bytes(), name
        self.harmed.clear()
        self.check_checkpoints(folder)
        losses = [
            [(row["step"], row["loss"]) for row in read_metrics(each / "metrics.jsonl")]
            for each in (folder, self.whole)
        ]
        assert losses[0] == losses[1]
        kept = {f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}", "final"}
        assert {path.name for path in folder.iterdir()} == kept | {
            "metrics.jsonl",
            "run.json",
            "training.log",
            "training_config.json",
        }
        self.counts["ends bit-identical"] += 1

    def log(self) -> str:
        """Show the end of what the runs printed."""
        log = self.path / "run.log"
        return log.read_text()[-4000:] if log.exists() else "no run.log"

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(timeout=PATIENCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_killed_at_any_moment_ends_bit_for_bit_as_if_nothing_had_been(
    engine: str, tmp_path: Path, tiny_model: Path, cli_environment: dict[str, str]
):
    seed = int(os.environ.get("TWINTUNE_FAULT_SEED", random.randrange(1_000_000)))
    print(f"\n{engine}: TWINTUNE_FAULT_SEED={seed}")
    chance, runs = random.Random(seed), Runs(engine, tmp_path, tiny_model, cli_environment)
    try:
        number = 0
        while runs.counts["kills"] < KILLS:
            number += 1
            runs.disturb(f"run-{number}", chance)
    finally:
        runs.close()
        print(f"{engine}: {dict(runs.counts)}; a run takes {runs.seconds:.2f} s")
    assert runs.counts["ends bit-identical"] == number
