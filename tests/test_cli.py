"""The command line as a first user meets it where all goes well, on both engines.

Each run is a process of its own, as a person starts it; runs that several tests look at are made once a session.
"""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from patience import PATIENCE
from rich.console import Console
from tiny_models import write_llama
from workplace import STEPS, FinishedRun, Workplace, rows

from common.config import load_config
from common.errors import UserError
from common.evaluate.beside_base import evaluate_adapter
from common.runs.checkpoint import checkpoints, damage
from common.talk.speaker import open_model

VERBS = ("train", "evaluate", "generate", "chat", "preview", "convert", "doctor", "status", "report")
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
METRICS = {
    *("step", "epoch", "loss", "learning_rate", "grad_norm"),
    *("tokens_per_second", "supervised_tokens", "peak_memory_bytes"),
}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_run_writes_exactly_the_files_of_the_design(finished: FinishedRun):
    run_files = {"training_config.json", "metrics.jsonl", "training.log", "run.json"}
    assert names(finished.output) == run_files | {"checkpoint-100", f"checkpoint-{STEPS}", "final"}
    checkpoint = ADAPTER | TOKENIZER | {"optimizer.safetensors", "trainer_state.json", "manifest.json"}
    assert names(finished.output / "checkpoint-100") == checkpoint
    assert names(finished.output / "final") == ADAPTER | TOKENIZER | {"training_config.json", "README.md"}
    assert damage(finished.output / f"checkpoint-{STEPS}") is None


def test_metrics_have_the_designs_keys_and_evaluations_where_due(finished: FinishedRun):
    metrics = rows(finished.output)
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert all(row.keys() - {"eval_loss"} == METRICS for row in metrics)
    assert [row["step"] for row in metrics if "eval_loss" in row] == [40, 80, 120]
    assert metrics[-1]["loss"] < metrics[0]["loss"] / 2  # nine sentences are soon known by heart
    assert all(isinstance(value, int | float) for row in metrics for value in row.values())


def test_the_config_of_the_run_is_written_whole(finished: FinishedRun):
    written = json.loads((finished.output / "training_config.json").read_text())
    assert written["engine"] == finished.engine and written["lora"]["r"] == 4 and written["adam_beta1"] == 0.9
    assert json.loads((finished.output / "final" / "training_config.json").read_text()) == written


def test_a_run_shows_what_changed(finished: FinishedRun):
    shown = finished.done.stdout
    assert "Held-out examples, before and after" in shown and "Scores on held-out examples" in shown
    assert "exact_match" in shown and "The adapter is in out/final" in shown
    assert f"step {STEPS}/{STEPS}" in shown
    assert f"Trained {STEPS} steps" in (finished.output / "training.log").read_text()


def test_resuming_a_finished_run_says_so(finished: FinishedRun):
    before = (finished.output / "final" / "adapter_model.safetensors").read_bytes()
    done = finished.workplace.train("--engine", finished.engine, "--resume")
    assert done.returncode == 0, done.stderr
    assert "This run is finished: out/final holds its adapter." in done.stdout
    assert (finished.output / "final" / "adapter_model.safetensors").read_bytes() == before
    assert len(rows(finished.output)) == STEPS


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(finished: FinishedRun, workplace: Workplace):
    output = workplace.path / "out"
    command = [sys.executable, "-m", "common.cli", "train", "--config", "config.json", "--engine", finished.engine]
    with subprocess.Popen(
        command,
        cwd=workplace.path,
        env=workplace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while process.poll() is None and not ((output / "metrics.jsonl").is_file() and rows_seen(output)):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 130, message
    [checkpoint] = checkpoints(output)
    step = int(checkpoint.name.partition("-")[2])
    assert 0 < step < STEPS and damage(checkpoint) is None and not (output / "final").exists()
    assert f"stopped by SIGINT after step {step} of {STEPS}; everything is saved" in message
    resume = f"twintune train --config config.json --engine {finished.engine} --resume"
    assert resume in message
    assert [row["step"] for row in rows(output)] == list(range(1, step + 1))

    done = workplace.train("--engine", finished.engine, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert f"Resuming out/{checkpoint.name} after step {step}" in done.stdout
    for name in ("final/adapter_model.safetensors", f"checkpoint-{STEPS}/optimizer.safetensors"):
        assert (output / name).read_bytes() == (finished.output / name).read_bytes()
    assert [row["step"] for row in rows(output)] == list(range(1, STEPS + 1))
    losses = [[row["loss"] for row in rows(where)] for where in (output, finished.output)]
    assert losses[0][step:] == losses[1][step:]


def rows_seen(output: Path) -> bool:
    return "\n" in (output / "metrics.jsonl").read_text()


def test_evaluate_prints_one_json_object(finished: FinishedRun):
    done = finished.workplace.run("evaluate", "-c", "config.json", "--engine", finished.engine, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores.keys() == {"base", "adapter"}
    for figures in scores.values():
        assert figures.keys() == {"loss", "perplexity", "num_loss_tokens", "num_examples", "exact_match"}
        assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]), rel=1e-9)
    assert scores["base"]["num_loss_tokens"] == scores["adapter"]["num_loss_tokens"] > 0
    assert scores["adapter"]["loss"] < scores["base"]["loss"]
    # The validation file is the test file, and the last row of metrics was measured with the last weights.
    assert scores["adapter"]["loss"] == pytest.approx(rows(finished.output)[-1]["eval_loss"], rel=1e-5)


