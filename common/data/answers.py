"""Where in a rendered conversation the assistant speaks: found by three methods, each verified, or refused.

A span goes from the end of the prompt (what the model is given) to the end of the end-of-turn token (what it must
write), without the white space after. In this order: the template's own `{% generation %}` marks; one pass over the
rendering, which must hold every answer between the header and the end that the template writes around a probe; turn
by turn, by rendering the conversation up to the turn, or with the answer replaced by probes, and checking that what
stands before and after is the same in the whole. Nothing is guessed: a template that hides or drops an answer makes
the example an error. Cost: one rendering an example, two a turn where the template rewrites its history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.data.records import RecordError
from common.data.spans import Span
from common.data.template import Rendered

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], Rendered]  # messages, add_generation_prompt
# Text that no template knows and no tokenizer has: letters, so that trimming changes nothing.
PROBES = ("qxzprobeaqxz", "qxzproobebqxz")
ONE_EXAMPLE_AN_ANSWER = "split the conversation into one example an answer, or use train_on: last_assistant"


@dataclass(frozen=True)
class Frame:
    """Hold what a template writes around an answer, learned from probes.

    `header` ends the prompt, `lead` stands between it and the answer (Mistral's space, Qwen3's empty thoughts), `end`
    is the end-of-turn token, "" where there is none, `closing` what follows it at the end of a conversation only.
    """

    header: str = ""
    lead: str = ""
    end: str = ""
    closing: str = ""

    def closed(self, text: str) -> int:
        """Return where the last turn ends in a rendering that ends with it."""
        return len(text.rstrip().removesuffix(self.closing))


def learn_frame(render: Render, last_special: Callable[[str], int]) -> Frame:
    """Learn what a template writes around answers; `last_special` gives where the last special token of a text ends.

    An empty Frame, where the template refuses a conversation as simple as the probes, means: turn by turn.
    """
    asked: Messages = [{"role": "user", "content": PROBES[0]}]
    answered: Messages = [*asked, {"role": "assistant", "content": PROBES[1]}]
    try:
        prompt, one = render(asked, True).text, render(answered, False).text
        two = render([*answered, *asked], False).text
    except RecordError:
        return Frame()
    if one.count(PROBES[0]) != 1 or one.count(PROBES[1]) != 1 or two.count(PROBES[1]) != 1:
        return Frame()
    (before, after), later = one.split(PROBES[1]), two.partition(PROBES[1])[2]
    common = next(
        (i for i, (a, b) in enumerate(zip(after, later, strict=False)) if a != b), min(map(len, (after, later)))
    )
    end = after[: last_special(after[:common])]
    closing = after.rstrip()[len(end) :] if end else ""
    known = prompt if before.startswith(prompt) else before
    header = known.partition(PROBES[0])[2].removeprefix(end).lstrip()
    return Frame(header if last_special(header) else "", before[len(known) :], end, closing)


def find_answers(render: Render, messages: Messages, turns: Sequence[int], whole: Rendered, frame: Frame) -> list[Span]:
    """Return the characters of the answers in messages[turns]; raises RecordError where their place is not certain."""
    every = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if whole.answers and len(whole.answers) != len(every) and len(turns) == len(every):
        return list(whole.answers)  # the template marks fewer or more than the answers, and says so
    spans: Sequence[Span] | None = None
    if len(whole.answers) == len(every):
        spans = whole.answers
    elif frame.header and frame.end:
        spans = _scan([messages[turn] for turn in every], whole.text, frame)
    if spans is None:
        spans = [_by_prefix(render, messages, turn, whole.text, frame) for turn in turns]
    elif len(turns) != len(every):
        spans = [span for turn, span in zip(every, spans, strict=True) if turn in turns]
    for turn, (begin, stop) in zip(turns, spans, strict=True):
        if thoughts(messages[turn]) not in whole.text[begin:stop]:
            raise _thoughtless(turn, turn == every[-1])
    return list(spans)


def thoughts(message: Mapping[str, Any]) -> str:
    """Return the reasoning of an answer, in a field of its own or within <think> marks."""
    if len(message) > 2 and isinstance(own := message.get("reasoning_content"), str) and own.strip():
        return own.strip()
    content = message.get("content")
    if isinstance(content, str) and "</think>" in content:
        return content.partition("</think>")[0].rpartition("<think>")[2].strip()
    return ""


def _scan(answers: Messages, whole: str, frame: Frame) -> list[Span] | None:
    """Find all answers in one pass: each behind a header, before an end, and no header left over.

    Contents can't forge headers, which hold a special token: the caller refuses those in contents.
    """
    spans = []
    position = 0
    for message in answers:
        begin = whole.find(frame.header, position)
        if begin < 0:
            return None
        begin += len(frame.header)
        position = _end_of(message, whole, begin, frame)
        if position < 0:
            return None
        spans.append((begin, position))
    return spans if whole.find(frame.header, position) < 0 else None


def _end_of(message: Mapping[str, Any], whole: str, begin: int, frame: Frame) -> int:
    """Return where an answer that begins here ends; -1 where the text here is not this answer."""
    content = message.get("content") or ""
    if isinstance(content, str) and not message.get("tool_calls"):
        for text in (content, content.strip()):
            for lead in ("", frame.lead) if frame.lead else ("",):
                if whole.startswith(written := lead + text + frame.end, begin):
                    return begin + len(written)
    if not isinstance(content, str) or not (message.get("tool_calls") or thoughts(message)):
        return -1
    stop = whole.find(frame.end, begin)
    text = whole[begin : max(stop, begin)]
    said = content.rpartition("</think>")[2].strip()
    names = [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls") or ()]
    held = said in text and thoughts(message) in text and all(name in text for name in names)
    return stop + len(frame.end) if stop >= 0 and held else -1


def _by_prefix(render: Render, messages: Messages, turn: int, whole: str, frame: Frame) -> Span:
    """Place an answer between two prefixes of the whole: the prompt, and the conversation up to it."""
    last = turn == len(messages) - 1
    before = _attempt(render, messages[:turn], True)
    after = whole if last else _attempt(render, messages[: turn + 1], False)
    if before is not None and after is not None:
        kept = after[: frame.closed(after)]
        if kept.startswith(before) and whole.startswith(kept):
            return len(before), len(kept)
    return _by_probe(render, messages, turn, whole, frame, before)


def _by_probe(render: Render, messages: Messages, turn: int, whole: str, frame: Frame, prompt: str | None) -> Span:
    """Place an answer between what stands before and after a probe in its stead, equal for two probes."""
    around = set()
    for probe in PROBES:
        swapped = [*messages[:turn], {"role": "assistant", "content": probe}, *messages[turn + 1 :]]
        text = _attempt(render, swapped, False)
        if text is None or text.count(probe) != 1:
            raise _uncertain(turn)
        around.add(tuple(text.split(probe)))
    before, after = next(iter(around))
    stop = len(whole) - len(after)
    if len(around) > 1 or not (whole.startswith(before) and whole.endswith(after) and len(before) < stop):
        raise _uncertain(turn)
    if frame.end and not after.startswith(frame.end):
        raise _uncertain(turn)
    if not frame.end and turn == len(messages) - 1:
        return _prompt_end(before, whole, prompt, frame), frame.closed(whole)
    return _prompt_end(before, whole, prompt, frame), stop + len(frame.end)


def _prompt_end(before: str, whole: str, prompt: str | None, frame: Frame) -> int:
    """Return where the prompt ends: a template may write some characters of an answer itself."""
    if prompt and whole.startswith(prompt) and len(prompt) <= len(before):
        return len(prompt)
    return len(before) - (len(frame.lead) if frame.header and before.endswith(frame.header + frame.lead) else 0)


def _attempt(render: Render, messages: Messages, add_generation_prompt: bool) -> str | None:
    try:
        return render(messages, add_generation_prompt).text
    except RecordError:  # a template may refuse a part of a conversation, such as none at all
        return None


def _thoughtless(turn: int, is_last: bool) -> RecordError:
    """Refuse to train an answer without the reasoning it came with: that teaches not to reason."""
    remedy = "use 'prompt' and 'completion', or take the reasoning out" if is_last else ONE_EXAMPLE_AN_ANSWER
    return RecordError(
        f"the chat template leaves out the reasoning of message {turn + 1}, so training it would teach answers "
        f"without; {remedy}"
    )


def _uncertain(turn: int) -> RecordError:
    return RecordError(
        f"the chat template rewrites what stands before or in message {turn + 1}, so its place is not certain; "
        f"{ONE_EXAMPLE_AN_ANSWER}"
    )
