"""Peers: SpRAy and Domino, short implementations from the papers, and baselines of label errors."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from sklearn.cluster import SpectralClustering
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import kneighbors_graph

from convscope.diagnosis.clustering import principal_components, standardize
from convscope.diagnosis.observations import Observations

CLEANLAB = """
import sys, json, numpy as np
from cleanlab.rank import get_label_quality_scores
data = np.load(sys.argv[1])
print(json.dumps({m: get_label_quality_scores(data["labels"], data["probabilities"], method=m).tolist()
                  for m in ("self_confidence", "normalized_margin")}))
"""


def spray(observations: Observations, neighbours: int = 10, most: int = 8) -> list[np.ndarray]:
    """Cluster the heatmaps of each class, and return clusters by how well they are told apart.

    Spectral clustering on the graph of nearest neighbours, with as many clusters as the largest gap of eigenvalues says
    (Lapuschkin et al., Nature Communications 2019), ranked by Fisher's discriminant between a cluster and the rest of
    its class (Anders et al., Finding and removing Clever Hans, Information Fusion 2022).
    """
    ranked: list[tuple[float, np.ndarray]] = []
    for label in np.unique(observations.labels[observations.labels >= 0]):
        rows = np.flatnonzero(observations.labels == label)
        maps = np.asarray(observations.evidence[rows], np.float32).reshape(len(rows), -1)
        maps = maps / np.maximum(np.abs(maps).max(1, keepdims=True), 1e-9)
        graph = kneighbors_graph(maps, min(neighbours, len(rows) - 1)).toarray()
        graph = np.maximum(graph, graph.T)
        degree = 1 / np.sqrt(graph.sum(1))
        values = np.linalg.eigvalsh(np.eye(len(rows)) - degree[:, None] * graph * degree)
        count = int(np.diff(values[: most + 1])[1:].argmax()) + 2
        clusters = SpectralClustering(count, affinity="precomputed", random_state=0).fit_predict(graph)
        components = principal_components(maps, 10, np.random.default_rng(0))
        for cluster in range(count):
            members = clusters == cluster
            if 5 <= members.sum() <= len(rows) - 5:
                projected = LinearDiscriminantAnalysis().fit(components, members).decision_function(components)
                gap = projected[members].mean() - projected[~members].mean()
                spread = projected[members].var() + projected[~members].var()
                ranked.append((gap**2 / max(spread, 1e-9), rows[members]))
    return [members for _, members in sorted(ranked, key=lambda pair: -pair[0])]


def domino(observations: Observations, slices: int = 25, weight: float = 10.0, steps: int = 60) -> list[np.ndarray]:
    """Fit the error-aware mixture of Domino, and return its slices by how far labels exceed predictions.

    A mixture over features (Gaussian, diagonal), labels and predicted probabilities (categorical), whose
    log-likelihoods count `weight` times, by expectation maximisation (Eyuboglu et al., ICLR 2022, section 5).
    """
    rows = np.flatnonzero(observations.labels >= 0)
    rng = np.random.default_rng(0)
    z = principal_components(standardize(observations.features[rows]), 16, rng).astype(float)
    classes = observations.logits.shape[1]
    y = np.eye(classes)[observations.labels[rows]]
    p = np.exp(observations.logits[rows] - observations.logits[rows].max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    # The start: slices of one cell of the confusion matrix, as in the authors' implementation.
    cells = observations.labels[rows] * classes + p.argmax(1)
    order = rng.permutation(np.unique(cells))
    responsibilities = np.full((len(rows), slices), 1e-3)
    for s in range(slices):
        responsibilities[cells == order[s % len(order)], s] += rng.random()
    responsibilities /= responsibilities.sum(1, keepdims=True)
    for _ in range(steps):
        mass = responsibilities.sum(0) + 1e-9
        mean = responsibilities.T @ z / mass[:, None]
        variance = responsibilities.T @ z**2 / mass[:, None] - mean**2 + 1e-2
        rate_y, rate_p = (responsibilities.T @ v / mass[:, None] + 1e-6 for v in (y, p))
        gaussian = -0.5 * (((z[:, None] - mean) ** 2) / variance + np.log(variance)).sum(2)
        log = np.log(mass) + gaussian + weight * (y @ np.log(rate_y).T + p @ np.log(rate_p).T)
        responsibilities = np.exp(log - log.max(1, keepdims=True))
        responsibilities /= responsibilities.sum(1, keepdims=True)
    excess = np.abs(rate_y - rate_p).max(1)
    members = responsibilities.argmax(1)
    by_excess = [rows[members == s] for s in np.argsort(-excess, kind="stable")]
    return [images for images in by_excess if len(images) >= 5]


def label_scores(observations: Observations, cleanlab: Path | None) -> dict[str, np.ndarray]:
    """Return the label quality (N,) by baselines, and by cleanlab if a Python interpreter that has it is given."""
    p = np.exp(observations.logits - observations.logits.max(1, keepdims=True)).astype(float)
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(p))
    self_confidence = p[rows, observations.labels]
    others = p.copy()
    others[rows, observations.labels] = -1
    scores = {"self-confidence": self_confidence, "normalised margin": self_confidence - others.max(1)}
    if cleanlab is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.npz"
            np.savez(path, labels=observations.labels, probabilities=p)
            command = [str(cleanlab), "-c", CLEANLAB, str(path)]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        scores |= {f"cleanlab, {name}": np.array(values) for name, values in json.loads(answer).items()}
    return scores


def average_precision(is_wrong: np.ndarray, quality: np.ndarray) -> float:
    """Return the average precision of low quality as a sign of a wrong label."""
    ordered = is_wrong[np.argsort(quality, kind="stable")]
    return float((np.cumsum(ordered) / np.arange(1, len(ordered) + 1))[ordered].mean())
