"""What has been said, and what of it the model still sees once it is more than fits."""

from __future__ import annotations

from dataclasses import replace

from common.errors import UserError
from common.sampling import Sampling
from common.talk.speaker import Answer, Messages, Speaker, system_message


class Conversation:
    """Remember questions and answers in turn; the oldest are forgotten where the model can't look back on them."""

    def __init__(self, speaker: Speaker, system: str | None, sampling: Sampling) -> None:
        self._speaker = speaker
        self.system = system
        self._sampling = sampling
        self._messages: Messages = []
        self._asked = 0

    @property
    def question(self) -> str | None:
        """Give the last question."""
        return next((each["content"] for each in reversed(self._messages) if each["role"] == "user"), None)

    def ask(self, text: str) -> tuple[list[int], int]:
        """Take up a question; returns the tokens to be answered, and how many questions were forgotten for them.

        Raises UserError, and takes up nothing, where the question alone is too long or the chat template refuses it.
        """
        kept: Messages = [*self._messages, {"role": "user", "content": text}]
        count = len(kept)
        ids = self._tokens(kept)
        while self._speaker.context and len(ids) + self._reserve > self._speaker.context:
            if len(kept) == 1:
                raise UserError(
                    f"that makes {len(ids):,} tokens; the model looks back on {self._speaker.context:,}, of which "
                    f"{self._reserve:,} are kept for the answer; say less"
                )
            kept = kept[2:]
            ids = self._tokens(kept)
        self._messages = kept
        return ids, (count - len(kept)) // 2

    def answered(self, answer: Answer) -> None:
        """Remember the answer to the last question."""
        self._messages.append({"role": "assistant", "content": answer.text})

    def drop_unanswered(self) -> None:
        """Forget a last question that has got no answer."""
        if self._messages and self._messages[-1]["role"] == "user":
            self._messages.pop()

    def take_back(self) -> str | None:
        """Forget the last question and its answer, if there is one; returns the question."""
        question = self.question
        while self._messages and self._messages.pop()["role"] != "user":
            pass
        return question

    def clear(self) -> None:
        """Forget all but the system prompt."""
        self._messages = []

    def next_sampling(self) -> Sampling:
        """Return how to choose the tokens of the next answer: every answer draws anew, the first by the seed given."""
        self._asked += 1
        return replace(self._sampling, seed=self._sampling.seed + self._asked - 1)

    @property
    def _reserve(self) -> int:
        """Count the tokens kept free for an answer: its longest, but not more than half of what there is."""
        return min(self._sampling.max_new_tokens, (self._speaker.context or 0) // 2)

    def _tokens(self, messages: Messages) -> list[int]:
        return self._speaker.prompt_ids([*system_message(self.system), *messages])
