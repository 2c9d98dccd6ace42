"""Embed features in two dimensions by t-SNE (van der Maaten and Hinton 2008)."""

import numpy as np

_MIN_IMAGES = 8  # fewer images form no neighborhoods


def embed(features: np.ndarray) -> np.ndarray | None:
    """Return a t-SNE map (M, 2) of features (M, F).

    Returns:
        None if there are fewer than eight images, if a feature is NaN or infinite, or if all images
        are equal.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    x = features.astype(np.float32)
    if len(x) < _MIN_IMAGES or not np.isfinite(x).all():
        return None
    # Compare before subtracting the mean: rounding would leave differences that crash t-SNE.
    if (x == x[0]).all():
        return None
    x = x - x.mean(0)
    scale = float(np.abs(x).max())  # squared distances of large features would overflow
    from sklearn.manifold import TSNE

    init = "pca" if x.shape[1] > 1 else "random"
    tsne = TSNE(perplexity=min(30.0, (len(x) - 1) / 3), init=init, random_state=0)
    return tsne.fit_transform(x / scale)
