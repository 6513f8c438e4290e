"""Train sentence embeddings from plain sentences, with negatives that know the topics."""

from st_clusterns.clustering.corpus_clusters import CorpusClusters
from st_clusterns.clustering.embedding import embed_corpus
from st_clusterns.clustering.n_clusters import choose_n_clusters
from st_clusterns.losses.cached import CachedClusterNSLoss
from st_clusterns.losses.clusterns import ClusterNSLoss
from st_clusterns.losses.presets import PRESETS
from st_clusterns.losses.published import PublishedClusterNSLoss
from st_clusterns.training.adapt import adapt
from st_clusterns.training.audit import audit
from st_clusterns.training.callbacks import ClusterStateCallback
from st_clusterns.training.diagnostics import log_clusters
from st_clusterns.training.loader import ClusterDataLoader
from st_clusterns.training.report import write_report
from st_clusterns.training.sampler import ClusterBatchSampler
from st_clusterns.training.sentences import SentenceFile
from st_clusterns.training.trainer import Recipe
from st_clusterns.training.views import TextViews, views_dataset

__version__ = "0.2.0"

__all__ = [
    "PRESETS",
    "CachedClusterNSLoss",
    "ClusterBatchSampler",
    "ClusterDataLoader",
    "ClusterNSLoss",
    "ClusterStateCallback",
    "CorpusClusters",
    "PublishedClusterNSLoss",
    "Recipe",
    "SentenceFile",
    "TextViews",
    "adapt",
    "audit",
    "choose_n_clusters",
    "embed_corpus",
    "log_clusters",
    "views_dataset",
    "write_report",
]
