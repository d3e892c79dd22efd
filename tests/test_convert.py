"""`twintune convert`: floats, files and records, what resumes, what is refused. Packed formats have their own tests.

The oracles are torch's casts and transformers' loader.
"""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conversions import assert_same_files, run_convert
from exports import model_logits
from gguf_files import tiny_llama, write_gguf
from patience import PATIENCE
from rich.console import Console
from safetensors.torch import load_file, save_file

from common.base.shards import INDEX
from common.base.weights import check_model_folder, fingerprint, read_header
from common.convert.record import hub_revision, read_record
from common.convert.source import RECORD
from common.convert.target import FloatTarget
from common.errors import Interrupted, UserError

torch = pytest.importorskip("torch")

SHARD = 60_000  # bytes: some ten files of a tiny Llama
SLOWLY = """
import sys, time
from common import cli
from common.convert import writing
write = writing.write_shard
def slow(*arguments):
    time.sleep(0.05)
    write(*arguments)
writing.write_shard = slow
sys.argv[0] = "twintune"
cli.main()
"""


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_floats_are_cast_as_torch_casts_them(tmp_path: Path, llama: Path, dtype: str):
    result = run_convert(llama, tmp_path / "out", dtype=dtype, check=True)
    stored, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(llama / "model.safetensors")
    assert stored.keys() == before.keys()
    for name, tensor in before.items():
        expected = tensor.to(getattr(torch, dtype))
        assert stored[name].dtype == expected.dtype and torch.equal(stored[name], expected), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype and config["rope_theta"] == 50000.0
    assert result["logits"]["difference"] <= result["logits"]["tolerance"] < result["logits"]["largest"] / 2
    assert (dtype == "float32") == (result["weights"]["equal"] == result["weights"]["weights"])
    model_logits(tmp_path / "out")


def test_shards_are_read_and_written_and_hold_every_tensor_once(tmp_path: Path, llama: Path):
    run_convert(llama, tmp_path / "many", max_shard_bytes=SHARD)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert len(shards) > 5 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert index["weight_map"] == {name: path.name for path in shards for name in read_header(path)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for path in shards for t in load_file(path).values())
    assert all(path.stat().st_size < SHARD + 5_000 or len(read_header(path)) == 1 for path in shards)
    np.testing.assert_array_equal(model_logits(tmp_path / "many"), model_logits(llama))
    run_convert(tmp_path / "many", tmp_path / "one")
    assert_same_files(tmp_path / "one", llama)
    assert not (tmp_path / "one" / INDEX).exists()


