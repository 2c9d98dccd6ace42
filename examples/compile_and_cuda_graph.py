"""torch.compile of both networks and the loss. On a GPU, also a CUDA graph of the whole step.

What changes in your loop:

    compiled = torch.compile(loss_of, fullgraph=True)
    compiled(x, y).backward()
    graph.replay()
"""

import torch
from torch import nn

from bdkd import bdkd_loss

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
labels = torch.randint(10, (1280,))
images = torch.randn(10, 64)[labels] + 2 * torch.randn(1280, 64)  # the last 256 are for test
images, labels = images.to(device), labels.to(device)
teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).to(device)
parameters = [*teacher.parameters(), *student.parameters()]
on_gpu = device == "cuda"
optimizer = torch.optim.AdamW(parameters, lr=1e-2, capturable=on_gpu)


def loss_of(x, y):
    out = bdkd_loss(student(x), teacher(x), y)  # no graph break, no device sync
    return out.student + out.teacher


compiled = torch.compile(loss_of, fullgraph=True)
for _ in range(60):
    batch = torch.randint(1024, (64,), device=device)
    x, y = images[batch], labels[batch]
    optimizer.zero_grad()
    compiled(x, y).backward()
    optimizer.step()

if on_gpu:  # the same step as a CUDA graph: one launch for all its kernels
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: a capture needs earlier steps on a side stream
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(x, y).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()  # before the capture, so that each replay overwrites the gradients
    with torch.cuda.graph(graph):
        loss_of(x, y).backward()
        optimizer.step()
    for _ in range(20):
        batch = torch.randint(1024, (64,), device=device)
        x.copy_(images[batch])  # the graph always reads the tensors of the capture
        y.copy_(labels[batch])
        graph.replay()

with torch.no_grad():
    correct = student(images[1024:]).argmax(1) == labels[1024:]
captured = "compiled and captured" if on_gpu else "compiled (no GPU here: no CUDA graph)"
print(f"student accuracy {correct.float().mean():.1%}, {captured}")
