"""Exported networks: ONNX, torch.export and safetensors files. Requires ``bdkd[train]``."""

from bdkd.extras import missing_packages

if message := missing_packages(("msgspec", "numpy", "tomli-w", "tqdm")):
    raise ImportError(message)
