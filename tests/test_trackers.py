"""`report_to`: TensorBoard's files are read back; the other packages are fakes here, which check only our calls.

Where wandb, trackio and mlflow were installed, in a scratch environment, the same run wrote to their local folders;
README.md says when. What a tracker does wrong must not reach a run: that is tested with trackers made to fail.
"""

import struct
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from patience import PATIENCE
from tiny_run import NoteReporter

from common.config import TrainConfig
from common.errors import MachineError, UserError
from common.view.trackers import TrackedRun, import_trackers, prefixed
from common.view.tracking import TrackedReporter

ROWS = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1, "peak_memory_bytes": 2000},
    {"step": 2, "epoch": 1.0, "loss": None, "learning_rate": 0.05, "eval_loss": 1.5, "loss_spike": True},
]


def tracked(folder: Path, first_step: int = 1) -> TrackedRun:
    return TrackedRun("mine", "abc123", folder, TrainConfig(run_name="mine").to_dict(), first_step)


def report(trackers, run: TrackedRun, rows=ROWS, patience: float = 10.0) -> NoteReporter:
    shown = NoteReporter()
    reporter = TrackedReporter(shown, trackers, run, patience)
    reporter.begin(run.first_step - 1, 10)
    for row in rows:
        reporter.row(row)
        reporter.advance(row["step"])
    reporter.end()
    reporter.end()
    return shown


# ---- TensorBoard, for real


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Read event files, oldest first: TFRecords (length, its CRC, data, its CRC) of protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.glob("events.*"), key=lambda each: each.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value if v.HasField("simple_value")}
            at += length + 16
    return found


def test_tensorboard_files_hold_every_figure_under_hugging_faces_names(tmp_path):
    report(import_trackers(["tensorboard"]), tracked(tmp_path))
    found = scalars(tmp_path / "runs")
    assert found == {
        ("train/epoch", 1): 0.5,
        ("train/loss", 1): 2.0,
        ("train/learning_rate", 1): pytest.approx(0.1),  # float32
        ("train/peak_memory_bytes", 1): 2000.0,
        ("train/epoch", 2): 1.0,
        ("train/learning_rate", 2): pytest.approx(0.05),
        ("train/loss_spike", 2): 1.0,
        ("eval/loss", 2): 1.5,
    }


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path):
    report(import_trackers(["tensorboard"]), tracked(tmp_path))
    time.sleep(1.1)  # whole seconds name the files
    report(import_trackers(["tensorboard"]), tracked(tmp_path, first_step=3), [{"step": 3, "loss": 1.0}])
    assert len(list((tmp_path / "runs").glob("events.*"))) == 2
    assert scalars(tmp_path / "runs")[("train/loss", 3)] == 1.0


# ---- our calls to packages that are not here


class Calls:
    """Note every call, with its arguments, on whatever name."""

    def __init__(self, noted: list, name: str, **answers: object) -> None:
        self._noted, self._name, self._answers = noted, name, answers

    def __getattr__(self, name: str):
        def call(*arguments, **named):
            self._noted.append((f"{self._name}.{name}", arguments, named))
            return self._answers.get(name)

        return call


def test_wandb_is_given_name_config_and_a_lasting_id(tmp_path, monkeypatch):
    calls: list = []
    fake = Calls(calls, "wandb", init=Calls(calls, "run"), login=True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    shown = report(import_trackers(["wandb"]), tracked(tmp_path))
    assert shown.lines == []
    assert [call[0] for call in calls] == ["wandb.login", "wandb.init", "run.log", "run.log", "run.finish"]
    assert calls[0][2] == {"prompt": False}  # nobody is asked in the middle of a run
    named = calls[1][2]
    assert (named["project"], named["name"], named["id"], named["resume"]) == ("ours", "mine", "abc123", "allow")
    assert named["config"]["lora"]["r"] == 16 and named["dir"] == str(tmp_path)
    assert calls[3][1:] == (
        ({"train/epoch": 1.0, "train/learning_rate": 0.05, "eval/loss": 1.5, "train/loss_spike": 1.0},),
        {"step": 2},
    )


def test_wandb_without_a_key_is_refused_before_anything_loads(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Calls([], "wandb", login=False))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="report_to: wandb: no API key found; log in with `wandb login`"):
        import_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert [tracker.name for tracker in import_trackers(["wandb"])] == ["wandb"]


