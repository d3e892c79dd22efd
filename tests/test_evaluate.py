"""Scores of a model on held-out examples: the loss exactly, the answers as they are judged."""

import math

import numpy as np
import pytest
from fake_engine import A, B, FakeEngine
from tiny_tokenizer import CHATML_TOOLS, LLAMA3, write_tokenizer

from common.config import EvaluationConfig, TrainConfig
from common.data.chat import ChatTokenizer
from common.data.records import Example
from common.data.tokens import build_dataset
from common.engine import TrainState
from common.evaluate.metrics import make_metrics
from common.evaluate.questions import Question, make_questions
from common.evaluate.scores import HeldOut, evaluate, generate_answers
from common.initial import initial_weights
from common.trainer import mean_loss, total_loss

QUESTION = {"role": "user", "content": "What is the answer?"}
ANSWER = {"role": "assistant", "content": "Yes."}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, CHATML_TOOLS)
    return ChatTokenizer(folder)


def engine_of(vocabulary: int, **evaluation) -> FakeEngine:
    config = TrainConfig(evaluation=EvaluationConfig(**evaluation))
    engine = FakeEngine(config, vocabulary=vocabulary)
    engine.load_state(TrainState.fresh(initial_weights(engine.adapter_shapes(), 0)))
    return engine


def asked(questions: list[Question], *metrics: str, data=None) -> HeldOut:
    return HeldOut(data, questions, make_metrics(metrics, questions))


def examples(count: int):
    random = np.random.default_rng(3)
    lengths = random.integers(2, 12, count)
    rows = [(random.integers(1, 16, n).tolist(), [False, *(random.random(n - 1) < 0.7).tolist()]) for n in lengths]
    for _, mask in rows:
        mask[-1] = True
    return build_dataset([(ids, mask, f"x:{number}") for number, (ids, mask) in enumerate(rows)])


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_loss_is_that_of_every_supervised_token_whatever_the_batches(batch_size):
    engine, data = engine_of(16), examples(20)
    weights = engine.read_state().weights
    tokens, targets = [], []
    for row in range(len(data)):
        supervised = np.flatnonzero(data.mask(row)[1:])
        tokens += data.tokens(row)[supervised].tolist()
        targets += data.tokens(row)[supervised + 1].tolist()
    x = engine._embedding[tokens]
    logits = x @ engine._base.T + 2 * (x @ weights[A].T) @ weights[B].T
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]
    loss_sum, count = total_loss(engine, data, batch_size)
    assert count == len(targets)
    assert loss_sum == pytest.approx(losses.sum(), rel=1e-12)  # float64, summed in another order
    assert mean_loss(engine, data, batch_size) == loss_sum / count


def test_one_evaluation_batch_is_under_way_while_the_last_is_fetched():
    engine = engine_of(16)
    engine.calls.clear()
    total_loss(engine, examples(6), batch_size=2)
    assert engine.calls == ["eval", "eval", "fetch eval", "eval", "fetch eval", "fetch eval"]


def test_questions_are_the_conversation_before_the_last_answer(tokenizer):
    earlier = ({**QUESTION, "content": "First?"}, {**ANSWER, "content": "One."})
    example = Example("x:1", messages=(*earlier, QUESTION, ANSWER, QUESTION))
    (question,) = make_questions([example], tokenizer)
    assert (question.shown, question.expected) == ("What is the answer?", "Yes.")
    assert tokenizer.decode(question.prompt_ids, skip_special=False) == (
        "<|im_start|>user\nFirst?<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>\n"
        "<|im_start|>user\nWhat is the answer?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tools_are_part_of_a_question(tokenizer):
    example = Example("x:1", messages=(QUESTION, ANSWER), tools=({"name": "clock"},))
    (question,) = make_questions([example], tokenizer)
    assert '{"name": "clock"}' in tokenizer.decode(question.prompt_ids)


def test_prompts_are_questions_and_plain_text_is_none(tokenizer):
    examples = [Example("x:1", text="a"), Example("x:2", prompt="b", completion="c"), Example("x:3", completion="d")]
    assert make_questions(examples, tokenizer) == [Question("b", tuple(tokenizer.text_ids("b")), "c", "x:2")]


def test_a_prompt_begins_with_the_bos_that_training_had(tmp_path):
    write_tokenizer(tmp_path, LLAMA3, eos="<|eot_id|>", adds_bos=True)
    ours = ChatTokenizer(tmp_path)
    for example in (Example("x:1", prompt="b", completion="c"), Example("x:2", messages=(QUESTION, ANSWER))):
        (question,) = make_questions([example], ours)
        trained = ours.encode(example, "assistant")
        assert list(question.prompt_ids) == trained.token_ids[: trained.loss_mask.index(True)]


def test_answers_come_back_in_the_order_of_the_questions(tokenizer):
    engine = engine_of(tokenizer.vocabulary_size, max_new_tokens=5, batch_size=2)
    texts = ["Hello there, how are you?", "a", "The weather is good", "The answer", "yes"]
    questions = [Question(text, tuple(tokenizer.text_ids(text)), "") for text in texts]
    told: list[int] = []
    together = generate_answers(engine, engine.config, questions, tokenizer, told.append)
    alone = [generate_answers(engine, engine.config, [q], tokenizer, lambda n: None)[0] for q in questions]
    assert together == alone and len(set(alone)) > 1
    assert told == [2, 4, 5]


DATA = build_dataset([([1, 2, 3], [False, True, True], "x:1")])


@pytest.mark.parametrize(("metrics", "samples", "expected"), [((), 2, 2), ((), 0, 0), (("valid_json",), 1, 3)])
def test_answers_are_generated_for_what_is_measured_or_shown(tokenizer, metrics, samples, expected):
    engine = engine_of(tokenizer.vocabulary_size, samples=samples, max_new_tokens=3)
    test = asked([Question("a", tuple(tokenizer.text_ids("a")), "{}")] * 3, *metrics, data=DATA)
    result = evaluate(engine, engine.config, test, tokenizer, lambda n: None)
    assert len(result.answers) == expected
    assert result.scores.get("num_examples") == (3 if metrics else None)
    assert set(metrics) <= result.scores.keys()


def test_perplexity_is_the_exponential_of_the_loss(tokenizer):
    engine = engine_of(tokenizer.vocabulary_size)
    scores = evaluate(engine, engine.config, asked([], data=DATA), tokenizer, lambda n: None).scores
    assert scores == {
        "loss": mean_loss(engine, DATA, 8),
        "perplexity": math.exp(mean_loss(engine, DATA, 8)),
        "num_loss_tokens": 2,
    }


def test_a_score_is_the_share_of_right_answers(tokenizer, monkeypatch):
    engine = engine_of(tokenizer.vocabulary_size)
    answers = ['{"a": 1}', '{"a": 1, "b": 2}', "a", "[]"]
    monkeypatch.setattr("common.evaluate.scores.generate_answers", lambda *_: answers)
    test = asked([Question("", (1,), '{"a": 1}')] * 4, "exact_match", "json_field:a", "valid_json")
    result = evaluate(engine, engine.config, test, tokenizer, lambda n: None)
    scores = result.scores
    assert (scores["exact_match"], scores["json_field:a"], scores["valid_json"]) == (0.25, 0.5, 0.75)
    assert [each["exact_match"] for each in result.judgements] == [(True, 1), (False, 1), (False, 1), (False, 1)]
