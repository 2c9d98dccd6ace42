"""Hugging Face's Trainer, with both networks in one module and the loss in `compute_loss`.

What changes in your Trainer:

    student_logits, teacher_logits = model(inputs["images"])
    out = bdkd_loss(student_logits, teacher_logits, inputs["labels"])
    loss = out.student + out.teacher
"""

import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from bdkd import bdkd_loss


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        self.student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, images):
        return self.student(images), self.teacher(images)


class PairTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student_logits, teacher_logits = model(inputs["images"])
        out = bdkd_loss(student_logits, teacher_logits, inputs["labels"])
        loss = out.student + out.teacher
        return (loss, {"logits": student_logits}) if return_outputs else loss


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


if __name__ == "__main__":
    torch.manual_seed(0)
    labels = torch.randint(10, (1280,))
    images = torch.randn(10, 64)[labels] + 2 * torch.randn(1280, 64)  # ten Gaussian classes
    rows = [{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, num_train_epochs=3, per_device_train_batch_size=64, learning_rate=1e-2,
            label_names=["labels"], remove_unused_columns=False, save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = PairTrainer(
            Pair(), options, train_dataset=rows[:1024], eval_dataset=rows[1024:],
            compute_metrics=accuracy,
        )  # fmt: skip
        trainer.train()
        print(f"student accuracy {trainer.evaluate()['eval_accuracy']:.1%}")
