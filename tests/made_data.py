"""Made-up token data sets for tests of what is laid out and batched."""

from hypothesis import strategies as st

from common.data.tokens import TokenDataset, build_dataset


@st.composite
def datasets(draw) -> TokenDataset:
    """Draw examples of 2 to 40 tokens, none of which is 0 (the padding), each with a supervised token."""
    examples = []
    for number in range(draw(st.integers(1, 12))):
        ids = draw(st.lists(st.integers(1, 99), min_size=2, max_size=40))
        mask = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        mask[draw(st.integers(1, len(ids) - 1))] = True
        examples.append((ids, mask, f"file:{number + 1}"))
    return build_dataset(examples)
