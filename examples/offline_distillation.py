"""Offline distillation: the teacher is trained already and frozen, the student learns from it.

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
images = torch.randn(10, 64)[labels] + 2 * torch.randn(1280, 64)  # ten clouds; the last 256 test
teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)  # stands for a downloaded teacher
for _ in range(60):
    batch = torch.randint(1024, (64,))
    optimizer.zero_grad()
    F.cross_entropy(teacher(images[batch]), labels[batch]).backward()
    optimizer.step()
teacher.eval().requires_grad_(False)  # eval: its batch norms would move otherwise, had it any

optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
for _ in range(60):
    batch = torch.randint(1024, (64,))
    x, y = images[batch], labels[batch]
    # Logits that need no gradient: nothing is computed, allocated or written for the teacher.
    out = bdkd_loss(student(x), teacher(x), y, temperature=4.0, student_ce=0.1, student_kd=0.9)
    optimizer.zero_grad()
    out.student.backward()
    optimizer.step()

with torch.no_grad():
    correct = student(images[1024:]).argmax(1) == labels[1024:]
    agree = student(images[1024:]).argmax(1) == teacher(images[1024:]).argmax(1)
print(f"student accuracy {correct.float().mean():.1%}, as its teacher {agree.float().mean():.1%}")
