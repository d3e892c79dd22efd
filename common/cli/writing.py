"""Verbs that write files for others: configs, models in another format, adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from common.cli.given import same_command
from common.cli.options import (
    DeviceOption,
    EngineOption,
    JsonOption,
    ModelOption,
    example,
)
from common.errors import UserError


@example("twintune init --output mine.yaml --model Qwen/Qwen3-0.6B --train data/train.jsonl")
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


@example("twintune schema > configs/config.schema.json")
def schema() -> None:
    """Print the config's JSON schema, with which editors complete and check keys."""
    from common.config.schema import config_schema

    print(json.dumps(config_schema(), indent=2))


@example("twintune convert --model Qwen/Qwen3-4B --to mlx --quantize 4 --output models/mine")
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
    size, command = byte_size(max_shard_size), same_command(sys.argv[1:])
    request = Request(model, output, to, dtype, quantization, quant_type, double_quant, size, check, command)
    result = run_convert(request, Console(stderr=as_json))
    if as_json:
        print(json.dumps(result))


@example("twintune export --adapter outputs/quickstart-mlx/final --to gguf --output exports/gguf")
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
