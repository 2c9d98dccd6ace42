"""A training loop with Hugging Face Accelerate, on one CPU, one GPU or many (`accelerate launch`).

What changes in your loop:

    out = bdkd_loss(*pair(x), y)
    accelerator.backward(out.student + out.teacher)
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bdkd import bdkd_loss


class Pair(nn.Module):
    """Both networks in one module, so that one wrapper issues all collectives."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        self.student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, images):
        return self.student(images), self.teacher(images)


if __name__ == "__main__":
    torch.manual_seed(0)
    labels = torch.randint(10, (1280,))
    images = torch.randn(10, 64)[labels] + 2 * torch.randn(1280, 64)  # ten Gaussian classes
    train = DataLoader(TensorDataset(images[:1024], labels[:1024]), batch_size=64, shuffle=True)

    accelerator = Accelerator()
    pair = Pair()
    optimizer = torch.optim.AdamW(pair.parameters(), lr=1e-2)
    pair, optimizer, train = accelerator.prepare(pair, optimizer, train)
    for _ in range(3):
        for x, y in train:
            out = bdkd_loss(*pair(x), y)
            optimizer.zero_grad()
            accelerator.backward(out.student + out.teacher)
            optimizer.step()

    with torch.no_grad():
        student_logits, _ = pair(images[1024:].to(accelerator.device))
    correct = student_logits.argmax(1).cpu() == labels[1024:]
    accelerator.print(f"student accuracy {correct.float().mean():.1%}")
