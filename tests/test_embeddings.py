"""The cache of embeddings: whatever was interrupted, changed or damaged, what comes out is what `encode` gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny_bert import DIMENSION, load_model, make_sentences, save_bert
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from st_clusterns import embed_corpus, embeddings
from st_clusterns.embeddings import describe_model, embed_or_read

SENTENCES = [f"{i} {'word ' * (i % 7)}" for i in range(25)]


class Embedder:
    """Numbers that follow from each text alone; counts the texts; breaks off before a given call."""

    def __init__(self, calls: float = float("inf"), width: int = 3) -> None:
        self.texts: list[str] = []
        self.calls = calls
        self.width = width

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.texts += texts
        return np.array([[len(t), sum(map(ord, t)), i] for t in texts for i in [ord(t[0])]], dtype=np.float32)[
            :, : self.width
        ]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "CHUNK", 4)


def read(folder: Path, embedder: Embedder, sentences: Sequence[str] = SENTENCES, maker: str = "m") -> np.ndarray:
    rows = embed_or_read(sentences, embedder, maker, folder)
    np.testing.assert_array_equal(rows, Embedder()(sentences))
    return rows


def only(folder: Path, suffix: str) -> Path:
    [path] = folder.glob(f"*.{suffix}")
    return path


def test_a_second_call_embeds_nothing(tmp_path: Path) -> None:
    first, second = Embedder(), Embedder()
    read(tmp_path, first)
    rows = read(tmp_path, second)
    assert (first.texts, second.texts) == (SENTENCES, [])
    assert isinstance(rows, np.memmap)
    assert not rows.flags.writeable


@pytest.mark.parametrize("calls", range(7))
def test_after_an_interrupt_only_the_rest_is_embedded(tmp_path: Path, calls: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path, Embedder(calls))
    rest = Embedder()
    read(tmp_path, rest)
    assert rest.texts == SENTENCES[4 * calls :]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 299), st.sampled_from(["rows", "chunks"]), st.sampled_from(["cut", "flip", "append"]))
def test_damage_anywhere_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, place: int, suffix: str, damage: str
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    read(folder, Embedder())
    path = only(folder, suffix)
    data = bytearray(path.read_bytes())
    place %= len(data)
    changes: dict[str, Callable[[], bytes]] = {
        "cut": lambda: bytes(data[:place]),
        "flip": lambda: bytes([*data[:place], data[place] ^ 1, *data[place + 1 :]]),
        "append": lambda: bytes(data) + b"3 x\n",
    }
    path.write_bytes(changes[damage]())
    again, third = Embedder(), Embedder()
    read(folder, again)
    if damage != "append":
        assert again.texts
    read(folder, third)
    assert not third.texts


@pytest.mark.parametrize(
    "other",
    [
        [*SENTENCES[:-1], "24 other"],
        [SENTENCES[1], SENTENCES[0], *SENTENCES[2:]],
        SENTENCES[:-1],
        [SENTENCES[0] + SENTENCES[1][0], SENTENCES[1][1:], *SENTENCES[2:]],  # the same text, cut elsewhere
    ],
    ids=["changed", "swapped", "fewer", "cut elsewhere"],
)
def test_other_sentences_are_embedded_anew(tmp_path: Path, other: list[str]) -> None:
    read(tmp_path, Embedder())
    anew = Embedder()
    read(tmp_path, anew, other)
    assert anew.texts == other


def test_another_maker_or_number_format_is_another_entry(tmp_path: Path) -> None:
    read(tmp_path, Embedder())
    anew, half = Embedder(), Embedder()
    read(tmp_path, anew, maker="n")
    rows = embed_or_read(SENTENCES, half, "m", tmp_path, np.float16)
    assert anew.texts == half.texts == SENTENCES
    assert rows.dtype == np.float16


def test_nan_is_refused_and_nothing_of_its_chunk_is_kept(tmp_path: Path) -> None:
    def broken(texts: Sequence[str]) -> np.ndarray:
        rows = Embedder()(texts)
        rows[[text.startswith("9 ") for text in texts]] = np.nan
        return rows

    with pytest.raises(ValueError, match=r"sentences\[9\].*NaN"):
        embed_or_read(SENTENCES, broken, "m", tmp_path)
    rest = Embedder()
    read(tmp_path, rest)
    assert rest.texts == SENTENCES[8:]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.slow
def test_a_killed_process_loses_one_chunk_at_most(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        import numpy as np
        from st_clusterns import embeddings
        embeddings.CHUNK = 4
        calls = 0
        def embed(texts):
            global calls
            calls += 1
            return np.array([[len(t), sum(map(ord, t)), ord(t[0])] for t in texts], dtype=np.float32)
        append = embeddings._append
        def kill_in_the_middle(file, data):
            if calls == 4:
                file.write(data[: len(data) // 2]), file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            append(file, data)
        embeddings._append = kill_in_the_middle
        embeddings.embed_or_read({SENTENCES!r}, embed, "m", {str(tmp_path)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert only(tmp_path, "rows").stat().st_size == 3.5 * 4 * 3 * 4
    rest = Embedder()
    read(tmp_path, rest)
    assert rest.texts == SENTENCES[12:]


# With a model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def change_a_weight(model: SentenceTransformer) -> None:
    with torch.no_grad():
        next(iter(model.parameters()))[-1, -1] += 1e-3


def change_a_word(model: SentenceTransformer) -> None:
    model.tokenizer.add_tokens(["w1 w2"])


CHANGES: dict[str, Callable[[SentenceTransformer], object]] = {
    "weight": change_a_weight,
    "tokenizer": change_a_word,
    "length": lambda model: setattr(model, "max_seq_length", 5),
    "prompt": lambda model: (model.prompts.update(task="w3"), setattr(model, "default_prompt_name", "task")),
    "pooling": lambda model: setattr(model[1], "pooling_mode", "cls"),
    "heads": lambda model: setattr(model[0].auto_model.config, "num_attention_heads", 1),
    "half": lambda model: model.half(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_embeddings_is_in_the_description(bert: Path, change: str) -> None:
    model = load_model(bert)
    before = describe_model(model)
    model.encode(["w1", "w2 w3"])  # sets the tokenizer's padding, which decides nothing
    assert describe_model(model) == before == describe_model(load_model(bert))
    CHANGES[change](model)
    assert describe_model(model) != before


def test_static_embeddings_and_models_without_a_tokenizer_are_described() -> None:
    tokenizers = [Tokenizer(WordLevel({"[UNK]": 0, word: 1}, unk_token="[UNK]")) for word in ("a", "b")]
    weight = torch.ones(2, 3)
    one, same, other = (
        describe_model(SentenceTransformer(modules=[StaticEmbedding(t, embedding_weights=weight)], device="cpu"))
        for t in (tokenizers[0], tokenizers[0], tokenizers[1])
    )
    assert one == same != other
    assert describe_model(torch.nn.Linear(2, 2)) != describe_model(torch.nn.Linear(2, 2))


def test_settings_are_in_the_description(bert: Path) -> None:
    model = load_model(bert)
    assert describe_model(model, bf16=True) != describe_model(model, bf16=False)


def test_embed_corpus_with_a_cache_gives_what_encode_gives(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sentences = load_model(bert), make_sentences(30)
    plain = embed_corpus(sentences, model, show_progress_bar=False)
    monkeypatch.setattr(embeddings, "CHUNK", 8192)
    whole = embed_corpus(sentences, model, show_progress_bar=False, cache=tmp_path / "whole")
    np.testing.assert_array_equal(whole, plain)  # one chunk: to the last bit
    monkeypatch.setattr(embeddings, "CHUNK", 4)
    cut = embed_corpus(sentences, model, show_progress_bar=False, cache=tmp_path / "cut")
    np.testing.assert_allclose(cut, plain, atol=1e-6)
    assert whole.dtype == cut.dtype == np.float32
    assert whole.shape == (30, DIMENSION)

    change_a_weight(model)
    anew = embed_corpus(sentences, model, show_progress_bar=False, cache=tmp_path / "cut")
    np.testing.assert_allclose(anew, embed_corpus(sentences, model, show_progress_bar=False), atol=1e-6)


def test_a_large_corpus_is_kept_in_half_precision(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "LARGE", 20)
    model, sentences = load_model(bert), make_sentences(30)
    rows = embed_corpus(sentences, model, show_progress_bar=False, cache=tmp_path)
    assert rows.dtype == np.float16
    np.testing.assert_allclose(rows, embed_corpus(sentences, model, show_progress_bar=False), atol=1e-3)
