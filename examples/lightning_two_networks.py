"""Two networks in one LightningModule, each with its own optimizer (manual optimization).

What changes in your module:

    self.automatic_optimization = False
    out = bdkd_loss(self.student(x), self.teacher(x), y, temperature=2.0)
    self.manual_backward(out.student + out.teacher)
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdkd import bdkd_loss


class Pair(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        self.student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def configure_optimizers(self):
        networks = (self.teacher, self.student)
        return [torch.optim.AdamW(network.parameters(), lr=1e-2) for network in networks]

    def training_step(self, batch, index):
        x, y = batch
        out = bdkd_loss(self.student(x), self.teacher(x), y, temperature=2.0)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(out.student + out.teacher)
        for optimizer in self.optimizers():
            optimizer.step()
        self.log("student_loss", out.student.detach())

    def validation_step(self, batch, index):
        x, y = batch
        self.log("accuracy", (self.student(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    torch.manual_seed(0)
    labels = torch.randint(10, (1280,))
    images = torch.randn(10, 64)[labels] + 2 * torch.randn(1280, 64)  # ten Gaussian classes
    train = DataLoader(TensorDataset(images[:1024], labels[:1024]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(images[1024:], labels[1024:]), batch_size=256)

    trainer = lightning.Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Pair(), train, test)
    print(f"student accuracy {trainer.callback_metrics['accuracy']:.1%}")
