"""Semi-supervised training: unlabelled rows train only with the divergences.

What changes in your loop:

    labelled = bdkd_loss(s[:n], t[:n], y)
    unlabelled = bdkd_loss(s[n:], t[n:], None)
    loss = labelled.student + labelled.teacher + unlabelled.student + unlabelled.teacher
"""

import torch
from torch import nn

from bdkd import bdkd_loss

torch.manual_seed(0)
labels = torch.randint(10, (1280,))  # training uses the first 128 labels; the last 256 are for test
images = torch.randn(10, 64)[labels] + 2 * torch.randn(1280, 64)  # ten Gaussian classes
teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
optimizer = torch.optim.AdamW([*teacher.parameters(), *student.parameters()], lr=5e-3)

n = 32  # labelled rows per batch
for _ in range(80):
    known, unknown = torch.randint(128, (n,)), torch.randint(128, 1024, (96,))
    x, y = images[torch.cat([known, unknown])], labels[known]
    s, t = student(x), teacher(x)  # one forward pass for both kinds
    labelled = bdkd_loss(s[:n], t[:n], y)
    unlabelled = bdkd_loss(s[n:], t[n:], None)  # the divergences, without cross entropies
    loss = labelled.student + labelled.teacher + unlabelled.student + unlabelled.teacher
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    correct = student(images[1024:]).argmax(1) == labels[1024:]
print(f"student accuracy {correct.float().mean():.1%} from 128 labels")
