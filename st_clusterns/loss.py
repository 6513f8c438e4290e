"""`ClusterNSLoss`: contrastive learning from plain sentences with negatives that know the topics.

One step on a batch of `B` rows (`K` clusters, `D` dimensions, `W` processes), after Deng et al. 2023:

1. Embed. One text column is encoded twice with independent dropout; the second view is the positive.
2. Clusters. Until they start, only step 4 runs, as `MultipleNegativesRankingLoss` has it. From then on each row has a
   cluster (its label, if the loader sent one, else the nearest centroid), and the centroids follow the batch.
3. False negatives: other rows of the same cluster, if the cluster is to be trusted. Hard negative: the row's second
   most similar centroid.
4. `contrastive`: cross-entropy of a row's positive among the batch's positives (without false negatives by default),
   the explicit negatives and the hard negatives (equation 5).
5. `false_negative`, times `margin_weight`: the pull of each row to its centroid, or what a model that needs it learns
   from shared words; as published, the bidirectional margin on the false negatives (equations 7 and 8).

`st_clusterns.presets.Choices` lists where the published method and the recommended one part.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from st_clusterns import distributed
from st_clusterns.batch import Batch
from st_clusterns.clusters import Clusters, check_finite
from st_clusterns.components import LossComponents
from st_clusterns.corpus import CorpusClusters, recall_corpus, unwrap
from st_clusterns.false_negatives import bidirectional_margin, centroid_pull, relation_divergence
from st_clusterns.presets import RECOMMENDED, Choices, find_preset
from st_clusterns.spelling import SPELLING_KEY
from st_clusterns.start import Start
from st_clusterns.word_overlap import token_vectors

logger = logging.getLogger(__name__)

DEFAULT_CLUSTERS = 128
TEACHER_WEIGHT, TEACHER_TEMPERATURE = 10.0, 0.1  # of shared words; see `st_clusterns.word_overlap`
TOPIC_TEMPERATURE, PLAIN_TEMPERATURE = 0.1, 0.05  # with trusted clusters, and without
VIEWS_KEY = "clusterns_two_views"
CITATION = """
@inproceedings{deng2023clusteringaware,
    title = {Clustering-Aware Negative Sampling for Unsupervised Sentence Representation},
    author = {Deng, Jinghao and Wan, Fanqi and Yang, Tao and Quan, Xiaojun and Wang, Rui},
    booktitle = {Findings of the Association for Computational Linguistics: ACL 2023},
    year = {2023},
    url = {https://aclanthology.org/2023.findings-acl.555},
}
"""


class ClusterNSLoss(nn.Module):
    """Contrastive loss whose negatives know the topics, for plain sentences without labels.

    Inputs, as the built-in losses have them:

    - one text column: each sentence is encoded twice with independent dropout, in one forward pass;
    - (anchor, positive) pairs; (anchor, positive, negative_1, ..., negative_n) tuples;
    - an optional label column: cluster numbers from 1 as `ClusterDataLoader` sends them (0: unknown). The published
      method makes its own clusters and takes no notice of it.

    Inside `MatryoshkaLoss`, lower dimensions see truncated centroids, and these move at the steps that include the
    full width. Inside `AdaptiveLayerLoss` and `Matryoshka2dLoss`, rows have the clusters of the last layer at all
    layers, and centroids move once a step.

    The recommended method, which is the default, keeps the idea and exchanges what did not work on real text:

    - Clusters come from the whole corpus, its embeddings joined with the words that its sentences share
      (`st_clusterns.words`): which words go together in this corpus is the one thing that the model does not know.
    - They have a measured trust; where the corpus is not made of clusters, none is trusted and the loss is
      `MultipleNegativesRankingLoss` (see `st_clusterns.corpus`). Only a model that judges worse than shared words, as
      a raw language model may, has its clusters from words, and if these are not to be trusted either, learns likeness
      from words (`st_clusterns.word_overlap`) behind two frozen layers: one whitens, one adds to the embedding which
      words a sentence has (`st_clusterns.spelling`).
    - Trusted clusters first put a frozen linear layer at the end of the model that turns down what sentences of one
      cluster differ in (`st_clusterns.topic_layer`).
    - False negatives leave the softmax, and each row is pulled to its own centroid by cross-entropy among all
      centroids: the neighbouring centroids are its hard negatives. A pull between rows lifts all cosines alike; this
      one has its counterweight in itself. It passes on to the encoder what the words told the clusters.

    What each is worth: V-measure of all-MiniLM-L6-v2 on four clustering sets, 20 steps of 96, 3 seeds where a spread
    is given, else one (`results/ablation`; `results/exploration` has what was found when each was chosen). The pull,
    or the margin in its place, makes the most difference, then words; the masking is within the noise, and the layer
    costs 1.9 on SearchSnippets and gains 2.3 on Biomedical. ::

                                                  StackOverflow  SearchSnippets  Biomedical      AgNews
        starting model                                     69.6            58.4        43.1        58.5
        in-batch contrastive                         67.3 ± 0.8      53.6 ± 4.4  42.5 ± 0.6  53.6 ± 1.7
        the default                                  78.8 ± 0.9      63.6 ± 0.6  47.3 ± 0.5  62.8 ± 0.6
        - clusters of embeddings alone                     70.9            64.2        44.2        62.0
        - no topic layer                                   78.1            65.5        45.0        62.9
        - no pull to centroids                             68.5            60.7        46.7        58.0
        - the margin in place of the pull                  78.2            64.9        45.7        62.0
        - false negatives stay in the softmax              78.1            63.1        47.0        62.8
        - topic layer alone, no training             72.0 ± 0.2      61.9 ± 0.9  46.5 ± 0.3  60.9 ± 0.6

    Args:
        model: the model to train.
        n_clusters: number of clusters `K`. Default: that of the corpus clusters, else 128.
        temperature: divides every cosine in a cross-entropy, above 0. Default: 0.1, and while no cluster is trusted
            0.05, that of `MultipleNegativesRankingLoss`.
        momentum: share of the way that centroids move towards a batch's members at each forward pass, 0 to 1.
            With gradient accumulation they move once per forward pass, not per optimiser step.
        start_similarity: clusters start once the mean in-batch cosine is at or below it, -1 to 1.
        margin_alpha: (margin only) a false negative should stay this far below the positive, in cosine.
        margin_beta: and fall at most this far below it, in cosine, `margin_alpha` or more.
        margin_weight: weight of `false_negative`: the margin, the pull to centroids, or 10 times the divergence from
            what shared words say; 0 or more, 0 turns it off.
        hard_negative_weight: multiplies a row's own hard negative in its denominator (its logarithm is added to the
            logit), 0 or more; 0 turns hard negatives off. Explicit negatives always count once.
        min_trust: clusters below this trust are treated as if their sentences had nothing in common, 0 to 1.
        gather_across_devices: score this process's rows against the rows of all processes.
        clusters: the corpus clusters to start from (`loader.clusters`, or those of `cluster_corpus`). Without it,
            those of a `ClusterDataLoader` made for the same model are taken, if there is but one.
        choices: where the published and the recommended method part; set by `from_preset`.

    Raises:
        ValueError: if a number is out of its range.

    Attributes:
        clusters: the state, a `Clusters` module: `centroids`, `trust`, `started`, `predict`, `partial_fit`, `seed`.
            It changes in training with gradients on, never by an evaluation.

    References:
        Deng et al., Clustering-Aware Negative Sampling for Unsupervised Sentence Representation, Findings of ACL 2023.

    Example:
        ::

            loader = ClusterDataLoader(sentences, model, batch_size=128)
            model.fit(train_objectives=[(loader, ClusterNSLoss(model))], epochs=1)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        n_clusters: int | None = None,
        temperature: float | None = None,
        momentum: float = 0.02,
        start_similarity: float = 0.4,
        margin_alpha: float = 0.0,
        margin_beta: float = 0.3,
        margin_weight: float = 1.0,
        hard_negative_weight: float = 0.0,
        min_trust: float = 0.2,
        gather_across_devices: bool = False,
        *,
        clusters: CorpusClusters | None = None,
        choices: Choices = RECOMMENDED,
    ) -> None:
        super().__init__()
        _check_numbers(
            TOPIC_TEMPERATURE if temperature is None else temperature,
            start_similarity,
            margin_alpha,
            margin_beta,
            margin_weight,
            hard_negative_weight,
            min_trust,
        )
        self.model = model
        self._temperature = temperature
        self.margin_alpha = margin_alpha
        self.margin_beta = margin_beta
        self.margin_weight = margin_weight
        self.hard_negative_weight = hard_negative_weight
        self.min_trust = min_trust
        self.gather_across_devices = gather_across_devices
        self.choices = choices
        if clusters is not None and choices.start_from_one_batch:
            raise ValueError(
                "clusters=... was given, but the published method starts from one batch: leave it out, or change "
                "choices.start_from_one_batch."
            )
        self._found_corpus = clusters is None
        self.corpus = None if choices.start_from_one_batch else clusters or recall_corpus(model)
        if self.corpus is not None and n_clusters not in (None, self.corpus.n_clusters):
            raise ValueError(
                f"n_clusters={n_clusters}, but the corpus was clustered into {self.corpus.n_clusters}: leave "
                "n_clusters out, or cluster the corpus into as many (ClusterDataLoader(..., n_clusters=...))."
            )
        k = self.corpus.n_clusters if self.corpus else DEFAULT_CLUSTERS if n_clusters is None else n_clusters
        self.clusters = Clusters(k, _dimension(model), momentum, to_sum=choices.move_to_sum)
        self.register_buffer("token_weights", torch.zeros(0), persistent=False)
        self.start = Start(k, self.clusters.centroids.shape[1], start_similarity, choices.start_from_one_batch)
        self.reset()
        self._warned_equal_views = False
        self._agreed = False
        self._words: Tensor | None = None  # see `Batch.words`
        self._ids: Tensor | None = None  # the clusters of the last batch's rows, from 1, (B,)

    def __setattr__(self, name: str, value: Any) -> None:
        """Forget what training taught the clusters when the trainer puts in another model (`model_init`)."""
        other = name == "model" and "model" in self._modules and unwrap(value) is not unwrap(self.model)
        super().__setattr__(name, value)
        if other:
            self.reset()

    @classmethod
    def from_preset(cls, model: SentenceTransformer, name: str, **overrides: Any) -> ClusterNSLoss:
        """Make the loss with a preset's numbers and choices.

        Args:
            model: the model to train.
            name: one of `st_clusterns.presets.PRESETS`, such as "paper/bert-base".
            overrides: any other argument of the constructor; it wins over the preset.

        Raises:
            ValueError: for an unknown name, listing the known ones.
        """
        preset = find_preset(name)
        return cls(model, **{**preset.settings, "choices": preset.choices, **overrides})

    def reset(self) -> None:
        """Forget what training taught the clusters: back to the corpus's, or to not started (for `model_init`)."""
        self.clusters.reset()
        self.start.reset()
        if self.corpus is not None:
            self.corpus.append_layers_to(unwrap(self.model))
            self.clusters.seed(**self.corpus.tensors())
            weights = () if self.corpus.token_weights is None else self.corpus.token_weights
            self.token_weights = torch.as_tensor(weights, dtype=torch.float32, device=self.clusters.centroids.device)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> LossComponents:
        """Embed the columns and return `{"contrastive": ..., "false_negative": ...}`, both scalars."""
        columns = list(sentence_features)
        embeddings = self._embed_twice(columns[0]) if len(columns) == 1 else [self._embed(column) for column in columns]
        with self._reading(columns[0]):
            return self.compute_loss_from_embeddings(embeddings, labels)

    @contextmanager
    def _reading(self, features: dict[str, Tensor]) -> Iterator[None]:
        """Look at the anchors' tokens as long as the loss of their embeddings is computed, if words are the teacher."""
        if len(self.token_weights) and _is_padded(features):
            self._words = token_vectors(features, self.token_weights)
        try:
            yield
        finally:
            self._words = None

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> LossComponents:
        """Compute the loss of a batch; in training, the clusters follow it.

        Args:
            embeddings: anchors, positives and any number of negatives, each (B, D).
            labels: cluster numbers from 1, 0 for unknown, (B,).

        Returns:
            `contrastive` and `false_negative` (already weighted), scalars. The latter is 0 before the start.

        Raises:
            ValueError: for fewer than two columns, NaN or Inf in a row, or labels that fit no cluster.
        """
        with self._full_precision():
            batch = self._prepare(embeddings, labels)
            return self._terms(batch, slice(0, len(batch.anchors)))

    def _embed(self, features: dict[str, Tensor]) -> Tensor:
        # Wrappers come again with the same features, in which the spelling layer has left what CLS pooling would take.
        features.pop(SPELLING_KEY, None)
        embeddings: Tensor = self.model(features)["sentence_embedding"]
        return embeddings

    def _embed_twice(self, features: dict[str, Tensor]) -> list[Tensor]:
        """Encode one column twice, in one merged forward pass where rows are padded sequences."""
        # Kept with the features: wrappers like AdaptiveLayerLoss pass state from call to call through the dict.
        if VIEWS_KEY not in features:
            views = (
                [{k: _repeat_rows(v) for k, v in features.items()}]
                if _is_padded(features)
                else [dict(features) for _ in range(2)]
            )
            features[VIEWS_KEY] = views  # type: ignore[assignment]
        rows = torch.cat([self._embed(view) for view in features[VIEWS_KEY]])
        first, second = rows.chunk(2)
        self._check_views(first, second)
        return [first, second]

    def _check_views(self, first: Tensor, second: Tensor) -> None:
        if self._in_training() and not self._warned_equal_views and torch.equal(first, second):
            self._warned_equal_views = True
            logger.warning(
                "Both views of a sentence are equal, so there is little to learn: the model has no dropout in "
                "training. Train on (anchor, positive) pairs, or use a model with dropout."
            )

    def _full_precision(self) -> AbstractContextManager[object]:
        # Cosines of 1 part in 256 (bfloat16) would decide clusters and, divided by a temperature of 0.05, the loss.
        device = self.clusters.centroids.device.type
        return nullcontext() if device == "mps" else torch.autocast(device, enabled=False)

    def _in_training(self) -> bool:
        # `trainer.evaluate()` leaves the loss in training mode; the model and autograd tell the truth.
        return self.model.training and torch.is_grad_enabled()

    def _agree(self, size: int, device: torch.device) -> None:
        """Refuse processes that cannot work together; at first, give all of them the state of rank 0."""
        if distributed.world_size() == 1 or not (self._in_training() or self.gather_across_devices):
            return  # nothing is exchanged, so an evaluation may run on one process alone
        distributed.check_same(
            size, "The number of rows of a batch", device, "For a last, smaller batch pass dataloader_drop_last=True."
        )
        if not self._agreed:
            distributed.check_same(
                self.clusters.n_clusters, "n_clusters", device, "Make the loss with the same clusters on all of them."
            )
            distributed.check_same(
                len(self.token_weights),
                "The number of token weights",
                device,
                "Give them the same sentences and model.",
            )
            for buffer in (self.token_weights, *self.clusters.buffers(), *self.start.buffers()):
                distributed.broadcast(buffer)
            self._agreed = True

    def _check_labels(self, labels: Tensor | None, size: int) -> Tensor | None:
        """Adopt the corpus that the labels speak of, and refuse labels that cannot be its cluster numbers."""
        if labels is None or self.choices.start_from_one_batch:  # the published method makes its own clusters
            return None
        if labels.shape != (size,):
            raise ValueError(
                f"labels must be one cluster number a row, of the shape ({size},), got {tuple(labels.shape)}."
            )
        if self.corpus is None:
            corpus = recall_corpus(self.model)
            if corpus is None:
                raise ValueError(
                    "A label column reached ClusterNSLoss, but it has no corpus clusters that the labels could be "
                    "numbers of: pass clusters=cluster_corpus(embeddings), or remove the column."
                )
            if corpus.n_clusters != self.clusters.n_clusters:
                raise ValueError(
                    f"The loss was made with {self.clusters.n_clusters} clusters before the corpus was clustered into "
                    f"{corpus.n_clusters}: make the ClusterDataLoader first."
                )
            if not self._in_training():
                return None  # an evaluation changes nothing
            self.corpus = corpus
            self.reset()
        elif self._found_corpus and not self.corpus.numbers_like(recall_corpus(self.model) or self.corpus):
            raise ValueError(
                "The loss has the clusters of one data loader, and labels come that may be the numbers of another: "
                "make the loss after the loader that it is trained with, or with clusters=loader.clusters."
            )
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        if not whole or labels.min() < 0 or labels.max() > self.clusters.n_clusters:
            raise ValueError(
                f"labels must be whole cluster numbers from 1 to {self.clusters.n_clusters} (0: unknown), got "
                f"{labels.dtype} values from {labels.min().item()} to {labels.max().item()}."
            )
        return labels

    def _prepare(self, embeddings: list[Tensor], labels: Tensor | None) -> Batch:
        """Gather and normalise the columns, let the clusters follow, and look the batch up in them."""
        if len(embeddings) < 2:
            raise ValueError(f"Expected an anchor and a positive at least, got {len(embeddings)} column(s).")
        columns = [e.to(torch.promote_types(e.dtype, torch.float32)) for e in embeddings]
        size = len(columns[0])
        self._agree(size, columns[0].device)
        anchors = columns[0]
        others = [distributed.gather_with_grad(c) if self.gather_across_devices else c for c in columns[1:]]
        offset = distributed.rank() * size if self.gather_across_devices else 0
        own = torch.arange(offset, offset + size, device=anchors.device)
        if at_lower_layer(self.model):
            labels, serving = self._ids, self._ids is not None
        else:
            labels = self._check_labels(labels, size)
            serving = self._follow(anchors.detach(), columns[1].detach(), labels)
        batch = Batch(
            anchors=F.normalize(anchors, dim=1),
            positives=F.normalize(others[0], dim=1),
            negatives=F.normalize(torch.cat(others[1:]), dim=1) if others[1:] else anchors[:0].detach(),
            own=own,
            temperature=self.temperature,
            words=self._words,
        )
        if serving:
            self._look_up(batch, anchors.detach(), labels)
        self._ids = None if batch.clusters is None else batch.clusters[own] + 1
        return batch

    def _follow(self, anchors: Tensor, positives: Tensor, labels: Tensor | None) -> bool:
        """Let the clusters follow the batch of all processes; return whether they serve in this step."""
        serving = bool(self.clusters.started)
        width, full = anchors.shape[1], self.clusters.centroids.shape[1]
        if width > full:
            raise ValueError(
                f"The embeddings have {width} dimensions, the clusters {full}. A model with truncate_dim truncates in "
                "encode() only: set model.truncate_dim = None before training."
            )
        whole = width == full  # not a Matryoshka truncation
        if self._in_training() and whole:
            anchors, positives = distributed.gather(anchors), distributed.gather(positives)
            check_finite(positives, "The second column's embeddings")
            if serving:
                ids = self._cluster_ids(anchors, _gather_labels(labels))
                self.clusters.partial_fit(anchors, ids)  # looks for NaN on its own
            else:
                check_finite(anchors, "The first column's embeddings")
                self.start.offer(anchors, positives, self.clusters)
        return serving

    def _look_up(self, batch: Batch, anchors: Tensor, labels: Tensor | None) -> None:
        """Fill in the clusters, their trust and the hard negatives of the batch's rows."""
        if self.gather_across_devices:
            anchors, labels = distributed.gather(anchors), _gather_labels(labels)
        batch.clusters = self._cluster_ids(anchors, labels)
        batch.trusted = self.clusters.trust[batch.clusters] >= self.min_trust
        batch.centroids = self.clusters.directions(anchors)
        if self.hard_negative_weight > 0:
            second = self.clusters.similarity(anchors).scatter(1, batch.clusters[:, None], -torch.inf).argmax(dim=1)
            batch.hard_negatives = batch.centroids[second]

    def _cluster_ids(self, anchors: Tensor, labels: Tensor | None) -> Tensor:
        """Take each row's cluster from its label, else from the nearest centroid: (M, D), (M,) -> (M,)."""
        if labels is not None and labels.min() > 0:
            return labels.long() - 1  # nothing to look up
        nearest = self.clusters.predict(anchors)
        return nearest if labels is None else torch.where(labels > 0, labels - 1, nearest)

    def _terms(self, batch: Batch, rows: slice) -> LossComponents:
        """Return the share that some rows of this process have in the loss."""
        anchors, own = batch.anchors[rows], batch.own[rows]
        cosine = anchors @ batch.positives.T  # (R, M)
        # (R, M); the pull to centroids asks for no pairs, so none are looked for
        pairs = self.choices.pull_rows_together or not self.choices.keep_false_negatives
        same = batch.false_negatives(rows) if pairs else None
        share = 1 / len(batch.anchors)
        return LossComponents(
            contrastive=self._contrastive(batch, anchors, own, cosine, same) * share,
            false_negative=self._false_negative(batch, rows, cosine, same) * share,
        )

    def _contrastive(self, batch: Batch, anchors: Tensor, own: Tensor, cosine: Tensor, same: Tensor | None) -> Tensor:
        """Cross-entropy of the positive among all candidates, summed over the rows."""
        if same is not None and not self.choices.keep_false_negatives:
            cosine = cosine.masked_fill(same, -torch.inf)
        logits = [cosine]  # (R, M)
        if len(batch.negatives):
            logits.append(anchors @ batch.negatives.T)  # (R, n*M)
        if batch.hard_negatives is not None:
            logits.append(self._hard_negative_cosine(batch, anchors, own))
        candidates = torch.cat(logits, dim=1) if len(logits) > 1 else cosine
        return F.cross_entropy(candidates / batch.temperature, own, reduction="sum")

    def _hard_negative_cosine(self, batch: Batch, anchors: Tensor, own: Tensor) -> Tensor:
        """Cosines with the hard negatives, the row's own weighted: (R, M) if they are shared, else (R, 1)."""
        hard_negatives = batch.hard_negatives
        assert hard_negatives is not None
        weight = batch.temperature * math.log(self.hard_negative_weight)  # in the logit: log(weight)
        if not self.choices.share_hard_negatives:
            return (anchors * hard_negatives[own]).sum(dim=1, keepdim=True) + weight
        is_own = torch.arange(len(hard_negatives), device=own.device) == own[:, None]
        return anchors @ hard_negatives.T + weight * is_own

    def _false_negative(self, batch: Batch, rows: slice, cosine: Tensor, same: Tensor | None) -> Tensor:
        """What keeps related rows together, weighted, summed over the rows."""
        anchors, own = batch.anchors[rows], batch.own[rows]
        if self.margin_weight == 0:
            return cosine.new_zeros(())
        if batch.words is not None:
            here = own - batch.own[0]
            taught = cosine[:, batch.own], batch.words[rows] @ batch.words.T  # by the rows of this process
            divergence = relation_divergence(*taught, here, batch.temperature, TEACHER_TEMPERATURE)
            return self.margin_weight * TEACHER_WEIGHT * divergence.sum()
        if batch.clusters is None:
            return cosine.new_zeros(())
        if self.choices.pull_rows_together:
            assert same is not None  # as clusters are known
            return self.margin_weight * self._margin(cosine, own, same)
        assert batch.trusted is not None
        assert batch.centroids is not None
        pull = centroid_pull(anchors, batch.centroids, batch.clusters[own], batch.temperature)
        return self.margin_weight * (pull * batch.trusted[own]).sum()

    def _margin(self, cosine: Tensor, own: Tensor, same: Tensor) -> Tensor:
        """Bidirectional margin of the false negatives, summed over the rows' means."""
        row, column = same.nonzero(as_tuple=True)  # P pairs, few of the R*M
        positive = cosine.gather(1, own[:, None]).squeeze(1)  # (R,)
        pairs, margins = cosine[row, column][:, None], (self.margin_alpha, self.margin_beta)
        penalty = bidirectional_margin(pairs, positive[row], *margins).squeeze(1)  # (P,)
        if self.choices.average_margin_over_batch:  # in the authors' code other pairs count, as the constant alpha
            return (penalty.sum() + self.margin_alpha * (same.numel() - len(row))) / same.shape[1]
        return (penalty / same.sum(dim=1)[row]).sum()

    @property
    def temperature(self) -> float:
        """What divides the cosines."""
        if self._temperature is not None:
            return self._temperature
        return TOPIC_TEMPERATURE if bool((self.clusters.trust >= self.min_trust).any()) else PLAIN_TEMPERATURE

    @property
    def start_similarity(self) -> float:
        """The mean in-batch cosine at which the clusters start."""
        return self.start.similarity

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card."""
        return {
            "n_clusters": self.clusters.n_clusters,
            "temperature": self.temperature,
            "momentum": self.clusters.momentum,
            "start_similarity": self.start_similarity,
            "margin_alpha": self.margin_alpha,
            "margin_beta": self.margin_beta,
            "margin_weight": self.margin_weight,
            "hard_negative_weight": self.hard_negative_weight,
            "min_trust": self.min_trust,
            "gather_across_devices": self.gather_across_devices,
            **{f.name: getattr(self.choices, f.name) for f in fields(self.choices)},
        }

    @property
    def citation(self) -> str:
        """The paper's BibTeX entry, for the model card."""
        return CITATION


