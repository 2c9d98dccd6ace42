"""What a finished run keeps of every test image: the ground of figures drawn long after it.

One safetensors file a run. Of each network: confidence, entropy, predicted class and, of some
images, the features that its classifier sees. A report needs neither weights nor data.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bdkd.extras import missing_packages

if message := missing_packages(("numpy",)):
    raise ImportError(message)

import numpy as np

# Enough points for a picture of ten clusters, and 2 MB a network at 2,048 features.
FEATURE_CLASSES, FEATURES_PER_CLASS = 10, 50


@dataclass(frozen=True)
class NetworkPredictions:
    """One network on the N test images, at temperature 1."""

    confidence: np.ndarray  # (N,) float64, the largest probability
    entropy: np.ndarray  # (N,) float32, nats
    predicted: np.ndarray  # (N,) int64
    features: np.ndarray | None  # (M, F) float16 of the images ``Predictions.featured``


@dataclass(frozen=True)
class Predictions:
    """Every network of a run on the same N test images, in the data source's order."""

    classes: tuple[str, ...]
    target: np.ndarray  # (N,) int64
    featured: np.ndarray  # (M,) int64, indices into the N images
    networks: Mapping[str, NetworkPredictions]

    def correct(self, network: str) -> np.ndarray:  # (N,) bool
        return self.networks[network].predicted == self.target


def featured_images(target: np.ndarray) -> np.ndarray:
    """Indices of the images whose features are kept: of the first ten classes, the first fifty of
    each, so that a picture of them can be read; ``target (N,)`` holds integers."""
    kept = [
        np.flatnonzero(target == label)[:FEATURES_PER_CLASS]
        for label in np.unique(target)[:FEATURE_CLASSES]
    ]
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)


def to_bytes(predictions: Predictions) -> bytes:
    """The file's content, as :func:`read_predictions` takes it."""
    from safetensors.numpy import save

    arrays = {"target": predictions.target, "featured": predictions.featured}
    for index, network in enumerate(predictions.networks.values()):
        arrays |= {
            f"{index}.confidence": network.confidence,
            f"{index}.entropy": network.entropy,
            f"{index}.predicted": network.predicted,
        }
        if network.features is not None:
            arrays[f"{index}.features"] = network.features
    metadata = {
        "classes": json.dumps(predictions.classes),
        "networks": json.dumps(list(predictions.networks)),
    }
    return save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)


def read_predictions(path: Path) -> Predictions:
    """Read a run's file.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is cut off, or no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        target = arrays["target"]
        networks = {
            name: NetworkPredictions(
                arrays[f"{index}.confidence"],
                arrays[f"{index}.entropy"],
                arrays[f"{index}.predicted"],
                arrays.get(f"{index}.features"),
            )
            for index, name in enumerate(json.loads(metadata["networks"]))
        }
        predictions = Predictions(
            tuple(json.loads(metadata["classes"])), target, arrays["featured"], networks
        )
        _check_shapes(predictions)
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no predictions of a run: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} holds no predictions of a run: {error}") from error
    return predictions


def _check_shapes(predictions: Predictions) -> None:
    count, featured = len(predictions.target), predictions.featured
    if featured.ndim != 1 or (len(featured) and not 0 <= featured.min() <= featured.max() < count):
        raise ValueError("its featured images are not among its images")
    for name, network in predictions.networks.items():
        for of_images in (network.confidence, network.entropy, network.predicted):
            if of_images.shape != (count,):
                raise ValueError(f"{name!r} has {of_images.shape} values for {count} images")
        features = network.features
        if features is not None and (features.ndim != 2 or len(features) != len(featured)):
            raise ValueError(f"{name!r} has features of shape {features.shape}")
