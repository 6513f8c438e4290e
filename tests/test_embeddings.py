"""The cache of embeddings: whatever was interrupted, changed or damaged, what comes out is what `encode` gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny_bert import DIMENSION, load_model, make_sentences
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn

from st_clusterns import embed_corpus
from st_clusterns.clustering import embedding as module
from st_clusterns.clustering.embedding import describe_model
from st_clusterns.clustering.vectors import equal_rows

SENTENCES = [f"{i} {'word ' * (i % 7)}" for i in range(25)]


def rows_of(texts: Sequence[str]) -> np.ndarray:
    """Numbers that follow from each text alone."""
    return np.array([[len(text), sum(map(ord, text)), ord(text[0])] for text in texts], dtype=np.float32)


class Embedder(nn.Module):
    """Counts the texts that it embeds; breaks off before a given call."""

    device = torch.device("cpu")

    def __init__(self, calls: float = float("inf"), weight: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))
        self.texts: list[str] = []
        self.calls = calls

    def _get_name(self) -> str:
        return "Embedder"  # also of subclasses, so that all have one description

    def encode(self, texts: list[str], **options: Any) -> np.ndarray:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.texts += texts
        self.options = options
        return rows_of(texts)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)


def read(folder: Path, embedder: Embedder, sentences: Sequence[str] = SENTENCES) -> None:
    rows = embed_corpus(sentences, embedder, show_progress_bar=False, cache=folder)
    np.testing.assert_array_equal(rows, embed_corpus(sentences, Embedder()))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.npy"))


# Without a cache


def test_the_order_is_kept_and_rows_are_unit_vectors() -> None:
    embedder = Embedder()
    rows = embed_corpus(("b", "a"), embedder, batch_size=7, show_progress_bar=False)
    assert embedder.texts == ["b", "a"]
    assert embedder.options == {"prompt": None, "batch_size": 7, "show_progress_bar": False}
    expected = rows_of(["b", "a"])
    np.testing.assert_allclose(rows, expected / np.sqrt((expected**2).sum(axis=1, keepdims=True)), rtol=1e-6)


def test_half_precision_is_normalised_in_full() -> None:
    class Half(Embedder):
        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            return rows_of(texts).astype(np.float16)

    rows = embed_corpus(SENTENCES, Half())
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_text_without_a_known_word_is_a_row_of_zeros(dtype: torch.dtype) -> None:
    """`encode` would divide by a length that half precision rounds to zero."""
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1}, []))  # drops unknown words
    tokenizer.pre_tokenizer = Whitespace()
    static = StaticEmbedding(tokenizer, embedding_weights=torch.tensor([[3.0, 4.0], [1e-5, 0.0]]))
    model = SentenceTransformer(modules=[static], device="cpu").to(dtype)
    rows = embed_corpus(["a", "unknown", "a a", "b"], model, show_progress_bar=False)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [0.6, 0.8], [1, 0]], atol=1e-3)
    assert equal_rows(rows) == (2, 3)


def test_bf16_embeds_in_bfloat16(model: SentenceTransformer) -> None:
    full, half = (embed_corpus(["w1 w2", "w3"], model, show_progress_bar=False, bf16=bf16) for bf16 in (False, True))
    np.testing.assert_allclose(half, full, atol=0.05)
    assert not np.allclose(half, full, atol=1e-5)


def test_equal_rows_against_all_pairs() -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(60, 8))[draw.integers(60, size=200)] + draw.uniform(-1e-6, 1e-6, size=(200, 8))
    near = np.abs(rows[:, None] - rows).max(axis=2) < 1e-5
    assert equal_rows(rows.astype(np.float32)) == (int((near.sum(axis=1) > 1).sum()), len(np.unique(near, axis=0)))


# What is kept, and what is embedded anew


def test_a_second_call_embeds_nothing(tmp_path: Path) -> None:
    first, second = Embedder(), Embedder()
    read(tmp_path, first)
    read(tmp_path, second)
    assert (first.texts, second.texts) == (SENTENCES, [])


@pytest.mark.parametrize("calls", range(7))
def test_after_an_interrupt_only_the_rest_is_embedded(tmp_path: Path, calls: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path, Embedder(calls))
    rest = Embedder()
    read(tmp_path, rest)
    assert rest.texts == SENTENCES[4 * calls :]


def test_only_the_missing_chunks_are_embedded(tmp_path: Path) -> None:
    read(tmp_path, Embedder())
    for number in (1, 4):
        files(tmp_path)[number].rename(files(tmp_path)[number].with_suffix(".partial"))  # as a kill leaves it
        again = Embedder()
        read(tmp_path, again)
        assert again.texts == SENTENCES[4 * number : 4 * number + 4]


HEADER = 128  # bytes of a `.npy` file before its numbers


@settings(max_examples=40, deadline=None, phases=[Phase.generate])  # shrinking a failure takes minutes
@given(st.integers(0, HEADER + 47), st.integers(0, 7), st.sampled_from(["cut", "flip", "append", "swap"]))
def test_damage_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int, damage: str) -> None:
    """A header that says something else, and too few or too many numbers. (Flipped numbers are not noticed.)"""
    folder = tmp_path_factory.mktemp("cache")
    read(folder, Embedder())
    path = files(folder)[2]
    data = bytearray(path.read_bytes())
    assert len(data) == HEADER + 4 * 3 * 4
    if damage == "cut":
        data = data[:place]
    elif damage == "flip":
        data[place % HEADER] ^= 1 << bit
    elif damage == "append":
        data += b"\0"
    else:
        data = bytearray(files(folder)[-1].read_bytes())  # the last chunk holds a single row
    path.write_bytes(data)
    again, third = Embedder(), Embedder()
    read(folder, again)
    if damage != "flip":  # a flip can hit a blank of the header
        assert again.texts == SENTENCES[8:12]
    read(folder, third)
    assert not third.texts


def test_numbers_of_another_format_are_embedded_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path, Embedder())
    path = files(tmp_path)[0]
    np.save(path, np.load(path).astype(np.float64))
    again = Embedder()
    read(tmp_path, again)
    assert again.texts == SENTENCES[:4]
    assert f"{path} is damaged: its 4 sentences are embedded anew." in caplog.text


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


def test_another_model_precision_or_chunk_size_is_another_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(tmp_path, Embedder())
    other, half, large = Embedder(weight=1.0), Embedder(), Embedder()
    read(tmp_path, other)
    embed_corpus(SENTENCES, half, cache=tmp_path, bf16=True)
    monkeypatch.setattr(module, "CHUNK", 8)
    read(tmp_path, large)
    assert other.texts == half.texts == large.texts == SENTENCES
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_and_nothing_of_its_chunk_is_kept(tmp_path: Path, value: float) -> None:
    class Broken(Embedder):
        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            rows = rows_of(texts)
            rows[[text.startswith("9 ") for text in texts], 1] = value
            return rows

    broken, whole = Broken(), Embedder()
    for cache in (None, tmp_path):
        with pytest.raises(ValueError, match="The model embeds '9 word word ' as NaN or Inf: is the model broken"):
            embed_corpus(SENTENCES, broken, cache=cache)
    read(tmp_path, whole)
    assert whole.texts == SENTENCES[8:]


# Several processes


def test_who_asks_for_the_same_embeddings_waits(tmp_path: Path) -> None:
    """Two threads with a lock each, which is what two processes have."""
    entered, second = threading.Event(), Embedder()

    class Slow(Embedder):
        def encode(self, texts: list[str], **options: Any) -> np.ndarray:
            entered.set()
            follower.join(0.05)
            return super().encode(texts, **options)

    first = Slow()

    def follow() -> None:
        entered.wait()
        embed_corpus(SENTENCES, second, cache=tmp_path)

    follower = threading.Thread(target=follow)
    follower.start()
    embed_corpus(SENTENCES, first, cache=tmp_path)
    follower.join()
    assert (first.texts, second.texts) == (SENTENCES, [])


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.slow
def test_a_killed_process_loses_one_chunk_at_most(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        import numpy as np
        from st_clusterns.clustering import embedding
        from test_embeddings import SENTENCES, Embedder
        embedding.CHUNK = 4
        save, saved = np.save, []
        def kill_in_the_middle(file, rows):
            saved.append(rows)
            if len(saved) == 4:
                save(file, rows[:2]), file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(file, rows)
        np.save = kill_in_the_middle
        embedding.embed_corpus(SENTENCES, Embedder(), cache={str(tmp_path)!r})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (len(files(tmp_path)), len(list(tmp_path.glob("*/*.partial")))) == (3, 1)
    rest = Embedder()
    read(tmp_path, rest)
    assert rest.texts == SENTENCES[12:]


# With a model


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
    assert describe_model(nn.Linear(2, 2)) != describe_model(nn.Linear(2, 2))


def test_settings_are_in_the_description(model: SentenceTransformer) -> None:
    assert describe_model(model, bf16=True) != describe_model(model, bf16=False)


def test_a_model_with_a_cache_gives_what_encode_gives(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sentences = load_model(bert), make_sentences(30)
    plain = embed_corpus(sentences, model, show_progress_bar=False)
    np.testing.assert_allclose(plain, model.encode(sentences, normalize_embeddings=True), atol=1e-6)
    monkeypatch.setattr(module, "CHUNK", 8192)
    whole = embed_corpus(sentences, model, show_progress_bar=False, cache=tmp_path / "whole")
    np.testing.assert_array_equal(whole, plain)  # one chunk: to the last bit
    monkeypatch.setattr(module, "CHUNK", 4)
    cut = embed_corpus(sentences, model, show_progress_bar=False, cache=tmp_path / "cut")
    np.testing.assert_allclose(cut, plain, atol=1e-6)
    assert whole.dtype == cut.dtype == np.float32
    assert whole.shape == (30, DIMENSION)

    change_a_weight(model)
    anew = embed_corpus(sentences, model, show_progress_bar=False, cache=tmp_path / "cut")
    np.testing.assert_allclose(anew, embed_corpus(sentences, model, show_progress_bar=False), atol=1e-6)


# Several devices


@pytest.mark.slow
def test_several_devices_embed_as_one_does(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes that start once for all chunks, not at all if the cache has them, and end whatever happens."""
    model, texts = load_model(bert), make_sentences(60)
    monkeypatch.setattr(module, "CHUNK", 25)
    started: list[list[str]] = []
    pools: list[Any] = []
    start = SentenceTransformer.start_multi_process_pool

    def watched(self: SentenceTransformer, devices: list[str]) -> Any:
        started.append(devices)
        pools.append(start(self, devices))
        return pools[-1]

    monkeypatch.setattr(SentenceTransformer, "start_multi_process_pool", watched)
    model.train()
    single = embed_corpus(texts, model, show_progress_bar=False, prompt="w1 ")
    settings = {"show_progress_bar": False, "prompt": "w1 ", "devices": ["cpu", "cpu"], "cache": tmp_path}
    for _ in range(2):
        np.testing.assert_allclose(embed_corpus(texts, model, **settings), single, atol=1e-6)
    assert started == [["cpu", "cpu"]]
    assert model.training
    model.tokenizer.model_input_names = None  # nothing can be read
    with pytest.raises(Exception, match="NoneType"):
        embed_corpus(texts, model, show_progress_bar=False, devices=["cpu"])
    assert len(pools) == 2
    for process in (process for pool in pools for process in pool["processes"]):
        with pytest.raises(ValueError, match="closed"):
            process.is_alive()


def test_a_precision_that_the_processes_would_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16=True does not reach the processes of devices="):
        embed_corpus(SENTENCES, Embedder(), bf16=True, devices=["cpu", "cpu"])
