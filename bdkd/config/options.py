"""The options of a recipe. TOML files and the command line are two views of these classes.

The bounds of an option are in its type. :mod:`bdkd.config.check` checks them, and relations between
options.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple, TypeVar


class Interval(NamedTuple):
    """The bounds of a number. Each is optional."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def contains(self, number: float) -> bool:
        """Return whether a number is within the bounds. NaN is not."""
        return (
            (self.ge is None or number >= self.ge)
            and (self.gt is None or number > self.gt)
            and (self.le is None or number <= self.le)
            and (self.lt is None or number < self.lt)
            and number == number
        )

    def __str__(self) -> str:
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if high is None:
            return f"above {low}" if self.ge is None else f"at least {low}"
        shown = "2**63" if high == 2**63 else high
        return (
            f"in {'(' if self.ge is None else '['}{low}, {shown}{')' if self.le is None else ']'}"
        )


Number = TypeVar("Number", int, float)
NotNegative = Annotated[Number, Interval(ge=0)]
Count = Annotated[int, Interval(ge=1)]
Side = Annotated[int, Interval(ge=8, le=4096)]
Positive = Annotated[float, Interval(gt=0)]
Share = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]


@dataclass(frozen=True)
class SyntheticConfig:
    """What the source synthetic makes."""

    images: int = 10_000
    """Training images, validation included; a fifth as many more are the test set."""
    classes: Annotated[int, Interval(ge=2)] = 10
    """Classes."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are varied."""

    source: str = "digits"
    """The data source: digits, cifar10, cifar100, tiny-imagenet, imagenet, folder or synthetic."""
    root: str | None = None
    """Folder of the data set, for sources that read one."""
    image_size: Side | None = None
    """Side in pixels, for sources that resize; without it, their own (folder and synthetic: 32,
    tiny-imagenet: 64, imagenet: 224)."""
    validation: Decay = 0.1
    """Share of the training images held out to choose the best checkpoint by; 0: all of them train,
    and train.select must be last."""
    train_images: Annotated[int, Interval(ge=2)] | None = None
    """Train on only so many of the images that remain, classes in proportion; without it, on all.
    """
    label_noise: Share = 0.0
    """Share of the training labels replaced by a random other class; the same for every seed."""
    pixel_noise: Share = 0.0
    """Standard deviation of Gaussian noise added to the images of every part, as a share of the
    largest pixel value; the same for every seed."""
    crop: NotNegative[int] = 0
    """Augmentation: pad each training image by so many pixels and cut a random window of its size
    (the field's random crop with padding 4 is 4)."""
    crop_padding: Literal["zero", "reflect", "edge"] = "zero"
    """What the padding holds: black, the image mirrored, or its border repeated."""
    flip: bool = False
    """Augmentation: mirror each training image with probability 1/2."""
    cutout: NotNegative[int] = 0
    """Augmentation: set a random square of this side in pixels to the mean colour."""
    format: Literal["folder", "webdataset", "tfrecord"] = "folder"
    """imagenet: a file an image, train/<wnid>/*.JPEG; tar shards of webdataset; or TFRecords."""
    loader: Literal["auto", "dali", "pillow"] = "auto"
    """imagenet: decode with NVIDIA DALI or with Pillow; auto: with DALI where it is installed."""
    workers: NotNegative[int] | None = None
    """imagenet: threads (dali) or processes (pillow) that decode, a rank; without it, one for each
    processor that the rank has. 0: pillow in the training's own process."""
    exclude: str | None = None
    """imagenet: a list of images to leave out, as bdkd data check writes it."""
    smallest_crop: Annotated[float, Interval(gt=0, le=1)] = 0.08
    """imagenet: smallest share of the image's area that a random crop takes."""
    progressive: tuple[tuple[int, int], ...] = ()
    """imagenet: training resolution by epoch, as pairs of first epoch and side in pixels; after the
    last one, and without any, data.image_size. Evaluation is always at data.image_size."""
    rand_augment: tuple[int, int] | None = None
    """imagenet: RandAugment's number of operations an image, and their magnitude in [0, 10]."""
    erasing: Share = 0.0
    """imagenet: probability that a random rectangle of a training image is erased."""
    mixup: NotNegative[float] = 0.0
    """imagenet: alpha of mixup, which blends each image and label with its neighbour's; 0: off."""
    cutmix: NotNegative[float] = 0.0
    """imagenet: alpha of CutMix, which pastes a part of the neighbour; 0: off. With mixup, each
    image has the one or the other."""
    synthetic: SyntheticConfig = SyntheticConfig()


