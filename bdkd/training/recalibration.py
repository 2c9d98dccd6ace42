"""Temperature scaling of trained networks: fitted on the validation part, measured on the test."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bdkd.data import DataSource
from bdkd.evaluation.temperature import fit_temperature
from bdkd.training.evaluate import evaluate
from bdkd.training.step import autocast


class Scaled(nn.Module):
    """A network whose logits are divided by a temperature, in float64."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).double() / self.temperature


def recalibrate(
    networks: Mapping[str, nn.Module], source: DataSource, batch_size: int, precision: str
) -> dict[str, dict[str, float | None]]:
    """By network: ``temperature``, and the test images' ``ece_scaled``, ``nll_scaled`` and
    ``brier_scaled`` with the logits divided by it; None where nothing was held out to fit it on,
    or the logits are not finite. The networks' training mode is put back.
    """
    temperatures = fit_temperatures(networks, source, batch_size, precision)
    scaled = {
        name: Scaled(networks[name], temperature)
        for name, temperature in temperatures.items()
        if temperature is not None
    }
    was_training = {name: network.training for name, network in networks.items()}
    results = evaluate(scaled, source, "test", batch_size, precision)
    for name, network in networks.items():
        network.train(was_training[name])
    recalibrated: dict[str, dict[str, float | None]] = {}
    for name, temperature in temperatures.items():
        result = results.get(name)
        recalibrated[name] = {
            "temperature": temperature,
            "ece_scaled": result.ece if result else None,
            "nll_scaled": result.nll if result else None,
            "brier_scaled": result.brier if result else None,
        }
    return recalibrated


def fit_temperatures(
    networks: Mapping[str, nn.Module], source: DataSource, batch_size: int, precision: str
) -> dict[str, float | None]:
    """The temperature of every network on the validation part, whose logits are kept meanwhile in
    the type that the networks give: 4 bytes an image and class, 2 in low precision."""
    if source.info.counts["val"] == 0:
        return dict.fromkeys(networks)
    was_training = {name: network.training for name, network in networks.items()}
    logits: dict[str, list[Tensor]] = {name: [] for name in networks}
    targets: list[Tensor] = []
    for network in networks.values():
        network.eval()
    with torch.inference_mode():
        for batch in source.eval_batches("val", batch_size):
            targets.append(batch.target)
            with autocast(batch.target.device, precision):
                for name, network in networks.items():
                    logits[name].append(network(batch.views[0]))  # (B, C)
        target = torch.cat(targets)
        fitted = {name: fit_temperature(torch.cat(x), target) for name, x in logits.items()}
    for name, network in networks.items():
        network.train(was_training[name])
    return fitted
