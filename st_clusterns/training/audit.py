"""`audit`: what the in-batch negatives of a corpus are, before a training, without labels.

1. Embed the corpus, of a large one a random sample of its rows, and cluster it (`CorpusClusters.fit`).
2. Embed some sentences without a third of their words. A pair is as similar as a positive if it reaches the cosine that
   nine in ten of them have with their sentence.
3. Draw random batches and look at every pair (`st_clusterns.evaluation.negatives`).

Memory and time beyond the embeddings do not grow with the corpus: no matrix of all pairs is made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.clustering.embedding import as_texts, embed_corpus
from st_clusterns.clustering.labels import as_labels
from st_clusterns.clustering.sample import SAMPLE, check_counts
from st_clusterns.clustering.vectors import FEWEST, Ints
from st_clusterns.evaluation.negatives import Negatives, Pair, Rows, look_at_batches, number_words
from st_clusterns.evaluation.scores import mean_cosine
from st_clusterns.models import in_float32, load_model, name_of, reading_at_most, resolve_prompt
from st_clusterns.training import audit_text
from st_clusterns.training.report import describe_clusters
from st_clusterns.training.sentences import check_batch_size
from st_clusterns.training.views import Kind, TextViews, choose_kind

logger = logging.getLogger(__name__)

BATCH_SIZES = (32, 128, 512)
VIEWS, FEWEST_VIEWS = 2000, 50  # sentences without some words that are embedded, a tenth, at most and at least
REACHED = 0.9  # share of them that reach the cosine of a positive pair
N_PAIRS, N_EXAMPLES = 10, 3  # worst pairs, masked and not, and examples of a topic, that an audit keeps


@dataclass(frozen=True, repr=False)
class Audit:
    """What the negatives of a corpus are. `print` it; `to_dict()` has the same for a machine.

    Attributes:
        model: what the model is called.
        n_sentences: rows of the corpus.
        n_repeated: rows that repeat an earlier one exactly.
        n_sampled: rows that were audited.
        n_same_words: audited texts that have the words of another one.
        clusters: the clusters of the audited texts.
        positives: the kind of views that a training of this corpus has (`views_dataset`).
        near: cosine that nine in ten sentences have with themselves without a third of their words.
        hard: cosine from which on a negative is hard: the mean of two sentences of one cluster, as in the report.
        negatives: what the negatives are, for each batch size, in rising order.
        pairs: the pairs of the highest cosine that are probably false negatives, exact copies apart: ten that the loss
            does not mask, then ten that it masks. A text is in one pair only.
        has_labels: whether precision and recall were measured.
    """

    model: str
    n_sentences: int
    n_repeated: int
    n_sampled: int
    n_same_words: int
    clusters: CorpusClusters
    positives: Kind
    near: float
    hard: float
    negatives: list[Negatives]
    pairs: list[Pair]
    has_labels: bool

    @property
    def verdict(self) -> str:
        """What to train with, in some sentences."""
        return audit_text.verdict(self)

    @property
    def topics(self) -> list[dict[str, Any]]:
        """Each topic, largest first: its `name`, `size`, `trust`, whether it is `trusted`, and `examples`."""
        clusters = self.clusters
        examples = clusters.examples(N_EXAMPLES)
        return [
            {
                "name": clusters.names[topic],
                "size": int(clusters.sizes[topic]),
                "trust": float(clusters.trust[topic]),
                "trusted": bool(clusters.trusted[topic]),
                "examples": examples[topic],
            }
            for topic in np.argsort(-clusters.sizes, kind="stable")
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as lists, numbers and texts, for JSON."""
        texts = self.clusters.sentences
        left_out = ("first", "second")
        counts = ("model", "n_sentences", "n_repeated", "n_sampled", "n_same_words", "positives", "near", "hard")
        return {
            **{name: getattr(self, name) for name in counts},
            "verdict": self.verdict,
            "clusters": describe_clusters(self.clusters, self.negatives[-1].batch_size),
            "negatives": [
                {**asdict(one), "kinds": {name: count._asdict() for name, count in one.kinds.items()}}
                for one in self.negatives
            ],
            "topics": self.topics,
            "pairs": [
                {"texts": [texts[pair.first], texts[pair.second]]}
                | {name: value for name, value in vars(pair).items() if name not in left_out}
                for pair in self.pairs
            ],
        }

    def __str__(self) -> str:
        return audit_text.text(self)

    __repr__ = __str__


