"""Replace the KL module of your distillation loop by changing its import. All values stay the same.

What changes in your script:

    from bdkd import DistillKL
"""

import torch
from torch import nn
from torch.nn import functional as F

from bdkd import DistillKL

torch.manual_seed(0)
labels = torch.randint(10, (1280,))
images = torch.randn(10, 64)[labels] + 2 * torch.randn(1280, 64)  # the last 256 are for test
teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
optimizer = torch.optim.AdamW([*teacher.parameters(), *student.parameters()], lr=1e-2)
criterion_div = DistillKL(T=4.0)  # RepDistiller's name; also kd_loss, LigerJSD, LigerKLDIVLoss

for _ in range(60):
    batch = torch.randint(1024, (64,))
    x, y = images[batch], labels[batch]
    logit_s, logit_t = student(x), teacher(x)
    loss = F.cross_entropy(logit_t, y) + F.cross_entropy(logit_s, y)
    loss = loss + criterion_div(logit_s, logit_t.detach())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with torch.no_grad():
    correct = student(images[1024:]).argmax(1) == labels[1024:]
print(f"student accuracy {correct.float().mean():.1%}")
