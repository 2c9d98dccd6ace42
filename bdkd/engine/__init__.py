"""One optimizer step of all networks: forward passes, losses, gradients, optimizer and meter.

Requires ``bdkd[train]``.
"""

from bdkd.extras import missing_packages

if message := missing_packages(("msgspec", "numpy", "tomli-w", "tqdm")):
    raise ImportError(message)
