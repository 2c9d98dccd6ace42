"""t-SNE of the features that the classifiers see (van der Maaten and Hinton 2008)."""

import numpy as np

LEAST = 8  # images: of fewer, a picture of neighbourhoods says nothing


def embed(features: np.ndarray) -> np.ndarray | None:
    """Features ``(M, F)`` in two dimensions ``(M, 2)``, or None where that cannot be done: fewer
    than eight images, a NaN, or all of them equal.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    x = features.astype(np.float32)
    if len(x) < LEAST or not np.isfinite(x).all():
        return None
    # By comparison: the mean of equal values rounds, and t-SNE of what is left would crash.
    if (x == x[0]).all():
        return None
    x = x - x.mean(0)
    scale = float(np.abs(x).max())
    from sklearn.manifold import TSNE

    # Larger features would overflow the squares of their distances; t-SNE knows no scale.
    tsne = TSNE(
        perplexity=min(30.0, (len(x) - 1) / 3), init="pca" if x.shape[1] > 1 else "random",
        random_state=0,
    )  # fmt: skip
    return tsne.fit_transform(x / scale)