@dataclass(frozen=True)
class NetworkConfig:
    """One of the networks that train together."""

    model: str
    """Name of a registered model."""
    role: Literal["student", "teacher"]
    """What the network is to the others."""
    weights: str | None = None
    """Weights to start from: a state dict (.pt, .safetensors), a run's checkpoint, or the run's
    folder (its selected checkpoint)."""
    frozen: bool = False
    """It never trains: no gradient, no step, batch norm at rest (offline distillation)."""
    learning_rate: Positive | None = None
    """This network's own peak learning rate; without it, the optimizer's."""
    shard: bool = False
    """Share a large teacher's weights out among the ranks (FSDP2), to save memory."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Options of the model, as name and value."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The method, and its options. What is left out is the method's own default, given here for
    bdkd; the resolved values stand in a run's config.toml. An option that the method does not read
    is refused."""

    name: str = "bdkd"
    """The method: bdkd, dml, independent, kd, kdcl or switokd."""
    backend: Literal["auto", "triton", "native", "reference"] | None = None
    """Implementation of the fused loss (auto)."""
    temperature: float | None = None
    """Temperature of the divergences (1; kd: 4)."""
    gamma: float | None = None
    """bdkd: the larger of a sample's two weights (2; 1: unweighted)."""
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
    """bdkd, ablation: which divergences the student learns from (both)."""
    weighting: Literal["entropy", "swapped"] | None = None
    """bdkd, ablation: the weights by the entropy gap, or exchanged (entropy)."""
    soften_entropy: bool | None = None
    """bdkd: compare the entropies at the temperature, or else at 1 (true)."""
    ensemble: Literal["minlogit", "naive"] | None = None
    """kdcl: how the networks' logits become one target (minlogit)."""
    label_smoothing: Share | None = None
    """Label smoothing of every cross entropy (0)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer for all networks, with parameter groups for each."""

    name: Literal["sgd", "adamw", "lamb", "novograd"] = "sgd"
    """SGD with momentum, or AdamW; LAMB and NovoGrad on a GPU, where NVIDIA's apex is installed."""
    learning_rate: Positive = 0.1
    """Peak learning rate, for the whole batch."""
    momentum: Decay = 0.9
    """SGD: momentum."""
    nesterov: bool = True
    """SGD: Nesterov's momentum."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW, LAMB, NovoGrad: decay of the two moments."""
    weight_decay: NotNegative[float] = 5e-4
    """Weight decay; norms and biases have none, unless decay_norms."""
    decay_norms: bool = False
    """Let norms and biases decay too, as the distillation field's code does."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over time: linear warm-up, then a decay."""

    name: Literal["cosine", "step", "constant"] = "cosine"
    """Decay: to the final factor along a cosine, by steps at milestones, or none."""
    unit: Literal["epochs", "steps"] = "epochs"
    """What warm-up and milestones count. Steps are those of the batch size that the run began with.
    """
    warmup: NotNegative[float] = 0.0
    """Length of the linear warm-up."""
    milestones: tuple[NotNegative[float], ...] = ()
    """step: where the rate is multiplied by the factor."""
    factor: Annotated[float, Interval(gt=0, le=1)] = 0.1
    """step: the factor."""
    final: Share = 0.0
    """cosine: the final rate as a share of the peak."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: Count = 30
    """Passes over the training images; the schedule spans them. A run that is resumed with another
    number continues its decay at the present learning rate; a decay that has ended begins again."""
    batch_size: Annotated[int, Interval(ge=2)] = 128
    """Images of one optimizer step, over all devices and accumulated parts."""
    accumulate: int = 1
    """Parts a batch is split into; their gradients add up to the batch's."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """fp32, or mixed: bf16 autocast, or fp16 autocast with a loss scale."""
    channels_last: bool = True
    """Keep images and weights in the channels-last layout."""
    compile: bool = False
    """Compile forward passes, losses and backward passes with torch.compile: one graph of all
    networks. With several ranks, whose DDP exchanges gradients while they come, and with a torch
    that cannot, the backward passes are a graph of their own."""
    cuda_graph: bool = False
    """Capture a whole step as one CUDA graph for each shape of a batch, and replay it: for small
    networks, which the host launches more slowly than a GPU computes them. Not measured yet."""
    overlap: bool = False
    """Run the networks beside each other on one GPU, each on a stream of its own: for networks that
    leave parts of it idle, most of all with cuda_graph. Not measured yet."""
    tf32: bool = True
    """On a GPU, let float32 matrix products and convolutions round their inputs to TF32."""
    deterministic: bool = False
    """Only operators that repeat their result bit for bit: on a GPU slower, and a resumed run is
    the run that was never stopped to the last bit; a CPU's runs are so without it."""
    clip_norm: Positive | None = None
    """Clip each network's gradient to this norm."""
    ema_decay: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of each student with this decay per step. It averages the
    weights and the statistics of batch norm. The decay warms up as in timm's ModelEmaV3."""
    max_skipped: Count = 20
    """Stop after so many steps in a row with non-finite losses or gradients."""
    select: Literal["best", "last"] = "best"
    """Which weights the test images see: best on the validation part, or the last."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every_steps: Count = 500
    """Optimizer steps between checkpoints; one is also written at the end and on a signal."""
    every_minutes: Positive | None = None
    """Also save when so many minutes have gone by since the last checkpoint."""
    keep: Count = 2
    """How many of the newest checkpoints stay."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several ranks, started by torchrun."""

    timeout: Positive = 600.0
    """Seconds that a rank waits for another before the run ends and says which one is missing."""
    grace: Positive = 25.0
    """Seconds after a signal in which the ranks save and exit; torchrun ends them after 30."""
    compress: Literal["none", "bf16"] = "none"
    """Exchange gradients as they are, or rounded to bf16: half the bytes."""
    sync_batch_norm: bool = False
    """Batch norm over the images of all ranks; without it, each rank normalises by its own."""


@dataclass(frozen=True)
class Recipe:
    """A whole run: data, networks, method, optimisation, and where it goes."""

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
    """Folder of the run; without it, runs/<recipe>-<method>-seed<seed>."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    """Seed of weights, data order and augmentation."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    threads: Count | None = None
    """CPU threads that torch computes with; without it, torch's choice."""
    max_steps: Count | None = None
    """Stop after so many optimizer steps, whatever the epochs; the schedule does not change."""
    evaluate_every: Count = 1
    """Epochs between evaluations."""
    watch_test: bool = False
    """Evaluate on the test images too, for an accuracy curve without a validation part. The results
    are only logged: they never choose a checkpoint."""
    log_every: Count = 10
    """Optimizer steps between log lines; between them nothing is read from the device."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""
