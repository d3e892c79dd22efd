"""`twintune doctor`: what it says of real conditions, made here, and of models that the engines agree on or don't."""

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patience import PATIENCE
from safetensors.numpy import load_file
from tiny_models import EXPERTS, WINDOW, write_family, write_llama

from common.doctor import agreement, machine, selftest
from common.doctor.agreement import examine_model
from common.doctor.finding import Finding
from common.doctor.packages import examine_packages
from common.doctor.selftest import self_test
from common.doctor.shorten import layers_to_keep, write_shortened
from common.engine import examine_engine
from common.errors import MachineError

PMSET = "Note: No thermal warning level has been recorded\n\tCPU_Scheduler_Limit = 100\n\tCPU_Speed_Limit \t= 62\n"


@pytest.fixture
def without(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Give the environment of a Python in which some packages can't be imported, as if never installed."""

    def environment(*packages: str) -> dict[str, str]:
        lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in packages)]
        (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
        return {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent}", "HF_HUB_OFFLINE": "1"}

    return environment


@pytest.fixture
def hub_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, float], str]]:
    """Start a hub that answers with a status after some seconds."""
    servers = []

    def start(status: int, seconds: float) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                time.sleep(seconds)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{servers[-1].server_port}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return endpoint

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def lines_of(printed: str) -> dict[str, dict[str, str]]:
    return {line["what"]: line for line in map(json.loads, printed.splitlines())}


def test_both_engines_are_ready_here_and_every_line_is_a_json_object(cli, tmp_path, without):
    done = cli("doctor", "--json", cwd=tmp_path, env=without())
    assert done.returncode == 0, done.stderr
    lines = lines_of(done.stdout)
    assert {
        "system",
        "chip",
        "memory",
        "disk here",
        "Hub",
        "mlx device",
        "torch device",
        "bitsandbytes",
    } <= lines.keys()
    assert lines["ready to train"]["found"].startswith("with mlx and torch")
    assert lines["Hub"]["state"] == "warning"  # offline was asked for
    assert all(line["state"] in ("ok", "warning", "wrong") for line in lines.values())
    assert all(line["fix"] for line in lines.values() if line["state"] != "ok")


def test_a_mac_with_mlx_alone_is_ready(cli, tmp_path, without):
    done = cli("doctor", cwd=tmp_path, env=without("torch", "peft", "bitsandbytes"))
    assert done.returncode == 0, done.stderr
    assert "ready to train: with mlx; engine: auto takes mlx" in done.stdout
    assert "torch: not installed" in done.stdout


def test_without_any_engine_nothing_trains_and_the_exit_code_says_so(cli, tmp_path, without):
    done = cli("doctor", cwd=tmp_path, env=without("torch", "mlx"))
    assert done.returncode == 3
    assert "pip install 'twintune[mlx]'" in done.stdout
    assert "nothing can train here" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_computes_something_else_is_wrong(monkeypatch):
    assert [each.state for each in self_test(["mlx", "torch"])] == ["ok", "ok"]
    monkeypatch.setattr(selftest, "EXPECTED", tuple(each * 1.001 for each in selftest.EXPECTED))
    (found,) = self_test(["torch"])
    assert found.state == "wrong"
    assert "1e-03" in found.found


def test_an_engine_that_breaks_is_a_line_and_no_traceback(monkeypatch):
    monkeypatch.setitem(selftest.CONFIG, "num_key_value_heads", 3)
    states = {each.what: each for each in self_test(["mlx", "torch"])}
    assert states["mlx self-test"].state == states["torch self-test"].state == "wrong"


def test_a_hub_that_answers_even_with_an_error_is_reachable(hub_of):
    for status in (200, 404):
        endpoint = hub_of(status, 0)
        assert machine.hub().state == "ok"
        assert endpoint in machine.hub().found


def test_a_hub_that_hangs_or_is_not_there_costs_little_time(hub_of, monkeypatch):
    hub_of(200, PATIENCE)
    began = time.monotonic()
    assert machine.hub(seconds=0.3).state == "warning"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused = machine.hub()
    assert refused.state == "warning" and "HTTPS_PROXY" in refused.fix
    assert time.monotonic() - began < PATIENCE


def test_little_room_and_little_memory_are_said(monkeypatch, tmp_path):
    missing = tmp_path / "not" / "yet" / "there"
    assert machine.disk(missing, "disk").found.endswith(str(tmp_path))
    monkeypatch.setattr(machine, "LITTLE_DISK", 1e18)
    assert machine.disk(missing, "disk").state == "warning"
    monkeypatch.setattr(machine, "NO_DISK", 1e18)
    assert machine.disk(missing, "disk").state == "wrong"
    monkeypatch.setattr(machine, "LITTLE_MEMORY", 1e18)
    assert machine.memory().state == "warning"


def test_a_slowed_mac_is_told_from_a_cool_one():
    assert machine.speed_limit(PMSET) == 62
    assert machine.speed_limit("Note: No thermal warning level has been recorded\n") == 100


def test_versions_too_old_are_named_with_what_to_install(tmp_path, monkeypatch):
    info = tmp_path / "twintune-9.9.dist-info"
    info.mkdir()
    needs = [f"Requires-Dist: {each}; extra == 'mlx'" for each in ("mlx>=99", "mlx-lm>=0.1", "no-such-package>=2")]
    text = "\n".join(["Metadata-Version: 2.1", "Name: twintune", "Version: 9.9", "Provides-Extra: mlx", *needs])
    (info / "METADATA").write_text(text + "\nRequires-Dist: numpy>=1\n")
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = examine_packages("mlx", needed=True)
    assert found.state == "wrong"
    assert found.fix == "pip install -U 'mlx>=99' 'no-such-package>=2'"
    assert "no-such-package missing" in found.found


