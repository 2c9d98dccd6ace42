"""The packages that the trainer and its command line import: a part of the extra ``bdkd[train]``.

``pip install bdkd`` installs torch and nothing else. The loss and the models need no more.
"""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# Package -> module. The other packages of the extra (scikit-learn, matplotlib, tensorboard) are
# imported where they are used. The code there says which package to install.
TRAINER_PACKAGES = {
    "msgspec": "msgspec",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tomli-w": "tomli_w",
    "tqdm": "tqdm",
    "tyro": "tyro",
}


def bdkd_version() -> str:
    """Return the installed version of bdkd. It is unknown for a source tree on ``PYTHONPATH``."""
    try:
        return version("bdkd")  # pyproject.toml is the only file that contains it
    except PackageNotFoundError:
        return "0+unknown"


def missing_packages(packages: Iterable[str] = tuple(TRAINER_PACKAGES)) -> str | None:
    """Return one line about the packages that are not installed, or None if all are.

    Args:
        packages: keys of ``TRAINER_PACKAGES``. A module passes the packages that it imports. The
            command line needs all of them.
    """
    missing = [name for name in packages if find_spec(TRAINER_PACKAGES[name]) is None]
    if not missing:
        return None
    return f"the trainer and its command line need {', '.join(missing)}: pip install 'bdkd[train]'"
