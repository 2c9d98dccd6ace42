"""Save and read the predictions of a run on every test image.

The safetensors file of a run contains confidence, entropy and predicted class of each network, and
the input features of the classifier for some images. With it, a report needs no weights and no
data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bdkd.extras import missing_packages

if message := missing_packages(("numpy",)):
    raise ImportError(message)

import numpy as np

# Enough points for a t-SNE map; the features of a network with 2,048 features take 2 MB.
FEATURE_CLASSES, FEATURES_PER_CLASS = 10, 50


@dataclass(frozen=True)
class NetworkPredictions:
    """Predictions of one network on the N test images, at temperature 1."""

    confidence: np.ndarray  # (N,) float64, the largest probability
    entropy: np.ndarray  # (N,) float32, nats
    predicted: np.ndarray  # (N,) int64
    features: np.ndarray | None  # (M, F) float16 of the images ``Predictions.featured``


@dataclass(frozen=True)
class Predictions:
    """Predictions of all networks of a run on the N test images, in the order of the split."""

    classes: tuple[str, ...]
    target: np.ndarray  # (N,) int64
    featured: np.ndarray  # (M,) int64, indices into the N images
    networks: Mapping[str, NetworkPredictions]

    def correct(self, network: str) -> np.ndarray:  # (N,) bool
        return self.networks[network].predicted == self.target


def featured_images(target: np.ndarray) -> np.ndarray:
    """Return the indices of the images whose features are kept: the first fifty of each of the
    first ten classes. ``target`` is (N,), integers."""
    kept = [
        np.flatnonzero(target == label)[:FEATURES_PER_CLASS]
        for label in np.unique(target)[:FEATURE_CLASSES]
    ]
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)


def to_bytes(predictions: Predictions) -> bytes:
    """Return the content of a file for :func:`read_predictions`."""
    from safetensors.numpy import save

    arrays = {"target": predictions.target, "featured": predictions.featured}
    for index, network in enumerate(predictions.networks.values()):
        for key, array in vars(network).items():
            if array is not None:
                arrays[f"{index}.{key}"] = array
    metadata = {
        "classes": json.dumps(predictions.classes),
        "networks": json.dumps(list(predictions.networks)),
    }
    return save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)


def read_predictions(path: Path) -> Predictions:
    """Read the predictions of a run.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is incomplete or contains something else.
    """
    from safetensors import SafetensorError, safe_open

    if path.exists() and not path.is_file():
        raise ValueError(f"{path} contains no predictions of a run: it is not a regular file")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        networks = {
            name: NetworkPredictions(
                arrays[f"{index}.confidence"], arrays[f"{index}.entropy"],
                arrays[f"{index}.predicted"], arrays.get(f"{index}.features"),
            )
            for index, name in enumerate(json.loads(metadata["networks"]))
        }  # fmt: skip
        classes = tuple(json.loads(metadata["classes"]))
        predictions = Predictions(classes, arrays["target"], arrays["featured"], networks)
        _check_shapes(predictions)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} contains no predictions of a run: {error}") from error
    return predictions


def _check_shapes(predictions: Predictions) -> None:
    count, featured = len(predictions.target), predictions.featured
    if featured.ndim != 1 or (len(featured) and not 0 <= featured.min() <= featured.max() < count):
        raise ValueError("the indices of the featured images are out of range")
    for name, network in predictions.networks.items():
        for values in (network.confidence, network.entropy, network.predicted):
            if values.shape != (count,):
                raise ValueError(f"{name!r} has {values.shape} values for {count} images")
        features = network.features
        if features is not None and (features.ndim != 2 or len(features) != len(featured)):
            raise ValueError(f"{name!r} has features of shape {features.shape}")
