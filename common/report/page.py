"""The page around the plots: one HTML file without a script, a font or a picture from elsewhere.

What it says is put together here as rows of text; page.html lays it out; page.css fits it to phones, paper
and the dark.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.config.resume import flat
from common.evaluate.metrics import field_of
from common.report.plots import Plot
from common.report.runs import RunData
from common.view.progress import clock
from common.view.tables import NONE, field_rows, figure

HERE = Path(__file__).parent
ROWS = list[tuple[str, list[str]]]


def render_page(runs: Sequence[RunData], plots: Sequence[Plot]) -> str:
    """Return the page as HTML; all texts are escaped."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    single = runs[0] if len(runs) == 1 else None
    score_names, scores, fields = score_rows(runs)
    return environment.get_template("page.html").render(
        title=single.name if single else f"{len(runs)} runs compared",
        subtitle=_subtitle(runs),
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        numbers=list(_numbers(single)) if single else [],
        names=[run.name for run in runs],
        plots=[{"name": plot.name, "note": plot.note, "svg": Markup(plot.svg)} for plot in plots],
        curves_note="The curves are smoothed; what was logged stands behind them." if _is_smoothed(runs) else "",
        facts=table_rows(runs, _facts),
        scores=scores,
        score_names=score_names,
        fields=fields,
        answers=answer_cards(runs),
        data=table_rows(runs, _data),
        lengths=[(run.name, bars) for run in runs if (bars := _length_bars(run))],
        loading=list(_loading(next((run for run in runs if run.has_final), None))),
        changes=changed_rows(runs),
        configs=[(run.name, json.dumps(run.config, indent=2)) for run in runs if run.config],
        versions=table_rows(runs, lambda run: dict(run.record.get("versions") or {}).items()),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        folders=", ".join(str(run.folder) for run in runs),
    )


def table_rows(runs: Sequence[RunData], facts: Callable[[RunData], Any]) -> ROWS:
    """Lay (label, value) pairs of each run side by side; a value that a run lacks is a dash."""
    columns = [dict(facts(run)) for run in runs]
    labels = dict.fromkeys(label for column in columns for label in column)
    return [(label, [str(column.get(label, NONE)) for column in columns]) for label in labels]


def score_rows(runs: Sequence[RunData]) -> tuple[list[str], ROWS, ROWS]:
    """Lay the scores of the base and of every run's adapter side by side, a base for each model there is.

    Returns the names of the columns, the rows of whole scores, and those of single fields.
    """
    columns: dict[str, Mapping[str, float]] = {}
    scored = [run for run in runs if run.scores]
    bases = {run.base for run in scored}
    for run in scored:
        base = "base" if len(bases) == 1 else f"base of {run.name}"
        columns.setdefault(base, run.scores["base"])
        columns["adapter" if len(runs) == 1 else run.name] = run.scores["adapter"]
    metrics = dict.fromkeys(metric for column in columns.values() for metric in column if not field_of(metric))
    rows = [
        (metric, [figure(metric, column[metric]) if metric in column else NONE for column in columns.values()])
        for metric in metrics
    ]
    return list(columns), rows, field_rows(columns)


