"""The one table of metrics: their names in files, where each is written, and how it is shown."""

from typing import NamedTuple


class Metric(NamedTuple):
    """A number of one network. Fractions are in [0, 1]; NLL and entropy are in nats."""

    key: str
    """Its name in ``metrics.jsonl``, ``summary.json`` and :class:`CalibrationResult`."""
    label: str
    """Its name in the tables of ``bdkd compare``."""
    description: str
    """Its name in a model card."""
    hub: str = ""
    """Its type on Hugging Face's hub; empty: not in a model card."""
    trained: bool = False
    """A mean over the training batches of a log interval."""
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
    """A column of ``bdkd compare``."""
    tested: bool = False
    """``bdkd compare`` tests differences from the first method."""
    headline: bool = False
    """In the figure of ``bdkd compare``, and its test in the tables."""

    def show(self, value: float | None, sign: str = "") -> str:
        """Return a value as text for a table. ``sign`` is "+" for differences."""
        if value is None:
            return "–"
        text = f"{100 * value if self.percent else value:{sign}.{self.digits}f}"
        # A difference that rounds to nothing has no sign.
        return text.lstrip("+-") if not float(text) else text


METRICS = (
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
    Metric("mce", "MCE %", "largest gap of a bin (MCE)", "maximum_calibration_error",
           validated=True, percent=True, digits=2),
    Metric("brier", "Brier", "Brier score", "brier_score", validated=True, compared=True,
           tested=True),
    Metric("adaptive_ece", "adaptive ECE %", "ECE over 15 bins of equal count", "adaptive_ece",
           percent=True, digits=2),
    Metric("classwise_ece", "class-wise ECE %", "ECE class by class", "classwise_ece",
           percent=True, digits=2),
    Metric("ece_if_calibrated", "ECE % if calibrated",
           "ECE of a perfectly calibrated network, so many images", "ece_if_calibrated",
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

MEASURED = tuple(metric.key for metric in METRICS if metric.measured)
VALIDATED = tuple(metric.key for metric in METRICS if metric.validated)
TRAINED = tuple(metric.key for metric in METRICS if metric.trained)
CHARTED = frozenset(metric.key for metric in METRICS if metric.charted)
SCALED = tuple(
    metric.key.removesuffix("_scaled") for metric in METRICS if metric.key.endswith("_scaled")
)

# Numbers of a whole step in metrics.jsonl. The objective's statistics are means over the samples.
OBJECTIVE_STATISTICS = (
    "forward_weight", "reverse_weight", "forward_kl", "reverse_kl", "teacher_active",
)  # fmt: skip
STEP_CHARTED = frozenset({*OBJECTIVE_STATISTICS[:4], "images_per_second", "data_wait"})
"""Numbers of a whole step that ``bdkd report`` draws."""
RESERVED = frozenset({
    "step", "epoch", "split", "images_per_second", "learning_rate", "skipped_steps", "data_wait",
    "memory_mib", "mfu", *OBJECTIVE_STATISTICS,
})  # fmt: skip
"""Names that a network cannot have."""
