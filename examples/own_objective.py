"""Your own objective: each sample is weighted by statistics of the loss.

What changes in your loop:

    stats = bdkd_loss(s.detach(), t.detach(), y).stats
    trust = 0.2 + 0.8 * stats.teacher_correct * stats.teacher_confidence
    out = bdkd_loss(s, t, y, sample_weight=trust)
"""

import torch
from torch import nn

from bdkd import bdkd_loss

torch.manual_seed(0)
truth = torch.randint(10, (1280,))
images = torch.randn(10, 64)[truth] + 2 * torch.randn(1280, 64)  # the last 256 are for test
noisy = torch.rand(1280) < 0.3  # three in ten labels are drawn at random
labels = torch.where(noisy, torch.randint(10, (1280,)), truth)
teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
optimizer = torch.optim.AdamW([*teacher.parameters(), *student.parameters()], lr=5e-3)

for _ in range(80):
    batch = torch.randint(1024, (64,))
    x, y = images[batch], labels[batch]
    s, t = student(x), teacher(x)
    # Only the statistics, without gradients. Each one is (N,); see bdkd.BDKDStats.
    stats = bdkd_loss(s.detach(), t.detach(), y).stats
    # Labels that the teacher does not predict get a small weight in both losses.
    trust = 0.2 + 0.8 * stats.teacher_correct * stats.teacher_confidence
    out = bdkd_loss(s, t, y, sample_weight=trust)  # the mean divides by the sum of the weights
    optimizer.zero_grad()
    (out.student + out.teacher).backward()
    optimizer.step()

with torch.no_grad():
    correct = student(images[1024:]).argmax(1) == truth[1024:]
print(f"student accuracy {correct.float().mean():.1%} on clean labels")
