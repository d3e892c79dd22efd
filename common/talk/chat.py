"""`twintune chat`: a person, or a program's lines, in conversation with a model."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import nullcontext

from rich.console import Console

from common.errors import UserError
from common.runs.signals import StopRequest, stop_on_signals
from common.sampling import Sampling
from common.talk.conversation import Conversation
from common.talk.speaker import ADAPTER, BASE, Speaker, print_piece
from common.talk.terminal import Terminal
from common.view.display import say

HELP = """\
Tab, /switch     let the other answer, the base or the adapter; the conversation goes on
/base, /adapter  let this one answer
/retry           answer the last question again; sampled answers come out differently
/system TEXT     another system prompt from now on; without TEXT, show it
/clear           forget what was said
/help            show this
Ctrl-C           stop an answer
Ctrl-D, /quit    end\
"""


def chat(speaker: Speaker, system: str | None, sampling: Sampling) -> None:
    """Answer lines until they end: on a terminal with keys and a prompt, else as they come, answers alone on stdout."""
    if not speaker.tokenizer.has_template:
        raise UserError(
            f"{speaker.tokenizer.directory}: the base model has no chat template, so it can't chat; use its Instruct "
            "version, or `twintune generate`, which continues a text"
        )
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    talk = Chat(speaker, Conversation(speaker, system, sampling), on_terminal)
    if on_terminal:
        keys = "Tab switches between base and adapter, " if speaker.lora else ""
        talk.note(f"{keys}/help lists commands, Ctrl-D ends")
    for line in talk.lines() if on_terminal else sys.stdin:
        if line.strip() and not talk.take(line.strip()):
            break


class Chat:
    """Take a person's lines, one at a time: commands are done, anything else is answered."""

    def __init__(self, speaker: Speaker, conversation: Conversation, on_terminal: bool) -> None:
        """Take whether a person sits there: what is no part of an answer goes to stderr otherwise."""
        self._speaker = speaker
        self._conversation = conversation
        self._on_terminal = on_terminal
        self._notes = Console(stderr=not on_terminal)

    def lines(self) -> Iterator[str]:
        """Ask for lines at a terminal; Ctrl-C drops the one that is being typed."""
        terminal = Terminal(colored=self._notes.color_system is not None)
        while True:
            try:
                line = terminal.ask(lambda: self._speaker.who, self.switch)
            except KeyboardInterrupt:
                print()
                self.note("(Ctrl-D ends)")
                continue
            if line is None:
                return
            if line.strip():
                terminal.remember(line)
                yield line

    def take(self, line: str) -> bool:
        """Do what a line says; returns whether to go on, which a person's second Ctrl-C is no reason against."""
        try:
            return self._do(line)
        except KeyboardInterrupt:
            if not self._on_terminal:
                raise
        self._conversation.drop_unanswered()
        print()
        self.note("(stopped at once)")
        return True

    def switch(self) -> None:
        """Let the other one answer from now on."""
        self._become(BASE if self._speaker.who == ADAPTER else ADAPTER)

    def note(self, text: str) -> None:
        """Show what is no part of an answer."""
        say(self._notes, text, "dim")

    def _do(self, line: str) -> bool:
        command, _, rest = line.partition(" ")
        if not re.fullmatch(r"/[a-z]+", command):
            self._answer(line)
            return True
        match command:
            case "/quit" | "/exit":
                return False
            case "/switch":
                self.switch()
            case "/base" | "/adapter":
                self._become(command.removeprefix("/"))
            case "/retry":
                self._retry()
            case "/system":
                self._system(rest.strip())
            case "/clear":
                self._conversation.clear()
                self.note("(forgotten)")
            case "/help":
                self.note(HELP)
            case _:
                self.note(f"(no command {command}; /help lists them)")
        return True

    def _become(self, who: str) -> None:
        try:
            self._speaker.become(who)
        except UserError as error:
            self.note(f"({error})")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
        self.note(f"(system prompt: {self._conversation.system or 'what the chat template has by itself'})")

    def _retry(self) -> None:
        question = self._conversation.take_back()
        if question is None:
            self.note("(nothing was asked yet)")
        else:
            self.note(f"(again: {question})")
            self._answer(question)

    def _answer(self, text: str) -> None:
        """Answer and show the speed; a person's Ctrl-C stops the answer, which is remembered as far as it went."""
        with stop_on_signals(signal.SIGINT) if self._on_terminal else nullcontext(StopRequest()) as stop:
            try:
                prompt_ids, forgotten = self._conversation.ask(text)
            except UserError as error:
                self.note(f"({error})")
                return
            if forgotten:
                self.note(f"(the conversation is too long for the model: {forgotten} earlier questions are forgotten)")
            sampling = self._conversation.next_sampling()
            answer = self._speaker.answer(prompt_ids, sampling, print_piece, lambda: stop.signal_name is not None)
        self._conversation.answered(answer)
        print(flush=True)
        self.note(f"{'(stopped) ' if stop.signal_name else ''}{answer.speed}")
