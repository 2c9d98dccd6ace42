"""What a run is made of. The recipes' TOML files and the command line are both views of this."""

import dataclasses
import difflib
import math
import re
import tomllib
import typing
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

from bdkd.extras import missing_packages

if message := missing_packages(("msgspec", "tomli-w")):
    raise ImportError(message)

import msgspec
import tomli_w

from bdkd.errors import RunError, UsageError
from bdkd.text import read_text


@dataclass(frozen=True)
class SyntheticConfig:
    """What the source synthetic makes."""

    images: int = 10_000
    """Training images, validation included; a fifth as many more are the test set."""
    classes: int = 10
    """Classes."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are varied."""

    source: str = "digits"
    """The data source: digits, cifar10, cifar100, tiny-imagenet, imagenet, folder or synthetic."""
    root: str | None = None
    """Folder of the data set, for sources that read one."""
    image_size: int | None = None
    """Side in pixels, for sources that resize; without it, their own (folder and synthetic: 32,
    tiny-imagenet: 64, imagenet: 224)."""
    validation: float = 0.1
    """Share of the training images held out to choose the best checkpoint by; 0: all of them train,
    and train.select must be last."""
    train_images: int | None = None
    """Train on only so many of the images that remain, classes in proportion; without it, on all.
    """
    label_noise: float = 0.0
    """Share of the training labels replaced by a random other class; the same for every seed."""
    pixel_noise: float = 0.0
    """Standard deviation of Gaussian noise added to the images of every part, as a share of the
    largest pixel value; the same for every seed."""
    crop: int = 0
    """Augmentation: pad each training image by so many pixels and cut a random window of its size
    (the field's random crop with padding 4 is 4)."""
    crop_padding: Literal["zero", "reflect", "edge"] = "zero"
    """What the padding holds: black, the image mirrored, or its border repeated."""
    flip: bool = False
    """Augmentation: mirror each training image with probability 1/2."""
    cutout: int = 0
    """Augmentation: set a random square of this side in pixels to the mean colour."""
    format: Literal["folder", "webdataset", "tfrecord"] = "folder"
    """imagenet: a file an image, train/<wnid>/*.JPEG; tar shards of webdataset; or TFRecords."""
    loader: Literal["auto", "dali", "pillow"] = "auto"
    """imagenet: decode with NVIDIA DALI or with Pillow; auto: with DALI where it is installed."""
    workers: int | None = None
    """imagenet: threads (dali) or processes (pillow) that decode, a rank; without it, one for each
    processor that the rank has. 0: pillow in the training's own process."""
    exclude: str | None = None
    """imagenet: a list of images to leave out, as bdkd data check writes it."""
    smallest_crop: float = 0.08
    """imagenet: smallest share of the image's area that a random crop takes."""
    progressive: tuple[tuple[int, int], ...] = ()
    """imagenet: training resolution by epoch, as pairs of first epoch and side in pixels; after the
    last one, and without any, data.image_size. Evaluation is always at data.image_size."""
    rand_augment: tuple[int, int] | None = None
    """imagenet: RandAugment's number of operations an image, and their magnitude in [0, 10]."""
    erasing: float = 0.0
    """imagenet: probability that a random rectangle of a training image is erased."""
    mixup: float = 0.0
    """imagenet: alpha of mixup, which blends each image and label with its neighbour's; 0: off."""
    cutmix: float = 0.0
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
    learning_rate: float | None = None
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
    label_smoothing: float | None = None
    """Label smoothing of every cross entropy (0)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer for all networks, with parameter groups for each."""

    name: Literal["sgd", "adamw", "lamb", "novograd"] = "sgd"
    """SGD with momentum, or AdamW; LAMB and NovoGrad on a GPU, where NVIDIA's apex is installed."""
    learning_rate: float = 0.1
    """Peak learning rate, for the whole batch."""
    momentum: float = 0.9
    """SGD: momentum."""
    nesterov: bool = True
    """SGD: Nesterov's momentum."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW, LAMB, NovoGrad: decay of the two moments."""
    weight_decay: float = 5e-4
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
    warmup: float = 0.0
    """Length of the linear warm-up."""
    milestones: tuple[float, ...] = ()
    """step: where the rate is multiplied by the factor."""
    factor: float = 0.1
    """step: the factor."""
    final: float = 0.0
    """cosine: the final rate as a share of the peak."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 30
    """Passes over the training images; the schedule spans them. A run that is resumed with another
    number continues its decay at the present learning rate; a decay that has ended begins again."""
    batch_size: int = 128
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
    clip_norm: float | None = None
    """Clip each network's gradient to this norm."""
    ema_decay: float | None = None
    """Keep an exponential moving average of each student with this decay per step. It averages the
    weights and the statistics of batch norm. The decay warms up as in timm's ModelEmaV3."""
    max_skipped: int = 20
    """Stop after so many steps in a row with non-finite losses or gradients."""
    select: Literal["best", "last"] = "best"
    """Which weights the test images see: best on the validation part, or the last."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every_steps: int = 500
    """Optimizer steps between checkpoints; one is also written at the end and on a signal."""
    every_minutes: float | None = None
    """Also save when so many minutes have gone by since the last checkpoint."""
    keep: int = 2
    """How many of the newest checkpoints stay."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several ranks, started by torchrun."""

    timeout: float = 600.0
    """Seconds that a rank waits for another before the run ends and says which one is missing."""
    grace: float = 25.0
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
    seed: int = 0
    """Seed of weights, data order and augmentation."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads that torch computes with; without it, torch's choice."""
    max_steps: int | None = None
    """Stop after so many optimizer steps, whatever the epochs; the schedule does not change."""
    evaluate_every: int = 1
    """Epochs between evaluations on the validation part."""
    log_every: int = 10
    """Optimizer steps between log lines; between them nothing is read from the device."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""


# Names of networks and recipes become keys and folders.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = {
    "step", "epoch", "split", "images_per_second", "learning_rate", "skipped_steps",
    "data_wait", "memory_mib", "mfu",
    "forward_weight", "reverse_weight", "forward_kl", "reverse_kl", "teacher_active",
}  # fmt: skip


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in files("bdkd.recipes").iterdir()
        if entry.name.endswith(".toml")
    )


def load_recipe(name_or_path: str) -> Recipe:
    """Return a shipped recipe by name, or the recipe in a TOML file.

    Raises:
        UsageError: no such recipe exists, or a key or value in it does not fit.
        RunError: the file cannot be read.
    """
    if name_or_path in shipped_recipes():
        text = (files("bdkd.recipes") / f"{name_or_path}.toml").read_text("utf-8")
        return parse_recipe(text, source=f"recipe {name_or_path}")
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.exists():
        raise UsageError(
            f"unknown recipe {name_or_path!r}: {nearest(name_or_path, shipped_recipes())} "
            "(or give a TOML file)"
        )
    try:
        text = read_text(path)
    except OSError as error:
        raise RunError(
            f"cannot read the recipe {path}: {error.strerror}: give the path of a TOML file, or "
            "the name of a shipped recipe (bdkd train names them)"
        ) from error
    return parse_recipe(text, source=str(path))


def parse_recipe(text: str, source: str) -> Recipe:
    """The recipe that a TOML text describes; ``source`` names it in error messages."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is not valid TOML: {error}") from error
    _refuse_unknown_keys(values, Recipe, source, "")
    try:
        recipe = msgspec.convert(values, Recipe)
    except msgspec.ValidationError as error:
        remedy = "; every run's config.toml is a whole recipe" * ("missing required" in str(error))
        raise UsageError(f"{source}: {error}{remedy}") from error
    # msgspec leaves defaults on the class; a copy has every field of its own
    return typing.cast(Recipe, _with_own_fields(recipe))