def test_evaluate_shows_what_the_quantisation_of_the_base_costs(finished: FinishedRun, monkeypatch):
    monkeypatch.chdir(finished.workplace.path)
    console = Console(file=io.StringIO(), width=100)
    four_bits = ["quantization.load_in_4bit=true", "quantization.quant_type=fp4", "evaluation.samples=0"]

    def scores(*overrides: str, full_precision: bool = True):
        config = load_config(Path("config.json"), [f"engine={finished.engine}", "evaluation.metrics=[]", *overrides])
        return evaluate_adapter(config, None, [], console, full_precision)

    plain, rounded = scores(), scores(*four_bits)
    assert list(rounded) == ["full_precision", "base", "adapter"]
    assert rounded["full_precision"]["loss"] == pytest.approx(plain["base"]["loss"], rel=1e-6)
    assert abs(rounded["base"]["loss"] - plain["base"]["loss"]) > 1e-4  # 4 bits of random weights are felt
    assert "full precision" in console.file.getvalue()
    assert scores(*four_bits, full_precision=False).keys() == plain.keys() == {"base", "adapter"}


def test_generate_and_chat_are_greedy_and_deterministic(finished: FinishedRun):
    options = ["--adapter", "out/final", "--engine", finished.engine, "--max-new-tokens", 4]
    generated = finished.workplace.run("generate", "--prompt", "say 3", *options)
    assert generated.returncode == 0, generated.stderr
    assert generated.stdout.strip() and generated.stdout.endswith("\n")
    chat = finished.workplace.run("chat", *options, stdin="say 3\nsay 2\n")
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.startswith(generated.stdout) and chat.stdout.endswith("\n")
    assert chat.stderr.count("tokens/s)") == 2 and "tokens/s" not in chat.stdout + generated.stderr


def test_an_adapter_of_another_base_is_refused(finished: FinishedRun, tmp_path: Path):
    other = write_llama(tmp_path / "other", hidden_size=64)
    with pytest.raises(UserError, match=r"final: .*lora_A.weight has shape \(4, 48\); expected \(4, 64\)"):
        open_model(str(other), finished.output / "final", finished.engine, "cpu")
    one_layer = write_llama(tmp_path / "shallow", num_hidden_layers=1)
    message = finished.workplace.refused(
        *("evaluate", "-c", "config.json", "--engine", finished.engine, "--adapter", "out/final"),
        *("--set", f"model_name_or_path={one_layer}"),
    )
    assert "holds base_model.model.model.layers.1." in message and "is it an adapter of another base?" in message


def test_preview_prints_an_object_an_example_and_the_totals(workplace: Workplace):
    done = workplace.run("preview", "--config", "config.json", "-n", 2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    *examples, totals = map(json.loads, done.stdout.splitlines())
    assert [example["source"] for example in examples] == ["train.jsonl:1", "train.jsonl:2"]
    for example in examples:
        assert example.keys() == {"source", "token_ids", "loss_mask", "num_tokens", "num_loss_tokens"}
        assert len(example["token_ids"]) == len(example["loss_mask"]) == example["num_tokens"]
        assert sum(example["loss_mask"]) == example["num_loss_tokens"] > 0
    assert totals["num_examples"] == 9 and totals["num_tokens"] == 9 * examples[0]["num_tokens"]


def test_preview_marks_what_is_trained(workplace: Workplace):
    done = workplace.run("preview", "--config", "config.json", "-n", 1)
    assert "<|im_start|>assistant\n[[it is 00<|im_end|>]]" in done.stdout and done.stderr == ""


def test_preview_says_what_is_shared_or_could_be(workplace: Workplace):
    lines = map(json.loads, (workplace.path / "train.jsonl").read_text().splitlines())
    system = {"role": "system", "content": "You repeat two digits after the words it is."}
    told = [json.dumps({"messages": [system, *line["messages"]]}) + "\n" for line in lines]
    (workplace.path / "train.jsonl").write_text("".join(told))
    packed = ("preview", "--config", "config.json", "-n", 1, "--set", "packing=true")
    assert "prefix_sharing: true would leave out" in workplace.run(*packed).stdout
    shared = workplace.run(*packed, "--set", "prefix_sharing=true").stdout
    assert "are left out" in shared and "would" not in shared
    nothing = workplace.run(*packed, "--set", "prefix_sharing=true", "--set", "data.train_on=all").stdout
    assert "nothing: too few examples have their first 8 tokens" in nothing


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(workplace: Workplace, verb: str):
    done = workplace.run(verb, "--help")
    assert done.returncode == 0 and f"Example: twintune {verb} --" in done.stdout


def test_a_bare_command_shows_the_verbs(workplace: Workplace):
    done = workplace.run()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(f"  {verb} " in done.stdout + done.stderr for verb in VERBS)


def test_a_reader_that_stops_early_sees_no_traceback(workplace: Workplace):
    (workplace.path / "train.jsonl").write_text((workplace.path / "train.jsonl").read_text() * 300)
    command = [sys.executable, "-m", "common.cli", "preview", "-c", "config.json", "--json", "-n", "2700"]
    with subprocess.Popen(
        command, cwd=workplace.path, env=workplace.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    ("words", "expected"),
    [("rep", "report"), ("train --eng", "--engine"), ("train --engine t", "torch")],
)
def test_the_shell_completes_verbs_options_and_values(workplace: Workplace, words: str, expected: str):
    asked = {"COMP_WORDS": f"twintune {words}", "COMP_CWORD": str(len(words.split()))}
    done = workplace.run(env={"_TWINTUNE_COMPLETE": "complete_bash", **asked})
    assert done.stdout.split() == [expected]
