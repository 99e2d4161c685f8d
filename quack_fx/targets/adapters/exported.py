"""`model.pt2` -> the program that torch.export.save wrote, as a module, and the example inputs it was exported with.

Modules and parameters have the names of the exported model. It may have been exported on the meta device.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from typing import Any

import torch
from torch import nn

from quack_fx.errors import TargetError
from quack_fx.targets.adapters.base import Adapted, Adapter, saved_file
from quack_fx.targets.files import Namespace, name_and_text
from quack_fx.targets.inputs.values import Inputs, named
from quack_fx.targets.pick import Recipe


def _open(rest: str, typed: str) -> Adapted:
    path = saved_file(rest, typed)
    if not zipfile.is_zipfile(path):  # torch.export.load would log pages about it
        raise TargetError(f"{typed!r} is no archive of torch.export.save")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
            _tell_apart(program.state_dict)
            model = _without_values(torch.export.unflatten(program))
    except Exception as error:
        raise TargetError(
            f"{typed!r} is no program of torch.export.save that torch {torch.__version__} reads: {name_and_text(error)}"
        ) from error

    def examples(_: nn.Module) -> list[Inputs]:
        if program.example_inputs is None:
            raise TargetError(f"{typed!r} was saved without its example inputs; give them with --inputs")
        return [named(*program.example_inputs)]

    names = {"program": program, "model": model}
    return Adapted(Namespace(typed, names), Recipe("the program", lambda: model, made=True), examples)


ADAPTER = Adapter("FILE.pt2", _open, takes=lambda target: re.search(r"\.pt2(:.*)?$", target) is not None)


def _without_values(model: nn.Module) -> nn.Module:
    """Drop the fake tensors in the metadata of the program's graphs, which copies of the model would hold as well."""
    for module in model.modules():
        graph = getattr(module, "graph", None)
        for node in graph.nodes if isinstance(graph, torch.fx.Graph) else ():
            node.meta.pop("val", None)
    return model


def _tell_apart(state: dict[str, Any]) -> None:
    """Give every meta tensor a storage of its own. torch.export.load gives all of them the same one, and `unflatten`
    takes weights that share a storage for tied weights."""
    for name, tensor in state.items():
        if tensor.is_meta:
            own = torch.empty_like(tensor)
            state[name] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
