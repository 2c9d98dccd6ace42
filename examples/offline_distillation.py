"""Offline distillation: the student learns from a trained, frozen teacher.

What changes in your loop:

    teacher.eval().requires_grad_(False)
    out = bdkd_loss(student(x), teacher(x), y, temperature=4.0, student_ce=0.1, student_kd=0.9)
    out.student.backward()
"""

import torch
from torch import nn
from torch.nn import functional as F

from bdkd import bdkd_loss

torch.manual_seed(0)
labels = torch.randint(10, (1280,))
images = torch.randn(10, 64)[labels] + 2 * torch.randn(1280, 64)  # the last 256 are for test
teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)  # replaces loading a trained teacher
for _ in range(60):
    batch = torch.randint(1024, (64,))
    optimizer.zero_grad()
    F.cross_entropy(teacher(images[batch]), labels[batch]).backward()
    optimizer.step()
teacher.eval().requires_grad_(False)  # eval() also stops updates of batch-norm statistics

optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
for _ in range(60):
    batch = torch.randint(1024, (64,))
    x, y = images[batch], labels[batch]
    # The teacher's logits need no gradient, so no gradient is computed or allocated for them.
    out = bdkd_loss(student(x), teacher(x), y, temperature=4.0, student_ce=0.1, student_kd=0.9)
    optimizer.zero_grad()
    out.student.backward()
    optimizer.step()

with torch.no_grad():
    correct = student(images[1024:]).argmax(1) == labels[1024:]
    agree = student(images[1024:]).argmax(1) == teacher(images[1024:]).argmax(1)
print(f"student accuracy {correct.float().mean():.1%}, same as teacher {agree.float().mean():.1%}")
