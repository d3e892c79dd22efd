"""The command line as a first user meets it: what goes well on both engines, and every wrong turn.

A wrong turn ends in one message on stderr, an exit code, no traceback, and a disk as it was. Each run is a
process of its own, as a person starts it; runs that several tests look at are made once a session.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_models import write_llama

from common.adapters.adapter import read_adapter
from common.base.hub import resolve_model
from common.config import load_config
from common.errors import UserError
from common.evaluate.beside_base import evaluate_adapter
from common.runs.checkpoint import checkpoints, damage
from common.talk.speaker import open_model

ENGINES = ("mlx", "torch")
VERBS = ("train", "evaluate", "generate", "chat", "preview", "convert", "doctor", "status", "report")
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
METRICS = {
    *("step", "epoch", "loss", "learning_rate", "grad_norm"),
    *("tokens_per_second", "supervised_tokens", "peak_memory_bytes"),
}
STEPS = 120  # long enough to be interrupted in the middle
CONFIG = {
    "data": {"train": "train.jsonl", "validation": "test.jsonl", "test": "test.jsonl"},
    "lora": {"r": 4, "lora_dropout": 0.1},  # dropout, so that a resume has to find the same masks again
    "device": "cpu",
    "learning_rate": 0.01,
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 40,
    "save_steps": 50,
    "save_total_limit": 2,
    "evaluation": {"samples": 1, "max_new_tokens": 4, "metrics": ["exact_match"]},
}


@dataclass(frozen=True)
class Workplace:
    """A folder with data and a config, in which a person runs commands."""

    path: Path
    run_cli: Callable[..., subprocess.CompletedProcess[str]]
    environment: dict[str, str]

    def run(self, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return self.run_cli(*arguments, cwd=self.path, **options)

    def train(self, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return self.run("train", "--config", "config.json", *arguments, **options)

    def write_config(self, **changes: object) -> None:
        config = json.loads((self.path / "config.json").read_text()) | changes
        (self.path / "config.json").write_text(json.dumps(config))

    def refused(self, *arguments: object, code: int = 2, **options: object) -> str:
        """Run a command that must fail in good order; returns its message."""
        before = sorted(self.path.rglob("*"))
        done = self.run(*arguments, **options)
        noise, found, message = f"\n{done.stderr}".partition("\nerror: ")
        assert done.returncode == code and found, done.stderr
        assert "Traceback" not in done.stderr + done.stdout and "\nerror: " not in message
        assert not noise or "with the torch engine" in done.stdout  # whose libraries have a lot to say
        assert sorted(self.path.rglob("*")) == before
        return message


def make_workplace(path: Path, model: Path, cli: Callable, environment: dict[str, str]) -> Workplace:
    for name, count in (("train.jsonl", 9), ("test.jsonl", 3)):
        lines = [
            {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}{i}"}]}
            for i in range(count)
        ]
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.json").write_text(json.dumps(CONFIG | {"model_name_or_path": str(model), "output_dir": "out"}))
    return Workplace(path, cli, environment)


@pytest.fixture
def workplace(tmp_path: Path, tiny_model: Path, cli: Callable, cli_environment: dict[str, str]) -> Workplace:
    return make_workplace(tmp_path, tiny_model, cli, cli_environment)


@dataclass(frozen=True)
class FinishedRun:
    """A workplace in which an engine has trained to the end, and what it printed."""

    engine: str
    workplace: Workplace
    done: subprocess.CompletedProcess[str]

    @property
    def output(self) -> Path:
        return self.workplace.path / "out"


@pytest.fixture(scope="session", params=ENGINES)
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    cli: Callable,
    cli_environment: dict[str, str],
) -> FinishedRun:
    path = tmp_path_factory.mktemp(f"finished-{request.param}")
    workplace = make_workplace(path, tiny_model, cli, cli_environment)
    done = workplace.train("--engine", request.param)
    assert done.returncode == 0, done.stderr
    return FinishedRun(request.param, workplace, done)


@pytest.fixture
def model(tiny_model: Path, workplace: Workplace) -> Path:
    """A copy of the tiny model that a test may break, in the place the config names."""
    workplace.write_config(model_name_or_path="model")
    return Path(shutil.copytree(tiny_model, workplace.path / "model"))


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


# What goes well


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
        message = process.communicate(timeout=60)[1]
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


# Wrong options and configs


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train", "--confg", "x"], ["train"], ["chat", "--temperature", "-1"]]
)
def test_wrong_options_show_the_usage(workplace: Workplace, arguments: list[str]):
    done = workplace.run(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Usage: twintune") and "\nError: " in done.stderr


def test_a_missing_config_is_named(workplace: Workplace):
    message = workplace.refused("train", "--config", "nosuch.yaml")
    assert message.startswith(f"nosuch.yaml: no such file (looked from {workplace.path})")


def test_everything_wrong_with_a_config_is_said_at_once(workplace: Workplace):
    workplace.write_config(warmup_stepz=4, fp16=True, bf16=True, lora={"r": "8", "alpha": 3}, max_steps=2.5)
    lines = workplace.refused("train", "-c", "config.json", "--set", "learning_rat=1").splitlines()
    assert sorted(lines) == [
        "--set learning_rat=1: unknown key; did you mean learning_rate?",
        "config.json: bf16: found true, which contradicts fp16: true; keep one of them",
        "config.json: lora.alpha: unknown key; did you mean lora.lora_alpha?",
        'config.json: lora.r: found "8"; expected an integer of at least 1; write e.g. r: 16',
        "config.json: max_steps: found 2.5; expected an integer of at least -1; write e.g. max_steps: -1",
        "config.json: warmup_stepz: unknown key; did you mean warmup_steps?",
    ]


@pytest.mark.parametrize("option", ["learning_rate", "=1", "lora=8", "lora.r=[", "lora..r=1"])
def test_a_bad_override_is_shown_with_a_good_one(workplace: Workplace, option: str):
    assert workplace.refused("train", "-c", "config.json", "--set", option).startswith(f"--set {option}: ")


def test_a_config_without_model_and_data_lists_both(workplace: Workplace):
    (workplace.path / "empty.yaml").write_text("seed: 1\n")
    for verb in ("train", "preview"):
        message = workplace.refused(verb, "--config", "empty.yaml")
        assert "model_name_or_path: missing" in message and "data.train: missing" in message


# Wrong data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "train.jsonl: the file holds no examples"),
        ("\n\n", "train.jsonl: the file holds no examples"),
        ('{"text": "a b"}\n{"text": \n', "train.jsonl:2: no JSON: "),
        ('{"messages": [{"role": "user", "content": "a"}]}', "train.jsonl:1: has no answer"),
        ('{"prompt": "a", "completion": " "}', "train.jsonl:1: 'completion' is empty"),
        ('{"question": "a"}', "train.jsonl:1: has none of 'input_ids', 'messages', "),
    ],
    ids=["empty", "blank", "no-json", "no-answer", "empty-answer", "other-keys"],
)
def test_bad_data_is_named_by_file_and_line(workplace: Workplace, content: str, message: str):
    (workplace.path / "train.jsonl").write_text(content)
    assert workplace.refused("train", "-c", "config.json").startswith(message)


def test_a_missing_data_file_is_named(workplace: Workplace):
    assert workplace.refused("train", "-c", "config.json", "--set", "data.test=x.jsonl").startswith("x.jsonl: no such")


# Wrong models


def test_a_model_folder_without_weights_is_refused(workplace: Workplace, model: Path):
    (model / "model.safetensors").unlink()
    message = workplace.refused("train", "-c", "config.json")
    assert message.startswith("model: the folder has no weights; expected model.safetensors")


def test_a_truncated_weight_file_is_refused(workplace: Workplace, model: Path):
    os.truncate(model / "model.safetensors", 100_000)
    message = workplace.refused("train", "-c", "config.json")
    assert message.startswith("model/model.safetensors: truncated: 100,000 bytes, its header promises ")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_broken_file_of_the_model_is_named(workplace: Workplace, model: Path, name: str):
    (model / name).write_text("{% if %}" if name.endswith("jinja") else '{"model_type": ')
    message = workplace.refused("train", "-c", "config.json")
    assert message.startswith("model: the chat template" if name.endswith("jinja") else f"model/{name}: ")


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unknown_architecture_is_refused(workplace: Workplace, model: Path, engine: str):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "nosuch", "architectures": ["Nosuch"]}))
    message = workplace.refused("train", "-c", "config.json", "--engine", engine)
    assert message.startswith(f"model: the {'MLX' if engine == 'mlx' else engine} engine can't load this model")
    assert "model_type nosuch" in message


def test_a_tokenizer_of_another_model_is_refused(workplace: Workplace, model: Path):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"][0] | {"id": 416, "content": "<|new|>"}
    tokenizer["added_tokens"].append(added)
    tokenizer["model"]["vocab"] |= {f"<|{i}|>": i for i in range(len(tokenizer["model"]["vocab"]), 416)}
    tokenizer["model"]["vocab"]["<|new|>"] = 416
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (workplace.path / "train.jsonl").write_text('{"text": "hello <|new|>"}\n')
    message = workplace.refused("train", "-c", "config.json")
    assert message.startswith("model: its tokenizer makes token 416, its model knows only 0 to 415")


def test_a_model_name_that_is_nothing_is_refused(workplace: Workplace):
    message = workplace.refused("train", "-c", "config.json", "--set", "model_name_or_path=nosuch")
    assert message.startswith("model_name_or_path: nosuch: no such folder; expected a local model folder or a Hub name")
    with pytest.raises(UserError, match="no such folder"):
        resolve_model("nosuch")


# Wrong places


def test_another_config_in_the_same_folder_is_refused_with_the_differences(finished: FinishedRun):
    message = finished.workplace.refused("train", "-c", "config.json", "--resume", "--set", "lora.r=8")
    assert message.startswith("output_dir: out already holds a run of another config:\n  lora.r: 4 -> 8\n")


def test_training_again_without_resume_is_refused(finished: FinishedRun):
    message = finished.workplace.refused("train", "-c", "config.json", "--engine", finished.engine)
    assert message.startswith("output_dir: out already holds this run; continue it with --resume")


@pytest.mark.parametrize("output", ["train.jsonl", "train.jsonl/run"])
def test_an_output_that_is_a_file_is_refused(workplace: Workplace, output: str):
    message = workplace.refused("train", "-c", "config.json", "--set", f"output_dir={output}")
    assert f"{workplace.path / 'train.jsonl'} is a file; expected a folder" in message


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system in memory with the given options; skips where that isn't allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"can't mount a small disk here: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_a_read_only_output_is_refused(workplace: Workplace, mounted: Callable[[str], Path]):
    disk = mounted("ro")
    message = workplace.refused("train", "-c", "config.json", "--set", "output_dir=disk/run")
    assert message.startswith(f"output_dir: disk/run: {disk} can't be written")


def test_a_full_disk_leaves_the_earlier_checkpoints_good(workplace: Workplace, mounted: Callable[[str], Path]):
    disk = mounted("size=1m")
    many = ["--engine", "mlx", "--set", "save_steps=1", "--set", "save_total_limit=100", "--set", "data.test=[]"]
    done = workplace.train(*many, "--set", "output_dir=disk/run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    saved = checkpoints(disk / "run")
    first = disk / "run" / f"checkpoint-{len(saved) + 1}"
    assert f"step {len(saved) + 1} is not saved: {first}: the disk is full: " in done.stdout
    assert [row["step"] for row in rows(disk / "run")] == list(range(1, STEPS + 1))  # training went on
    assert done.stderr.startswith(f"error: {disk / 'run' / 'final'}: the disk is full: ")
    assert f"checkpoint-{len(saved)} is good: nothing is lost but the {STEPS - len(saved)} steps after" in done.stderr
    assert "Once there is room, continue with:\n  twintune train --config config.json --engine mlx" in done.stderr
    assert len(saved) > 1 and not any(map(damage, saved))
    assert not [path for path in disk.rglob("*") if path.name.startswith(".") or path.name == "final"]

    subprocess.run(["mount", "-o", "remount,size=32m", str(disk)], check=True)
    resumed = workplace.train(*many, "--set", "output_dir=disk/run", "--set", f"max_steps={len(saved) + 2}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Resuming disk/run/checkpoint-{len(saved)} after step {len(saved)}" in resumed.stdout


def test_resume_from_what_is_no_checkpoint_is_refused(workplace: Workplace):
    for where in ("nosuch", "."):
        message = workplace.refused("train", "-c", "config.json", "--resume", where)
        assert message.startswith(f"--resume {where}: no checkpoint; expected a folder such as out/checkpoint-40")


# Wrong adapters


@pytest.fixture
def adapter(finished: FinishedRun, tmp_path: Path) -> Path:
    """A copy of a finished adapter that a test may break."""
    return Path(shutil.copytree(finished.output / "final", tmp_path / "adapter"))


@pytest.mark.parametrize("finished", ["mlx"], indirect=True)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", None, "adapter: has no adapter_config.json"),
        ("adapter_config.json", "{", "adapter/adapter_config.json: no JSON"),
        (
            "adapter_config.json",
            '{"peft_type": "IA3"}',
            "adapter/adapter_config.json: has peft_type 'IA3', which is no LoRA adapter",
        ),
        ("adapter_model.safetensors", None, "adapter: has no adapter_model.safetensors"),
        ("adapter_model.safetensors", "short", "adapter/adapter_model.safetensors: no safetensors file"),
    ],
)
def test_a_broken_adapter_is_named(workplace: Workplace, adapter: Path, name: str, content: str | None, message: str):
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_text(content)
    assert workplace.refused("generate", "--adapter", "adapter", "--prompt", "x").startswith(message)
    if name == "adapter_config.json":
        assert workplace.refused("evaluate", "-c", "config.json", "--adapter", "adapter").startswith(message)


@pytest.mark.parametrize("finished", ["mlx"], indirect=True)
def test_a_missing_tensor_is_named(workplace: Workplace, adapter: Path):
    from safetensors.numpy import save_file

    weights, _ = read_adapter(adapter)
    missing = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != missing}, adapter / "adapter_model.safetensors")
    message = workplace.refused("generate", "--adapter", "adapter", "--prompt", "x", "--engine", "mlx")
    assert message.startswith(f"adapter: lacks {missing}")


def test_generate_without_a_model_says_what_to_name(workplace: Workplace):
    assert workplace.refused("generate", "--prompt", "x").startswith("--model: missing; name a model folder")


# Machines that can't


@pytest.mark.parametrize("engine", ENGINES)
def test_a_device_that_is_not_there_is_refused_as_the_machines_fault(workplace: Workplace, engine: str):
    if has_cuda(engine):
        pytest.skip("there is a CUDA device here")
    message = workplace.refused("train", "-c", "config.json", "--engine", engine, "--device", "cuda", code=3)
    assert message.startswith("device: cuda: ")


def has_cuda(engine: str) -> bool:
    if engine == "torch":
        import torch

        return torch.cuda.is_available()
    import mlx.core as mx

    return mx.cuda.is_available()


@pytest.mark.parametrize(("engine", "extra"), [("mlx", "mlx"), ("torch", "cuda")])
def test_an_engine_that_is_not_installed_is_refused_with_what_installs_it(
    workplace: Workplace, engine: str, extra: str
):
    """A None in sys.modules is Python's own way to say that a module can't be found."""
    command = ["twintune", "train", "-c", "config.json", "--engine", engine]
    code = f"import sys; sys.modules['{engine}'] = None; sys.argv = {command}; from common.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=workplace.path, env=workplace.environment, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert done.stderr.startswith(f"error: engine {engine}: {engine} is not installed in this environment")
    assert f"pip install 'twintune[{extra}]'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [("rep", "report"), ("train --eng", "--engine"), ("train --engine t", "torch")],
)
def test_the_shell_completes_verbs_options_and_values(workplace: Workplace, words: str, expected: str):
    asked = {"COMP_WORDS": f"twintune {words}", "COMP_CWORD": str(len(words.split()))}
    done = workplace.run(env={"_TWINTUNE_COMPLETE": "complete_bash", **asked})
    assert done.stdout.split() == [expected]
