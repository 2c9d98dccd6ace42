"""Checkpoints load that these tests write with the code of other trainers."""

import argparse

import pytest
import torch
from test_weights import assert_same, load, network
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset
from vision import mended_torchvision

IMAGES, LABELS = torch.randn(8, 3, 8, 8), torch.arange(8) % 10


@pytest.fixture(autouse=True)
def _torchvision_imports():
    mended_torchvision()


def with_lightning(given, folder):
    lightning = pytest.importorskip("lightning", exc_type=ImportError)

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"optimizer": argparse.Namespace(lr=0.1)})
            self.model = given
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))

        def training_step(self, batch, _):
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = torch.utils.data.DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Module(), loader)
    trainer.save_checkpoint(folder / "epoch.ckpt")
    return folder / "epoch.ckpt"


def with_accelerate(given, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(given, torch.optim.SGD(given.parameters(), 0.1))
    accelerator.backward(nn.functional.cross_entropy(model(IMAGES), LABELS))
    optimizer.step()
    accelerator.save_state(str(folder / "state"))
    return folder / "state"


def with_accelerate_in_parts(given, folder):
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(given, folder / "parts", max_shard_size="100KB")
    assert (folder / "parts" / "model.safetensors.index.json").exists()
    return folder / "parts"


def with_transformers(given, folder):
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = given

        def forward(self, images, labels):
            logits = self.backbone(images)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"images": x, "labels": y} for x, y in zip(IMAGES, LABELS, strict=True)]
    options = transformers.TrainingArguments(
        output_dir=str(folder / "hf"), max_steps=1, per_device_train_batch_size=8, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(Model(), options, train_dataset=data)
    trainer.train()
    trainer.save_model(str(folder / "hf"))
    return folder / "hf"


def with_timm(given, folder):
    """Save as timm's train.py does, and return the last checkpoint, which has an average."""
    utils = pytest.importorskip("timm.utils", exc_type=ImportError)
    average = utils.ModelEmaV3(given, decay=0.5)
    optimizer = torch.optim.SGD(given.parameters(), 0.1)
    options = argparse.Namespace(model="resnet8", lr=0.1)
    saver = utils.CheckpointSaver(
        given, optimizer, args=options, model_ema=average, checkpoint_dir=str(folder),
    )  # fmt: skip
    saver.save_checkpoint(0, metric=75.0)
    given.load_state_dict(average.module.state_dict())  # timm and bdkd prefer the average
    return folder / "last.pth.tar"


def with_torchvision_references(given, folder):
    """Save the dictionary of references/classification/train.py, with an AveragedModel in it."""
    average = AveragedModel(given, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(given.parameters(), 0.1)
    checkpoint = {
        "model": given.state_dict(), "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 30).state_dict(), "epoch": 0,
        "args": argparse.Namespace(model="resnet8", device="cpu"),
        "model_ema": average.state_dict(), "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }  # fmt: skip
    torch.save(checkpoint, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


TRAINERS = [
    with_lightning, with_accelerate, with_accelerate_in_parts, with_transformers, with_timm,
    with_torchvision_references,
]  # fmt: skip


@pytest.mark.parametrize("trained", TRAINERS, ids=lambda f: f.__name__)
def test_a_checkpoint_of_another_trainer_loads(trained, tmp_path):
    given = network()
    path = trained(given, tmp_path)
    assert_same(load(path)[0], given)


# RepDistiller's names of some layers of each family. Many papers use its teachers.
REPDISTILLER = {
    "resnet8x4": ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight",
                  "layer1.0.downsample.0.weight", "layer3.0.downsample.1.bias", "fc.bias"],
    "wrn_16_2": ["conv1.weight", "block1.layer.0.bn1.weight", "block1.layer.0.convShortcut.weight",
                 "block3.layer.1.conv2.weight", "bn1.weight", "fc.weight"],
    "vgg8": ["block0.0.weight", "block0.1.running_var", "block4.0.bias", "classifier.weight"],
    "resnet18": ["conv1.weight", "layer2.0.shortcut.0.weight", "layer4.1.bn2.bias",
                 "linear.weight"],
}  # fmt: skip


@pytest.mark.parametrize("model", REPDISTILLER)
def test_weights_with_the_names_of_repdistiller_load(model, tmp_path):
    from bdkd.models.key_names import layouts

    given = network(model, 100)
    names = layouts(given, model)["RepDistiller"]
    assert set(REPDISTILLER[model]) <= set(names.values())
    state = {names[key]: value for key, value in given.state_dict().items()}
    torch.save({"epoch": 240, "model": state, "best_acc": torch.tensor(75.6)}, tmp_path / "t.pth")
    loaded, text = load(tmp_path / "t.pth", model, 100)
    assert_same(loaded, given)
    assert "named as in RepDistiller" in text


LIBRARIES = [
    ("torchvision", "resnet18", "imagenet_resnet18"),
    ("timm", "resnet18", "imagenet_resnet18"),
    ("torchvision", "mobilenet_v2", "imagenet_mobilenet_v2"),
    ("timm", "mobilenetv2_100", "imagenet_mobilenet_v2"),
    ("torchvision", "shufflenet_v2_x0_5", "imagenet_shufflenet_v2_x0_5"),
    ("torchvision", "mobilenet_v3_small", "torchvision:mobilenet_v3_small"),
    ("torchvision", "googlenet", "torchvision:googlenet"),
    ("timm", "mobilenetv3_small_050", "timm:mobilenetv3_small_050"),
]


@pytest.mark.parametrize(("library", "name", "model"), LIBRARIES)
def test_weights_of_a_library_give_the_librarys_logits(library, name, model, tmp_path):
    """Load them into the network of that library, or into our network for the same function."""
    if library == "timm":
        theirs = pytest.importorskip("timm").create_model(name, num_classes=10)
    else:
        models = pytest.importorskip("torchvision").models
        options = {"aux_logits": True, "init_weights": False} if name == "googlenet" else {}
        theirs = models.get_model(name, weights=None, num_classes=10, **options)
    for key, value in theirs.state_dict().items():
        if key.endswith("running_mean"):
            nn.init.normal_(value, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    ours, _ = load(tmp_path / "w.pth", model)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def test_a_network_with_another_activation_does_not_load(tmp_path):
    """timm's MobileNetV1 has the same shapes as ours, but uses ReLU6."""
    theirs = pytest.importorskip("timm").create_model("mobilenetv1_100", num_classes=10)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    with pytest.raises(Exception, match="does not fit 'teacher'"):
        load(tmp_path / "w.pth", "imagenet_mobilenet_v1")