def test_trackio_is_given_the_run_under_a_lasting_name(tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, "trackio", Calls(calls, "trackio", init=Calls(calls, "run")))
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    assert report(import_trackers(["trackio"]), tracked(tmp_path)).lines == []
    assert [call[0] for call in calls] == ["trackio.init", "run.log", "run.log", "run.finish"]
    assert calls[0][2]["name"] == "mine-abc123" and calls[0][2]["resume"] == "allow"
    assert calls[0][2]["project"] == "twintune"


@pytest.mark.parametrize("known", [False, True])
def test_mlflow_makes_a_run_once_and_finds_it_again(tmp_path, monkeypatch, known):
    calls: list = []
    run = SimpleNamespace(info=SimpleNamespace(run_id="r7"))
    experiment = SimpleNamespace(experiment_id="e1")
    answers = {"get_experiment_by_name": experiment if known else None, "create_experiment": "e1"}
    client = Calls(calls, "client", **answers, search_runs=[run] if known else [], create_run=run)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: client))
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    assert report(import_trackers(["mlflow"]), tracked(tmp_path)).lines == []
    names = [name for name, _, _ in calls]
    assert ("client.create_run" in names) is not known and ("client.log_param" in names) is not known
    assert ("client.log_metric", ("r7", "eval_loss", 1.5), {"step": 2}) in calls
    assert names[-1] == "client.set_terminated"
    parameters = {arguments[1]: arguments[2] for name, arguments, _ in calls if name == "client.log_param"}
    assert known or parameters["lora.r"] == "16"


def test_a_missing_package_is_one_message_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # which an import takes for missing
    with pytest.raises(MachineError, match=r"report_to: mlflow: .* install it with: pip install mlflow"):
        import_trackers(["tensorboard", "mlflow"])


def test_nothing_is_imported_that_is_not_asked_for():
    assert import_trackers([]) == []
    assert prefixed({"loss": 1.0, "eval_loss": 2.0}) == {"train/loss": 1.0, "eval/loss": 2.0}


# ---- trackers that fail


class Failing:
    """Fail where a test wants it, and note what arrives."""

    name = "failing"

    def __init__(self, at: str, hangs: threading.Event | None = None) -> None:
        self._at, self._hangs, self.arrived = at, hangs, []

    def start(self, run: TrackedRun) -> None:
        self._maybe("start")

    def log(self, step: int, values) -> None:
        self._maybe(f"log {step}")
        self.arrived.append(step)

    def finish(self) -> None:
        self._maybe("finish")

    def _maybe(self, where: str) -> None:
        if where == self._at:
            if self._hangs:
                self._hangs.wait(2 * PATIENCE)
            raise ConnectionError("no route to host\nand much more")


@pytest.mark.parametrize(
    ("at", "arrived", "trouble"),
    [
        ("start", [], "can't be started (ConnectionError: no route to host)"),
        ("log 1", [2], "takes no metrics (ConnectionError: no route to host)"),
        ("finish", [1, 2], "takes no metrics (ConnectionError: no route to host)"),
    ],
)
def test_a_tracker_that_fails_warns_once_and_the_others_go_on(tmp_path, at, arrived, trouble):
    failing, good = Failing(at), Failing("never")
    shown = report([failing, good], tracked(tmp_path))
    assert shown.lines == [f"report_to: failing: {trouble}; training goes on, metrics.jsonl has everything"]
    assert shown.rows == ROWS and shown.steps == [1, 2]
    assert failing.arrived == arrived and good.arrived == [1, 2]


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end(tmp_path):
    release = threading.Event()
    began = time.monotonic()
    shown = report([Failing("log 1", release)], tracked(tmp_path), patience=0.2)
    assert time.monotonic() - began < PATIENCE
    assert shown.rows == ROWS and "is still sending; about 2 rows" in shown.lines[0]
    release.set()
