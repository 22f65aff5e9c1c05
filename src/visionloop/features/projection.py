"""Embeddings to points in the plane. Pure: the same input and seed give the same points.

Dimensions: n images, d features.
"""

from typing import Literal

import numpy as np

from visionloop.features.neighbours import FloatArray, check_vectors, find_neighbours

Method = Literal["auto", "pca", "tsne"]

# t-SNE of so many images takes about half a minute. The other images are placed between their nearest of these.
MAX_TSNE = 2000
MIN_TSNE = 8
NUM_COMPONENTS = 50
PERPLEXITY = 30.0
NUM_NEAREST = 3


def project(embedding_nd: FloatArray, method: Method = "auto", *, seed: int = 0) -> tuple[FloatArray, str]:
    """Return points (n, 2) between -1 and 1, and how they were computed, in words. `auto`: t-SNE from 8 images on.

    Vectors are scaled to length 1 first, so near points have a small cosine distance. Raises DatasetError.
    """
    check_vectors(embedding_nd, embedding_nd)
    unit_nd = embedding_nd / np.maximum(np.linalg.norm(embedding_nd, axis=1, keepdims=True), 1e-12)
    if method == "pca" or len(unit_nd) < MIN_TSNE:
        return _to_square(compute_pca(unit_nd, 2)), "principal components"
    number = len(unit_nd)
    sample = np.unique(np.linspace(0, number - 1, min(number, MAX_TSNE)).round().astype(np.int64))
    place_s2 = compute_tsne(unit_nd[sample], seed)
    if len(sample) == number:
        return _to_square(place_s2), "t-SNE"
    others = np.setdiff1d(np.arange(number), sample)
    distance_mk, row_mk = find_neighbours(unit_nd[others], unit_nd[sample], NUM_NEAREST)
    weight_mk = 1 / (distance_mk + 1e-6)
    weight_mk /= weight_mk.sum(axis=1, keepdims=True)
    place_n2 = np.empty((number, 2), np.float32)
    place_n2[sample] = place_s2
    place_n2[others] = (weight_mk[:, :, None] * place_s2[row_mk]).sum(axis=1)
    words = f"t-SNE of {len(sample):,} images, the other {len(others):,} among their nearest of these"
    return _to_square(place_n2), words


def compute_pca(unit_nd: FloatArray, num_components: int) -> FloatArray:
    """Return the first principal components (n, num_components); zeros where there are fewer."""
    from sklearn.decomposition import PCA

    number = min(num_components, *unit_nd.shape)
    out = np.zeros((len(unit_nd), num_components), np.float32)
    if len(unit_nd) > 1 and (unit_nd != unit_nd[0]).any():  # if all vectors are equal, the zeros stay
        solver = "covariance_eigh" if len(unit_nd) > unit_nd.shape[1] else "full"
        out[:, :number] = PCA(number, svd_solver=solver).fit_transform(unit_nd)
    return out


def compute_tsne(unit_nd: FloatArray, seed: int) -> FloatArray:
    """Return the t-SNE (van der Maaten and Hinton, 2008) of some vectors, started from their principal components."""
    from sklearn.manifold import TSNE

    reduced = compute_pca(unit_nd, min(NUM_COMPONENTS, unit_nd.shape[1]))
    if not reduced.std():
        return np.zeros((len(unit_nd), 2), np.float32)
    perplexity = min(PERPLEXITY, (len(unit_nd) - 1) / 3)
    model = TSNE(2, perplexity=perplexity, init="pca", random_state=seed)
    return np.asarray(model.fit_transform(reduced), np.float32)


def _to_square(place_n2: FloatArray) -> FloatArray:
    """Centre points and scale both axes alike, so that the longer one goes from -1 to 1."""
    low, high = place_n2.min(axis=0), place_n2.max(axis=0)
    span = float((high - low).max()) / 2
    return np.asarray((place_n2 - (low + high) / 2) / (span or 1.0), np.float32)
