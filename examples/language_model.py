"""Two small language models: logits (batch, time, vocabulary), with padding tokens ignored.

What changes in your loop:

    labels = tokens[:, 1:].masked_fill(tokens[:, 1:] == PAD, -100)
    out = bdkd_loss(student(inputs), teacher(inputs), labels)
    (out.student + out.teacher).backward()
"""

import torch
from torch import nn

from bdkd import bdkd_loss

PAD, VOCABULARY = 0, 32


class LanguageModel(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens):  # (B, T)
        return self.head(self.mix(self.embed(tokens))[0])  # (B, T, VOCABULARY)


def sentences(count):
    """Return padded sequences. Each one counts from its first token, with its own step."""
    start, stride = torch.randint(1, 32, (count, 1)), torch.randint(1, 4, (count, 1))
    tokens = (start + stride * torch.arange(17) - 1) % 31 + 1
    return tokens.masked_fill(torch.arange(17) >= torch.randint(8, 18, (count, 1)), PAD)


torch.manual_seed(0)
teacher, student = LanguageModel(64), LanguageModel(32)
optimizer = torch.optim.AdamW([*teacher.parameters(), *student.parameters()], lr=1e-2)
for _ in range(60):
    tokens = sentences(64)
    inputs = tokens[:, :-1]
    labels = tokens[:, 1:].masked_fill(tokens[:, 1:] == PAD, -100)
    out = bdkd_loss(student(inputs), teacher(inputs), labels)  # the mean of tokens without padding
    optimizer.zero_grad()
    (out.student + out.teacher).backward()
    optimizer.step()

counted = labels != -100  # statistics have the labels' shape (B, T), and ignored tokens have 0
accuracy = out.stats.student_correct.sum() / counted.sum()
print(f"student accuracy {accuracy:.1%} of {counted.sum()} next tokens")
