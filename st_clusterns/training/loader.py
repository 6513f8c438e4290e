"""`ClusterDataLoader`: a DataLoader over plain sentences that clusters them for `ClusterNSLoss`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers import InputExample, SentenceTransformer
from torch.utils.data import DataLoader

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.training.sentences import check_sentences


class ClusterDataLoader(DataLoader[Any]):
    """A DataLoader over plain sentences for `model.fit`, which clusters them first.

    The clusters (attribute `clusters`) are noted on the model as `model.corpus_clusters`, where `ClusterNSLoss(model)`
    finds them; the next loader made for the model replaces the note.

    Args:
        sentences: the corpus: a list, a column of a table, a generator.
        model: embeds the corpus, and is the model that will be trained.
        batch_size: sentences per batch, 2 or more; also while embedding.
        n_clusters: number of clusters `K`. Default: chosen from the corpus (`CorpusClusters.fit`).
        seed: seed of the clustering and of the order. `model.fit` shuffles with a seed of its own.
        show_progress_bar: whether to show one while embedding.

    Raises:
        ValueError: if the sentences are no texts, or too few for a batch or for the clusters.

    Example:
        ::

            loader = ClusterDataLoader(sentences, model, batch_size=96)
            loss = ClusterNSLoss(model)
            model.fit(train_objectives=[(loader, loss)], epochs=1, steps_per_epoch=20, warmup_steps=0)

        Without `warmup_steps=0`, `fit` warms up over 10,000 steps and hardly changes the model.
    """

    def __init__(
        self,
        sentences: Iterable[str],
        model: SentenceTransformer,
        batch_size: int = 96,
        n_clusters: int | None = None,
        seed: int = 0,
        show_progress_bar: bool = True,
    ) -> None:
        sentences = check_sentences(sentences, batch_size)
        self.clusters = CorpusClusters.fit(
            sentences, model, n_clusters, seed, batch_size=batch_size, show_progress_bar=show_progress_bar
        )
        self.clusters.note_on(model)
        examples: Any = [InputExample(texts=[sentence]) for sentence in sentences]
        order = torch.Generator().manual_seed(seed)
        super().__init__(examples, batch_size=batch_size, shuffle=True, generator=order)
