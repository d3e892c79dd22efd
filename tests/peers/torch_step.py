"""Ours and its rivals on one card, in one go and one table: tokens a second, memory, time to the first step.

    PYTHONPATH=.:tests:tests/peers python tests/peers/torch_step.py [--shapes 3b-bf16 short] [--who ours unsloth]

Every figure comes from a process of its own, which dies with its memory. Models and tokens are random; what isn't
installed, or fails, is said in its row. `--shapes longest` searches the longest row that trains in 24 GB, from
`--start` tokens on. A shape takes one to three minutes for each of those who run it; `--work` keeps the models (22 GB)
between calls. `--tiny` runs all of it on a CPU, with tiny models, to see that it would run.
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

WHO = ("ours", "unsloth", "trl", "peft")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "unsloth", "trl")
BUDGET = 24e9  # bytes that torch may hold, for the longest row
STEP_OF_LENGTH = 1024


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="of torch_shapes.py; all of them if left out")
    parser.add_argument("--who", nargs="+", choices=WHO, default=list(WHO))
    parser.add_argument("--steps", type=int, default=8, help="timed ones")
    parser.add_argument("--start", type=int, default=4096, help="tokens of the first row that is tried for the longest")
    parser.add_argument("--limit", type=float, default=280, help="seconds for one process")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "twintune-peers")
    parser.add_argument("--output", type=Path, help="file that gets one JSON object a row")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("WHO", "SHAPE"), help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.child:
        run_child(*options.child, options)
        return
    from torch_shapes import SHAPES

    rows: list[dict[str, Any]] = []
    for name in options.shapes or SHAPES:
        written = run("model", name, options)  # in nobody's time
        if "failed" in written:
            raise SystemExit(f"{name}: {written['failed']}")
        for who in options.who:
            if SHAPES[name].offloading and who != "ours" and name != "longest":
                continue
            rows.append(run(who, name, options))
            print(json.dumps(rows[-1]), flush=True)
            if options.output:
                options.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"\n{table(rows)}")


def run(who: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Let a process measure; what it said last counts, also where it fails or takes too long."""
    flags = ["--tiny"] if options.tiny else []
    command = [sys.executable, __file__, "--child", who, name, "--work", str(options.work), *flags]
    command += ["--steps", str(options.steps), "--start", str(options.start), "--began", str(time.time())]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaints:
        try:
            code: int | str = subprocess.run(
                command, stdout=said, stderr=complaints, timeout=options.limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"not done in {options.limit:g} s"
        for file in (said, complaints):
            file.seek(0)
        found = [line for line in said if line.startswith('{"who"')]
        last = [line.strip() for line in complaints if line.strip()][-1:]
    row = json.loads(found[-1]) if found else {"who": who, "shape": name}
    return row if code == 0 else row | {"failed": f"{code}: {' '.join(last)[:300]}" if isinstance(code, int) else code}


def run_child(who: str, name: str, options: argparse.Namespace) -> None:
    """Measure in this process and print what is known."""
    row: dict[str, Any] = {"who": who, "shape": name}
    if who in ("unsloth", "trl", "peft") and not is_installed(who):
        print(json.dumps(row | {"failed": f"{who} is not installed"}))
        return
    if who == "unsloth":
        import unsloth  # noqa: F401  # wants to be first
    import torch
    from torch_shapes import SHAPES, model_folder

    shape = SHAPES[name]
    if options.tiny:
        shape = replace(shape, rows=2, length=256 if shape.short else min(shape.length, 64))
    folder, on_card = model_folder(options.work, shape.size, options.tiny), torch.cuda.is_available()
    if who == "model":
        return
    row |= {"device": torch.cuda.get_device_name() if on_card else "CPU", "versions": versions()}
    if name == "longest":
        start, limit = (64, 256) if options.tiny else (options.start, 2**20)
        for length in longest(who, folder, shape, start, limit, on_card):
            print(json.dumps(row | {"longest": length}), flush=True)
        return
    print(json.dumps(row | measured(steps_of(who, folder, shape, options.steps + 1, on_card), options.began)))


def steps_of(who: str, folder: Path, shape: Any, steps: int, on_card: bool) -> Iterator[tuple[int, int, float]]:
    """Yield tokens, supervised tokens and the end of each step."""
    from torch_shapes import full_examples, short_examples

    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    rows = 4 * shape.rows
    if who == "ours":
        from torch_ours import ours

        # As many positions: ours has none for the last token, whose next one nobody knows.
        examples = short_examples(vocabulary) if shape.short else full_examples(shape.length + 1, rows, vocabulary)
        yield from ours(folder, shape, examples, steps, on_card)
        return
    from torch_rivals import loop, trl

    examples = short_examples(vocabulary) if shape.short else full_examples(shape.length, rows, vocabulary)
    if who == "trl":
        yield from trl(folder, shape, examples, steps)
    else:
        for tokens, supervised in loop(who, folder, shape, examples, steps):
            yield tokens, supervised, time.perf_counter()


def measured(steps: Iterator[tuple[int, int, float]], began: float) -> dict[str, Any]:
    """Time the steps between warming up and the last; `began` is when the process was started, by the wall clock.

    Each step of ours is launched before the one before it is waited for. A long launch waits for the card, and so the
    last step, which none follows, is partly done when the one before it is noted.
    """
    import torch
    from torch_shapes import WARM_UP

    started = time.perf_counter() - (time.time() - began)
    *done, _ = steps
    seconds = done[-1][2] - done[WARM_UP - 1][2]
    tokens, supervised = (sum(step[part] for step in done[WARM_UP:]) for part in (0, 1))
    figures = {
        "tokens_per_second": tokens / seconds,
        "supervised_tokens_per_second": supervised / seconds,
        "step_seconds": seconds / (len(done) - WARM_UP),
        "slowest_step_seconds": max(later[2] - step[2] for step, later in itertools.pairwise(done[WARM_UP - 1 :])),
        "first_step_after_seconds": done[0][2] - started,
    }
    if torch.cuda.is_available():
        held = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
        figures |= held | {"to_host_bytes_per_second": to_host()}
    return figures


def to_host(size: int = 2**26, times: int = 20) -> float:
    """Time copies from the card into pinned memory of the host: what offloading can't be faster than."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source, device="cpu", pin_memory=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return times * size / (time.perf_counter() - began)


def longest(who: str, folder: Path, shape: Any, start: int, limit: int, on_card: bool) -> Iterator[int]:
    """Yield ever longer rows that train within the budget: twice as long until one doesn't, then between the two."""
    import torch

    if on_card:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, BUDGET / total))
    train = trainer_of(who, folder, shape, limit, on_card)
    unit = min(STEP_OF_LENGTH, start)
    fitting, failing, first = 0, limit + 1, start // unit * unit
    while failing - fitting > unit:
        tried = min(2 * fitting or first, limit) if failing > limit else (fitting + failing) // 2 // unit * unit
        try:
            train(tried)
            fitting = tried
            yield fitting
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            failing = tried
        gc.collect()
        if on_card:
            torch.cuda.empty_cache()
        if fitting >= limit:
            return