def to_toml(recipe: Recipe) -> str:
    """The recipe as a TOML text that :func:`parse_recipe` reads back to the same recipe."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(recipe)))


def differing_keys(a: Recipe, b: Recipe) -> list[str]:
    """Dotted keys in which two recipes differ."""
    left, right = _flatten(dataclasses.asdict(a)), _flatten(dataclasses.asdict(b))
    missing = object()
    return sorted(
        key
        for key in left.keys() | right.keys()
        if left.get(key, missing) != right.get(key, missing)
    )


def check_recipe(recipe: Recipe) -> None:
    """Raise ``UsageError`` for the first value that is out of range, by its key."""
    from torch import nn  # the networks become one nn.ModuleDict, whose own names are taken

    t, d, s, o = recipe.train, recipe.data, recipe.schedule, recipe.optimizer
    checks = [
        (
            "name",
            recipe.name,
            NAME.fullmatch(recipe.name) is not None,
            "letters, digits, -, _ and .",
        ),
        ("networks", "none", len(recipe.networks) > 0, "at least one network"),
        ("train.epochs", t.epochs, t.epochs >= 1, "at least 1"),
        ("train.batch_size", t.batch_size, t.batch_size >= 2, "at least 2"),
        (
            "train.accumulate",
            t.accumulate,
            1 <= t.accumulate <= t.batch_size and t.batch_size % t.accumulate == 0,
            f"a divisor of train.batch_size ({t.batch_size})",
        ),
        ("train.clip_norm", t.clip_norm, t.clip_norm is None or t.clip_norm > 0, "above 0"),
        (
            "train.ema_decay",
            t.ema_decay,
            t.ema_decay is None or 0 < t.ema_decay < 1,
            "between 0 and 1",
        ),
        ("train.max_skipped", t.max_skipped, t.max_skipped >= 1, "at least 1"),
        (
            "objective.label_smoothing",
            recipe.objective.label_smoothing,
            0 <= (recipe.objective.label_smoothing or 0) <= 1,
            "in [0, 1]",
        ),
        ("data.validation", d.validation, 0 <= d.validation < 1, "in [0, 1)"),
        (
            "train.select",
            t.select,
            t.select == "last" or d.validation > 0,
            "last where data.validation is 0 (nothing is held out to choose the best by)",
        ),
        (
            "data.train_images",
            d.train_images,
            d.train_images is None or d.train_images >= 2,
            "at least 2",
        ),
        ("data.label_noise", d.label_noise, 0 <= d.label_noise <= 1, "in [0, 1]"),
        ("data.pixel_noise", d.pixel_noise, 0 <= d.pixel_noise <= 1, "in [0, 1]"),
        ("data.crop", d.crop, d.crop >= 0, "at least 0"),
        ("data.cutout", d.cutout, d.cutout >= 0, "at least 0"),
        ("data.workers", d.workers, d.workers is None or d.workers >= 0, "at least 0"),
        ("data.smallest_crop", d.smallest_crop, 0 < d.smallest_crop <= 1, "in (0, 1]"),
        (
            "data.progressive",
            d.progressive,
            all(epoch >= 0 and 8 <= side <= 4096 for epoch, side in d.progressive)
            and [epoch for epoch, _ in d.progressive]
            == sorted({epoch for epoch, _ in d.progressive}),
            "pairs of a first epoch, ascending, and a side in [8, 4096]",
        ),
        (
            "data.rand_augment",
            d.rand_augment,
            d.rand_augment is None or (d.rand_augment[0] >= 1 and 0 <= d.rand_augment[1] <= 10),
            "a number of operations of at least 1, and a magnitude in [0, 10]",
        ),
        ("data.erasing", d.erasing, 0 <= d.erasing <= 1, "in [0, 1]"),
        ("data.mixup", d.mixup, d.mixup >= 0, "at least 0"),
        ("data.cutmix", d.cutmix, d.cutmix >= 0, "at least 0"),
        (
            "data.image_size",
            d.image_size,
            d.image_size is None or 8 <= d.image_size <= 4096,
            "in [8, 4096]",
        ),
        ("data.synthetic.classes", d.synthetic.classes, d.synthetic.classes >= 2, "at least 2"),
        (
            "data.synthetic.images",
            d.synthetic.images,
            d.synthetic.images >= 10 * d.synthetic.classes,
            "at least ten for each of data.synthetic.classes",
        ),
        ("optimizer.learning_rate", o.learning_rate, _positive(o.learning_rate), "above 0"),
        ("optimizer.weight_decay", o.weight_decay, o.weight_decay >= 0, "at least 0"),
        ("optimizer.momentum", o.momentum, 0 <= o.momentum < 1, "in [0, 1)"),
        ("schedule.warmup", s.warmup, s.warmup >= 0, "at least 0"),
        ("schedule.milestones", s.milestones, all(m >= 0 for m in s.milestones), "at least 0"),
        ("checkpoint.every_steps", recipe.checkpoint.every_steps,
         recipe.checkpoint.every_steps >= 1, "at least 1"),
        ("checkpoint.keep", recipe.checkpoint.keep, recipe.checkpoint.keep >= 1, "at least 1"),
        ("checkpoint.every_minutes", recipe.checkpoint.every_minutes,
         recipe.checkpoint.every_minutes is None or recipe.checkpoint.every_minutes > 0, "above 0"),
        ("distributed.timeout", recipe.distributed.timeout, recipe.distributed.timeout > 0,
         "above 0"),
        ("distributed.grace", recipe.distributed.grace, recipe.distributed.grace > 0, "above 0"),
        ("log_every", recipe.log_every, recipe.log_every >= 1, "at least 1"),
        ("evaluate_every", recipe.evaluate_every, recipe.evaluate_every >= 1, "at least 1"),
        ("max_steps", recipe.max_steps, recipe.max_steps is None or recipe.max_steps >= 1,
         "at least 1"),
        ("threads", recipe.threads, recipe.threads is None or recipe.threads >= 1, "at least 1"),
        ("seed", recipe.seed, 0 <= recipe.seed < 2**63, "in [0, 2**63)"),
        ("optimizer.betas", o.betas, all(0 <= beta < 1 for beta in o.betas), "in [0, 1)"),
        ("schedule.final", s.final, 0 <= s.final <= 1, "in [0, 1]"),
        ("schedule.factor", s.factor, 0 < s.factor <= 1, "in (0, 1]"),
    ]  # fmt: skip
    for key, number in _flatten(dataclasses.asdict(recipe)).items():
        for part in number if isinstance(number, tuple) else (number,):
            if isinstance(part, float):
                checks.append((key, number, math.isfinite(part), "finite"))
    for name, network in recipe.networks.items():
        usable = NAME.fullmatch(name) is not None and "." not in name and name not in RESERVED
        usable = usable and not hasattr(nn.ModuleDict(), name)
        checks.append(
            (
                f"the network name {name!r}",
                name,
                usable and not name.endswith("_ema"),
                "letters, digits, - and _, not ending in _ema, no key of metrics.jsonl and no "
                "attribute of torch.nn.ModuleDict",
            )
        )
        checks.append((f"networks.{name}.shard", network.shard,
                       not network.shard or network.role == "teacher",
                       "a teacher's option: an exported student lies on one device"))  # fmt: skip
        checks.append((f"networks.{name}.shard", network.shard,
                       not network.shard or t.precision != "fp16",
                       "off with train.precision fp16, whose loss scale needs all gradients: "
                       "use bf16"))  # fmt: skip
        rate = network.learning_rate
        checks.append((f"networks.{name}.learning_rate", rate,
                       rate is None or _positive(rate), "above 0"))  # fmt: skip
    for key, value, fits, needed in checks:
        if not fits:
            raise UsageError(f"{key} must be {needed}, got {value}")


def nearest(name: str, known: list[str]) -> str:
    """The hint after an unknown name: its nearest neighbour, or all there are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _refuse_unknown_keys(values: object, kind: object, source: str, prefix: str) -> None:
    """msgspec ignores keys that a dataclass does not have; a typo must not pass in silence."""
    if typing.get_origin(kind) is dict and isinstance(values, dict):
        for key, value in values.items():
            _refuse_unknown_keys(value, typing.get_args(kind)[1], source, f"{prefix}{key}.")
    if not dataclasses.is_dataclass(kind) or not isinstance(values, dict):
        return
    known = {f.name: f.type for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{source}: unknown key {prefix}{key}: {nearest(key, list(known))}")
        _refuse_unknown_keys(value, known[key], source, f"{prefix}{key}.")


def _with_own_fields(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value)(
            **{f.name: _with_own_fields(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    if isinstance(value, dict):
        return {key: _with_own_fields(item) for key, item in value.items()}
    return value


def _without_none(value: object) -> typing.Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def _flatten(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
