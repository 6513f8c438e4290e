"""`ClusterDataLoader`: a DataLoader over plain sentences that clusters them for `ClusterNSLoss`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sentence_transformers import InputExample, SentenceTransformer
from torch.utils.data import DataLoader

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.clustering.embedding import embed_corpus
from st_clusterns.models import check_trainable, default_route, resolve_prompt
from st_clusterns.training.sentences import check_sentences
from st_clusterns.training.views import views_dataset


class ClusterDataLoader(DataLoader[Any]):
    """A DataLoader over plain sentences for `model.fit`, which clusters them first.

    It gives the rows of `views_dataset`, sentences or (view, sentence) pairs, the same in all epochs.

    The clusters (attribute `clusters`) are noted on the model as `model.corpus_clusters`, where `ClusterNSLoss(model)`
    finds them; the next loader made for the model replaces the note.

    Args:
        sentences: the corpus: a list, a column of a table, a generator.
        model: embeds the corpus, and is the model that will be trained.
        batch_size: sentences per batch, 2 or more; also while embedding.
        n_clusters: number of clusters `K`. Default: chosen from the corpus (`CorpusClusters.fit`).
        seed: seed of the clustering, the views and the order. `model.fit` shuffles with a seed of its own.
        show_progress_bar: whether to show one while embedding.
        prompt: put before each sentence, in the clusters and in the training; "" for nothing.
        prompt_name: its name among `model.prompts`, in place of `prompt`. Default: the model's default prompt.

    Raises:
        ValueError: if the sentences are no texts, or too few for a batch or for the clusters, or if `fit` cannot train
            the model as it is, with the prompt.

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
        prompt: str | None = None,
        prompt_name: str | None = None,
    ) -> None:
        sentences = check_sentences(sentences, batch_size)
        check_trainable(model)
        prompt = resolve_prompt(model, prompt, prompt_name)
        _check_fit(model, sentences[0], prompt)
        settings: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        self.clusters = CorpusClusters.fit(sentences, model, n_clusters, seed, prompt=prompt, **settings)
        self.clusters.note_on(model)
        rows = views_dataset(sentences, self.clusters, seed=seed)
        examples: Any = [InputExample(texts=[prompt + text for text in row.values()]) for row in rows]
        order = torch.Generator().manual_seed(seed)
        super().__init__(examples, batch_size=batch_size, shuffle=True, generator=order)


def _check_fit(model: SentenceTransformer, sentence: str, prompt: str) -> None:
    """Refuse, by a `ValueError`, what `model.fit` cannot pass on: a route, and a prompt that is more than more text."""
    route = default_route(model)
    if route is not None:
        raise ValueError(
            "model.fit cannot tell a Router its route: train with SentenceTransformerTrainer, "
            f'router_mapping={{"view": {route!r}, "sentence": {route!r}}} in its arguments and '
            "ClusterNSLoss(model, clusters)."
        )
    if prompt:
        with_prompt = embed_corpus([sentence], model, show_progress_bar=False, prompt=prompt)
        as_text = embed_corpus([prompt + sentence], model, show_progress_bar=False, prompt="")
        if not np.allclose(with_prompt, as_text, atol=1e-4):
            raise ValueError(
                f"The model treats the prompt {prompt!r} as more than text (Pooling(include_prompt=False), or a chat "
                "template), which model.fit cannot pass on: train with SentenceTransformerTrainer, "
                "prompts=clusters.prompt in its arguments and ClusterNSLoss(model, clusters)."
            )