def test_a_gguf_becomes_float16_with_its_tokenizer(tmp_path: Path):
    source = write_gguf(tmp_path / "model.gguf", tiny_llama())
    shown = io.StringIO()
    result = run_convert(source, tmp_path / "out", check=True, console=Console(file=shown, width=200))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} < names_in(tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert result["logits"] is None and "no engine here loads both a GGUF file and the result" in shown.getvalue()


@pytest.mark.parametrize(("to", "options"), [("mlx", {"bits": 4, "group_size": 32}), ("bnb", {}), ("mlx", {})])
def test_a_gguf_becomes_what_its_folder_becomes(tmp_path: Path, to: str, options: dict):
    source = write_gguf(tmp_path / "model.gguf", tiny_llama())
    run_convert(source, tmp_path / "hf", dtype="bfloat16")
    run_convert(source, tmp_path / "direct", to, dtype="bfloat16", **options)
    run_convert(tmp_path / "hf", tmp_path / "in_two", to, dtype="bfloat16", **options)
    assert_same_files(tmp_path / "direct", tmp_path / "in_two")


def test_the_record_tells_sources_sums_options_and_checks(tmp_path: Path, llama: Path):
    folder = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    shutil.copytree(llama, folder)
    run_convert(folder, tmp_path / "out", dtype="bfloat16")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (record["source"]["repository"], record["source"]["revision"]) == ("owner/name", "0123abc")
    sums = subprocess.run(["sha256sum", *sorted(folder.iterdir())], capture_output=True, text=True, check=True).stdout
    expected = {Path(line.split()[1]).name: line.split()[0] for line in sums.splitlines()}
    assert {name: entry["sha256"] for name, entry in record["source"]["files"].items()} == expected
    assert record["options"]["dtype"] == "bfloat16" and record["versions"]["twintune"]
    assert record["fingerprint"] == fingerprint(tmp_path / "out")
    assert record["checks"]["weights"]["share"] <= 1
    assert hub_revision(tmp_path) == {}


def interrupted_after(count: int) -> Callable[..., Iterator]:
    """Encode so many weights, then be interrupted."""
    encode, done = FloatTarget.encode, []

    def encode_some(self: FloatTarget, group: object) -> Iterator:
        done.append(group)
        if len(done) > count:
            os.kill(os.getpid(), signal.SIGINT)
        return encode(self, group)

    return encode_some


def test_an_interrupted_conversion_goes_on_with_the_files_it_has(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
):
    out, options = tmp_path / "out", {"max_shard_bytes": SHARD, "command": "twintune convert --again"}
    with monkeypatch.context() as patch:
        patch.setattr(FloatTarget, "encode", interrupted_after(9))
        with pytest.raises(
            Interrupted, match=r"finished files are kept; go on with: twintune convert --again"
        ) as error:
            run_convert(llama, out, **options)
    assert error.value.exit_code == 130
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert finished and "config.json" not in names_in(out)
    with pytest.raises(UserError, match=r"has no config.json"):
        check_model_folder(out)
    shown = io.StringIO()
    run_convert(llama, out, console=Console(file=shown, width=200), **options)
    assert f"going on; {len(finished)} of " in shown.getvalue()
    assert all((out / name).stat().st_mtime_ns == time_ns for name, time_ns in finished.items())
    run_convert(llama, tmp_path / "whole", **options)
    assert_same_files(out, tmp_path / "whole")


@pytest.mark.parametrize("changed", ["options", "source"])
def test_another_conversion_in_a_begun_folder_begins_anew_and_says_so(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, changed: str
):
    source, out, shown = shutil.copytree(llama, tmp_path / "source"), tmp_path / "out", io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(FloatTarget, "encode", interrupted_after(9))
        with pytest.raises(Interrupted):
            run_convert(source, out, max_shard_bytes=SHARD)
    if changed == "source":
        tensors = load_file(source / "model.safetensors")
        save_file(
            {name: tensor * 2 for name, tensor in tensors.items()}, source / "model.safetensors", {"format": "pt"}
        )
    dtype = "bfloat16" if changed == "options" else None
    run_convert(source, out, dtype=dtype, max_shard_bytes=SHARD, console=Console(file=shown, width=300))
    said = {"options": "dtype: None -> bfloat16", "source": "model.safetensors changed"}[changed]
    assert f"began as another conversion ({said}); beginning anew" in shown.getvalue()
    run_convert(source, tmp_path / "expected", dtype=dtype, max_shard_bytes=SHARD)
    assert_same_files(out, tmp_path / "expected")


def test_a_killed_conversion_goes_on(tmp_path: Path, llama: Path, cli_environment: dict[str, str]):
    command = ["convert", "--model", str(llama), "--output", "out", "--max-shard-size", "60KB", "--no-check"]
    start = [sys.executable, "-c", SLOWLY, *command]
    process = subprocess.Popen(start, cwd=tmp_path, env=cli_environment, stdout=subprocess.DEVNULL)
    while not (record := read_record(tmp_path / "out")) or len(record["shards"]) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert "config.json" not in names_in(tmp_path / "out")
    (tmp_path / "out" / f".model-00009-of-00009.safetensors.tmp-{process.pid}").write_bytes(b"half")
    process = subprocess.Popen(start, cwd=tmp_path, env=cli_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len((read_record(tmp_path / "out") or {"shards": ()})["shards"]) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and b"going on; " in out
    assert b"go on with: twintune convert --model" in error and b"Traceback" not in error
    done = subprocess.run(start, cwd=tmp_path, env=cli_environment, capture_output=True, text=True, check=True)
    assert "out is ready" in done.stdout and not [name for name in names_in(tmp_path / "out") if name[0] == "."]
    run_convert(llama, tmp_path / "expected", max_shard_bytes=60_000)
    assert_same_files(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize(("to", "options"), [("hf", {"dtype": "float16"}), ("mlx", {"mode": "mxfp8"}), ("bnb", {})])
def test_a_number_that_changed_on_the_disk_is_found_and_nothing_is_left(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, to: str, options: dict
):
    from tiny_models import write_llama

    from common.convert import writing

    model = write_llama(tmp_path / "model", hidden_size=64, intermediate_size=96)
    write = writing.write_shard

    def flip(path: Path, *arguments: object) -> None:
        write(path, *arguments)
        name, entry = max(read_header(path).items(), key=lambda item: item[1]["data_offsets"][1])
        data = bytearray(path.read_bytes())
        assert entry["data_offsets"][1] > entry["data_offsets"][0], name
        packed = read_header(path)["model.layers.0.mlp.down_proj.weight"]["data_offsets"]
        data[len(data) - max(e["data_offsets"][1] for e in read_header(path).values()) + packed[0] + 1] ^= 0x77
        path.write_bytes(data)

    monkeypatch.setattr(writing, "write_shard", flip)
    with pytest.raises(UserError, match=r"down_proj.weight holds .* the source .*out was removed"):
        run_convert(model, tmp_path / "out", to, **options)
    assert not (tmp_path / "out").exists()


def test_logits_that_differ_leave_nothing(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("common.convert.convert.write_config", lambda folder, target: lie(folder, target.config))
    with pytest.raises(UserError, match=r"computes something else than the source: the .* engine .*out was removed"):
        run_convert(llama, tmp_path / "out", check=True)
    assert names_in(tmp_path) == set()


def lie(folder: Path, config: dict) -> None:
    theta = {"rope_theta": 10.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}
    (folder / "config.json").write_text(json.dumps(config | theta))


def test_a_number_too_large_for_float16_is_refused_with_what_holds_it(tmp_path: Path, llama: Path):
    source = shutil.copytree(llama, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    message = (
        r"tensor model.norm.weight reaches 100000; float16 ends at 65504; use bfloat16 or float32; .*out was removed"
    )
    with pytest.raises(UserError, match=message):
        run_convert(source, tmp_path / "out", dtype="float16")
    assert names_in(tmp_path) == {"source"}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "its weights are packed by gptq, which convert can't read"),
        ({"quant_method": "fp8"}, "its weights are packed by fp8"),
    ],
)
def test_other_packed_formats_are_refused(tmp_path: Path, llama: Path, stored: dict, message: str):
    source = shutil.copytree(llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    with pytest.raises(UserError, match=message):
        run_convert(source, tmp_path / "out")


def test_tensors_that_are_no_floats_are_refused(tmp_path: Path, llama: Path):
    source = shutil.copytree(llama, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.places": torch.arange(4)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model.places is stored as I64; expected F64, F32, F16 or BF16"):
        run_convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "hf", "bits": 4}, "--quantize, --mode: MLX's formats, with --to hf; write --to mlx"),
        ({"to": "bnb", "mode": "mxfp4"}, "with --to bnb"),
        ({"to": "mlx", "quant_type": "nf4"}, "bitsandbytes' formats, with --to mlx; write --to bnb"),
        ({"to": "hf", "double_quant": True}, "bitsandbytes' formats, with --to hf"),
        ({"to": "bnb", "quant_type": "int8", "double_quant": True}, "--double-quant: int8 keeps one scale a row"),
    ],
    ids=str,
)
def test_an_option_of_another_format_is_refused(tmp_path: Path, llama: Path, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        run_convert(llama, tmp_path / "out", **options)


def test_a_folder_in_use_is_left_alone_and_an_empty_one_is_taken(tmp_path: Path, llama: Path):
    (tmp_path / "out").mkdir()
    run_convert(llama, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    for folder in (tmp_path / "out", llama):
        with pytest.raises(UserError, match="already exists"):
            run_convert(llama, folder)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_disk_too_small_is_told_before_anything_is_written(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the disk is full: [\d,]+ bytes are missing"):
        run_convert(llama, tmp_path / "out")
    assert names_in(tmp_path) == set()


def test_a_disk_that_fills_up_keeps_what_is_whole(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch):
    fsync, calls = os.fsync, []

    def fill(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        with pytest.raises(UserError, match="the disk is full"):
            run_convert(llama, tmp_path / "out", max_shard_bytes=SHARD)
    kept = names_in(tmp_path / "out")
    assert "model-00001-of" in " ".join(kept) and not any(".tmp-" in name or name == "config.json" for name in kept)
    run_convert(llama, tmp_path / "out", max_shard_bytes=SHARD)
    check_model_folder(tmp_path / "out")


def test_the_verb_prints_json_alone_and_names_sizes(tmp_path: Path, llama: Path, cli: Callable):
    options = ("--max-shard-size", "0.06MB", "--no-check", "--json")
    done = cli("convert", "--model", llama, "--output", "out", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["stored"] == "float32" and result["logits"] is None and "--no-check" in done.stderr
    assert len(list((tmp_path / "out").glob("model-*"))) > 5
    done = cli("convert", "--model", llama, "--output", "more", "--max-shard-size", "many", cwd=tmp_path)
    assert done.returncode == 2 and "--max-shard-size many: expected a size such as 500MB" in done.stderr
    done = cli("convert", "--model", llama, "--output", "more", "--add-tokens", "<x>", "--to", "mlx", cwd=tmp_path)
    assert done.returncode == 2 and "--to: --add-tokens leaves the weights as they are" in done.stderr


def test_converting_a_gguf_imports_no_framework(tmp_path: Path):
    write_gguf(tmp_path / "model.gguf", tiny_llama())
    code = """
import sys
sys.argv = ["twintune", "convert", "--model", "model.gguf", "--output", "out"]
from common import cli
try: cli.main()
except SystemExit: pass
print({"torch", "transformers", "mlx"} & sys.modules.keys())
"""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("set()\n"), done.stderr


def test_a_source_that_no_engine_computes_is_converted_and_that_is_said(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments: object) -> None:
        raise UserError("it is too strange")

    monkeypatch.setattr("common.convert.convert.logits_of", refuse)
    shown = io.StringIO()
    result = run_convert(llama, tmp_path / "out", check=True, console=Console(file=shown, width=200))
    assert result["logits"] is None and "logits not compared: it is too strange" in shown.getvalue()
    check_model_folder(tmp_path / "out")


def test_a_model_beyond_free_memory_is_converted_without_its_logits(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("common.convert.logits.device_memory", lambda engine, device: SimpleNamespace(free_bytes=1000))
    shown = io.StringIO()
    result = run_convert(llama, tmp_path / "out", check=True, console=Console(file=shown, width=200))
    assert result["logits"] is None and "the model does not fit into free memory" in shown.getvalue()
