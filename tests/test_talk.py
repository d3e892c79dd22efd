"""Talking: who answers, what is remembered, and a person's keys in a real terminal, with the engine in NumPy."""

import ctypes.util
import fcntl
import itertools
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from fake_engine import FakeEngine
from fake_files import LORA, WEIGHTS, write_base, write_tuned
from patience import PATIENCE

from common.config import LoraConfig, TrainConfig
from common.data.chat import ChatTokenizer
from common.engine import TrainState
from common.errors import UserError
from common.sampling import Sampling
from common.talk.conversation import Conversation
from common.talk.speaker import Answer, Speaker


def speaker(folder: Path, lora: LoraConfig | None = LORA, **config: object) -> Speaker:
    made = Speaker(
        FakeEngine(TrainConfig(lora=LORA), vocabulary=416), ChatTokenizer(write_base(folder, **config)), lora
    )
    made.take_adapter(TrainState.fresh(WEIGHTS)) if lora else made.engine.load_state(TrainState.fresh(zeros()))
    return made


def zeros() -> dict[str, np.ndarray]:
    return {key: np.zeros_like(value) for key, value in WEIGHTS.items()}


def said(one: Speaker, sampling: Sampling | None = None) -> str:
    written: list[str] = []
    answer = one.answer([5, 6], sampling or Sampling(12), written.append)
    assert "".join(written) == answer.text and answer.num_tokens <= 12
    return answer.text


def test_base_and_adapter_take_turns_with_one_model(tmp_path):
    one = speaker(tmp_path)
    tuned = said(one)
    one.become("base")
    plain = said(one)
    assert one.who == "base" and plain != tuned
    one.become("adapter")
    assert said(one) == tuned
    one.engine.load_state(TrainState.fresh(zeros()))
    assert said(one) == plain  # the base's answer is that of an adapter that changes nothing


def test_without_an_adapter_there_is_nobody_else(tmp_path):
    one = speaker(tmp_path, lora=None)
    with pytest.raises(UserError, match="no adapter to switch to; start with --adapter"):
        one.become("adapter")
    assert one.who == "base"


def test_an_answer_can_be_stopped_and_counts_what_there_is(tmp_path):
    one, asked = speaker(tmp_path), itertools.count(1)
    answer = one.answer([5, 6], Sampling(50), lambda text: None, lambda: next(asked) == 3)
    assert answer.num_tokens == 3 and answer.tokens_per_second > 0
    assert re.fullmatch(r"\(3 tokens, [\d,.]+ tokens/s\)", answer.speed)


def test_an_answer_ends_where_the_model_can_look_back_no_further(tmp_path):
    one = speaker(tmp_path, max_position_embeddings=8)
    assert one.answer([5] * 5, Sampling(50, stop_ids=frozenset()), lambda text: None).num_tokens <= 3
    with pytest.raises(UserError, match="that makes 8 tokens; the model looks back on 8 at most"):
        one.answer([5] * 8, Sampling(50), lambda text: None)


def talked(folder: Path, context: int, questions: list[str], system: str | None = None) -> tuple[Conversation, list]:
    talk = Conversation(speaker(folder, max_position_embeddings=context), system, Sampling(16))
    seen = []
    for text in questions:
        ids, forgotten = talk.ask(text)
        seen.append((talk._speaker.tokenizer.decode(ids, skip_special=False), forgotten))
        talk.answered(Answer(f"answer to {text}", 3, 1.0))
    return talk, seen


def test_a_conversation_is_told_whole_with_its_system_prompt(tmp_path):
    _, seen = talked(tmp_path, 4096, ["one", "two"], system="Be brief.")
    assert seen[1] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\nanswer to one<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n",
        0,
    )


def test_the_oldest_questions_are_forgotten_where_there_is_no_room_for_an_answer(tmp_path):
    talk, seen = talked(tmp_path, 128, ["one", "two", "three", "four", "five"], system="Be brief.")
    lengths = [len(talk._speaker.tokenizer._tokenize(text).ids) for text, _ in seen]
    assert max(lengths) <= 128 - 16
    assert sum(forgotten for _, forgotten in seen) > 0 and seen[0][1] == 0
    last = seen[-1][0]
    assert last.startswith("<|im_start|>system\nBe brief.") and "answer to four" in last and "user\none" not in last
    assert all(text.count("<|im_start|>user") == text.count("<|im_start|>assistant") for text, _ in seen)


