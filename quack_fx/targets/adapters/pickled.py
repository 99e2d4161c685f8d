"""`model.pt` or `model.pth` -> the nn.Module that torch.save wrote into it.

Reading a pickled module runs code that the file names, as running a .py does, so give only files that you trust. A file
with weights alone is recognised without running code, and refused.
"""

from __future__ import annotations

import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.errors import TargetError
from quack_fx.targets.adapters.base import Adapted, Adapter, saved_file
from quack_fx.targets.files import Namespace, name_and_text
from quack_fx.targets.pick import Recipe

_TYPE_THE_SOURCE = "type the Python file that builds the model (model.py or model.py:NAME), which needs no weights"


def _open(rest: str, typed: str) -> Adapted:
    path = saved_file(rest, typed)
    _refuse_other_archives(path, typed)
    loaded = _loaded(path, typed)

    def make() -> Any:
        if not isinstance(loaded, nn.Module):
            raise TargetError(f"{typed!r} holds {_what(loaded)}")
        return loaded

    return Adapted(Namespace(typed, {"loaded": loaded}), Recipe("", make, made=True))


ADAPTER = Adapter("FILE.pt", _open, takes=lambda target: re.search(r"\.(pt|pth)(:.*)?$", target) is not None)


def _refuse_other_archives(path: Path, typed: str) -> None:
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6, or no file of torch at all
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    if "constants.pkl" in names:
        raise TargetError(f"{typed!r} is a TorchScript archive, which is not read; {_TYPE_THE_SOURCE}")
    if "archive_format" in names:
        raise TargetError(f"{typed!r} is an archive of torch.export; call it {path.with_suffix('.pt2').name!r}")


def _loaded(path: Path, typed: str) -> Any:
    """What the file holds, on the CPU; read without running code where torch can."""
    load = partial(torch.load, path, map_location="cpu", mmap=zipfile.is_zipfile(path))
    try:
        try:
            return load(weights_only=True)
        except pickle.UnpicklingError:  # it contains more than weights
            for folder in (str(path.resolve().parent), str(Path.cwd())):  # the module's own file may be there
                if folder not in sys.path:
                    sys.path.insert(0, folder)
            return load(weights_only=False)
    except Exception as error:
        raise TargetError(
            f"{typed!r} cannot be read by torch.load: {name_and_text(error)}; {_TYPE_THE_SOURCE}"
        ) from error


def _what(loaded: Any) -> str:
    """What a file contains instead of a module, and what to type."""
    if not isinstance(loaded, Mapping):
        return f"a {type(loaded).__name__}, not an nn.Module; {_TYPE_THE_SOURCE}"
    modules = [key for key, value in loaded.items() if isinstance(value, nn.Module)]
    if modules:
        return f'a dict with an nn.Module in it; type --build "loaded[{modules[0]!r}]"'
    tensors = sum(isinstance(value, Tensor) for value in loaded.values())
    held = f"a state dict of {tensors} tensors" if tensors else f"a dict ({', '.join(map(str, [*loaded][:4]))})"
    return f"{held}, weights without a model; {_TYPE_THE_SOURCE}"
