"""Names and typical sentences of clusters, without labels.

The name of a cluster is its words of the highest class-based tf-idf (Grootendorst 2022, BERTopic), in this weighting:
the share of the cluster's sentences that hold a word, times the log of how much higher this share is than in the whole
corpus, times the word's inverse document frequency. A word that is as frequent elsewhere weighs nothing, so no list of
stop words is needed, in any language.

In scripts without spaces the words of tf-idf are pairs of characters. A name shows what they are part of: a pair grows
by the character next to it as long as most of the cluster's sentences continue it in the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import regex
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer

from st_clusterns.clustering.vectors import Floats, Ints
from st_clusterns.clustering.words import UNSPACED, fold_case, split_words

N_WORDS = 3  # words in a name
SINGLE = 0.1  # what a word counts that a single sentence of the cluster holds; every further sentence counts 1
MOST, LONGEST = 0.7, 12  # share of the occurrences that must continue a pair alike; characters of a word, at most
PAIR = regex.compile(rf"(?V1){UNSPACED}")
EDGE = regex.compile(rf"(?V1)(?:{UNSPACED}|\p{{M}})")


def topic_names(sentences: Sequence[str], ids: Ints, n_clusters: int) -> list[str]:
    """Name each cluster by three of its words, most typical first.

    Args:
        sentences: `N` texts in any language.
        ids: the cluster of each, 0 to K-1, (N,).
        n_clusters: `K`.

    Returns:
        `K` distinct names. A cluster without words is called by its number.
    """
    counter = CountVectorizer(analyzer=split_words, binary=True)
    try:
        holds = counter.fit_transform(sentences)  # (N, V): whether a sentence holds a word
    except ValueError:  # scikit-learn's way to say that there is no word
        return [f"cluster {cluster}" for cluster in range(n_clusters)]
    words: npt.NDArray[Any] = counter.get_feature_names_out()
    overall = np.asarray(holds.mean(axis=0)).ravel()
    belongs = csr_matrix((np.ones(len(ids)), (ids, np.arange(len(ids)))), (n_clusters, len(ids)))
    counts = (belongs @ holds).tocsr()  # (K, V)
    counts.sort_indices()  # words of one weight in alphabetical order
    names, used = list[str](), Counter[str]()
    for cluster, size in enumerate(np.bincount(ids, minlength=n_clusters)):
        row = counts[[cluster]]
        share = overall[row.indices]
        weight = (row.data - 1 + SINGLE) * np.log(row.data / size / share) * -np.log(share)
        ranked: list[str] = words[row.indices[np.argsort(-weight, kind="stable")]].tolist()
        own = [fold_case(sentences[place]) for place in np.flatnonzero(ids == cluster).tolist()]
        name = ", ".join(_whole_words(ranked, own)) or f"cluster {cluster}"
        used[name] += 1
        names.append(name if used[name] == 1 else f"{name} ({used[name]})")
    return names


def nearest_sentences(embeddings: Floats, ids: Ints, centroids: Floats, count: int) -> list[list[int]]:
    """Return the rows of each cluster that are nearest to its centroid, nearest first, at most `count` a cluster.

    Args:
        embeddings: unit vectors, (N, D).
        ids: the cluster of each, 0 to K-1, (N,).
        centroids: (K, D).
        count: rows for each cluster.
    """
    cosines = np.einsum("nd,nd->n", embeddings, centroids[ids])  # lengths of centroids do not matter in a cluster
    order = np.lexsort((-cosines, ids))
    ends = np.cumsum(np.bincount(ids, minlength=len(centroids)))
    return [order[start:end][:count].tolist() for start, end in zip(np.append(0, ends[:-1]), ends, strict=True)]


def _whole_words(ranked: Sequence[str], sentences: Sequence[str]) -> list[str]:
    """Return the first words; pairs of characters grow to what they are part of, which is listed once."""
    found = list[str]()
    for word in ranked:
        if len(found) == N_WORDS:
            break
        if PAIR.match(word):
            word = _grow(word, sentences)
            if any(EDGE.match(word) and (word in other or other in word) for other in found):
                continue
        found.append(word)
    return found


def _grow(word: str, sentences: Sequence[str]) -> str:
    holding = [text for text in sentences if word in text]
    grows = True
    while grows and len(word) < LONGEST:
        grows = False
        for side in (1, -1):
            beside = Counter(_character_beside(text, word, side) for text in holding)
            [(character, times)] = beside.most_common(1)
            if EDGE.match(character) and times >= MOST * len(holding) and times > 1:
                word = word + character if side == 1 else character + word
                holding = [text for text in holding if word in text]
                grows = True
    return word


def _character_beside(text: str, word: str, side: int) -> str:
    place = text.find(word)
    return text[place + len(word) : place + len(word) + 1] if side == 1 else text[max(place - 1, 0) : place]
