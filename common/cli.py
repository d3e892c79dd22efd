"""The command line: verbs, their options and exit codes. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import contextlib
import errno
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from common.errors import TwintuneError, UserError
from common.options import SamplingOptions, take_sampling
from common.runs.signals import LastingStream, outlive_terminal

if TYPE_CHECKING:
    from common.config import TrainConfig

app = typer.Typer(
    name="twintune",
    help="Fine-tune with one config on MLX or torch; out comes a standard PEFT adapter.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="The config, YAML or JSON.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. lora.r=8; repeatable."),
]
EngineOption = Annotated[
    Literal["auto", "mlx", "torch"] | None, typer.Option("--engine", help="What computes.", show_default=False)
]
DeviceOption = Annotated[
    Literal["auto", "cuda", "mps", "cpu", "gpu"] | None,
    typer.Option("--device", help="Where it computes.", show_default=False),
]
AdapterOption = Annotated[
    Path | None, typer.Option("--adapter", metavar="DIR", help="An adapter's folder, PEFT's or mlx-lm's.")
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="Base model: folder or Hub name; else the adapter's own."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print only JSON lines on stdout.")]
SystemOption = Annotated[str | None, typer.Option("--system", help="System prompt.")]


@app.command(epilog="Example: twintune train --config configs/quickstart.yaml --set learning_rate=2e-4")
def train(
    config: ConfigOption,
    engine: EngineOption = None,
    device: DeviceOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[auto|DIR]", help="Go on from the newest intact checkpoint, from this one, or from an adapter."
        ),
    ] = None,
    allow_changed: Annotated[bool, typer.Option(help="Resume although config, data or base changed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Try although the estimate says that it can't fit.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but an error.")] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Train an adapter and write checkpoints, metrics and final/ into the config's output_dir."""
    from rich.console import Console

    from common import launch

    settings = _load(config, engine, device, overrides)
    with outlive_terminal():
        events = sys.stdout if as_json else None
        request = launch.Request(str(config), resume, allow_changed, _resume_command(sys.argv[1:]), events, force)
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # libraries print too
            launch.train(settings, request, Console(quiet=quiet))


@app.command(epilog="Example: twintune evaluate --config configs/quickstart.yaml --adapter outputs/quickstart/final")
def evaluate(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN_DIR", help="With --compare: runs or adapters, two or more.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The config; --compare has the first run's.")
    ] = None,
    adapter: AdapterOption = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Examples; else the config's data.test."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="In place of the config's metrics: exact_match, ...; repeatable."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask several runs the same questions, and say how sure the difference is.")
    ] = False,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", metavar="TASK[,TASK]", help="Tasks of lm-evaluation-harness instead.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of each --lm-eval task, this many questions.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put --lm-eval's prompts through the chat template.")
    ] = False,
    engine: EngineOption = None,
    device: DeviceOption = None,
    full_precision: Annotated[
        bool, typer.Option(help="Measure a base that the config quantises without that, too; it must fit in memory.")
    ] = True,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Measure loss, perplexity and answers of base and adapter, side by side; or runs with --compare."""
    from rich.console import Console

    from common.evaluate import verb

    asked = verb.Request(
        config, runs or [], adapter, data or [], metric or [], compare, lm_eval, limit, apply_chat_template
    )
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # libraries and your own metrics print too
        result = verb.run(asked, _overrides(engine, device, overrides), full_precision, Console(stderr=as_json))
    if as_json:
        print(json.dumps(result))


@app.command(epilog='Example: twintune generate --model models/smollm2-135m-instruct --prompt "turn on the light"')
@take_sampling
def generate(
    prompt: Annotated[str, typer.Option(help="What the user says.")],
    sampling: SamplingOptions,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    engine: EngineOption = None,
    device: DeviceOption = None,
) -> None:
    """Print the model's answer to a prompt as it comes."""
    from common.talk import speaker

    speaker.answer_once(speaker.open_model(model, adapter, engine, device), prompt, system, sampling.sampling())


@app.command(epilog="Example: twintune chat --adapter outputs/quickstart/final")
@take_sampling
def chat(
    sampling: SamplingOptions,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    engine: EngineOption = None,
    device: DeviceOption = None,
) -> None:
    """Talk with the model; Tab switches between base and adapter, /help tells more, Ctrl-D ends."""
    from common.talk.chat import chat as converse
    from common.talk.speaker import open_model

    converse(open_model(model, adapter, engine, device), system, sampling.sampling())


