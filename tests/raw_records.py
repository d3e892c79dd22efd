"""What tests of the readers share: what is read from a path, by place or whole, and why it is refused."""

import pytest

from common.data.readers import RecordError, decode, list_files, place, read_raw
from common.errors import UserError


def read(path: str, split="train") -> list:
    return [decode(raw) for raw in read_raw(list_files(path, split))]


def outcomes(path: str) -> dict[str, object]:
    """Map each record's place to its value, or to the text of its error."""
    files, found = list_files(path), {}
    for raw in read_raw(files):
        try:
            found[place(files, raw)] = decode(raw)
        except RecordError as error:
            found[place(files, raw)] = str(error)
    return found


def refusal(path, split="train") -> str:
    with pytest.raises(UserError) as caught:
        for _ in read_raw(list_files(path, split)):
            pass
    return str(caught.value)
