"""Training from Python and in notebooks: the same runs, files and errors as the command line's."""

import json
import os
import re
import signal
import sys
import types
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from rich.console import Console
from test_imports import loaded_after
from test_live import ROW

import common
from common import load_config, train
from common.errors import Interrupted, UserError
from common.view.live import make_reporter
from common.view.notebook import NotebookReporter

ROOT = Path(__file__).parent.parent
LINE = json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]})


@pytest.fixture
def engines(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """A folder with a config of five steps, and the engines in NumPy that runs in it have opened."""
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("train.jsonl").write_text(f"{LINE}\n" * 8)
    settings = {"model_name_or_path": str(tiny_model), "output_dir": "out", "save_steps": 2, "max_steps": 5}
    settings |= {"data": {"train": "train.jsonl"}, "lora": {"r": 2, "target_modules": ["proj"]}}
    Path("configs/quickstart.yaml").write_text(json.dumps(settings))
    opened: list[FakeEngine] = []

    def open_engine(name, config, directory, lora):
        opened.append(FakeEngine(config, vocabulary=416))
        return opened[-1]

    monkeypatch.setattr("common.inputs.open_engine", open_engine)
    return opened


def test_importing_the_package_loads_nothing_of_it():
    assert not loaded_after("import common") & {"numpy", "pydantic", "rich"}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = common.trian  # type: ignore[attr-defined]


def test_keys_are_changed_one_by_one_also_within_groups(engines):
    config = load_config("configs/quickstart.yaml", max_steps=3, lora={"r": 4}, data={"validation_split": 2})
    assert (config.max_steps, config.lora.r, config.lora.target_modules) == (3, 4, ("proj",))
    assert config.data.train == ("train.jsonl",) and config.data.validation_split == 2
    config = load_config("configs/quickstart.yaml", output_dir=Path("a"), data={"train": (Path("b"), "c")})
    assert config.output_dir == "a" and config.data.train == ("b", "c")


def test_what_is_wrong_with_the_changes_is_told_all_at_once(engines):
    with pytest.raises(UserError) as caught:
        load_config("configs/quickstart.yaml", max_stepz=3, lora={"r": 0}, data=None)
    assert sorted(str(caught.value).splitlines()) == [
        "load_config: lora.r: found 0; expected an integer of at least 1; write e.g. r: 16",
        "load_config: max_stepz: unknown key; did you mean max_steps?",
    ]


def test_a_run_gives_its_folder_losses_and_adapter_and_another_can_follow(engines, capsys):
    for number in (1, 2):
        config = load_config("configs/quickstart.yaml", output_dir=f"out{number}")
        run = train(config, quiet=True)
        assert run.run_dir == Path(f"out{number}") and (run.adapter / "adapter_model.safetensors").is_file()
        assert list(run.losses) == [1, 2, 3, 4, 5] and run.losses[5] < run.losses[1]
        assert run.eval_losses == {} and run.scores is None
    assert [engine.calls.count("close") for engine in engines] == [1, 1] and capsys.readouterr().out == ""


def test_validation_losses_and_scores_are_there_where_the_config_asks_for_them(engines):
    data = {"validation_split": 2, "test": "train.jsonl"}
    run = train(load_config("configs/quickstart.yaml", eval_strategy="steps", eval_steps=5, data=data), quiet=True)
    assert list(run.eval_losses) == [5] and run.scores is not None
    assert run.scores["adapter"]["loss"] < run.scores["base"]["loss"]


def test_ctrl_c_saves_frees_the_model_and_the_run_goes_on_with_resume(engines, monkeypatch):
    config, launch = load_config("configs/quickstart.yaml"), FakeEngine.train_step

    def interrupted(self, batch, rate):
        if batch.step == 3 and len(engines) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return launch(self, batch, rate)

    monkeypatch.setattr(FakeEngine, "train_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r'everything is saved. Continue with:\n  train\(config, resume="auto"\)'):
        train(config, quiet=True)
    assert signal.getsignal(signal.SIGINT) is before and engines[0].calls[-1] == "close"
    with pytest.raises(UserError, match="already holds this run"):
        train(config, quiet=True)
    assert list(train(config, resume="auto", quiet=True).losses) == [1, 2, 3, 4, 5]


def test_an_adapter_is_begun_from_by_the_config_alone(engines):
    run = train(load_config("configs/quickstart.yaml"), quiet=True)
    with pytest.raises(UserError, match="adapter_name_or_path"):
        train(load_config("configs/quickstart.yaml", output_dir="other"), resume=str(run.adapter))


def test_the_example_of_the_readme_runs(engines):
    (code,) = re.findall(r"```python\n(from common import .*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {}
    exec(code, names)
    assert names["run"].adapter.is_dir() and len(names["run"].losses) == names["config"].max_steps == 20


# ---- in a notebook


class Displayed(list):
    """Stand in for IPython.display: what is shown in place, one entry a drawing."""

    def display(self, shown, display_id):
        assert display_id is True
        self.append(shown)
        return types.SimpleNamespace(update=self.append)


def test_a_notebook_gets_the_terminals_two_lines_replaced_in_place(monkeypatch):
    shown = Displayed()
    module = types.ModuleType("IPython.display")
    module.HTML, module.display = str, shown.display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    console = Console(file=open(os.devnull, "w"), force_jupyter=False)  # noqa: SIM115
    console.is_jupyter = True
    reporter = make_reporter(console, None, lambda step: f"next save: step {step + 10}")
    assert isinstance(reporter, NotebookReporter)
    reporter.begin(39, 80)
    for step in range(40, 60):
        reporter.advance(step)
    console.is_jupyter = False  # lines would go to IPython, which isn't there
    reporter.row(ROW | {"step": 60})
    reporter.end()
    reporter.end()
    assert len(shown) == 3  # at the begin, once within a quarter of a second, at the end
    text = re.sub(r"<[^>]*>", "", shown[-1])
    assert "step 59/80" in text and "217 tok/s" in text and "next save: step 69" in text
    assert shown[-1].startswith("<pre") and "next save: step 49" in shown[0]


def test_a_real_notebook_shows_progress_and_messages(tmp_path, llama, cli_environment):
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"executes a notebook: pip install {package}")
    import nbformat
    from nbclient import NotebookClient

    (tmp_path / "train.jsonl").write_text(f"{LINE}\n" * 8)
    settings = {"model_name_or_path": str(llama), "engine": "torch", "device": "cpu", "max_steps": 3}
    (tmp_path / "c.json").write_text(json.dumps(settings | {"data": {"train": "train.jsonl"}}))
    cells = (
        "from common import load_config, train",
        "train(load_config('c.json', output_dir='out')).losses",
        "train(load_config('c.json', output_dir='out'))",
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=cli_environment)
    outputs = [cell.outputs for cell in notebook.cells]
    pages = [each.data["text/html"] for each in outputs[1] if "text/html" in each.get("data", {})]
    assert any("step 3/3" in re.sub(r"<[^>]*>", "", page) for page in pages)
    assert "ipywidgets" not in str(pages)  # which rich would ask for
    (error,) = outputs[2]
    assert error.traceback == [f"UserError: {error.evalue}"] and "already holds this run" in error.evalue
