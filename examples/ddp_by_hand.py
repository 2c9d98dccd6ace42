"""DistributedDataParallel: torchrun --nproc-per-node 2 examples/ddp_by_hand.py

What changes in your script:

    pair = DistributedDataParallel(Pair().to(device))
    out = bdkd_loss(*pair(x), y)
    (out.student + out.teacher).backward()
"""

import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # import before the group exists: DDP's late import would keep it alive
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bdkd import bdkd_loss


class Pair(nn.Module):
    """Both networks in one DDP module, so that all ranks issue collectives in the same order."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        self.student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, images):
        return self.student(images), self.teacher(images)


def main(device):
    torch.manual_seed(0)  # the same data and the same initial weights on every rank
    labels = torch.randint(10, (1280,))
    images = torch.randn(10, 64)[labels] + 2 * torch.randn(1280, 64)  # ten Gaussian classes
    train = TensorDataset(images[:1024], labels[:1024])
    sampler = DistributedSampler(train)
    batch_size = 64 // dist.get_world_size()
    loader = DataLoader(train, batch_size, sampler=sampler, drop_last=True)

    pair = DistributedDataParallel(Pair().to(device))
    optimizer = torch.optim.AdamW(pair.parameters(), lr=1e-2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            out = bdkd_loss(*pair(x), y)  # the mean on this rank; DDP averages the gradients
            optimizer.zero_grad()
            (out.student + out.teacher).backward()
            optimizer.step()

    # Sum the counts of all ranks. The average of the ranks' accuracies would be wrong if they have
    # different numbers of images.
    mine = slice(1024 + dist.get_rank(), 1280, dist.get_world_size())
    with torch.no_grad():
        student_logits = pair.module.student(images[mine].to(device))
    counts = torch.tensor([len(labels[mine]), 0], device=device)
    counts[1] = (student_logits.argmax(1) == labels[mine].to(device)).sum()
    dist.all_reduce(counts)
    if dist.get_rank() == 0:
        total, correct = counts.tolist()
        print(f"student accuracy {correct / total:.1%} of {total}, {dist.get_world_size()} ranks")


on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
dist.init_process_group("nccl" if on_gpu else "gloo")
main(device)  # frees the DDP module, which references the group, before the group is destroyed
dist.destroy_process_group()
