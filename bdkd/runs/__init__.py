"""The files of a run: folder, checkpoints, logs, profile and summary. Requires ``bdkd[train]``."""

from bdkd.extras import missing_packages

if message := missing_packages(("msgspec", "numpy", "tomli-w", "tqdm")):
    raise ImportError(message)
