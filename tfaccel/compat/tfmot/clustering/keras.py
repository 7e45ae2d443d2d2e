"""`tfmot.clustering.keras`, name by name."""

from tfaccel.compat.clustering import (
    CentroidInitialization,
    ClusterableLayer,
    ClusterWeights,
    cluster_scope,
    cluster_weights,
    strip_clustering,
)
from tfaccel.compat.clustering_callbacks import ClusteringSummaries

__all__ = [
    "CentroidInitialization",
    "ClusterWeights",
    "ClusterableLayer",
    "ClusteringSummaries",
    "cluster_scope",
    "cluster_weights",
    "strip_clustering",
]
