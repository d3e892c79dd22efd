"""Which sums inductor's kernels hold a whole row for."""

from types import SimpleNamespace

import pytest
import sympy
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint

from torch_backend.whole_rows import LONGEST, WholeRows


@pytest.mark.parametrize(
    ("numbers", "hint", "cooperative", "expected"),
    [
        (sympy.Integer(3072), ReductionHint.INNER, False, True),
        (sympy.Integer(LONGEST), ReductionHint.INNER, False, True),
        (sympy.Integer(LONGEST + 1), ReductionHint.INNER, False, False),
        (sympy.Symbol("s0"), ReductionHint.INNER, False, False),  # of a length that changes
        (sympy.Integer(3072), ReductionHint.OUTER, False, False),
        (sympy.Integer(3072), ReductionHint.INNER, True, False),
    ],
)
def test_rows_of_hidden_states_are_held_and_the_rest_is_left_to_inductor(
    numbers, hint, cooperative, expected, monkeypatch
):
    class Features(SimpleNamespace):
        def get_reduction_hint(self):
            return hint

    monkeypatch.setattr(InductorChoices, "should_use_persistent_reduction", lambda *_: False)
    assert WholeRows.should_use_persistent_reduction(Features(reduction_numel=numbers), cooperative) == expected
