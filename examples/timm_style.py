"""A script with timm's models, mixup (soft labels), optimizer, schedule and EMA.

What changes in your script:

    out = bdkd_loss(student(x), teacher(x), y)
    (out.student + out.teacher).backward()
"""

import timm
import timm.data
import timm.optim
import timm.scheduler
import timm.utils
import torch
from torch import nn

from bdkd import bdkd_loss

timm.utils.random_seed(0)  # mixup draws from NumPy
labels = torch.randint(4, (256,))
images = torch.randn(4, 3, 32, 32)[labels] + 0.5 * torch.randn(256, 3, 32, 32)  # last 64: test

options = {"num_classes": 4, "in_chans": 3, "pretrained": False}
teacher = timm.create_model("resnet14t", **options)
student = timm.create_model("resnet10t", **options)
pair = nn.ModuleDict({"teacher": teacher, "student": student})
optimizer = timm.optim.create_optimizer_v2(pair, opt="adamw", lr=3e-3, weight_decay=0.05)
scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=24, warmup_t=4)
mixup = timm.data.Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=4)
average = timm.utils.ModelEmaV3(student, decay=0.8)

for step in range(24):
    batch = torch.randint(192, (32,))
    x, y = mixup(images[batch], labels[batch])  # y: (32, 4), smoothed soft labels
    out = bdkd_loss(student(x), teacher(x), y)
    optimizer.zero_grad()
    (out.student + out.teacher).backward()
    optimizer.step()
    average.update(student)
    scheduler.step(step + 1)

average.module.eval()
with torch.no_grad():
    correct = average.module(images[192:]).argmax(1) == labels[192:]
print(f"student accuracy {correct.float().mean():.1%}")
