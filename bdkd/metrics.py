"""The table of all metrics: their names in files, where they are written, how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from bdkd.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


class Metric(NamedTuple):
    """A number of one network. Fractions are in [0, 1]; NLL and entropy are in nats."""

    key: str
    """Its name in ``metrics.jsonl``, ``summary.json`` and :class:`CalibrationResult`."""
    label: str
    """Its name in the tables of ``bdkd compare``."""
    description: str
    """Its name in a model card."""
    hub: str = ""
    """Its type on the Hugging Face hub. Empty if model cards do not contain it."""
    trained: bool = False
    """Logged as the mean over the training batches of a log interval."""
    validated: bool = False
    """Logged at each validation."""
    measured: bool = True
    """Part of ``summary.json`` and ``bdkd evaluate``."""
    charted: bool = False
    """Drawn over time by ``bdkd report``."""
    percent: bool = False
    """Shown in percent in tables."""
    digits: int = 4
    compared: bool = False
    """Shown in a column of ``bdkd compare``."""
    tested: bool = False
    """``bdkd compare`` tests differences from the first method."""
    headline: bool = False
    """Shown in the figure of ``bdkd compare``, with its test in the tables."""
    of_samples: Callable[[Tensor, Tensor], Tensor] | None = None
    """The function of a registered metric. It maps logits and labels to a value of each sample."""
    reduce: Callable[[Tensor], Any] | None = None
    """Reduces the values of all samples to a registered metric. None: their mean."""

    def show(self, value: float | None, sign: str = "") -> str:
        """Return a value as text for a table. ``sign`` is "+" for differences."""
        if value is None:
            return "–"
        text = f"{100 * value if self.percent else value:{sign}.{self.digits}f}"
        # A difference that rounds to 0 has no sign.
        return text.lstrip("+-") if not float(text) else text


_BUILT_IN = (
    Metric("loss", "loss", "training loss", trained=True, measured=False, charted=True),
    Metric("top1", "top-1 %", "top-1 accuracy", "accuracy", trained=True, validated=True,
           charted=True, percent=True, digits=2, compared=True, tested=True, headline=True),
    Metric("top5", "top-5 %", "top-5 accuracy", "top_5_accuracy", trained=True, validated=True,
           percent=True, digits=2),
    Metric("ece", "ECE %", "expected calibration error (ECE), 15 bins",
           "expected_calibration_error", trained=True, validated=True, charted=True, percent=True,
           digits=2, compared=True, tested=True, headline=True),
    Metric("nll", "NLL", "negative log likelihood, nats", "nll", trained=True, validated=True,
           charted=True, compared=True, tested=True, headline=True),
    Metric("entropy", "entropy", "mean entropy of the predictions, nats", "entropy", trained=True,
           validated=True, charted=True),
    Metric("mce", "MCE %", "maximum calibration error (MCE)", "maximum_calibration_error",
           validated=True, percent=True, digits=2),
    Metric("brier", "Brier", "Brier score", "brier_score", validated=True, compared=True,
           tested=True, headline=True),
    Metric("adaptive_ece", "adaptive ECE %", "ECE over 15 bins of equal count", "adaptive_ece",
           percent=True, digits=2),
    Metric("classwise_ece", "class-wise ECE %", "class-wise ECE", "classwise_ece",
           percent=True, digits=2),
    Metric("ece_if_calibrated", "ECE % if calibrated",
           "expected ECE if perfectly calibrated, same number of images", "ece_if_calibrated",
           percent=True, digits=2),
    # After temperature scaling on the validation images
    Metric("ece_scaled", "ECE % at T", "ECE after temperature scaling", measured=False,
           percent=True, digits=2, compared=True, tested=True, headline=True),
    Metric("nll_scaled", "NLL at T", "NLL after temperature scaling", measured=False,
           compared=True, tested=True),
    Metric("brier_scaled", "Brier at T", "Brier score after temperature scaling", measured=False),
    Metric("temperature", "T", "temperature fitted on the validation images", measured=False,
           digits=2, compared=True),
)  # fmt: skip

METRICS: Registry[Metric] = Registry("metric", "bdkd.metrics")
"""All metrics by key, in the order of tables."""
for _metric in _BUILT_IN:
    METRICS.add(_metric.key, _metric, Metric)

SCALED = tuple(
    metric.key.removesuffix("_scaled") for metric in _BUILT_IN if metric.key.endswith("_scaled")
)
_OF_A_NETWORK = frozenset({"model", "role", "parameters"})  # other keys of summary.json

OfSamples = TypeVar("OfSamples", bound=Callable[..., Any])


def register_metric(
    key: str,
    label: str = "",
    *,
    description: str = "",
    reduce: Callable[[Tensor], Any] | None = None,
    percent: bool = False,
    digits: int = 4,
    tested: bool = True,
) -> Callable[[OfSamples], OfSamples]:
    """Return a decorator that registers a metric of a network's predictions.

    It decorates a function of the logits ``(B, C)`` float64 and the labels ``(B,)`` int64 of a
    batch, which returns a value of each sample, ``(B,)`` or ``(B, ...)``. The metric is the mean
    over all samples of a split, or ``reduce`` of their values ``(N,)`` or ``(N, ...)`` float64, on
    the CPU and in the order of the split. With several ranks, the values are gathered first.

    The metric is computed at each validation and on the test images. It is written to
    ``metrics.jsonl`` and ``summary.json``, shown by ``bdkd evaluate``, drawn by ``bdkd report``,
    and compared by ``bdkd compare``.

    Args:
        key: its name in files.
        label: its name in tables. Default: ``key``.
        description: its name in sentences. Default: ``label``.
        reduce: see above. Default: the mean.
        percent: show the value, a fraction, in percent.
        digits: number of digits after the decimal point.
        tested: ``bdkd compare`` tests differences from the first method.

    Raises:
        TypeError, ValueError: the key is not a valid name, or is already registered.
    """
    if key in _OF_A_NETWORK:
        raise ValueError(
            f"the name of a metric must not be {key!r}, which is a key of summary.json"
        )

    METRICS.check_name(key)

    def add(of_samples: OfSamples) -> OfSamples:
        metric = Metric(
            key, label or key, description or label or key, validated=True, charted=True,
            percent=percent, digits=digits, compared=True, tested=tested, headline=tested,
            of_samples=of_samples, reduce=reduce,
        )  # fmt: skip
        METRICS.add(key, metric, of_samples)
        return of_samples

    return add


def registered_metrics() -> list[Metric]:
    """Return the metrics of plugins."""
    return [metric for metric in METRICS.values() if metric.of_samples is not None]


def values_of(result: Any, *, validated: bool = False) -> dict[str, float]:
    """Return the metrics of a :class:`CalibrationResult` by key: those of ``summary.json``, or
    those that are logged at each validation."""
    registered: Mapping[str, float] = result.registered
    return {
        metric.key: registered[metric.key] if metric.of_samples else getattr(result, metric.key)
        for metric in METRICS.values()
        if (metric.validated if validated else metric.measured)
    }


# Numbers of a whole step in metrics.jsonl. The objective's statistics are means over the samples.
OBJECTIVE_STATISTICS = (
    "forward_weight", "reverse_weight", "forward_kl", "reverse_kl", "teacher_active",
)  # fmt: skip
STEP_CHARTED = frozenset({*OBJECTIVE_STATISTICS[:4], "images_per_second", "data_wait"})
"""Numbers of a whole step that ``bdkd report`` draws."""
OF_A_LINE = frozenset({
    "step", "epoch", "split", "images_per_second", "learning_rate", "skipped_steps", "data_wait",
    "memory_mib", "mfu", "seconds",
})  # fmt: skip
"""Keys of a line of ``metrics.jsonl`` that are neither networks nor statistics."""
RESERVED = OF_A_LINE | {*OBJECTIVE_STATISTICS}
"""Names that a network cannot have."""
