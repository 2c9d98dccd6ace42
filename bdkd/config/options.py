"""The options of a recipe. TOML files and the command line both set the fields of these classes.

The type of an option contains its bounds. Each objective, data source and optimizer defines its
options in a subclass of :class:`ObjectiveConfig`, :class:`DataConfig` or :class:`OptimizerConfig`.
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
        """Raise ``UsageError`` if two options conflict. A recipe calls this when it is created,
        after it has checked the bounds of each option."""


@dataclass(frozen=True)
class DataConfig(Options):
    """The data set, and the options that all data sources share."""

    source: str
    """Name of the data source."""
    root: str | None = None
    """Folder of the data set, for sources that read one. The source images also accepts a .parquet
    file, or hf:NAME for a Hugging Face data set."""
    image_size: Side | None = None
    """Width and height of the images in pixels, for sources that resize images. Default for images
    and folder: the input size of the teacher, or else of a student. If the networks accept any
    size, it is the size of the stored images, but at most 224. Default for other sources:
    synthetic 32, tiny-imagenet 64, imagenet 224."""
    validation: Rate = 0.1
    """Share of the training images that is held out to select the best checkpoint. 0 trains on all
    images and requires train.select = last."""

    def training_sizes(self) -> set[int | None]:
        """Return the widths of the square training images in pixels. None means that the source
        decides."""
        return {self.image_size}

    def has_validation(self) -> bool:
        """Return whether the data set may have validation images."""
        return self.validation > 0

    def image_size_from_networks(self) -> bool:
        """Return whether the networks determine ``image_size`` if it is not set."""
        return False


# Values of networks.NAME.weights
RANDOM, PRETRAINED = "random", "pretrained"


@dataclass(frozen=True)
class NetworkConfig(Options):
    """One network of the recipe."""

    model: str
    """Name of the model. bdkd models lists them."""
    role: Literal["student", "teacher"]
    """Role of the network in the objective."""
    weights: str | None = None
    """Initial weights: the path of a torch or safetensors file from any trainer, or the folder of a
    run, whose selected checkpoint is loaded. pretrained: the weights that timm or torchvision
    publish for the model. random: random weights. A frozen network requires this option. The
    default for other networks is random weights."""
    weights_key: str | None = None
    """Key of the weights in a file that contains several, such as model or state_dict_ema. For the
    checkpoint of a run: the name of a network in that run. Default: the network with the same name,
    and its moving average if the file contains one."""
    reset_head: bool = False
    """Train a new classifier instead of loading it, for weights with another number of classes.
    Pretrained weights with another number of classes always get a new classifier."""
    frozen: bool = False
    """Do not train this network (offline distillation). Its batch norm layers stay in evaluation
    mode."""
    learning_rate: Positive | None = None
    """Peak learning rate of this network. Default: optimizer.learning_rate."""
    shard: bool = False
    """Shard the weights of this teacher across the ranks (FSDP2) to save memory."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Options of the model, as pairs of a name and a value."""


@dataclass(frozen=True)
class ObjectiveConfig(Options):
    """The objective and its options."""

    name: str
    """Name of the objective."""


@dataclass(frozen=True)
class OptimizerConfig(Options):
    """The optimizer. It updates all networks, and each network has its own parameter groups."""

    name: str
    """Name of the optimizer. lamb and novograd require a GPU and NVIDIA's apex."""
    learning_rate: Positive = 0.1
    """Peak learning rate of the schedule. It is not scaled by the batch size or the number of
    ranks."""
    weight_decay: NotNegative[float] = 5e-4
    """Weight decay. It does not apply to norms and biases unless decay_norms is set."""
    decay_norms: bool = False
    """Also apply weight decay to norms and biases, as common distillation code does."""


