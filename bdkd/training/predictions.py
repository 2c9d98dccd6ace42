"""Every network's answer to every image of a split, for the figures that are drawn after a run."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from bdkd.data import DataSource, Split
from bdkd.evaluation.predictions import NetworkPredictions, Predictions, featured_images
from bdkd.training.step import autocast

HALF_MAX = torch.finfo(torch.float16).max


def predict(
    networks: Mapping[str, nn.Module],
    source: DataSource,
    split: Split,
    batch_size: int,
    precision: str,
) -> Predictions:
    """Two passes: the answers to all images, then the features of the few that figures show.

    Networks without ``forward_features`` have no features. The networks' training mode is put
    back; no random state is touched.
    """
    was_training = {name: network.training for name, network in networks.items()}
    for network in networks.values():
        network.eval()
    with torch.inference_mode():
        targets: list[Tensor] = []
        answers: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in networks}
        for batch in source.eval_batches(split, batch_size):
            targets.append(batch.target)
            for name, network in networks.items():
                with autocast(batch.target.device, precision):
                    logits = network(batch.views[0])  # (B, C)
                p = logits.double().softmax(-1)
                entropy = torch.special.entr(p).sum(-1)
                confidence = p.amax(-1)
                # Of the logits, not of p, where large ones are equal; of a NaN, no class.
                predicted = logits.argmax(-1).where(confidence > 0, -1)
                answers[name].append((confidence, entropy.float(), predicted))
        target = torch.cat(targets).cpu().numpy()
        featured = featured_images(target)
        chosen = torch.zeros(len(target), dtype=torch.bool)
        chosen[torch.from_numpy(featured)] = True
        features = _features(networks, source, split, batch_size, precision, chosen)
    for name, network in networks.items():
        network.train(was_training[name])
    return Predictions(
        source.info.classes,
        target,
        featured,
        {
            name: NetworkPredictions(
                confidence=_joined(confidence),
                entropy=_joined(entropy),
                predicted=_joined(predicted),
                features=_joined(features[name]) if features[name] else None,
            )
            for name, answer in answers.items()
            for confidence, entropy, predicted in [zip(*answer, strict=True)]
        },
    )


def _joined(parts: Iterable[Tensor]) -> np.ndarray:
    return torch.cat(list(parts)).cpu().numpy()


def _features(
    networks: Mapping[str, nn.Module],
    source: DataSource,
    split: Split,
    batch_size: int,
    precision: str,
    chosen: Tensor,  # (N,) bool
) -> dict[str, list[Tensor]]:
    """Features ``(M, F)`` float16 of the chosen images, by network and batch, on the host."""
    features: dict[str, list[Tensor]] = {name: [] for name in networks}
    seen, last = 0, int(chosen.nonzero().max()) if chosen.any() else -1
    for batch in source.eval_batches(split, batch_size):
        here = chosen[seen : seen + len(batch.target)].to(batch.target.device)  # (B,)
        if here.any():
            images = batch.views[0][here]
            for name, network in networks.items():
                forward: Callable[[Tensor], Tensor] | None
                forward = getattr(network, "forward_features", None)
                if forward is None:
                    continue
                with autocast(batch.target.device, precision):
                    x = forward(images)  # (M, F), or not yet pooled (M, F, H, W)
                x = x.float().mean((2, 3)) if x.ndim == 4 else x.float()
                features[name].append(x.clamp(-HALF_MAX, HALF_MAX).half().cpu())
        seen += len(batch.target)
        if seen > last:
            break
    return features
