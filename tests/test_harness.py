"""lm-evaluation-harness asks our engines: the same answers as from its own `hf` model, base beside adapter."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engines import ENGINES, open_fresh

from common.config import EvaluationConfig, TrainConfig
from common.data.chat import ChatTokenizer
from common.errors import UserError
from common.evaluate.engine_model import EngineModel
from common.evaluate.harness import make_model
from common.sampling import Sampling

PAIRS = [
    ("Hello there, how are", " you?"),
    ("Hello there, how are", " they"),
    ("The weather is  ", "good"),  # white space at the end of a context
    ("", "Yes."),
    ("What is the answer?", " The answer is yes. " * 3),
]
LONG = " ".join(["The weather is good and the answer is yes."] * 40)
QUESTIONS = [
    {"question": "Hello there, how are", "choices": [" you?", " they", " the weather"], "gold": 0},
    {"question": "The weather is", "choices": [" good", " yes", " the answer"], "gold": 1},
    {"question": "What is the", "choices": [" answer?", " weather", " hello"], "gold": 2},
]
CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWERS = """
task: answers
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module", params=ENGINES)
def model(request: pytest.FixtureRequest, tiny_model: Path) -> EngineModel:
    engine = open_fresh(request.param, tiny_model)
    return EngineModel(engine, TrainConfig(per_device_eval_batch_size=2), ChatTokenizer(tiny_model))


def reference(model: EngineModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Score one continuation from the logits of its own row, token by token."""
    ids = [*context, *continuation]
    logits = model._engine.logits(np.array([ids]))[0].astype(np.float64)
    rows = logits[len(context) - 1 : -1]
    normalisers = np.log(np.exp(rows).sum(axis=-1))  # of small logits
    chosen = rows[np.arange(len(continuation)), continuation] - normalisers
    return chosen.sum(), rows.argmax(axis=-1).tolist() == continuation


def test_log_likelihoods_are_those_of_each_continuation_by_itself(model):
    ours = model.loglikelihood(requests(*PAIRS))
    for (context, continuation), (value, greedy) in zip(PAIRS, ours, strict=True):
        tokenize = model._tokenizer.text_ids
        tokens = tokenize(context.rstrip()) if context else [model._start]
        whole = tokenize(context + continuation) if context else tokens + tokenize(continuation)
        expected = reference(model, tokens, whole[len(tokens) :])
        assert (value, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1])  # padded rows, float32


def test_a_greedy_continuation_is_known_as_such(model):
    (answer,) = model.generate_until(requests(("Hello there", {"max_gen_toks": 4})))
    ids = model._tokenizer.text_ids("Hello there")
    tokens = [token for _, token in model._engine.generate([ids], Sampling(4))]
    ((_, greedy), (_, other)) = model._loglikelihoods([(ids, tokens), (ids, [*tokens[:-1], tokens[-1] ^ 1])])
    assert greedy and not other and answer == model._tokenizer.decode(tokens)


def test_a_long_text_is_seen_window_by_window_each_token_predicted_once(model, monkeypatch):
    monkeypatch.setattr(model, "_longest", 16)
    ids = model._tokenizer.text_ids(LONG)[:50]
    windows = list(model._windows(ids))
    assert [token for _, part in windows for token in part] == ids
    assert all(len(context) + len(part) <= 17 for context, part in windows)
    assert [len(context) for context, _ in windows] == [1, 1, 1, 15]  # the last sees as much as fits
    (value,) = model.loglikelihood_rolling(requests((LONG,)))
    windows = model._windows(model._tokenizer.text_ids(LONG))
    parts = [reference(model, list(context), list(part))[0] for context, part in windows]
    assert value == pytest.approx(sum(parts), rel=1e-5)
    assert model.loglikelihood_rolling(requests(("",))) == [0.0]


def test_answers_end_where_the_task_says_and_come_back_in_order(model):
    whole = model.generate_until(requests(*((text, {"max_gen_toks": 12}) for text, _ in PAIRS if text)))
    until = whole[0][3:5]
    cut = model.generate_until(
        requests(*((text, {"until": [until], "max_gen_toks": 12, "do_sample": False}) for text, _ in PAIRS if text))
    )
    assert cut == [text.partition(until)[0] for text in whole] and len(set(whole)) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_beams": 4}, "a task sets num_beams"), ({"max_gen_toks": 99_999}, "wants 99999 new tokens of a model")],
)
def test_what_can_not_be_honoured_is_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        model.generate_until(requests(("Hello", options)))


def test_the_chat_template_is_the_models_and_goes_on_with_an_answer_that_has_begun(model):
    history = [{"role": "user", "content": "Hello"}]
    asked = model.apply_chat_template(history)
    assert asked == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    begun = [*history, {"role": "assistant", "content": "The answer "}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == f"{asked}The answer"
    assert model.chat_template(True) == model.tokenizer_name != model.chat_template(False)


# The harness itself, where it is installed


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pytest.importorskip("lm_eval", reason="pip install 'twintune[lm-eval]'")
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, text in (("choices", CHOICES), ("answers", ANSWERS)):
        (folder / f"{name}.yaml").write_text(text.replace("QUESTIONS", str(folder / "questions.jsonl")))
    return [str(folder / "choices.yaml"), str(folder / "answers.yaml")]


def test_answers_are_those_of_the_harness_own_model(tasks, tiny_model, model):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    theirs = huggingface.HFLM(pretrained=str(tiny_model), device="cpu", dtype="float32", batch_size=2)
    ours = make_model(model._engine, TrainConfig(evaluation=EvaluationConfig(batch_size=2)), model._tokenizer)

    def ask(kind: str, *arguments: tuple) -> list[list]:
        asked = [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]
        return [getattr(one, kind)(asked) for one in (ours, theirs)]

    found, expected = ask("loglikelihood", *PAIRS)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    # Sums of up to 15 float32 log-probabilities, from two implementations of the same model.
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], atol=2e-4)
    found, expected = ask("loglikelihood_rolling", (LONG,), ("Yes.",))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    found, expected = ask("generate_until", *((text, {"until": ["e"], "max_gen_toks": 8}) for text, _ in PAIRS[:3]))
    assert found == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_tasks_are_scored_for_base_and_adapter(tasks, engine, tiny_model, tmp_path, cli_environment):
    from made_adapters import peft_model

    peft_model(tiny_model).save_pretrained(tmp_path / "adapter")
    (tmp_path / "config.json").write_text(json.dumps({"model_name_or_path": str(tiny_model), "device": "cpu"}))
    command = [sys.executable, "-m", "common.cli", "evaluate", "-c", "config.json", "--adapter", "adapter"]
    command += ["--engine", engine, "--lm-eval", ",".join(tasks), "--limit", "2", "--json"]
    command += ["--apply-chat-template"] if engine == "mlx" else []
    done = subprocess.run(command, cwd=tmp_path, env=cli_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores.keys() == {"base", "adapter"}
    for each in scores.values():
        assert each["choices"].keys() == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
        assert each["answers"].keys() == {"exact_match", "exact_match_stderr"}
    assert "lm-evaluation-harness" in done.stderr and "Traceback" not in done.stderr