def answer_cards(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Gather the answers to each held-out prompt, the base's first, and say which are as expected."""
    cards: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        for answer in run.record.get("answers") or []:
            key = (answer["prompt"], answer["expected"])
            card = cards.setdefault(key, {"prompt": key[0], "expected": key[1], "given": []})
            if not card["given"]:
                card["given"].append(("base", shown(answer["base"]), ""))
            right = answer["adapter"].strip() == answer["expected"].strip()
            name = "tuned" if len(runs) == 1 else run.name
            card["given"].append((name, shown(answer["adapter"]), ": as expected" if right else ""))
    return list(cards.values())


def changed_rows(runs: Sequence[RunData]) -> ROWS:
    """List the config keys that are not the same in all runs."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [json.dumps(config.get(key)) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def shown(text: str) -> str:
    """Make an answer fit to be read: nothing said is said so, control characters become �."""
    if not text.strip():
        return "(nothing)"
    return "".join("\ufffd" if ord(char) < 32 and char not in "\n\t" else char for char in text)


def _subtitle(runs: Sequence[RunData]) -> str:
    if len(runs) > 1:
        return ", ".join(run.name for run in runs)
    run = runs[0]
    device = run.record.get("device")
    where = (
        f" with the {run.record['engine']} engine{f' on {device}' if device else ''}" if "engine" in run.record else ""
    )
    return f"A LoRA adapter for {run.base}, trained{where}; {run.state}"


def _numbers(run: RunData) -> Iterator[tuple[str, str]]:
    """Choose the figures that stand at the top."""
    yield "steps", _steps(run)
    for label, key in (("training loss", "loss"), ("validation loss", "eval_loss")):
        value = run.last(key)
        if value is not None:
            yield label, f"{value:.4f}"
    speeds = run.series("tokens_per_second")[1]
    if speeds:
        yield "tokens a second", f"{median(speeds):,.0f}"
    peak = run.last("peak_memory_bytes")
    if peak is not None:
        yield "peak memory", f"{peak / 1e9:.1f} GB"
    if "seconds" in run.record:
        yield "time with scoring", clock(run.record["seconds"])


def _facts(run: RunData) -> Iterator[tuple[str, str]]:
    record, config = run.record, run.config
    yield "state", run.state
    yield "base model", run.base
    for key in ("engine", "device", "dtype", "began"):
        if key in record:
            yield key, str(record[key])
    yield "steps", _steps(run)
    yield "epochs", f"{run.last('epoch') or 0:.2f}"
    if "seconds" in record:
        yield "time with scoring", clock(record["seconds"])
    yield "training loss, first and last", _first_and_last(run.series("loss")[1])
    steps, losses = run.series("eval_loss")
    if losses:
        best = min(range(len(losses)), key=lambda at: losses[at])
        yield "validation loss, first and last", _first_and_last(losses)
        yield "lowest validation loss", f"{losses[best]:.4f} at step {steps[best]:,}"
    yield "supervised tokens trained", f"{run.last('supervised_tokens') or 0:,.0f}"
    if "trainable_weights" in record:
        yield "trainable weights", f"{record['trainable_weights']:,}"
    lora = config.get("lora") or {}
    if lora:
        yield "LoRA", f"r {lora.get('r')}, alpha {lora.get('lora_alpha')}, {lora.get('target_modules')}"
    if run.has_final:
        yield "adapter", run.adapter


def _data(run: RunData) -> Iterator[tuple[str, str]]:
    kept = run.record.get("data") or {}
    for split, counts in kept.items():
        share = counts["num_loss_tokens"] / counts["num_tokens"]
        yield f"{split} examples", f"{counts['num_examples']:,}"
        yield f"{split} tokens", f"{counts['num_tokens']:,}, {share:.0%} of them supervised"
        yield f"{split} lengths", f"{counts['shortest']:,} to {counts['longest']:,} tokens"
    totals = kept.get("training")
    if totals:
        yield "truncated", f"{totals['truncated']:,} examples, {totals['lost_loss_tokens']:,} supervised tokens lost"
        yield "left out", f"{totals['dropped']:,} without a supervised token, {totals['skipped']:,} unusable records"
        yield "an epoch", f"{totals['steps_per_epoch']:,} steps of {totals['rows_per_epoch']:,} rows in all"
        yield "padding", f"{totals['padding_share']:.1%} of the positions computed"
        if totals.get("shared_tokens"):
            yield "shared", f"{totals['shared_tokens']:,} tokens an epoch, not computed again in their row"


def _length_bars(run: RunData) -> list[tuple[str, str, float]]:
    counts = ((run.record.get("data") or {}).get("training") or {}).get("length_histogram") or {}
    most = max(counts.values(), default=0)
    return [(f"{int(bound):,}", f"{count:,}", round(100 * count / most, 1)) for bound, count in counts.items()]


def _loading(run: RunData | None) -> Iterator[tuple[str, str]]:
    """Write how each tool takes the adapter; nothing where no run has finished one."""
    if run is None:
        return
    adapter, base = shlex.quote(run.adapter), shlex.quote(run.base)
    yield "twintune", f"twintune chat --adapter {adapter}"
    yield (
        "Transformers and PEFT",
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(run.base)})\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(run.adapter)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(run.adapter)})",
    )
    yield "vLLM", f"vllm serve {base} --enable-lora --lora-modules tuned={adapter}"
    export = f"twintune export --adapter {adapter} --to"
    yield "mlx-lm", f"{export} mlx --output exported/mlx\nmlx_lm.generate --model {base} --adapter-path exported/mlx"
    yield "llama.cpp", f"{export} gguf --output exported/gguf\nllama-cli -m BASE.gguf --lora exported/gguf/*.gguf"
    yield "any other: one model with the adapter in it", f"{export} merged --output exported/merged"


def _steps(run: RunData) -> str:
    done, total = run.rows[-1]["step"], run.record.get("total_steps")
    return f"{done:,}" if total in (None, done) else f"{done:,} of {total:,}"


def _first_and_last(values: Sequence[float]) -> str:
    return f"{values[0]:.4f} to {values[-1]:.4f}" if values else NONE


def _is_smoothed(runs: Sequence[RunData]) -> bool:
    return any(len(run.rows) > 30 for run in runs)