@app.command(epilog="Example: twintune preview --config configs/quickstart.yaml -n 3")
def preview(
    config: ConfigOption,
    number: Annotated[int, typer.Option("-n", min=0, help="How many examples to show.")] = 5,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Show training examples as the model sees them, with the supervised tokens marked."""
    from common.view.preview import preview_data

    preview_data(_load(config, None, None, overrides), number, as_json)


@app.command(epilog="Example: twintune estimate --config configs/quickstart.yaml")
def estimate(
    config: ConfigOption,
    engine: EngineOption = None,
    device: DeviceOption = None,
    fix: Annotated[bool, typer.Option("--fix", help="Write a config that fits beside this one.")] = False,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Say how much memory and time a run takes, and what makes it fit, before anything is loaded or downloaded."""
    from common.estimate.verb import estimate as run_estimate

    run_estimate(_load(config, engine, device, overrides), config, as_json, fix)


@app.command(epilog="Example: twintune bench --config configs/quickstart.yaml --engine torch --steps 8")
def bench(
    config: ConfigOption,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to time.")] = 8,
    engine: EngineOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    overrides: SetOption = None,
) -> None:
    """Time training steps on this machine; nothing is saved."""
    from common.bench import bench as run_bench

    run_bench(_load(config, engine, device, overrides), str(config), steps, as_json)


@app.command(epilog="Example: twintune doctor --model models/smollm2-135m-instruct")
def doctor(
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Say whether both engines agree on this model: folder or Hub name.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can run and what to mend, and train a tiny model on every engine here."""
    from common.doctor import doctor as examination

    if model:
        examination.examine_model(model, as_json)
    else:
        examination.examine(as_json)


@app.command(epilog="Example: twintune status --json outputs/quickstart-mlx")
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The output_dir.")], as_json: JsonOption = False
) -> None:
    """Show how a run stands, from another terminal; on a terminal, follow it until it ends or Ctrl-C."""
    from common.view.status import show

    show(run, as_json)


@app.command(epilog="Example: twintune report --output both.html outputs/quickstart-mlx outputs/quickstart-torch")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="One output_dir, or several to compare.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page; else report.html in the run's folder, for several here."),
    ] = None,
) -> None:
    """Write an HTML page with plots, data, answers and config of a run, and the plots as PNG in a folder beside it."""
    from common.report.write import write_report

    print(f"{write_report(runs, output)} is ready")


@app.command(epilog="Example: twintune init --output mine.yaml --model Qwen/Qwen3-0.6B --train data/train.jsonl")
def init(
    output: Annotated[Path, typer.Option(metavar="FILE", help="The config to write.")] = Path("train.yaml"),
    model: Annotated[str | None, typer.Option(metavar="M", help="The base: a folder or Hub name.")] = None,
    train: Annotated[str | None, typer.Option(metavar="PATH", help="The examples.")] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="PATH|SHARE", help="More examples, or the share of them to hold out.")
    ] = None,
    four_bits: Annotated[bool | None, typer.Option("--4bit/--no-4bit", help="Hold the base in 4 bits.")] = None,
    output_dir: Annotated[str | None, typer.Option(metavar="DIR", help="The folder to train into.")] = None,
) -> None:
    """Write a config from five answers, asked at the terminal where no option gives them."""
    from common.init import Answers, write_config

    def ask(question: str, suggested: str) -> str:
        return str(typer.prompt(question, default=suggested or None))

    answers = Answers(model, train, validation, four_bits, output_dir)
    write_config(output, answers, ask if sys.stdin.isatty() else None)
    print(f"{output} is ready; see your data as the model will: twintune preview --config {output}")


@app.command(epilog="Example: twintune schema > configs/config.schema.json")
def schema() -> None:
    """Print the config's JSON schema, with which editors complete and check keys."""
    from common.config.schema import config_schema

    print(json.dumps(config_schema(), indent=2))


@app.command(epilog="Example: twintune convert --model Qwen/Qwen3-4B --to mlx --quantize 4 --output models/mine")
def convert(
    model: Annotated[str, typer.Option(metavar="M", help="A model folder, Hub name or GGUF file.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The model folder to write.")],
    to: Annotated[
        Literal["hf", "mlx", "bnb"], typer.Option(help="Hugging Face's layout, MLX's, or bitsandbytes' packed weights.")
    ] = "hf",
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        typer.Option(help="Of what is not packed; else as it is, float16 from GGUF.", show_default=False),
    ] = None,
    quantize: Annotated[
        int | None, typer.Option(metavar="2|3|4|5|6|8", help="Bits of MLX's formats, for --to mlx.", show_default=False)
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="16|32|64|128", help="MLX: weights that share a scale.", show_default=False)
    ] = None,
    mode: Annotated[
        Literal["affine", "mxfp4", "mxfp8", "nvfp4"] | None,
        typer.Option(help="MLX: how it rounds.", show_default=False),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=BITS|false", help="MLX: other bits for modules by a part of their path; repeatable."
        ),
    ] = None,
    quant_type: Annotated[
        Literal["nf4", "fp4", "int8"] | None, typer.Option(help="For --to bnb; else nf4.", show_default=False)
    ] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="bnb: pack the scales, too.")] = False,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file, such as 500MB.")] = "5GB",
    check: Annotated[bool, typer.Option(help="Compare logits of the two, which loads each.")] = True,
    tokens: Annotated[
        list[str] | None, typer.Option("--add-tokens", metavar="TEXT", help="A new token of the base; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model in another format, tensor by tensor, and check it; or give a base new tokens.

    Formats read: Hugging Face, MLX and bitsandbytes folders, packed or not, and GGUF. A conversion that was
    interrupted goes on when the same command is given again.
    """
    if tokens:
        from common.base.vocabulary import add_tokens

        others = (
            *(("--dtype", dtype), ("--to", to != "hf"), ("--quantize", quantize), ("--group-size", group_size)),
            *(("--mode", mode), ("--override", override), ("--quant-type", quant_type), ("--json", as_json)),
            *(("--double-quant", double_quant), ("--max-shard-size", max_shard_size != "5GB")),
        )
        if given := next((name for name, value in others if value), None):
            raise UserError(f"{given}: --add-tokens leaves the weights as they are; leave one of the two out")
        growth = add_tokens(Path(model), output, tokens)
        print(f"{output} is ready: {len(tokens)} new tokens, {growth.rows:,} rows; train them with")
        print("  lora: {modules_to_save: [embed_tokens, lm_head]}")
        return
    from rich.console import Console

    from common.convert.convert import convert as run_convert
    from common.convert.request import Request, byte_size, quantization_of

    quantization = quantization_of(quantize, group_size, mode, override or [])
    size, command = byte_size(max_shard_size), shlex.join([_program(), *sys.argv[1:]])
    request = Request(model, output, to, dtype, quantization, quant_type, double_quant, size, check, command)
    result = run_convert(request, Console(stderr=as_json))
    if as_json:
        print(json.dumps(result))


@app.command(epilog="Example: twintune export --adapter outputs/quickstart-mlx/final --to gguf --output exports/gguf")
def export(
    adapter: Annotated[Path, typer.Option("--adapter", metavar="DIR", help="The PEFT adapter folder to export.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    to: Annotated[
        Literal["peft", "mlx", "gguf", "merged", "merged-gguf"] | None,
        typer.Option(help="What to write; else what suits --for.", show_default=False),
    ] = None,
    reader: Annotated[
        str | None,
        typer.Option("--for", metavar="READER", help="The program that will load it: vllm, sglang, ollama, ..."),
    ] = None,
    model: ModelOption = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "q8_0"] | None,
        typer.Option(help="Of what is stored; q8_0 for merged-gguf.", show_default=False),
    ] = None,
    fold_rslora: Annotated[bool, typer.Option(help="Write rsLoRA's factor as a plain alpha.")] = False,
    quantize: Annotated[
        int | None, typer.Option(metavar="4|5|6|8", help="Put what --to merged writes into MLX's format of these bits.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder to the Hugging Face Hub.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Make a repository that is new a private one.")] = False,
    engine: EngineOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter for another program, and prove by its logits that nothing was lost."""
    from rich.console import Console

    from common.export.export import Request
    from common.export.export import export as run_export

    request = Request(
        adapter, output, to, reader, model, engine, device, dtype, fold_rslora, quantize, push_to_hub, private
    )
    result = run_export(request, Console(stderr=as_json))
    if as_json:
        print(json.dumps(result))


def main() -> None:
    """Run the command line; what a user can cause ends in one message and an exit code, without a traceback."""
    try:
        app(args=_with_bare_resume(sys.argv[1:]), prog_name="twintune")
    except TwintuneError as error:
        _leave(str(error), error.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        where = error.filename or "a file"
        _leave(
            f"{where}: {error.strerror}; free some room or check the permissions; what was saved before is intact",
            2,
        )


def _load(config: Path, engine: str | None, device: str | None, overrides: list[str] | None) -> TrainConfig:
    from common.config import load_config

    return load_config(config, _overrides(engine, device, overrides))


def _overrides(engine: str | None, device: str | None, overrides: list[str] | None) -> list[str]:
    options = {"engine": engine, "device": device}
    return [*(overrides or []), *(f"{key}={value}" for key, value in options.items() if value)]


def _resume_command(arguments: list[str]) -> str:
    """Return the command that was given, asking for the newest checkpoint."""
    completed = _with_bare_resume(arguments)
    if "--resume" in completed:
        at = completed.index("--resume")
        del completed[at : at + 2]
    return shlex.join([_program(), *completed, "--resume"])


def _program() -> str:
    """Name the program as it was called: it may not be on the PATH."""
    return sys.argv[0] if Path(sys.argv[0]).name == "twintune" else "twintune"


def _with_bare_resume(arguments: list[str]) -> list[str]:
    """Complete a `--resume` without a value to `--resume auto`, which typer can't do by itself."""
    completed: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        completed.append(argument)
        if argument == "--resume" and following.startswith("-"):
            completed.append("auto")
    return completed


def _leave(message: str, code: int) -> None:
    errors = LastingStream(sys.stderr)  # whoever read our output may be gone: the exit code is the same
    LastingStream(sys.stdout).flush()
    print(message if code == 130 else f"error: {message}", file=errors, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
