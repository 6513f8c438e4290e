"""Train sentence embeddings from plain sentences, with negatives that know the topics."""

from st_clusterns.cached import CachedClusterNSLoss
from st_clusterns.callbacks import ClusterStateCallback, ReclusterCallback
from st_clusterns.clusters import Clusters
from st_clusterns.corpus import CorpusClusters, cluster_corpus
from st_clusterns.embeddings import embed_corpus
from st_clusterns.loader import ClusterDataLoader
from st_clusterns.loss import ClusterNSLoss
from st_clusterns.presets import PRESETS
from st_clusterns.sampler import ClusterBatchSampler

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CachedClusterNSLoss",
    "ClusterBatchSampler",
    "ClusterDataLoader",
    "ClusterNSLoss",
    "ClusterStateCallback",
    "Clusters",
    "CorpusClusters",
    "ReclusterCallback",
    "cluster_corpus",
    "embed_corpus",
]