@dataclass(frozen=True)
class ScheduleConfig(Options):
    """The learning rate schedule: a linear warm-up, then a decay."""

    name: Literal["cosine", "step", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up. cosine: follow a half cosine down to the final
    learning rate. step: multiply the learning rate by factor at each milestone. constant: no
    decay."""
    unit: Literal["epochs", "steps"] = "epochs"
    """Unit of warmup and milestones. If a run is resumed with another batch size, the schedule
    still counts steps of the first batch size."""
    warmup: NotNegative[float] = 0.0
    """Length of the linear warm-up in epochs, or in steps if unit is steps."""
    milestones: tuple[NotNegative[float], ...] = ()
    """For the step schedule: numbers of completed epochs (or steps) after which the learning rate
    is multiplied by factor."""
    factor: Annotated[float, Bounds(gt=0, le=1)] = 0.1
    """For the step schedule: factor of the learning rate at each milestone."""
    final: Share = 0.0
    """For the cosine schedule: the final learning rate as a share of the peak."""


@dataclass(frozen=True)
class TrainConfig(Options):
    """The training loop."""

    epochs: Count = 30
    """Number of passes over the training images. It is also the length of the learning rate
    schedule. If a run is resumed with another number of epochs, the decay continues from the
    current learning rate. If the decay has already ended, the learning rate rises again."""
    batch_size: Annotated[int, Bounds(ge=2)] = 128
    """Number of images in one optimizer step, over all ranks and micro-batches."""
    accumulate: int = 1
    """Number of micro-batches in a batch (gradient accumulation). Must divide train.batch_size."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32: single precision. bf16: mixed precision with bf16 autocast. fp16: mixed precision with
    fp16 autocast and a loss scale."""
    channels_last: bool = True
    """Keep images and weights in the channels-last layout."""
    compile: bool = False
    """Compile the forward passes, losses and backward passes of all networks into one graph with
    torch.compile. With several ranks the backward passes are a second graph, because DDP reduces
    gradients during the backward pass. They are also a second graph with torch 2.8."""
    cuda_graph: bool = False
    """Capture a whole step as one CUDA graph for each batch shape, and replay it. Use this for
    small networks, whose kernels run faster than the host can launch them."""
    overlap: bool = False
    """Run the networks concurrently on one GPU, each on a separate stream. Use this for networks
    that do not fill the GPU. It saves more time together with cuda_graph."""
    tf32: bool = True
    """Use TF32 for float32 matrix products and convolutions on a GPU."""
    deterministic: bool = False
    """Use only deterministic operators. A resumed run then equals an uninterrupted run bit for bit.
    This is slower on a GPU. Runs on a CPU are always deterministic."""
    clip_norm: Positive | None = None
    """Clip the gradients of each network to this norm. Default: no clipping."""
    ema_decay: Annotated[float, Bounds(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of each student with this decay per step. It averages
    weights and batch norm statistics. The decay warms up as in timm's ModelEmaV3. Default: no
    moving average."""
    max_skipped: Count = 20
    """End the run with an error after this number of consecutive steps with non-finite losses or
    gradients."""
    select: Literal["best", "last"] = "best"
    """Weights to evaluate on the test images. best: the weights with the highest top-1 accuracy on
    the validation images. last: the weights after the last step."""

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
    """Optimizer steps between checkpoints. A checkpoint is also saved at the end of the run and
    when a signal stops it."""
    every_minutes: Positive | None = None
    """Also save a checkpoint when this number of minutes has passed since the last one."""
    keep: Count = 2
    """Number of recent checkpoints to keep. The best checkpoint is kept in addition."""


@dataclass(frozen=True)
class DistributedConfig(Options):
    """Training on several ranks that torchrun starts."""

    timeout: Positive = 600.0
    """Seconds that a rank waits for another rank. After this time the run ends with a message that
    names the missing rank."""
    grace: Positive = 25.0
    """Seconds that the ranks have to save a checkpoint and exit after a signal. torchrun kills them
    after 30 seconds."""
    compress: Literal["none", "bf16"] = "none"
    """Compression of the gradients for the all-reduce. bf16: round them to bf16, which halves the
    number of bytes. none: no compression."""
    sync_batch_norm: bool = False
    """Compute batch norm statistics over the images of all ranks instead of each rank
    separately."""


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
    """Random seed for weights, data order and augmentation."""
    device: str = "auto"
    """The device: auto (a GPU if available), cpu, cuda or cuda:N."""
    threads: Annotated[int, Bounds(ge=1, le=4096)] | None = None
    """Number of CPU threads that torch uses. Default: torch decides."""
    max_steps: Count | None = None
    """Stop after this number of optimizer steps. The learning rate schedule does not change."""
    evaluate_every: Count = 1
    """Number of epochs between evaluations. The networks are also evaluated at the end of the
    run."""
    watch_test: bool = False
    """Also evaluate on the test images during training, for an accuracy curve without validation
    images. The results are only logged and never select a checkpoint."""
    log_every: Count = 10
    """Optimizer steps between log lines. The trainer reads no values from the device between log
    lines."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where to write metrics in addition to metrics.jsonl."""
    plugins: tuple[str, ...] = ()
    """Plugins that the recipe needs. The command line must name each one with --plugin."""

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
             "made of letters, digits, -, _ and ."),
            ("networks", "none", len(self.networks) > 0, "a table with at least one network"),
            ("train.select", self.train.select,
             self.train.select == "last" or self.data.validation > 0,
             "last if data.validation is 0 (no images are held out to select the best weights)"),
        ]  # fmt: skip

    def _networks(self) -> Iterator["Check"]:
        from torch import nn  # a network cannot have the name of an attribute of nn.ModuleDict

        for name, network in self.networks.items():
            usable = NAME.fullmatch(name) is not None and "." not in name and name not in RESERVED
            usable = usable and not hasattr(nn.ModuleDict(), name) and not name.endswith("_ema")
            yield (
                f"the network name {name!r}", name, usable,
                "made of letters, digits, - and _, not end in _ema, and not be a key of "
                "metrics.jsonl or an attribute of torch.nn.ModuleDict",
            )  # fmt: skip
            for fits, needed in (
                (network.role == "teacher",
                 "false for a student (only a teacher can be sharded)"),
                (self.train.precision != "fp16",
                 "false with train.precision fp16 (its loss scale needs all gradients; use bf16)"),
            ):  # fmt: skip
                yield f"networks.{name}.shard", network.shard, fits or not network.shard, needed
            loads = network.weights not in (None, RANDOM)
            chooses = loads and network.weights != PRETRAINED
            for option, fits, needed in (
                ("weights_key", chooses or network.weights_key is None,
                 f"left out unless networks.{name}.weights is a file or the folder of a run"),
                ("reset_head", loads or not network.reset_head,
                 f"false without networks.{name}.weights"),
                ("reset_head", not (network.reset_head and network.frozen),
                 "false for a frozen network (its new classifier would never train)"),
            ):  # fmt: skip
                yield f"networks.{name}.{option}", repr(getattr(network, option)), fits, needed


Check = tuple[str, object, bool, str]  # key, value, whether the value is valid, what is needed


def sections(recipe: Recipe) -> dict[str, Options]:
    """Return the sections of a recipe by key, including ``networks.NAME``."""
    parts = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    own = {key: value for key, value in parts.items() if isinstance(value, Options)}
    return own | {f"networks.{name}": network for name, network in recipe.networks.items()}