def audit(
    model: SentenceTransformer | str,
    sentences: Iterable[str],
    batch_sizes: int | Sequence[int] | None = None,
    *,
    labels: Iterable[Any] | None = None,
    n_clusters: int | None = None,
    sample: int = SAMPLE,
    max_length: int = 64,
    seed: int = 0,
    prompt: str | None = None,
    prompt_name: str | None = None,
    embed_batch_size: int = 64,
    show_progress_bar: bool = True,
    trust_remote_code: bool = False,
) -> Audit:
    """Look at the in-batch negatives of a corpus: how many are probably false, how many are hard, what to train with.

    Args:
        model: the model to train, or its name on the hub or path. It is not changed.
        sentences: the corpus: a list, a column of a table, a generator.
        batch_sizes: number of sentences in a batch, or several. Default: those of 32, 128 and 512 that fit.
        labels: one for each sentence. They change nothing; they tell precision and recall of the guess. -1, None, NaN
            and NA stand for no label: what is guessed of these sentences is not judged.
        n_clusters: number of clusters `K`. Default: chosen from the corpus.
        sample: rows that are audited, at most: of a larger corpus a random sample.
        max_length: tokens that are read of a sentence, at most, besides the prompt.
        seed: seed of the random number generators.
        prompt: what the model reads before each sentence; "" for nothing.
        prompt_name: its name among `model.prompts`, in place of `prompt`. Default: the model's default prompt.
        embed_batch_size: texts per batch while embedding.
        show_progress_bar: whether to show one while embedding.
        trust_remote_code: whether code that comes with a model given by its name may be run.

    Raises:
        ValueError: as of `CorpusClusters.fit`, if a batch size does not fit, or if there is not one label a sentence.
    """
    if not FEWEST <= sample <= SAMPLE:
        raise ValueError(f"sample={sample} must be {FEWEST} to {SAMPLE}.")
    texts = as_texts(sentences)
    check_counts(len(set(texts)), len(texts), n_clusters)
    rows = np.arange(len(texts))
    if len(texts) > sample:
        rows = np.sort(np.random.default_rng(seed).choice(len(texts), sample, replace=False))
        logger.info(f"Auditing a random sample of {sample:,} of {len(texts):,} sentences.")
    if batch_sizes is None:
        batch_sizes = [size for size in BATCH_SIZES if size <= len(rows)] or [len(rows)]
    sizes = np.unique(batch_sizes).tolist()
    if not sizes:
        raise ValueError("batch_sizes is empty: give a batch size, or leave it out.")
    chosen = [texts[row] for row in rows]
    for size in sizes:
        check_batch_size(size, len(chosen))
    numbers = None if labels is None else _number(as_labels(labels, len(texts)))[rows]
    name = model if isinstance(model, str) else name_of(model)
    model = load_model(model, trust_remote_code) if isinstance(model, str) else model
    prompt = resolve_prompt(model, prompt, prompt_name)
    how: dict[str, Any] = {"batch_size": embed_batch_size, "show_progress_bar": show_progress_bar, "prompt": prompt}
    with reading_at_most(model, max_length, prompt), in_float32(model):
        clusters = CorpusClusters.fit(chosen, model, n_clusters, seed, **how)
        near = _cosine_of_positives(model, clusters, seed, **how)
    hard = mean_cosine(clusters.embeddings, clusters.ids)
    place = {text: number for number, text in enumerate(clusters.sentences)}
    words = number_words(clusters.sentences)
    corpus = Rows(
        clusters.embeddings,
        texts=np.array([place[text] for text in chosen]),
        words=words,
        topics=np.where(clusters.trusted[clusters.ids], clusters.ids, -1),
        near=near,
        hard=hard,
        labels=numbers,
    )
    looked = [look_at_batches(corpus, size, seed) for size in sizes]
    return Audit(
        model=name,
        n_sentences=len(texts),
        n_repeated=len(texts) - len(set(texts)),
        n_sampled=len(rows),
        n_same_words=int((np.bincount(words[words >= 0])[words[words >= 0]] > 1).sum()),
        clusters=clusters,
        positives=choose_kind(clusters.sentences, clusters.has_topics),
        near=near,
        hard=hard,
        negatives=[negatives for negatives, _ in looked],
        pairs=_worst_pairs([pair for _, pairs in looked for pair in pairs]),
        has_labels=labels is not None,
    )


def _number(labels: list[Any]) -> Ints:
    """Number labels as they come; -1 for none."""
    numbers: dict[Any, int] = {None: -1}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels])


def _cosine_of_positives(model: SentenceTransformer, clusters: CorpusClusters, seed: int, **how: Any) -> float:
    """Return the cosine that nine in ten sentences have with themselves without some words, whatever the positives.

    Dropout views are too near to tell anything, and spans of a document as far from it as other documents.
    """
    texts = clusters.sentences
    count = min(len(texts), max(FEWEST_VIEWS, min(VIEWS, len(texts) // 10)))
    chosen = np.random.default_rng(seed).choice(len(texts), count, replace=False)
    views = TextViews("deletion", seed)
    embeddings = embed_corpus([views.view(texts[place]) for place in chosen], model, **how)
    cosines = np.einsum("nd,nd->n", clusters.embeddings[chosen], embeddings)
    return float(np.quantile(cosines, 1 - REACHED))


def _worst_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    found, used = {True: list[Pair](), False: list[Pair]()}, set[int]()
    for pair in sorted(pairs, key=lambda pair: -pair.cosine):
        if not {pair.first, pair.second} & used and len(found[pair.masked]) < N_PAIRS:
            found[pair.masked].append(pair)
            used |= {pair.first, pair.second}
    return found[False] + found[True]
