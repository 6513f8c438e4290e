"""Hashes of texts: equal for equal tokens, in every layout of a batch."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from batches import PAD, TokenStub, padded
from conftest import StubModel
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tiny_bert import make_sentences
from torch import Tensor

from st_clusterns.losses import text_hashes as texts_module
from st_clusterns.losses.text_hashes import hash_sentences, repeats_text, text_hashes


def flat(texts: list[list[int]]) -> tuple[Tensor, list[int]]:
    """All tokens in a row, and the places where texts begin, with the end."""
    begins = [0]
    for text in texts:
        begins.append(begins[-1] + len(text))
    return torch.tensor([token for text in texts for token in text], dtype=torch.long), begins


def static(texts: list[list[int]]) -> dict[str, Tensor]:
    """As `StaticEmbedding` makes them."""
    tokens, begins = flat(texts)
    return {"input_ids": tokens, "offsets": torch.tensor(begins[:-1])}


def unpadded(texts: list[list[int]]) -> dict[str, Tensor]:
    """As a transformer with flash attention takes them."""
    tokens, begins = flat(texts)
    return {"input_ids": tokens[None], "cu_seq_lens_q": torch.tensor(begins, dtype=torch.int32)}


LAYOUTS = {
    "right": padded,
    "left": lambda texts: padded(texts, "left"),
    "wide": lambda texts: padded(texts, "right", 40),
    "static": static,
    "unpadded": unpadded,
    "unpadded with a mask": lambda texts: {**unpadded(texts), "attention_mask": torch.ones(len(texts), 2)},
}

some_texts = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=2, max_size=12)


@given(some_texts)
def test_hashes_are_equal_where_and_only_where_texts_are(texts: list[list[int]]) -> None:
    expected = [[one == other for other in texts] for one in texts]
    for name, layout in LAYOUTS.items():
        hashes = text_hashes(layout(texts))
        assert hashes.shape == (len(texts),)
        assert hashes.dtype == torch.int64
        assert (hashes[:, None] == hashes).tolist() == expected, name


@given(some_texts)
def test_the_layout_does_not_matter(texts: list[list[int]]) -> None:
    """Columns of one batch are padded to different widths."""
    first, *others = (text_hashes(layout(texts)) for layout in LAYOUTS.values())
    for other in others:
        assert torch.equal(first, other)


def test_permuted_tokens_differ() -> None:
    texts = [list(order) for order in permutations([3, 7, 11, 12, 500])]
    for layout in LAYOUTS.values():
        assert len(text_hashes(layout(texts)).unique()) == len(texts) == 120


def test_many_short_texts_do_not_collide() -> None:
    """All texts of three neighbouring tokens, and ids that are multiples of each other."""
    texts = [list(tokens) for tokens in product([0, 1, 2, 3, 30521, 30522, 61042, 61044, 2**31 - 1], repeat=3)]
    texts += [text[:size] for size in (1, 2) for text in texts if text[size:] == [0] * (3 - size)]
    assert len(set(map(tuple, texts))) == len(texts) == 729 + 81 + 9
    assert len(text_hashes(padded(texts)).unique()) == len(texts)


def test_a_longer_text_is_another_than_its_beginning_also_if_it_ends_with_the_padding_token() -> None:
    assert len(text_hashes(padded([[5], [5, PAD], [PAD, 5], [5, PAD, PAD]])).unique()) == 4


@pytest.mark.parametrize("layout", ["right", "static", "unpadded"])
def test_empty_texts_are_equal(layout: str) -> None:
    hashes = text_hashes(LAYOUTS[layout]([[], [5, 6], [], [5, 6], []]))
    assert (hashes[:, None] == hashes)[0].tolist() == [True, False, True, False, True]
    assert hashes[1] == hashes[3]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_the_number_format_of_the_mask_does_not_matter(dtype: torch.dtype) -> None:
    features = padded([[5, 6], [7]])
    features["attention_mask"] = features["attention_mask"].to(dtype)
    assert torch.equal(text_hashes(features), text_hashes(padded([[5, 6], [7]])))


def test_the_features_stay_as_they_were() -> None:
    for layout in LAYOUTS.values():
        features, again = layout([[5, 6], [7]]), layout([[5, 6], [7]])
        text_hashes(features)
        assert list(features) == list(again)
        assert all(map(torch.equal, features.values(), again.values()))


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"embedding": torch.randn(3, 4)},
        {"embedding": torch.randn(3, 4), "attention_mask": torch.ones(3, 2)},
        {"input_ids": torch.tensor([[5, 6]])},
        {"input_ids": torch.randn(3, 4), "attention_mask": torch.ones(3, 4)},
        {"input_ids": [[5, 6]], "attention_mask": torch.ones(1, 2)},
    ],
    ids=["nothing", "embeddings", "embeddings with a mask", "no mask", "numbers", "lists"],
)
def test_without_tokens_there_is_no_hash(features: dict[str, Tensor]) -> None:
    assert text_hashes(features) is None


# The sentences of a corpus


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_a_corpus_is_hashed_as_its_batches_are(
    block: int, model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the corpus is cut and padded."""
    monkeypatch.setattr(texts_module, "BLOCK", block)
    sentences = make_sentences(30)
    hashes = hash_sentences(model, sentences)
    assert hashes.shape == (30,)
    for batch in ([0, 5, 29], [7], list(range(30))):
        features = model.preprocess([sentences[place] for place in batch])
        assert torch.equal(text_hashes(features), hashes[batch])


def test_a_model_without_tokens_makes_no_hashes() -> None:
    class Other(TokenStub):
        def preprocess(self, sentences: list[str]) -> dict[str, Tensor]:
            return {"pixel_values": torch.ones(len(sentences), 2)}

    assert hash_sentences(StubModel(), ["text 1"]) is None
    assert hash_sentences(Other(), ["text 1"]) is None
    assert hash_sentences(TokenStub(), ["text 1"]) is not None


# Which candidates repeat a text


@given(st.integers(1, 6), st.integers(2, 5), st.data())
def test_repeats_text_is_its_definition_pair_by_pair(n_rows: int, n_columns: int, data: st.DataObject) -> None:
    column = st.lists(st.integers(0, 8), min_size=n_rows, max_size=n_rows)
    texts = data.draw(st.lists(column, min_size=n_columns, max_size=n_columns))
    own = data.draw(st.lists(st.integers(0, n_rows - 1), min_size=1, max_size=6))

    def repeats(row: int, column: int, other: int) -> bool:
        if column == 1 and other == row:
            return False  # its positive
        same = texts[column][other] in (texts[0][row], texts[1][row])
        return same or (column == 1 and texts[0][other] == texts[0][row])

    expected = [[repeats(i, c, j) for c in range(1, n_columns) for j in range(n_rows)] for i in own]
    hashes = [torch.tensor(column) for column in texts]
    assert repeats_text(hashes, torch.tensor(own)).tolist() == expected
    assert [column.tolist() for column in hashes] == texts, "the arguments are not changed"