def test_a_linux_without_a_compiler_is_warned(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = next(each for each in examine_engine("mlx") if each.what == "mlx compiler")
    assert compiler.state == "warning"
    assert "apt install g++" in compiler.fix


def test_broken_kernels_of_bitsandbytes_are_seen(monkeypatch):
    import bitsandbytes.functional as kernels

    found = next(each for each in examine_engine("torch") if each.what == "bitsandbytes")
    assert found.state == "ok"
    monkeypatch.setattr(kernels, "dequantize_4bit", lambda packed, state: 0 * state.code.new_zeros(64, 64))
    found = next(each for each in examine_engine("torch") if each.what == "bitsandbytes")
    assert found.state == "wrong"


SHORTENED = ["llama-scaled", "mistral", "qwen2_moe", "qwen3_5", "gemma2", "gemma3", "phi3", "smollm3", "gpt_oss"]


@pytest.mark.parametrize("name", SHORTENED)
def test_engines_agree_on_the_first_layers_of_what_the_readme_lists(name, tmp_path, monkeypatch):
    model = write_family(tmp_path, name, num_hidden_layers=8)
    monkeypatch.setattr(agreement, "write_shortened", lambda model, target: write_shortened(model, target, large=0))
    compared, verdict = examine_model(model)
    assert compared.found.startswith("the first ")
    assert verdict.state == "ok", verdict.found
    assert "both engines compute the same" in verdict.found


def test_a_model_that_the_engines_run_differently_is_told_with_the_figure(tmp_path):
    # mlx-lm computes Gemma 1's activation exactly, transformers by its tanh approximation.
    *_, verdict = examine_model(write_family(tmp_path, "gemma"))
    assert verdict.state == "wrong"
    assert "the engines differ on this model: logits differ by" in verdict.found


def test_a_model_whose_linear_modules_differ_is_told(tmp_path):
    # Its router holds a linear module in transformers, to which all-linear gives an adapter.
    *_, verdict = examine_model(write_family(tmp_path, "granitemoe", hidden_size=64, num_local_experts=6))
    assert verdict.state == "wrong"
    assert "router.layer" in verdict.found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # PEFT's own, about the same
def test_a_mixture_whose_modules_peft_takes_for_its_experts_is_told(tmp_path):
    findings = list(examine_model(write_family(tmp_path, "deepseek_v3", **EXPERTS)))
    refused = next(each for each in findings if each.what == "torch")
    assert "in deepseek_v3 PEFT makes other tensors of them" in refused.found


def test_a_model_that_one_engine_refuses_is_told_with_the_reason_and_the_exit_code(cli, tmp_path):
    write_family(tmp_path, "llama", hidden_act="gelu")
    done = cli("doctor", "--model", tmp_path, "--json", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    lines = lines_of(done.stdout)
    assert "hidden_act: 'gelu'" in lines["mlx"]["found"]
    assert str(tmp_path / "config.json") in lines["mlx"]["found"]
    assert "do not agree" in done.stderr


def test_a_model_too_large_for_this_memory_is_refused_with_the_figures(llama, monkeypatch):
    monkeypatch.setattr(agreement, "BYTES_A_WEIGHT", 10**12)
    with pytest.raises(MachineError, match="GB of memory"):
        list(examine_model(llama))


def test_without_both_engines_no_model_can_be_compared(cli, llama, tmp_path, without):
    done = cli("doctor", "--model", llama, cwd=tmp_path, env=without("mlx"))
    assert done.returncode == 3
    assert "mlx is not installed" in done.stderr


def test_shortening_keeps_the_first_layers_byte_for_byte(tmp_path):
    model, target = tmp_path / "model", tmp_path / "short"
    target.mkdir()
    write_family(model, "gemma3_text", num_hidden_layers=6, sliding_window=64)
    assert write_shortened(model, target, large=0) == "the first 2 of its 6 layers"
    whole, kept = (load_file(folder / "model.safetensors") for folder in (model, target))
    expected = [name for name in whole if not any(f"layers.{number}." in name for number in range(2, 6))]
    assert sorted(kept) == sorted(expected)
    assert all((kept[name] == whole[name]).all() for name in kept)
    config = json.loads((target / "config.json").read_text())
    assert config["num_hidden_layers"] == len(config["layer_types"]) == 2
    assert config["sliding_window"] == WINDOW


def test_a_small_model_and_one_whose_layers_are_not_numbered_stay_whole(tmp_path, llama):
    target = tmp_path / "short"
    target.mkdir()
    assert write_shortened(llama, target) == "the whole model"
    assert (target / "model.safetensors").samefile(llama / "model.safetensors")
    odd = write_llama(tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text()) | {"num_hidden_layers": 5}
    (odd / "config.json").write_text(json.dumps(config))
    (tmp_path / "again").mkdir()
    assert write_shortened(odd, tmp_path / "again", large=0) == "the whole model"


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({}, 2),
        ({"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}, 6),
        ({"full_attention_interval": 4}, 4),
        ({"first_k_dense_replace": 3}, 4),
    ],
)
def test_one_layer_of_each_kind_is_kept(config, kept):
    assert layers_to_keep(config) == kept


def test_findings_are_plain_lines_for_people(cli, tmp_path, without):
    done = cli("doctor", cwd=tmp_path, env=without("torch", "mlx"))
    assert any(line.startswith("wrong   mlx: not installed; install it with") for line in done.stdout.splitlines())
    assert Finding("ok", "a", "b").fix == ""
