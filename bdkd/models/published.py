"""Find and download the weights that timm and torchvision publish."""

import logging
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import torch

from bdkd.errors import RunError, reason_of

from .libraries import import_library

Answer = TypeVar("Answer")

REACH_SECONDS = 5.0  # to find out whether a host answers
# timm looks for these files, in this order, in a repository that does not name a file
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class PublishedWeights(NamedTuple):
    """A file of pretrained weights, in a repository of the Hugging Face Hub or at a URL."""

    model: str  # as create_model takes it, with timm's tag
    num_classes: int  # 0: without a classifier
    files: tuple[str, ...]  # possible names of the file, the preferred one first
    url: str | None = None
    repository: str | None = None  # of the Hub
    revision: str | None = None
    mean: tuple[float, ...] = ()  # of pixel values in [0, 1] in training, for each channel
    std: tuple[float, ...] = ()

    def path(self) -> Path | None:
        """Return the file in the local caches, or None if it is not on this machine."""
        if self.repository is None:
            path = self.folder() / self.files[0]
            return path if path.is_file() else None
        from huggingface_hub import constants, try_to_load_from_cache

        for name in self.files:
            found = try_to_load_from_cache(
                self.repository, name, cache_dir=constants.HF_HUB_CACHE, revision=self.revision
            )
            if isinstance(found, str):
                return Path(found)
        return None

    def folder(self) -> Path:
        """Return the local cache in which the library looks for the file."""
        if self.repository is None:
            return Path(torch.hub.get_dir(), "checkpoints").expanduser()
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def host(self) -> str:
        """Return the host name of the server that publishes the file."""
        if self.repository is None:
            return urlsplit(str(self.url)).netloc
        from huggingface_hub import constants

        return urlsplit(constants.ENDPOINT).netloc

    def remedy(self) -> str:
        """Return instructions to copy the file to a machine without an internet connection."""
        if self.repository is None:
            return f"download {self.url} on another machine and copy it into {self.folder()}"
        revision = f" --revision {self.revision}" if self.revision else ""
        cached = f"models--{self.repository.replace('/', '--')}"
        return (
            f'run "hf download {self.repository} {self.files[0]}{revision} --cache-dir DIR" on a '
            f"machine with a network, and copy DIR/{cached} into {self.folder()}"
        )


def timm_weights(name: str, options: Mapping[str, object]) -> PublishedWeights | None:
    """Return the weights that timm publishes for its model ``name`` and options, or None.

    Raises:
        RunError: timm cannot be imported.
    """
    if tag := options.get("pretrained_cfg"):
        name = f"{name.partition('.')[0]}.{tag}"
    try:
        known: Any = import_library("timm").models.get_pretrained_cfg(name)
    except RuntimeError:  # an invalid tag, which create_model reports
        return None
    if known is None or not (known.hf_hub_id or known.url):
        return None
    arch = name.partition(".")[0]
    model = f"timm:{arch}.{known.tag}" if known.tag else f"timm:{arch}"
    mean, std = tuple(known.mean), tuple(known.std)
    if known.hf_hub_id:
        repository, _, revision = known.hf_hub_id.partition("@")
        files = (known.hf_hub_filename,) if known.hf_hub_filename else _HUB_FILES
        return PublishedWeights(
            model, known.num_classes, files, None, repository, revision or None, mean, std
        )
    url, file = known.url if isinstance(known.url, tuple) else (known.url, None)
    files = (file or _file_of(url),)
    return PublishedWeights(model, known.num_classes, files, url, mean=mean, std=std)


def torchvision_weights(name: str) -> PublishedWeights | None:
    """Return the weights that torchvision names ``DEFAULT`` for its model ``name``, or None.

    Raises:
        RunError: torchvision cannot be imported.
    """
    models = import_library("torchvision").models
    if name not in models.list_models(module=models):
        return None
    default = getattr(models.get_model_weights(name), "DEFAULT", None)
    if default is None:
        return None
    classes, preset = len(default.meta["categories"]), default.transforms()
    return PublishedWeights(
        f"torchvision:{name}", classes, (_file_of(default.url),), default.url,
        mean=tuple(preset.mean), std=tuple(preset.std),
    )  # fmt: skip


def _file_of(url: str) -> str:
    return urlsplit(url).path.rpartition("/")[2]


def locate(published: PublishedWeights) -> Path:
    """Return the file of published weights, and download it if it is not on this machine.

    Raises:
        RunError: the file is not on this machine and cannot be downloaded. Without an internet
            connection, this error is raised after a few seconds.
    """
    if path := published.path():
        return path
    host = published.host()
    try:
        with _quiet_hub():
            failure = f"{host} cannot be reached"
            name = _reachable_file(published)
            failure = f"the download from {host} failed"
            print(f"downloading {name} of {published.model} from {host}", file=sys.stderr)
            return _download(published, name)
    # HTTP libraries raise errors of many types.
    except Exception as error:
        raise RunError(
            f"the pretrained weights of {published.model} are not on this machine, and {failure} "
            f"({_reason(error)}): {published.remedy()}"
        ) from error


def _reachable_file(published: PublishedWeights) -> str:
    """Return the name of the file that the host has. Raise an error of any type if the host has
    none of the files or does not answer in time."""
    if published.repository is None:
        request = urllib.request.Request(str(published.url), method="HEAD")
        # An HTTPError is an answer of the host. The download raises it again, with the reason.
        with suppress(urllib.error.HTTPError):
            _within(partial(urllib.request.urlopen, request, timeout=REACH_SECONDS))
        return published.files[0]
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise RunError("HF_HUB_OFFLINE is set")
    for name in published.files:
        url = hf_hub_url(published.repository, name, revision=published.revision)
        try:
            # hf_hub_download itself tries five times, for 23 seconds.
            _within(partial(get_hf_file_metadata, url, timeout=REACH_SECONDS))
            return name
        except EntryNotFoundError:
            continue
    raise RunError(f"{published.repository} has no {' or '.join(published.files)}")


def _download(published: PublishedWeights, name: str) -> Path:
    if published.repository is not None:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(published.repository, name, revision=published.revision))
    path = published.folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    known = re.search(r"-([0-9a-f]{8,})\.", name)  # the first digits of the SHA-256
    torch.hub.download_url_to_file(
        str(published.url), str(path), known[1] if known else None, progress=sys.stderr.isatty()
    )
    return path


def _within(call: Callable[[], Answer]) -> Answer:
    """Return the result of a call, or raise its error, within ``REACH_SECONDS``. The timeout of a
    socket would not be enough: it does not limit the look-up of a host name, and it starts again
    for each address of a host."""
    results: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {REACH_SECONDS:g} s")
    return results[0]


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence huggingface_hub's warnings about each attempt. The error says what failed."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None)  # of urllib's URLError
    text = reason_of(inner if isinstance(inner, Exception) else error)
    return re.sub(r"^\[Errno -?\d+\] ", "", text)