def layer_decorator(model: object) -> Any | None:
    """Return what `AdaptiveLayerLoss` (or `Matryoshka2dLoss`) has put in the transformer's place while it runs."""
    inner = unwrap(model)
    forward = inner[0].forward if isinstance(inner, nn.Sequential) else None
    return forward if hasattr(forward, "layer_idx") else None


def at_lower_layer(model: object) -> bool:
    """Whether this is a further call for one batch, whose rows have the clusters that they have at the last layer."""
    decorator = layer_decorator(model)
    return decorator is not None and decorator.layer_idx is not None


def _is_padded(features: dict[str, Any]) -> bool:
    return "attention_mask" in features and "cu_seq_lens_q" not in features


def _repeat_rows(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.ndim >= 2 else value


def _gather_labels(labels: Tensor | None) -> Tensor | None:
    return None if labels is None else distributed.gather(labels)


def _dimension(model: SentenceTransformer) -> int:
    # The old name is the only one before 5.4; the new one is the only one that warns of nothing.
    read = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    dimension = read()
    if dimension is None:
        raise ValueError("The model does not know its embedding dimension (get_embedding_dimension() is None).")
    return int(dimension)


def _check_numbers(
    temperature: float,
    start_similarity: float,
    margin_alpha: float,
    margin_beta: float,
    margin_weight: float,
    hard_negative_weight: float,
    min_trust: float,
) -> None:
    rules = [
        ("temperature", temperature, 0 < temperature < math.inf, "above 0"),
        ("start_similarity", start_similarity, -1 <= start_similarity <= 1, "between -1 and 1"),
        ("margin_alpha", margin_alpha, 0 <= margin_alpha < math.inf, "0 or more"),
        ("margin_beta", margin_beta, margin_alpha <= margin_beta, f"margin_alpha ({margin_alpha}) or more"),
        ("margin_weight", margin_weight, 0 <= margin_weight < math.inf, "0 or more"),
        ("hard_negative_weight", hard_negative_weight, 0 <= hard_negative_weight < math.inf, "0 or more"),
        ("min_trust", min_trust, 0 <= min_trust <= 1, "between 0 and 1"),
    ]
    for name, value, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name} must be {rule}, got {value}.")
