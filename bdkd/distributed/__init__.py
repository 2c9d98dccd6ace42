"""Training on several ranks: collectives, joining the ranks that torchrun starts, and FSDP."""
