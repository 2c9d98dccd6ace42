"""The options of a recipe. TOML files and the command line both set the fields of these classes.

The bounds of an option are in its type. :mod:`bdkd.config.check` checks the bounds, and the options
that depend on each other.
"""

from dataclasses import dataclass, field
from operator import ge, gt, le, lt
from typing import Annotated, Literal, NamedTuple, TypeVar


class Interval(NamedTuple):
    """The bounds of a number. Each is optional."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def contains(self, number: float) -> bool:
        """Return whether a number is within the bounds. NaN is not."""
        bounds = zip((ge, gt, le, lt), self, strict=True)
        return number == number and all(b is None or holds(number, b) for holds, b in bounds)

    def __str__(self) -> str:
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if high is None:
            return f"above {low}" if self.ge is None else f"at least {low}"
        left, right = "(" if self.ge is None else "[", ")" if self.le is None else "]"
        return f"in {left}{low}, {'2**63' if high == 2**63 else high}{right}"


Number = TypeVar("Number", int, float)
NotNegative = Annotated[Number, Interval(ge=0)]
Count = Annotated[int, Interval(ge=1)]
Side = Annotated[int, Interval(ge=8, le=4096)]
Positive = Annotated[float, Interval(gt=0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class SyntheticConfig:
    """Size of the data set of the source synthetic."""

    images: int = 10_000
    """Number of training images, including validation images. The test set has a fifth as many."""
    classes: Annotated[int, Interval(ge=2)] = 10
    """Number of classes."""


@dataclass(frozen=True)
class DataConfig:
    """The data set and its augmentation."""

    source: str = "digits"
    """The data source: digits, cifar10, cifar100, tiny-imagenet, imagenet, folder or synthetic."""
    root: str | None = None
    """Folder of the data set, for sources that read one."""
    image_size: Side | None = None
    """Side in pixels, for sources that resize. Default: the side of the source (folder and
    synthetic: 32, tiny-imagenet: 64, imagenet: 224)."""
    validation: Decay = 0.1
    """Share of the training images held out to select the best checkpoint. 0: train on all images,
    which requires train.select = last."""
    train_images: Annotated[int, Interval(ge=2)] | None = None
    """Number of the remaining images to train on, in the same class proportions. Default: all."""
    label_noise: Share = 0.0
    """Share of the training labels replaced by a random other class. Independent of the seed."""
    pixel_noise: Share = 0.0
    """Standard deviation of Gaussian noise on all images (train, val and test), as a share of the
    largest pixel value. Independent of the seed."""
    crop: NotNegative[int] = 0
    """Augmentation: pad each training image by this number of pixels, then cut a random crop of the
    original size (4 is torchvision's RandomCrop(padding=4))."""
    crop_padding: Literal["zero", "reflect", "edge"] = "zero"
    """Content of the padding: zeros, the mirrored image, or the repeated border."""
    flip: bool = False
    """Augmentation: mirror each training image with probability 1/2."""
    cutout: NotNegative[int] = 0
    """Augmentation: set a random square of this side in pixels to the mean colour."""
    format: Literal["folder", "webdataset", "tfrecord"] = "folder"
    """imagenet: image files (train/<wnid>/*.JPEG), webdataset tar shards, or TFRecords."""
    loader: Literal["auto", "dali", "pillow"] = "auto"
    """imagenet: decode with NVIDIA DALI or with Pillow. auto: DALI if it is installed."""
    workers: NotNegative[int] | None = None
    """imagenet: number of decoding threads (dali) or processes (pillow) of each rank. Default: one
    for each processor of the rank. 0: pillow decodes in the training process."""
    exclude: str | None = None
    """imagenet: file with a list of images to leave out. bdkd data check writes such a file."""
    smallest_crop: Annotated[float, Interval(gt=0, le=1)] = 0.08
    """imagenet: smallest area of a random crop, as a share of the image's area."""
    progressive: tuple[tuple[int, int], ...] = ()
    """imagenet: training resolution by epoch, as pairs of a first epoch and a side in pixels.
    Default: data.image_size. Evaluation always uses data.image_size."""
    rand_augment: tuple[int, int] | None = None
    """imagenet: number of RandAugment operations per image, and their magnitude in [0, 10]."""
    erasing: Share = 0.0
    """imagenet: probability that a random rectangle of a training image is erased."""
    mixup: NotNegative[float] = 0.0
    """imagenet: alpha of mixup, which blends each image and label with the next one. 0: off."""
    cutmix: NotNegative[float] = 0.0
    """imagenet: alpha of CutMix, which pastes a part of the next image. 0: off. If mixup is on too,
    each image gets one of the two."""
    synthetic: SyntheticConfig = SyntheticConfig()


@dataclass(frozen=True)
class NetworkConfig:
    """One network of the recipe."""

    model: str
    """Name of a registered model."""
    role: Literal["student", "teacher"]
    """Role of the network in the objective."""
    weights: str | None = None
    """Initial weights: a state dict (.pt, .safetensors), a checkpoint of a run, or the folder of a
    run (its selected checkpoint)."""
    frozen: bool = False
    """Do not train this network, for offline distillation. Batch norm is in evaluation mode."""
    learning_rate: Positive | None = None
    """Peak learning rate of this network. Default: optimizer.learning_rate."""
    shard: bool = False
    """Shard the weights of a large teacher across the ranks (FSDP2), to save memory."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Options of the model, as pairs of name and value."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective and its options. Defaults depend on the objective. Those of bdkd are given in
    parentheses. The config.toml of a run contains the resolved values. Setting an option that the
    objective does not read is an error."""

    name: str = "bdkd"
    """The objective: bdkd, dml, independent, kd, kdcl or switokd."""
    backend: Literal["auto", "triton", "native", "reference"] | None = None
    """Implementation of the fused loss (auto)."""
    temperature: float | None = None
    """Temperature of the divergences (1; kd: 4)."""
    gamma: float | None = None
    """bdkd: the larger one of the two weights of a sample (2; 1: unweighted)."""
    student_ce: float | None = None
    """Weight of the students' cross entropy (1; kd: 0.1)."""
    student_kd: float | None = None
    """Weight of the students' divergences (1; kd: 0.9)."""
    teacher_ce: float | None = None
    """Weight of the teachers' cross entropy (1)."""
    teacher_kd: float | None = None
    """Weight of the teachers' divergence (1)."""
    teacher_divergence: Literal["reverse", "forward"] | None = None
    """bdkd: the teacher's regulariser, KL(student || teacher) or KL(teacher || student)
    (reverse)."""
    student_divergence: Literal["both", "forward", "reverse"] | None = None
    """bdkd, ablation: divergences in the student's loss (both)."""
    weighting: Literal["entropy", "swapped"] | None = None
    """bdkd, ablation: the weights from the entropy gap, or the exchanged weights (entropy)."""
    soften_entropy: bool | None = None
    """bdkd: compare the entropies at the temperature; false: at temperature 1 (true)."""
    ensemble: Literal["minlogit", "naive"] | None = None
    """kdcl: method that combines the networks' logits into one target (minlogit)."""
    label_smoothing: Share | None = None
    """Label smoothing of every cross entropy (0)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer for all networks, with parameter groups for each."""

    name: Literal["sgd", "adamw", "lamb", "novograd"] = "sgd"
    """Optimizer. sgd uses momentum. lamb and novograd require a GPU and NVIDIA's apex."""
    learning_rate: Positive = 0.1
    """Peak learning rate for the whole batch."""
    momentum: Decay = 0.9
    """SGD: momentum."""
    nesterov: bool = True
    """SGD: use Nesterov momentum."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW, LAMB, NovoGrad: decay rates of the two moments."""
    weight_decay: NotNegative[float] = 5e-4
    """Weight decay. It does not apply to norms and biases, unless decay_norms is set."""
    decay_norms: bool = False
    """Apply weight decay to norms and biases too, as common distillation code does."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate schedule: a linear warm-up, then a decay."""

    name: Literal["cosine", "step", "constant"] = "cosine"
    """Decay: a cosine to the final factor, steps at milestones, or none."""
    unit: Literal["epochs", "steps"] = "epochs"
    """Unit of warmup and milestones. A step has the batch size with which the run started."""
    warmup: NotNegative[float] = 0.0
    """Length of the linear warm-up."""
    milestones: tuple[NotNegative[float], ...] = ()
    """step: times at which the learning rate is multiplied by the factor."""
    factor: Annotated[float, Interval(gt=0, le=1)] = 0.1
    """step: the factor."""
    final: Share = 0.0
    """cosine: the final learning rate as a share of the peak."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: Count = 30
    """Number of passes over the training images, which is also the length of the schedule. If a
    run is resumed with another number, its decay continues from the current learning rate. A decay
    that has ended starts again."""
    batch_size: Annotated[int, Interval(ge=2)] = 128
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
    ema_decay: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of each student with this decay per step. It averages
    weights and batch norm statistics. The decay warms up as in timm's ModelEmaV3."""
    max_skipped: Count = 20
    """Stop after this number of consecutive steps with non-finite losses or gradients."""
    select: Literal["best", "last"] = "best"
    """Weights to evaluate on the test images: the best on the validation images, or the last."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, and how many to keep."""

    every_steps: Count = 500
    """Optimizer steps between checkpoints. The end of a run and signals also save one."""
    every_minutes: Positive | None = None
    """Also save a checkpoint this number of minutes after the last one."""
    keep: Count = 2
    """Number of the newest checkpoints to keep."""


@dataclass(frozen=True)
class DistributedConfig:
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
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()
    run_dir: str | None = None
    """Folder of the run. Default: runs/<recipe>-<objective>-seed<seed>."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    """Random seed of weights, data order and augmentation."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    threads: Count | None = None
    """Number of CPU threads of torch. Default: torch decides."""
    max_steps: Count | None = None
    """Stop after this number of optimizer steps. The schedule does not change."""
    evaluate_every: Count = 1
    """Epochs between evaluations."""
    watch_test: bool = False
    """Also evaluate on the test images, for an accuracy curve without validation images. The
    results are only logged. They never select a checkpoint."""
    log_every: Count = 10
    """Optimizer steps between log lines. Nothing is read from the device between log lines."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Destinations of metrics in addition to metrics.jsonl."""
