"""Several ranks: what they exchange, how torchrun starts them, FSDP."""
