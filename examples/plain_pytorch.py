"""Train a teacher and a student together in a plain PyTorch loop.

What changes in your loop:

    out = bdkd_loss(student(x), teacher(x), y)
    (out.student + out.teacher).backward()
"""

import torch
from torch import nn

from bdkd import bdkd_loss

torch.manual_seed(0)
labels = torch.randint(10, (1280,))
images = torch.randn(10, 64)[labels] + 2 * torch.randn(1280, 64)  # the last 256 are for test
teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
optimizer = torch.optim.AdamW([*teacher.parameters(), *student.parameters()], lr=1e-2)

for step in range(60):
    batch = torch.randint(1024, (64,))
    x, y = images[batch], labels[batch]
    out = bdkd_loss(student(x), teacher(x), y)  # each loss trains its own network only
    optimizer.zero_grad()
    (out.student + out.teacher).backward()
    optimizer.step()
    if step % 20 == 19:
        stats = out.stats  # accuracy, entropies, KLs, ... of every sample, on the same device
        surer = (stats.student_entropy < stats.teacher_entropy).float().mean()
        print(f"step {step + 1}: student loss {out.student:.3f}, more certain on {surer:.0%}")

with torch.no_grad():
    for name, network in (("teacher", teacher), ("student", student)):
        correct = network(images[1024:]).argmax(1) == labels[1024:]
        print(f"{name} accuracy {correct.float().mean():.1%}")