def test_a_question_that_is_too_long_by_itself_is_not_taken_up(tmp_path):
    talk, _ = talked(tmp_path, 128, ["one"])
    with pytest.raises(UserError, match=r"the model looks back on 128, of which 16 are kept for the answer; say less"):
        talk.ask("the answer is " * 60)
    assert talk.question == "one"


def test_the_last_question_can_be_taken_back_and_everything_be_forgotten(tmp_path):
    talk, _ = talked(tmp_path, 4096, ["one", "two"])
    assert talk.take_back() == "two" and talk.question == "one"
    assert talk.take_back() == "one" and talk.take_back() is None
    talk.ask("three")
    talk.drop_unanswered()
    talk.drop_unanswered()
    assert talk.question is None
    talk.ask("four")
    talk.clear()
    assert talk.question is None


def test_every_answer_draws_anew_and_the_first_by_the_seed_given(tmp_path):
    talk = Conversation(speaker(tmp_path), None, Sampling(4, temperature=1.0, seed=7))
    assert [talk.next_sampling().seed for _ in range(3)] == [7, 8, 9]


# In processes of their own


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that answers and an adapter of it."""
    folder = tmp_path_factory.mktemp("talk")
    (folder / "base").mkdir()
    write_tuned(folder / "adapter", write_base(folder / "base"))
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).parent / "fake_run.py"), *arguments]


@pytest.fixture
def run(place: Path, cli_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def start(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        options = {"cwd": place, "env": cli_environment, "capture_output": True, "text": True, "timeout": 60}
        return subprocess.run(command(*arguments), input=stdin, check=False, **options)

    return start


def test_lines_from_a_program_are_answered_on_stdout_alone(run):
    options = ["--adapter", "adapter", "--engine", "torch", "--max-new-tokens", "6"]
    done = run("chat", *options, stdin="Hello\n\n/base\nHello\n/clear\n/adapter\nHello\n/nosuch\n/system Be brief.\n")
    assert done.returncode == 0, done.stderr
    once = run("generate", *options, "--prompt", "Hello").stdout
    first, second, third = done.stdout.splitlines()
    assert first == third == once.strip("\n") and second != first
    assert done.stderr.count("tokens/s)") == 3 and "(no command /nosuch; /help lists them)" in done.stderr
    assert "(system prompt: Be brief.)" in done.stderr


def test_sampling_options_are_the_same_for_both_and_reach_the_engine(run):
    options = ["--adapter", "adapter", "--engine", "torch", "--max-new-tokens", "9", "--temperature", "1.5"]
    plain = run("chat", *options, "--seed", "3", stdin="Hello\n/retry\n").stdout
    first, again = plain.splitlines()
    assert run("generate", *options, "--seed", "4", "--prompt", "Hello").stdout.splitlines() == [again] != [first]
    greedy = run("generate", *options[:-2], "--prompt", "Hello").stdout
    assert run("generate", *options, "--min-p", "1", "--prompt", "Hello").stdout == greedy
    assert run("generate", *options[:-2], "--repetition-penalty", "5", "--prompt", "Hello").stdout != greedy


def test_a_base_without_a_template_can_not_chat(run, place):
    (place / "plain").mkdir()
    write_base(place / "plain")
    (place / "plain" / "chat_template.jinja").unlink()
    done = run("chat", "--model", "plain", "--engine", "torch", stdin="Hello\n")
    assert done.returncode == 2 and "no chat template, so it can't chat" in done.stderr


def _as_in_a_terminal() -> None:
    """Take the pseudo-terminal, and Ctrl-C too, which what a shell runs in the background ignores."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Person:
    """Type at a pseudo-terminal and read what stands there."""

    def __init__(self, program: list[str], place: Path, environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        environment = {key: value for key, value in environment.items() if key not in ("NO_COLOR", "COLUMNS")}
        environment |= {"TERM": "xterm-256color", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            program,
            cwd=place,
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_as_in_a_terminal,
        )
        os.close(slave)
        self._unread = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def interrupt_typing(self) -> None:
        """Press Ctrl-C once the program waits for keys: one that comes just before it does, readline forgets."""
        while psutil.Process(self.process.pid).status() == psutil.STATUS_RUNNING:
            time.sleep(0.01)
        self.type("\x03")

    def read_until(self, pattern: str, seconds: float = PATIENCE) -> str:
        """Return what appears up to the end of a pattern; what comes after it waits for the next reading."""
        began = time.monotonic()
        while not (found := re.search(pattern, self._unread, re.DOTALL)):
            assert time.monotonic() - began < seconds, f"{pattern!r} is not in {self._unread!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self._unread += os.read(self._master, 4096).decode(errors="replace")
        read, self._unread = self._unread[: found.end()], self._unread[found.end() :]
        return read

    def leave(self) -> int:
        """End the input and wait for the program; returns its exit code."""
        self.type("\x15\x04")  # an empty line first
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def person(place: Path, cli_environment: dict[str, str]) -> Iterator[Callable[..., Person]]:
    people: list[Person] = []

    def sit_down(*options: str, **environment: str) -> Person:
        arguments = ["chat", "--adapter", "adapter", "--engine", "torch", *options]
        people.append(Person(command(*arguments), place, cli_environment | environment))
        return people[-1]

    yield sit_down
    for each in people:
        each.close()


PROMPT = {who: rf"{who}>\x1b\[0m " for who in ("base", "adapter")}


def answer_in(screen: str) -> str:
    """Cut out the line above the speed."""
    *_, answer, _ = re.sub(r"\x1b\[[?\w;]*?[a-zA-Z]", "", screen).replace("\r", "").split("tokens/s)")[0].split("\n")
    return answer


def test_tab_switches_who_answers_and_keeps_what_was_typed(person):
    one = person("--max-new-tokens", "6")
    assert "Tab switches" in one.read_until(PROMPT["adapter"])
    one.type("Hello\r")
    tuned = one.read_until(r"tokens/s\).*" + PROMPT["adapter"])
    one.type("Hel")
    one.read_until("Hel")
    one.type("\t")
    one.read_until(PROMPT["base"] + "Hel")
    one.type("lo\r")
    plain = one.read_until(r"tokens/s\).*" + PROMPT["base"])
    assert answer_in(plain) != answer_in(tuned) != ""
    one.type("\t")
    one.read_until(PROMPT["adapter"])
    one.type("\x1b[A")  # up: the key's mark is not in the history
    one.read_until("^Hello")
    assert one.leave() == 0


def test_a_pasted_text_with_tabs_switches_nothing(person):
    one = person("--max-new-tokens", "6")
    one.read_until(PROMPT["adapter"])
    one.type("\x1b[200~Hel\tlo\x1b[201~\r")
    assert "base>" not in one.read_until(r"tokens/s\).*" + PROMPT["adapter"])
    assert one.leave() == 0


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(person):
    one = person("--max-new-tokens", "500", TEST_TOKEN_SECONDS="0.05")
    one.read_until(PROMPT["adapter"])
    one.type("Hello\r")
    one.read_until(r"Hello\r\n\S*2004l\r[^\n]*[a-z]")
    one.type("\x03")
    stopped = one.read_until(r"tokens/s\)")
    assert 0 < int(re.search(r"\(stopped\) \(([\d,]+) tokens", stopped)[1]) < 400
    one.read_until(PROMPT["adapter"])
    one.type("half typed")
    one.read_until("half typed")  # before readline has the terminal, Ctrl-C would throw it away
    one.interrupt_typing()
    one.read_until(r"\(Ctrl-D ends\).*" + PROMPT["adapter"])
    one.type("/help\r")
    assert "/retry" in one.read_until(PROMPT["adapter"])
    assert one.leave() == 0


LIBEDIT = ctypes.util.find_library("edit")
MACS_READLINE = """
import ctypes, sys
from common.talk.terminal import BINDINGS
edit = ctypes.CDLL(sys.argv[1])
edit.readline.restype = ctypes.c_char_p
edit.rl_initialize()
for binding in BINDINGS[True]:
    edit.rl_parse_and_bind(binding.encode())
print("read", edit.readline(b"> "), flush=True)
"""


@pytest.mark.skipif(LIBEDIT is None, reason="no libedit here, which is the readline of macOS")
def test_libedit_understands_the_binding_of_the_key(place, cli_environment):
    one = Person([sys.executable, "-c", MACS_READLINE, LIBEDIT], place, cli_environment)
    try:
        one.read_until("> ")
        one.type("half typed\x1b[D\t")  # the cursor before the last letter
        one.read_until(r"read b'half type//switch//d'")
    finally:
        one.close()
