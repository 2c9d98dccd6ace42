"""Pass wrong input to every public function and every command, and check the messages.

A row contains words that the message must contain: the value that came, what is needed, and what to
do if this is not obvious. Broken files and data are tested together with the code that reads them.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import bdkd
from bdkd.cli import COMMANDS, main
from bdkd.config import OptimizerConfig
from bdkd.evaluation.calibration import Calibration, bootstrap, expected_ece
from bdkd.evaluation.figures import reliability_diagram
from bdkd.evaluation.temperature import fit_temperature

N, C = 4, 3
s, t = torch.zeros(N, C), torch.ones(N, C)
y = torch.tensor([0, 1, 2, 0])
loss = partial(bdkd.bdkd_loss, s, t, y)
with_grads = partial(bdkd.bdkd_loss_and_grad, s, t, y)


class ModelOutput:
    """An output as a Hugging Face model returns it."""

    logits = s


class Plain:
    """A class without the interface of any kind of plugin."""


class Undecorated(OptimizerConfig):
    rate: float = 1.0


@dataclass(frozen=True)
class WithoutDefault(OptimizerConfig):
    rate: float = field(kw_only=True)


@dataclass(frozen=True)
class WithComplex(OptimizerConfig):
    phase: complex = 1j


# (name, call, exception, words)
FUNCTIONS = [
    # --- the loss: tensors
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s.numpy(), t, y), TypeError,
     ["student_logits must be a tensor", "got ndarray", "torch.as_tensor(student_logits)"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, ModelOutput(), y), TypeError,
     ["teacher_logits", "got ModelOutput", "pass its .logits"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(None, t, y), TypeError,
     ["student_logits must be a tensor", "got NoneType"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(y, t, s), TypeError,
     ["student_logits", "float32", "got torch.int64", "labels go into target"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t.to(torch.complex64), y), TypeError,
     ["teacher_logits", "float32", "torch.complex64", ".float()"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s.to_sparse(), t, y), TypeError,
     ["student_logits must be a dense tensor", "torch.sparse_coo", ".to_dense()"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t[:2], y), ValueError,
     ["student_logits and teacher_logits", "(4, 3)", "(2, 3)", "same samples"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, torch.zeros(N, 5), y), ValueError,
     ["student_logits and teacher_logits", "(4, 3)", "(4, 5)", "same classes"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s.sum(), t, y), ValueError,
     ["student_logits", "(..., C)", "C >= 1", "got ()"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t.to("meta"), y), ValueError,
     ["teacher_logits", "device cpu", "got meta", "teacher_logits.to('cpu')"]),
    # --- the loss: labels and weights
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t, [0, 1, 2, 0]), TypeError,
     ["target must be a tensor or None", "got list", "torch.as_tensor(target)"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t), TypeError, ["bdkd_loss()", "'target'"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t, y.float()), ValueError,
     ["floating-point target", "soft labels", "(4, 3)", "got (4,)", "target.long()"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t, s.long()), ValueError,
     ["target must have shape (4,)", "got (4, 3)", "target.float()"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t, y[:, None]), ValueError,
     ["target must have shape (4,)", "got (4, 1)", "target.squeeze(-1)"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t, y[:2]), ValueError,
     ["target must have shape (4,)", "one label per sample", "got (2,)"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t, y.bool()), TypeError,
     ["target", "integer labels or floating-point soft labels", "torch.bool", ".long()"]),
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t, y + 1), ValueError,
     ["target[2] is 3", "[0, 3)", "ignore_index (-100)", "3 classes"]),
    ("bdkd_loss", lambda: loss(sample_weight=[1.0] * N), TypeError,
     ["sample_weight must be a tensor", "got list", "torch.as_tensor(sample_weight)"]),
    ("bdkd_loss", lambda: loss(sample_weight=y), TypeError,
     ["sample_weight must be float16", "torch.int64", "sample_weight.float()"]),
    ("bdkd_loss", lambda: loss(sample_weight=torch.ones(3)), ValueError,
     ["sample_weight must have shape (4,)", "one weight per sample", "got (3,)"]),
    # --- the loss: options
    ("bdkd_loss", lambda: bdkd.bdkd_loss(s, t, y, 4.0), TypeError, ["positional", "4"]),
    ("bdkd_loss", lambda: loss(tau=4.0), TypeError, ["'tau'", "Did you mean 'temperature'?"]),
    ("bdkd_loss", lambda: loss(alpha=0.9), TypeError, ["'alpha'", "'student_ce'", "'student_kd'"]),
    ("bdkd_loss_and_grad", lambda: with_grads(T=4.0), TypeError, ["'T'", "'temperature'"]),
    ("BDKDLoss", lambda: bdkd.BDKDLoss(T=4.0), TypeError, ["'T'", "'temperature'"]),
    ("BDKDOutput", lambda: loss().backward(), AttributeError,
     ["'backward'", "no loss requires a gradient", "torch.autograd.backward"]),
    ("bdkd_loss", lambda: loss(temperature=0), ValueError, ["temperature", "[0.0001", "got 0"]),
    ("bdkd_loss", lambda: loss(temperature="4"), TypeError,
     ["temperature", "[0.0001", "'4' (str)"]),
    ("bdkd_loss", lambda: loss(temperature=torch.tensor(4.0)), TypeError,
     ["temperature", "[0.0001", "Tensor", "temperature.item()"]),
    ("bdkd_loss", lambda: loss(gamma=0.5), ValueError, ["gamma", "[1, 1e9]", "0.5"]),
    ("bdkd_loss", lambda: loss(student_kd=-1), ValueError, ["student_kd", "[1e-30, 1e9]", "-1"]),
    ("bdkd_loss", lambda: loss(teacher_ce=float("nan")), ValueError, ["teacher_ce", "0 or", "nan"]),
    ("bdkd_loss", lambda: loss(teacher_divergence="KL"), ValueError,
     ["teacher_divergence", "'reverse' or 'forward'", "'KL'"]),
    ("bdkd_loss", lambda: loss(soften_entropy=1), TypeError, ["soften_entropy", "bool", "1"]),
    ("bdkd_loss", lambda: loss(label_smoothing=2), ValueError, ["label_smoothing", "[0, 1]", "2"]),
    ("bdkd_loss", lambda: loss(ignore_index=None), TypeError, ["ignore_index", "int", "None"]),
    ("bdkd_loss", lambda: loss(reduction="batchmean"), ValueError,
     ["reduction", "'mean', 'sum' or 'none'", "'batchmean'"]),
    ("bdkd_loss", lambda: loss(grad_scale="1"), TypeError, ["grad_scale", "number", "str"]),
    ("bdkd_loss", lambda: loss(grad_scale=torch.ones(2)), ValueError,
     ["grad_scale", "0-dim", "(2,)"]),
    ("bdkd_loss", lambda: loss(backend="cuda"), ValueError,
     ["backend", "auto, triton, native, reference", "'cuda'"]),
    ("BDKDLoss", lambda: bdkd.BDKDLoss(temperature=-1), ValueError,
     ["temperature", "[0.0001", "-1"]),
    ("BDKDLoss", lambda: bdkd.BDKDLoss(backend="gpu"), ValueError, ["backend", "native", "'gpu'"]),
    ("BDKDLoss", lambda: bdkd.BDKDLoss(T=4), TypeError, ["'T'"]),
    ("BDKDLoss", lambda: bdkd.BDKDLoss()(s, t), TypeError, ["'target'"]),
    ("bdkd_loss_and_grad", lambda: with_grads(grads=s), TypeError,
     ["grads must be a pair (ds, dt)", "got Tensor"]),
    ("bdkd_loss_and_grad", lambda: with_grads(grads=(s, t, s)), TypeError,
     ["grads must be a pair (ds, dt)", "a tuple of 3"]),
    ("bdkd_loss_and_grad", lambda: with_grads(grads=(s.clone(), t.half())), ValueError,
     ["grads[1]", "(4, 3) torch.float32", "torch.float16", "torch.empty_like(logits)"]),
    ("bdkd_loss_and_grad", lambda: with_grads(grads=(s[:1].expand(N, C), None)), ValueError,
     ["grads[0]", "each element once", "strides (0, 1)", ".contiguous()"]),
    ("bdkd_loss_and_grad", lambda: with_grads(grads=(g := s.clone(), g)), ValueError,
     ["grads[1] must not overlap the memory of grads[0]", "torch.empty_like(logits)"]),
    # --- functions with the interfaces of other libraries
    ("DistillKL", lambda: bdkd.DistillKL(0), ValueError, ["T must be", "[0.0001", "got 0"]),
    ("DistillKL", lambda: bdkd.DistillKL("4"), TypeError, ["T must be", "number", "'4' (str)"]),
    ("DistillKL", lambda: bdkd.DistillKL(4)(s[None], t[None]), ValueError,
     ["y_s must have shape (N, C)", "got (1, 4, 3)", "flatten(0, -2)"]),
    ("DistillKL", lambda: bdkd.DistillKL(4)(s, t[:2]), ValueError,
     ["y_s and y_t must have one shape", "(4, 3)", "(2, 3)"]),
    ("DistillKL", lambda: bdkd.DistillKL(4)(s, t.to("meta")), ValueError,
     ["y_s and y_t must be on one device", "cpu", "meta"]),
    ("kd_loss", lambda: bdkd.kd_loss(s, t, -1.0), ValueError, ["temperature", "[0.0001", "-1.0"]),
    ("kd_loss", lambda: bdkd.kd_loss(s, t, 4.0, False), TypeError, ["positional", "4"]),
    ("kd_loss", lambda: bdkd.kd_loss(s, t, 4.0, reduce=None), TypeError,
     ["reduce", "bool", "None"]),
    ("kd_loss", lambda: bdkd.kd_loss(s, t.numpy(), 4.0), TypeError,
     ["logits_teacher must be a tensor", "ndarray", "torch.as_tensor(logits_teacher)"]),
    ("LigerJSD", lambda: bdkd.LigerJSD(1.5), ValueError, ["beta", "[0, 1]", "1.5"]),
    ("LigerJSD", lambda: bdkd.LigerJSD(ignore_index=1.5), TypeError,
     ["ignore_index", "int", "1.5"]),
    ("LigerJSD", lambda: bdkd.LigerJSD()(s, t, y[:2]), ValueError,
     ["shift_labels must have shape (4,)", "got (2,)"]),
    ("LigerJSD", lambda: bdkd.LigerJSD(1)(s, t, y.float()), TypeError,
     ["shift_labels", "integer labels or None", "torch.float32"]),
    ("LigerKLDIVLoss", lambda: bdkd.LigerKLDIVLoss(reduction="none"), ValueError,
     ["reduction", "'mean', 'batchmean' or 'sum'", "'none'", "torch.nn.KLDivLoss"]),
    ("LigerKLDIVLoss", lambda: bdkd.LigerKLDIVLoss(1e-10), TypeError, ["positional"]),
    ("LigerKLDIVLoss", lambda: bdkd.LigerKLDIVLoss(log_target=1), TypeError,
     ["log_target", "bool", "1"]),
    ("LigerKLDIVLoss", lambda: bdkd.LigerKLDIVLoss()(s.long(), t), TypeError,
     ["y_pred", "float32", "torch.int64"]),
    # --- models
    ("create_model", lambda: bdkd.create_model("resnet9", 10), ValueError,
     ["no model named 'resnet9'", "'resnet8'"]),
    ("create_model", lambda: bdkd.create_model(18, 10), TypeError,
     ["name must be a string", "'resnet20'", "18 (int)", "list_models()"]),
    ("create_model", lambda: bdkd.create_model("resnet8", 0), ValueError,
     ["num_classes", "integer >= 1", "0"]),
    ("create_model", lambda: bdkd.create_model("resnet8", "10"), ValueError,
     ["num_classes", "integer >= 1", "'10'"]),
    ("create_model", lambda: bdkd.create_model("resnet8", 10, in_channels=0), ValueError,
     ["in_channels", "integer >= 1", "0"]),
    ("create_model", lambda: bdkd.create_model("resnet8", 10, depth=3), ValueError,
     ["'resnet8' has no option 'depth'", "width"]),
    ("create_model", lambda: bdkd.create_model("resnet8", 10, width="x"), ValueError,
     ["width", "number above 0", "'x'"]),
    # --- plugins
    ("register_objective", lambda: bdkd.register_objective(Plain), TypeError,
     ["name of the objective must be a string", "Plain", "call the decorator"]),
    ("register_objective", lambda: bdkd.register_objective("a b")(Plain), ValueError,
     ["name of the objective", "letters, digits", "'a b'"]),
    ("register_objective", lambda: bdkd.register_objective("kd")(Plain), ValueError,
     ["the objective 'kd' is registered by bdkd.objectives.kd.KD", "Plain", "another name"]),
    ("register_source", lambda: bdkd.register_source("mine", dict)(Plain), TypeError,
     ["options of the data source 'mine'", "subclass of DataConfig", "dict"]),
    ("register_optimizer", lambda: bdkd.register_optimizer("mine", Undecorated)(Plain), TypeError,
     ["Undecorated", "must be a dataclass", "@dataclass(frozen=True)"]),
    ("register_optimizer", lambda: bdkd.register_optimizer("mine", WithoutDefault)(Plain),
     TypeError, ["WithoutDefault.rate must have a default"]),
    ("register_optimizer", lambda: bdkd.register_optimizer("mine", WithComplex)(Plain),
     TypeError, ["WithComplex.phase must default to a number, a string, a tuple", "got 1j"]),
    ("register_model", lambda: bdkd.register_model("resnet8")(Plain), ValueError,
     ["the model 'resnet8' is registered by bdkd.models.resnet", "Plain", "another name"]),
    ("register_metric", lambda: bdkd.register_metric("model"), ValueError, ["'model'", "summary"]),
    ("register_metric", lambda: bdkd.register_metric("top1")(Plain), ValueError,
     ["the metric 'top1' is registered by bdkd.metrics", "Plain", "another name"]),
    # --- models
    ("create_model", lambda: bdkd.create_model("wrn_15_2", 10), ValueError,
     ["6n + 4", "16", "D = 15"]),
    # --- evaluation
    ("Calibration", lambda: Calibration("10"), ValueError, ["num_classes", "integer >= 1", "'10'"]),
    ("Calibration", lambda: Calibration(C).update(s.numpy(), y), TypeError,
     ["logits must be a tensor", "ndarray", "torch.as_tensor(logits)"]),
    ("Calibration", lambda: Calibration(C).update(y, s), TypeError,
     ["logits must be floating", "torch.int64", "labels go into target"]),
    ("Calibration", lambda: Calibration(5).update(s, y), ValueError,
     ["logits must have shape (B, 5)", "got (4, 3)"]),
    ("Calibration", lambda: Calibration(C).update(s, y.float()), TypeError,
     ["target", "integer labels", "torch.float32", ".long()"]),
    ("Calibration", lambda: Calibration(C).update(s, y[:2]), ValueError,
     ["target must have shape (4,)", "got (2,)"]),
    ("Calibration", lambda: Calibration(C).update(s, y + 1), ValueError,
     ["target[2] is 3", "[0, 3)", "3 classes"]),
    ("Calibration", lambda: Calibration(C).update(s.to("meta"), y), ValueError,
     ["logits", "device cpu", "got meta", "logits.to('cpu')"]),
    ("Calibration", lambda: Calibration(C).compute(), ValueError, ["no samples", "update()"]),
    ("Calibration", lambda: Calibration(C).merge(Calibration(5)), ValueError,
     ["5 classes", "one of 3"]),
    ("expected_ece", lambda: expected_ece(s), ValueError,
     ["confidences must have shape (N,)", "got (4, 3)"]),
    ("expected_ece", lambda: expected_ece(np.ones(3)), TypeError,
     ["confidences must be a tensor", "ndarray", "torch.as_tensor"]),
    ("expected_ece", lambda: expected_ece(torch.tensor([0.5, 97.0])), ValueError,
     ["confidences", "[0, 1]", "got 97"]),
    ("expected_ece", lambda: expected_ece(torch.rand(3), draws=0), ValueError,
     ["draws", ">= 1", "0"]),
    ("bootstrap", lambda: bootstrap(torch.rand(3), torch.ones(4)), ValueError,
     ["corrects", "(3,)", "got (4,)"]),
    ("bootstrap", lambda: bootstrap(torch.rand(3), [True] * 3), TypeError,
     ["corrects must be a tensor", "list", "torch.as_tensor(corrects)"]),
    ("bootstrap", lambda: bootstrap(torch.rand(3), torch.ones(3), level=95), ValueError,
     ["level", "(0, 1)", "95"]),
    ("fit_temperature", lambda: fit_temperature(s, y[:2]), ValueError,
     ["logits must have shape (N, C)", "target (N,)", "(4, 3)", "(2,)"]),
    ("reliability_diagram", lambda: reliability_diagram({}, Path("x.png"), "x"), ValueError,
     ["at least one network"]),
]  # fmt: skip

# These take no arguments, or only the loss creates them.
TAKE_NOTHING = {"available_backends", "list_models", "BDKDOutput", "BDKDStats"}

# (arguments, exit code, words); "file" is neither a recipe nor a checkpoint, "folder" is empty
COMMAND_LINES = [
    ("trian", 2, ["unknown command 'trian'", "'train'"]),
    ("--versoin", 2, ["'--versoin'", "'--version'"]),
    ("train", 2, ["needs a recipe as its first argument", "bdkd recipes", "TOML file", "--data"]),
    ("train digit", 2, ["unknown recipe 'digit'", "'digits'", "TOML file"]),
    ("train missing.toml", 1, ["missing.toml", "No such file", "shipped recipe"]),
    ("train folder", 2, ["folder is a folder, not a recipe", "--data folder trains on its images"]),
    ("train --data", 2, ["--data needs a value: DATA", "hf:NAME"]),
    ("train --data folder", 1, ["folder holds no images", "folder/<class>/"]),
    ("train file", 2, ["file is not valid TOML", "line 1"]),
    ("train empty.toml", 2, ["empty.toml", "has no name", "config.toml"]),
    ("train digits extra", 2, ["unexpected argument 'extra'", "bdkd train --help"]),
    ("train digits --seed x", 2, ["--seed must be an integer, in [0, 2**63), got 'x'"]),
    ("train digits --networks.pupil.model resnet8", 2,
     ["--networks.pupil.model", "no network 'pupil'", "teacher, student"]),
    ("train digits --networks.student.modle resnet8", 2, ["modle", "--networks.student.model"]),
    ("train digits --resume always", 2, ["--resume must be", "never, auto, require", "'always'"]),
    ("train digits --resume --run-dir new", 1, ["nothing to resume", "new"]),
    ("train digits --log tensorbord", 2, ["--log", "'tensorbord'", "'tensorboard'"]),
    ("train digits --max-steps 0", 2, ["--max-steps must be at least 1, got 0"]),
    ("train digits --lr 0.1", 2, ["unknown option '--lr'", "--optimizer.learning-rate?"]),
    ("train digits --learning_rate 0.1", 2, ["'--learning_rate'", "--optimizer.learning-rate"]),
    ("train digits --gamma 2", 2, ["unknown option '--gamma'", "--objective.gamma?"]),
    ("train digits --xyzzy 2", 2, ["unknown option '--xyzzy'", "--help-all lists all options"]),
    ("train digits -b 8", 2, ["unknown option '-b'", "--train.batch-size?"]),
    ("train digits --train.epochs", 2, ["--train.epochs needs a value: an integer, at least 1"]),
    ("train digits --train.epochs 1 2", 2, ["unexpected argument '2'"]),
    ("train digits --train.compile yes", 2, ["takes no value, got 'yes'", "--train.no-compile"]),
    ("train digits --dry-run=1", 2, ["--dry-run takes no value, got '1'"]),
    ("train digits --train.clip-norm none", 2, ["--train.clip-norm must be a number", "'none'"]),
    ("train digits --epochs ten", 2, ["--epochs must be an integer, at least 1, got 'ten'"]),
    ("train digits --batch-size", 2, ["--batch-size needs a value"]),
    ("train digits --optimizer.name adamw --optimizer.betas 0.9", 2,
     ["--optimizer.betas must be 2 numbers, got '0.9'"]),
    ("train digits --data.source imagenet --data.progressive 1 2 3", 2,
     ["--data.progressive must be groups of 2 integers, got '1 2 3'"]),
    ("train digits --teacher", 2, ["--teacher needs a value", "bdkd models"]),
    ("train digits --teacher resnet21", 2, ["'resnet21'", "'resnet20'"]),
    ("train digits --pretrained", 2, ["--pretrained", "no weights are published for", "timm"]),
    ("train digits --pretrained=teacher", 2, ["--pretrained takes no value", "'teacher'"]),
    ("train digits --objective bdk", 2, ["unknown objective 'bdk'", "'bdkd'"]),
    ("train digits --objective lskd", 2, ["'lskd'", "networks.teacher.weights", "'independent'"]),
    ("train digits --objective dkd", 2, ["'dkd'", "networks.teacher.weights", "'independent'"]),
    ("train digits --objective dkd --objective.warmup -1", 2, ["warmup", "at least 0", "-1"]),
    ("train digits --objective dkd --objective.temperature 0", 2, ["temperature", "[0.0001, "]),
    ("train digits --objective dkd --objective.student-kd 1", 2, ["student_kd", "'dkd'"]),
    ("train digits --objective dkd --objective.student-ce 0 --objective.target-kd 0 "
     "--objective.other-kd 0", 2, ["student_ce, target_kd and other_kd must not all be 0"]),
    ("train digits --data nowhere/", 2, ["'nowhere/'"]),
    ("train --epochs 3 digits", 2, ["needs the recipe as its first argument", "bdkd train digits"]),
    ("train digits --device cuda:9", 1, ["no device cuda:9", "--device cpu"]),
    ("train digits --no-probe", 2, ["--no-probe needs --dry-run", "give --dry-run too"]),
    ("train digits --images-per-second 5", 2, ["--images-per-second needs --dry-run"]),
    ("train digits --dry-run --images-per-second 0", 2, ["--images-per-second", "above 0", "0.0"]),
    ("benchmark", 2, ["needs a recipe as its first argument", "digits", "TOML file"]),
    ("benchmark digit", 2, ["unknown recipe 'digit'", "'digits'"]),
    ("benchmark --steps 5 digits", 2, ["needs a recipe as its first argument"]),
    ("benchmark digits --steps 0", 2, ["--steps must be at least 1, got 0"]),
    ("benchmark digits --steps x", 2, ["--steps must be an integer, at least 1, got 'x'"]),
    ("benchmark digits --warmup -1", 2, ["--warmup must be at least 0", "got -1"]),
    ("benchmark digits --data imagenet", 2, ["data.root must name the folder"]),
    ("benchmark digits --classes 5", 2, ["--classes needs --data synthetic"]),
    ("benchmark digits --data synthetic --classes 1", 2, ["--classes must be at least 2", "got 1"]),
    ("benchmark digits --data synthetic --data.source folder", 2,
     ["number of classes of the data source 'folder' is unknown", "pass --classes N"]),
    ("benchmark digits --networks.pupil.model resnet8", 2, ["no network 'pupil'"]),
    ("benchmark digits --resume", 2, ["--resume"]),
    ("benchmark imagenet-r50-mbv1", 1, ["data/imagenet"]),
    ("benchmark nothing.onnx", 1, ["cannot read nothing.onnx", "No such file"]),
    ("benchmark nothing.onnx digits", 2, ["digits is not an exported file (.onnx, ", "one recipe"]),
    ("benchmark nothing.onnx --batch 0", 2, ["--batch must be in [1, 1048576], got 0"]),
    ("benchmark nothing.onnx --threads two", 2, ["--threads must be integers", "got 'two'"]),
    ("benchmark nothing.onnx --steps 5", 2, ["unknown option '--steps'", "--help lists"]),
    ("evaluate", 2, ["evaluate needs RUN_OR_FILE: the folder of a run"]),
    ("evaluate nothing", 1, ["no checkpoint at nothing", "config.toml", "checkpoints/"]),
    ("evaluate folder", 1, ["no checkpoint at folder", "config.toml"]),
    ("evaluate file", 1, ["file is not a checkpoint", "begin as a zip file", "use another file"]),
    ("evaluate file --split train", 2, ["--split must be 'val' or 'test', got 'train'"]),
    ("evaluate folder --against file", 2, ["--against needs an exported file", "got folder"]),
    ("evaluate file --recipe digits", 2, ["--recipe needs an exported file", ".onnx", "got file"]),
    ("evaluate no.onnx --recipe digits", 1, ["cannot read no.onnx", "No such file"]),
    ("evaluate no.onnx --against", 2, ["--against needs a value"]),
    ("evaluate file --jsn", 2, ["--jsn", "--json"]),
    ("export", 2, ["export needs --to: 'onnx'", "'torchvision'"]),
    ("export --to onnx", 2, ["export needs RUN_OR_CHECKPOINT: the folder of a run"]),
    ("export nothing --to onnx", 1, ["no checkpoint at nothing", "config.toml"]),
    ("export folder --to tflite", 2, ["--to must be 'onnx', 'export', ", "got 'tflite'"]),
    ("update-bn", 2, ["update-bn needs RUN_OR_CHECKPOINT: the folder of a run"]),
    ("update-bn folder", 1, ["no checkpoint at folder", "config.toml"]),
    ("update-bn file", 1, ["file is not a checkpoint", "begin as a zip file", "use another file"]),
    ("update-bn file --images 0", 2, ["--images", "at least 1", "got 0"]),
    ("compare", 2, ["needs a recipe as its first argument", "digits"]),
    ("compare digits --methods bdk", 2, ["unknown objective 'bdk'", "'bdkd'"]),
    ("compare digits --methods bdkd bdkd", 2, ["--methods", "'bdkd'", "more than once"]),
    ("compare digits --methods bdkd --seeds x", 2, ["--seeds must be integers, got 'x'"]),
    ("compare digits --methods kd kd:temperature=4", 2, ["'kd'", "are the same method"]),
    ("compare digits --methods kd:optimizer.lr=1", 2, ["unknown key optimizer.lr", "learning_"]),
    ("tune", 2, ["needs a recipe as its first argument", "digits"]),
    ("tune digits", 2, ["--methods is missing", "kd:optimizer.learning_rate=0.05/0.1/0.2"]),
    ("tune digits --methods kd", 2, ["'kd' has nothing to choose", "give an option several"]),
    ("tune digits --methods kd:temperature=1/x", 2, ["temperature must be a number, got 'x'"]),
    ("tune digits --methods kd:temperature=1/2 --seeds x", 2, ["--seeds must be integers, got"]),
    ("report", 2, ["the folder of at least one run", "runs/mine"]),
    ("report nothing", 1, ["nothing is not a folder", "config.toml", "metrics.jsonl"]),
    ("report folder", 1, ["folder contains no run folder", "config.toml"]),
    ("train digits --networks.teacher.weights pretrained", 2,
     ["networks.teacher.weights cannot be pretrained", "wrn_16_2", "a model of timm", "imagenet_"]),
    ("models wrn_4_2", 2, ["no model matches 'wrn_4_2'", "did you mean 'wrn_40_2'?"]),
    ("models resnet8 wrn", 2, ["unexpected argument 'wrn'"]),
    ("recipes digit", 2, ["unknown recipe 'digit'", "'digits'"]),
    ("recipes digits --json", 2, ["--json", "leave out NAME"]),
    ("data get", 2, ["unknown action 'get'", "'fetch'"]),
    ("data check", 2, ["data check needs ROOT"]),
    ("data check nothing", 1, ["no data set at nothing", "data.root must name an existing"]),
    ("data check file", 1, ["must be a folder, got the file file", "pass its folder"]),
    ("data check folder", 1, ["folder holds no images", "folder/<class>/"]),
    ("data check hf:./nothing", 1, ["no data set at ./nothing", "OWNER/NAME"]),
    ("data check folder --format tfrecord", 1, ["folder holds no tfrecord files", "train*-of-*"]),
    ("data check folder --label-column x", 2, ["data.label_column applies to Hugging Face"]),
    ("data list --jsn", 2, ["unknown option '--jsn'", "--json"]),
    ("train digits --data.source images", 2, ["data.root must name", "hf:NAME"]),
    ("train digits --data.source images --data.root nothing", 1, ["no data set at nothing"]),
    ("train digits --data.source images --data.root file", 1, ["got the file file"]),
    ("train digits --data.source images --data.test-share 1", 2,
     ["--data.test-share must be in (0, 1), got 1"]),
    ("data fetch cifar10", 2, ["data fetch needs --to"]),
    ("data fetch fashion-minst --to folder", 2, ["did you mean 'fashion-mnist'"]),
    ("data fetch fashion-mnist --to file", 1, ["cannot write in file"]),
    ("train fashion-5k --data.root folder", 1,
     ["no data set fashion-mnist at folder", "dataset-fashion-mnist", "bdkd data fetch"]),
    ("train fashion-5k --data.image-size 32 --data.root folder", 1, ["no data set fashion-mnist"]),
    ("train kanji-500 --data.root folder", 1, ["no font files ipag.ttf", "apt install"]),
    ("train kanji-500 --data.manifest nothing", 1, ["cannot read the manifest nothing: No such"]),
    ("train kanji-500 --data.manifest folder", 1, ["cannot read the manifest folder: Is a dir"]),
    ("train kanji-500 --data.manifest file", 2, ["file is not a manifest of glyphs"]),
    ("train kanji-500 --data.characters 1", 2, ["--data.characters must be at least 2", "got 1"]),
    ("train kanji-500 --data.characters 2965", 2,
     ["data.characters must be at most 2,964", "got 2,965"]),
    ("train digits --data.characters 5", 2, ["data.characters is an option of glyphs"]),
    ("data fetch cifar1 --to folder", 2, ["unknown data set 'cifar1'", "'cifar10'"]),
    ("doctor now", 2, ["unexpected argument 'now'", "bdkd doctor --help"]),
    ("doctor --jsno", 2, ["unknown option '--jsno'", "did you mean --json?"]),
    ("completion", 2, ["completion needs SHELL: bash, zsh or fish"]),
    ("completion tcsh", 2, ["SHELL must be 'bash', 'zsh' or 'fish', got 'tcsh'"]),
    ("completion bash zsh", 2, ["unexpected argument 'zsh'"]),
]  # fmt: skip


def identity(case) -> str:
    return f"{case[0]}-{'-'.join(case[-1][-2:])}".replace(" ", "_")


@pytest.mark.parametrize(("name", "call", "kind", "words"), FUNCTIONS, ids=map(identity, FUNCTIONS))
def test_an_error_of_a_function_names_the_value_the_need_and_the_fix(name, call, kind, words):
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value)
    assert type(raised.value) is kind
    assert "\n" not in message
    assert len(message) < 300
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("line", "code", "words"), COMMAND_LINES, ids=[c[0] for c in COMMAND_LINES]
)
def test_an_error_of_a_command_names_the_value_the_need_and_the_fix(
    line, code, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("neither a recipe nor a checkpoint")
    (tmp_path / "empty.toml").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_:
        main(line.split())
    out, err = capsys.readouterr()
    assert exit_.value.code == code
    assert out == ""
    assert "Traceback" not in err
    # A warning about the torchvision of this environment is allowed.
    lines = [x for x in err.splitlines() if not x.startswith("warning: the installed torchvision")]
    assert len(lines) == 1
    err = lines[0]
    assert err.startswith("bdkd: ")
    assert not err.startswith("bdkd: bdkd")
    for word in words:
        assert word in err
    assert sorted(tmp_path.rglob("*")) == before, "a refused command leaves nothing behind"


def test_every_public_name_and_every_command_has_a_row():
    assert {case[0] for case in FUNCTIONS} >= set(bdkd.__all__) - TAKE_NOTHING
    assert {line.split()[0] for line, *_ in COMMAND_LINES} >= set(COMMANDS)