def trainer_of(who: str, folder: Path, shape: Any, limit: int, on_card: bool) -> Callable[[int], None]:
    """Return what trains two steps on a row of some length."""
    import torch
    from torch_shapes import full_examples

    if who == "ours":
        from torch_ours import opened, settings

        from common.batches import BatchPlan
        from common.data.tokens import build_dataset

        engine = opened(folder, settings(shape, tempfile.gettempdir(), 1, on_card))

        def train(length: int) -> None:
            ((tokens, mask),) = full_examples(length + 1, 1, 500)
            plan = BatchPlan(build_dataset([(tokens, mask, "made:1")]), 1, 1, 0, 2)
            for step in (1, 2):
                engine.fetch(engine.train_step(plan.step_batch(step), 1e-4))

        return train
    if who == "trl":
        raise SystemExit("the row of peft is TRL's too, whose trainer has no part in it")
    from torch_rivals import DEVICE, LOADERS, step

    model = LOADERS[who](folder, shape, limit)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on_card)

    def train_rival(length: int) -> None:
        ids = torch.tensor([full_examples(length, 1, 500)[0][0]], device=DEVICE)
        optimizer.zero_grad(set_to_none=True)
        for _ in range(2):
            step(model, optimizer, {"input_ids": ids, "labels": ids})

    return train_rival


def is_installed(name: str) -> bool:
    """Tell whether a package is there, without importing it."""
    return name in versions()


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter and are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as a table for the README, with date, device and versions above."""
    from torch_shapes import SHAPES

    known = next((row for row in rows if "versions" in row), {"device": "?", "versions": {}})
    with_versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    head = ("shape", "who", "tokens/s", "supervised/s", "step ms", "peak GB", "first step after s")
    lines = [
        f"{known['device']}, {date.today()}: {with_versions}\n",
        f"| {' | '.join(head)} |",
        "| --- " * len(head) + "|",
    ]
    for row in rows:
        cells = [SHAPES[row["shape"]].about, row["who"], *figures(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(row: dict[str, Any]) -> list[str]:
    """Write the figures of a row, or why there are none."""
    if "longest" in row:
        return [f"{row['longest']:,} tokens", row.get("failed", ""), "", "", ""]
    if "tokens_per_second" not in row:
        return [row["failed"], "", "", "", ""]
    return [
        f"{row['tokens_per_second']:,.0f}",
        f"{row['supervised_tokens_per_second']:,.0f}",
        f"{1e3 * row['step_seconds']:,.0f}",
        f"{row['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in row else "",
        f"{row['first_step_after_seconds']:.0f}",
    ]


if __name__ == "__main__":
    main()
