"""The options of a recipe. TOML files and the command line both set the fields of these classes.

The bounds of an option are in its type. Each objective, data source and optimizer has options of
its own, in a subclass of :class:`ObjectiveConfig`, :class:`DataConfig` or :class:`OptimizerConfig`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from bdkd.bounds import (
    Bounds,
    Count,
    NotNegative,
    Positive,
    Rate,
    Share,
    Side,
    check_bounds,
    check_value,
)
from bdkd.errors import UsageError
from bdkd.metrics import RESERVED
from bdkd.registry import NAME, OBJECTIVES, OPTIMIZERS, SELECTIONS, SOURCES


class Options:
    """A section of a recipe."""

    def check(self) -> None:
        """Raise ``UsageError`` if options that depend on each other do not fit. This is called when
        a recipe is created, after the bounds of each option were checked."""


@dataclass(frozen=True)
class DataConfig(Options):
    """The data set, and the options that all data sources share."""

    source: str
    """The data source."""
    root: str | None = None
    """Folder of the data set, for sources that read one."""
    image_size: Side | None = None
    """Side in pixels, for sources that resize. Default for images and folder: the size that the
    networks were made for (the teacher's first), or the pictures' own, at most 224. Default for
    others: synthetic 32, tiny-imagenet 64, imagenet 224."""
    validation: Rate = 0.1
    """Share of the training images held out to select the best checkpoint. 0: train on all images,
    which requires train.select = last."""

    def training_sizes(self) -> set[int | None]:
        """Return the sides of the training images in pixels. None is the side of the source."""
        return {self.image_size}

    def has_validation(self) -> bool:
        """Return whether the data set may have validation images."""
        return self.validation > 0

    def image_size_from_networks(self) -> bool:
        """Return whether image_size, if it is not set, is the size that the networks were made
        for."""
        return False


# Values of networks.NAME.weights
RANDOM, PRETRAINED = "random", "pretrained"


@dataclass(frozen=True)
class NetworkConfig(Options):
    """One network of the recipe."""

    model: str
    """Name of a registered model."""
    role: Literal["student", "teacher"]
    """Role of the network in the objective."""
    weights: str | None = None
    """Initial weights: a file of torch or safetensors, which any trainer may have written, or the
    folder of a run (its selected checkpoint). pretrained: the weights that timm or torchvision
    publish for the model. random: random weights, also if frozen."""
    weights_key: str | None = None
    """Key of the weights in the file, if it holds several (such as model or state_dict_ema).
    Default: the moving average if there is one. In a checkpoint of a run: name of the network."""
    reset_head: bool = False
    """Do not load the classifier, so that the file may be for another number of classes. With
    pretrained weights of another number this is the default."""
    frozen: bool = False
    """Do not train this network, for offline distillation. Batch norm is in evaluation mode."""
    learning_rate: Positive | None = None
    """Peak learning rate of this network. Default: optimizer.learning_rate."""
    shard: bool = False
    """Shard the weights of a large teacher across the ranks (FSDP2), to save memory."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Options of the model, as pairs of name and value."""


@dataclass(frozen=True)
class ObjectiveConfig(Options):
    """The objective and its options."""

    name: str
    """The objective."""


@dataclass(frozen=True)
class OptimizerConfig(Options):
    """One optimizer for all networks, with parameter groups for each."""

    name: str
    """The optimizer. lamb and novograd require a GPU and NVIDIA's apex."""
    learning_rate: Positive = 0.1
    """Peak learning rate for the whole batch."""
    weight_decay: NotNegative[float] = 5e-4
    """Weight decay. It does not apply to norms and biases, unless decay_norms is set."""
    decay_norms: bool = False
    """Apply weight decay to norms and biases too, as common distillation code does."""


@dataclass(frozen=True)
class ScheduleConfig(Options):
    """The learning rate schedule: a linear warm-up, then a decay."""

    name: Literal["cosine", "step", "constant"] = "cosine"
    """Decay: a cosine to the final factor, steps at milestones, or none."""
    unit: Literal["epochs", "steps"] = "epochs"
    """Unit of warmup and milestones. A step has the batch size with which the run started."""
    warmup: NotNegative[float] = 0.0
    """Length of the linear warm-up, in epochs (or steps)."""
    milestones: tuple[NotNegative[float], ...] = ()
    """step: numbers of completed epochs (or steps) after which the learning rate is multiplied by
    the factor."""
    factor: Annotated[float, Bounds(gt=0, le=1)] = 0.1
    """step: the factor."""
    final: Share = 0.0
    """cosine: the final learning rate as a share of the peak."""


@dataclass(frozen=True)
class TrainConfig(Options):
    """The training loop."""

    epochs: Count = 30
    """Number of passes over the training images, which is also the length of the schedule. If a
    run is resumed with another number, its decay continues from the current learning rate. A decay
    that has ended starts again."""
    batch_size: Annotated[int, Bounds(ge=2)] = 128
    """Images of one optimizer step, over all ranks and micro-batches."""
    accumulate: int = 1
    """Number of micro-batches in a batch (gradient accumulation)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or mixed precision: bf16 autocast, or fp16 autocast with a loss scale."""
    channels_last: bool = True
    """Keep images and weights in the channels-last layout."""
    compile: bool = False
    """Compile the forward passes, losses and backward passes of all networks with torch.compile as
    one graph. The backward passes are a separate graph with several ranks, because DDP reduces
    gradients during the backward pass, and with torch versions that do not support one graph."""
    cuda_graph: bool = False
    """Capture a whole step as one CUDA graph for each batch shape, and replay it. Use this for
    small networks, whose kernels the host launches more slowly than the GPU runs them. Not measured
    yet."""
    overlap: bool = False
    """Run the networks concurrently on one GPU, each on a separate stream. Use this for networks
    that do not fill the GPU, preferably with cuda_graph. Not measured yet."""
    tf32: bool = True
    """Use TF32 for float32 matrix products and convolutions on a GPU."""
    deterministic: bool = False
    """Use only deterministic operators. A resumed run then equals an uninterrupted run bit for bit.
    This is slower on a GPU. Runs on a CPU are always deterministic."""
    clip_norm: Positive | None = None
    """Clip the gradients of each network to this norm."""
    ema_decay: Annotated[float, Bounds(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of each student with this decay per step. It averages
    weights and batch norm statistics. The decay warms up as in timm's ModelEmaV3."""
    max_skipped: Count = 20
    """Stop after this number of consecutive steps with non-finite losses or gradients."""
    select: Literal["best", "last"] = "best"
    """Weights to evaluate on the test images: the best on the validation images, or the last."""

    def check(self) -> None:
        if self.accumulate < 1 or self.batch_size % self.accumulate:
            raise UsageError(
                f"train.accumulate must be a divisor of train.batch_size ({self.batch_size}), "
                f"got {self.accumulate}"
            )


@dataclass(frozen=True)
class CheckpointConfig(Options):
    """When to save checkpoints, and how many to keep."""

    every_steps: Count = 500
    """Optimizer steps between checkpoints. The end of a run and signals also save one."""
    every_minutes: Positive | None = None
    """Also save a checkpoint this number of minutes after the last one."""
    keep: Count = 2
    """Number of the newest checkpoints to keep."""


@dataclass(frozen=True)
class DistributedConfig(Options):
    """Training on several ranks, started by torchrun."""

    timeout: Positive = 600.0
    """Seconds that a rank waits for another rank. Then the run ends and names the missing rank."""
    grace: Positive = 25.0
    """Seconds after a signal within which the ranks save and exit. torchrun kills them after 30."""
    compress: Literal["none", "bf16"] = "none"
    """Round gradients to bf16 for the all-reduce, which halves the bytes, or not."""
    sync_batch_norm: bool = False
    """Compute batch norm statistics over the images of all ranks, not of each rank separately."""


@dataclass(frozen=True)
class Recipe:
    """All options of a run: data, networks, objective, optimizer, and output."""

    name: str
    """Name of the recipe."""
    networks: dict[str, NetworkConfig]
    """The networks that train together, by name."""
    data: DataConfig = field(default_factory=lambda: SOURCES.configure("digits"))
    objective: ObjectiveConfig = field(default_factory=lambda: OBJECTIVES.configure("bdkd"))
    optimizer: OptimizerConfig = field(default_factory=lambda: OPTIMIZERS.configure("sgd"))
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()
    run_dir: str | None = None
    """Folder of the run. Default: runs/<recipe>-<objective>-seed<seed>."""
    seed: Annotated[int, Bounds(ge=0, lt=2**63)] = 0
    """Random seed of weights, data order and augmentation."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    threads: Annotated[int, Bounds(ge=1, le=4096)] | None = None
    """Number of CPU threads of torch. Default: torch decides."""
    max_steps: Count | None = None
    """Stop after this number of optimizer steps. The schedule does not change."""
    evaluate_every: Count = 1
    """Evaluate after each time that this number of epochs is completed, and at the end of the
    run."""
    watch_test: bool = False
    """Also evaluate on the test images, for an accuracy curve without validation images. The
    results are only logged. They never select a checkpoint."""
    log_every: Count = 10
    """Optimizer steps between log lines. Nothing is read from the device between log lines."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Destinations of metrics in addition to metrics.jsonl."""
    plugins: tuple[str, ...] = ()
    """The plugins that the recipe needs. The command line must name them with --plugin."""

    def __post_init__(self) -> None:
        """Raise ``UsageError`` with the key of the first invalid value."""
        check_bounds(self, "")
        for selection in SELECTIONS:
            part = getattr(self, selection.section)
            kind = selection.find(getattr(part, selection.key)).config
            if type(part) is not kind:
                raise UsageError(
                    f"{selection.section} must be a {kind.__name__} for the {selection.kind} "
                    f"{getattr(part, selection.key)!r}, got a {type(part).__name__}"
                )
        for key, section in sections(self).items():
            check_bounds(section, key)
            try:
                section.check()
            except ValueError as error:  # of a plugin
                raise UsageError(f"{key}: {error}") from error
        for name, network in self.networks.items():
            for option, number in network.options.items():
                check_value(f"networks.{name}.options.{option}", number)
        for key, value, fits, needed in (*self._relations(), *self._networks()):
            if not fits:
                raise UsageError(f"{key} must be {needed}, got {value}")

    def _relations(self) -> list["Check"]:
        return [
            ("name", self.name, NAME.fullmatch(self.name) is not None,
             "letters, digits, -, _ and ."),
            ("networks", "none", len(self.networks) > 0, "at least one network"),
            ("train.select", self.train.select,
             self.train.select == "last" or self.data.validation > 0,
             "last if data.validation is 0 (no images are held out to select the best weights)"),
        ]  # fmt: skip

    def _networks(self) -> Iterator["Check"]:
        from torch import nn  # names of attributes of nn.ModuleDict cannot be names of networks

        for name, network in self.networks.items():
            usable = NAME.fullmatch(name) is not None and "." not in name and name not in RESERVED
            usable = usable and not hasattr(nn.ModuleDict(), name) and not name.endswith("_ema")
            yield (
                f"the network name {name!r}", name, usable,
                "letters, digits, - and _, not ending in _ema, no key of metrics.jsonl and no "
                "attribute of torch.nn.ModuleDict",
            )  # fmt: skip
            for fits, needed in (
                (network.role == "teacher",
                 "a teacher's option: an exported student is on one device"),
                (self.train.precision != "fp16",
                 "off with train.precision fp16, whose loss scale needs all gradients: use bf16"),
            ):  # fmt: skip
                yield f"networks.{name}.shard", network.shard, fits or not network.shard, needed
            loads = network.weights not in (None, RANDOM)
            chooses = loads and network.weights != PRETRAINED
            for option, fits, needed in (
                ("weights_key", chooses or network.weights_key is None,
                 f"left out unless networks.{name}.weights is a file or run"),
                ("reset_head", loads or not network.reset_head,
                 f"false without networks.{name}.weights"),
                ("reset_head", not (network.reset_head and network.frozen),
                 "false if the network is frozen: its new classifier would never train"),
            ):  # fmt: skip
                yield f"networks.{name}.{option}", repr(getattr(network, option)), fits, needed


Check = tuple[str, object, bool, str]  # key, value, whether the value is valid, what is needed


def sections(recipe: Recipe) -> dict[str, Options]:
    """Return the sections of a recipe by key, including ``networks.NAME``."""
    parts = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    own = {key: value for key, value in parts.items() if isinstance(value, Options)}
    return own | {f"networks.{name}": network for name, network in recipe.networks.items()}
