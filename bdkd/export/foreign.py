"""Evaluate ONNX files that ``bdkd export`` did not write, on the data of a recipe.

Such a file does not describe its images. The recipe says which images it is evaluated on, how the
images are normalised, and which classes the logits belong to.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdkd.config import Recipe, load_recipe, to_toml
from bdkd.data import DataInfo
from bdkd.errors import RunError
from bdkd.export.facts import VERSION, Exported, Facts, Quantization
from bdkd.export.formats import ForeignFile, without_others
from bdkd.export.onnx_format import checked_model
from bdkd.export.onnx_session import require
from bdkd.runs.folder import RunFolder

FOREIGN = "foreign"  # role of the network of a file that bdkd did not write


def recipe_for_data(name_or_path: str) -> Recipe:
    """Load a recipe, and return it with only the first of its networks.

    Args:
        name_or_path: name of a shipped recipe, a TOML file, or the folder of a run.

    Raises:
        UsageError, RunError: there is no such recipe, or it cannot be read.
    """
    folder = Path(name_or_path)
    if os.path.isfile(folder / "config.toml"):  # unlike Path.is_file(), never raises
        recipe = RunFolder(folder).read_config()
    else:
        recipe = load_recipe(name_or_path)
    return without_others(recipe, next(iter(recipe.networks)))


def describe_foreign(file: ForeignFile, recipe: Recipe, info: DataInfo) -> Exported:
    """Return a foreign ONNX file with facts about the data that it is evaluated on.

    Raises:
        RunError: the file has another format.
    """
    if file.kind != "onnx":
        raise RunError(f"{file.path} is refused: --recipe evaluates ONNX files only")
    facts = Facts(
        version=VERSION, network=file.path.stem, model="ONNX", role=FOREIGN, parameters=0,
        method="", seed=recipe.seed, step=0, recipe=to_toml(recipe), classes=tuple(info.classes),
        channels=info.channels, image_size=info.image_size, normalisation=info.normalisation,
        measured_on="", images=0, metrics={}, versions={},
    )  # fmt: skip
    exported = Exported(file.path, file.kind, file.content, facts, "")
    model = require("onnx").ModelProto.FromString(checked_model(exported))
    if any(node.op_type == "QuantizeLinear" for node in _nodes(model.graph)):
        facts = dataclasses.replace(facts, quantization=Quantization(0, "", ""))
    return exported._replace(facts=facts)


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph and of its subgraphs. protobuf limits the depth of subgraphs, so
    the recursion is short."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)
