"""Bad input: every kind has its exit status and one line that quotes what was given and says what to do.

First the command line: `main` in this process, on files that the table writes. Then the Python API, whose errors are
`QuackError`s of one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quack_fx.cli.app import main
from quack_fx.errors import FactorError, LayoutError, OptimizerError, QuackError
from quack_fx.layout import AttentionSite, LogitTerm, QKLayout, WeightBlock

MODEL = """
import torch
from torch import nn
import torch.nn.functional as F

class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
"""
PLAIN = AttentionSite(
    name="",
    kind="mha",
    cross=False,
    calls=1,
    query_heads=1,
    key_heads=1,
    head_dim=8,
    head_map=(0,),
    query=(WeightBlock("q.weight", "q", 0, (((0, 8),),)),),
    key=(WeightBlock("k.weight", "k", 0, (((0, 8),),)),),
    terms=(LogitTerm((0,), (0,)),),
    logit_scale=8**-0.5,
)
WRONG = replace(PLAIN, key=(WeightBlock("v.weight", "k", 0, (((0, 8),),)),))
TOO_MANY_ROWS = replace(PLAIN, key=(WeightBlock("k.weight", "k", 0, (((0, 16),),)),))


def layout_json(site: AttentionSite) -> str:
    return json.dumps(QKLayout((site,)).to_dict())


# name: (files, command line, exit status, what the one line says)
CASES: dict[str, tuple[dict[str, str], str, int, str]] = {
    # The command line itself.
    "no such command": ({}, "inspekt model.py", 2, r"No such command 'inspekt'.*; see quack-fx --help"),
    "no such option": ({}, "inspect --jsn model.py", 2, r"No such option.*--jsn.*; see quack-fx inspect --help"),
    "no target": ({}, "inspect", 2, r"Missing argument 'TARGET'; see quack-fx inspect --help"),
    "an option that is no number": (
        {},
        "convert m.py --tau big",
        2,
        r"Invalid value for '--tau': big is not a positive number; see",
    ),
    # The target.
    "no such file": ({}, "inspect nope.py", 2, r"no file 'nope.py' \(seen from .*\)"),
    "no such file in a folder": ({}, "inspect models/nope", 2, r"no file 'models/nope'"),
    "no such module": ({}, "inspect no_such_module:GPT", 2, r"no file and no module 'no_such_module'"),
    "a folder without a config": (
        {"d/x.txt": ""},
        "inspect d",
        2,
        r"'d' is a folder without a config.json; give one that",
    ),
    "a file of another kind": (
        {"model.txt": ""},
        "inspect model.txt",
        2,
        r"'model.txt' is neither a Python file \(.py\) nor",
    ),
    "nothing behind the colon": (
        {"model.py": MODEL},
        "inspect model.py:",
        2,
        r"'model.py:': what follows the colon must be",
    ),
    "nothing before the colon": ({}, "inspect :GPT", 2, r"':GPT' names no file; type file.py, file.py:NAME or"),
    "a file that is not text": (
        {"model.py": "\0"},
        "inspect model.py",
        2,
        r"quack-fx: model.py: SyntaxError: .*null bytes",
    ),
    "a syntax error": (
        {"model.py": "x = 1\ndef f(:\n"},
        "inspect model.py",
        2,
        r"model.py:2: SyntaxError: invalid syntax",
    ),
    "a syntax error in an import": (
        {"model.py": "import broken_neighbour\n", "broken_neighbour.py": "\n\nx = = 1\n"},
        "inspect model.py",
        2,
        r"model.py does not run: .*broken_neighbour.py:3: SyntaxError",
    ),
    "an import that fails": (
        {"model.py": "import torch\nimport no_such_package\n"},
        "inspect model.py",
        2,
        r"no model in model.py: .* \(not importable here, and stood in for: no_such_package\)",
    ),
    "an import that fails and is needed": (
        {
            "model.py": MODEL.replace("import torch\n", "import torch\nimport no_such_package\n", 1).replace(
                "return F", "x = no_such_package.rotate(x)\n        return F"
            )
        },
        "inspect model.py",
        2,
        r"the forward needs no_such_package.rotate, and no_such_package cannot be imported here; install it",
    ),
    "a file that raises": (
        {"model.py": "\n1 / 0\n"},
        "inspect model.py",
        2,
        r"model.py does not run: model.py:2: ZeroDivision",
    ),
    "a file that leaves": (
        {"model.py": "import sys\nsys.exit('usage')\n"},
        "inspect model.py",
        2,
        r"model.py:2: SystemExit: usage",
    ),
    # The model in it.
    "no model": (
        {"model.py": "x = 1\n"},
        "inspect model.py",
        2,
        r"no model in model.py: neither a zero-argument factory",
    ),
    "a model that is only imported": (
        {"model.py": "from neighbour_model import Attention\n", "neighbour_model.py": MODEL},
        "inspect model.py",
        2,
        r"no model in model.py: .*it imports Attention: type model.py:Attention",
    ),
    "two classes": (
        {"model.py": MODEL + "class Other(Attention): pass\nclass Third(Attention): pass\n"},
        "inspect model.py",
        2,
        r"model.py has 2 models \(Other, Third\); type model.py:Other or model.py:Third",
    ),
    "two factories": (
        {"model.py": MODEL + "def build_a_model(): return Attention()\ndef build_b_model(): return Attention()\n"},
        "inspect model.py",
        2,
        r"model.py has 2 models \(build_a_model, build_b_model\); type model.py:build_a_model or",
    ),
    "two instances": (
        {"model.py": MODEL + "a = Attention()\nb = Attention()\n"},
        "inspect model.py",
        2,
        r"model.py has 2 models \(a, b\); type model.py:a or model.py:b",
    ),
    "a constructor that needs arguments": (
        {"model.py": MODEL.replace("width=8", "width, odd").replace("super()", "assert odd == 3; super()")},
        "inspect model.py",
        2,
        r"building Attention\(width=64, odd=4\) of model.py fails: model.py:8: AssertionError; say what it is: "
        r"--build 'Attention\(width=64, odd=4\)'",
    ),
    "sizes that nobody gives": (
        {"model.py": MODEL.replace("width=8", "width")},
        "convert model.py -o out.py",
        2,
        r"the sizes width=64 of Attention\(64\) of model.py are assumed, .* --build 'Attention\(64\)', or add --assume",
    ),
    "a config that needs arguments": (
        {
            "model.py": "from dataclasses import dataclass\n@dataclass\nclass Config:\n    width: int\n"
            + MODEL.replace("width=8", "width: Config")
        },
        "inspect model.py",
        2,
        r"building Attention\(Config\(width=64\)\) of model.py fails: model.py:\d+: TypeError: .* --build 'Attention\(",
    ),
    "a factory that needs arguments": (
        {"model.py": "def build_model(width, *, bias): pass\n"},
        "inspect model.py",
        2,
        r"build_model\(\) of model.py gives a NoneType, not an nn.Module",
    ),
    "a constructor that raises": (
        {"model.py": MODEL.replace("super().__init__()", "raise ValueError('7 is odd')")},
        "inspect model.py",
        2,
        r"building Attention\(\) of model.py fails: model.py:8: ValueError: 7 is odd",
    ),
    "a factory that makes none": (
        {"model.py": "def build_model(): return 3\n"},
        "inspect model.py",
        2,
        r"build_model\(\) of model.py gives a int, not an nn.Module",
    ),
    "a name that is not there": (
        {"model.py": MODEL},
        "inspect model.py:Atention",
        2,
        r"no name 'Atention' in model.py; did you mean Attention\?",
    ),
    "an attribute that is not there": (
        {"model.py": MODEL},
        "inspect model.py:F.gpt",
        2,
        r"'F' of model.py has no attribute 'gpt'",
    ),
    "a name that is no model": (
        {"model.py": "x = 1\n"},
        "inspect model.py:x",
        2,
        r"'x' of model.py is a int, not an nn.Module",
    ),
    "a class that is no model": (
        {"model.py": "class X: pass\n"},
        "inspect model.py:X",
        2,
        r"'X' of model.py is the class X, not an nn.Module, a class of one or a factory",
    ),
    "a name and --build": (
        {"model.py": MODEL},
        "inspect model.py:Attention --build Attention()",
        2,
        r"'model.py:Attention' names 'Attention' and --build 'Attention\(\)' is given too; give one of them",
    ),
    "--build is no expression": (
        {"model.py": MODEL},
        "inspect model.py --build Attention(",
        2,
        r"--build 'Attention\(' is not a Python",
    ),
    "--build raises": (
        {"model.py": MODEL},
        "inspect model.py --build Attention(wide=3)",
        2,
        r"building Attention\(wide=3\) of model.py fails: TypeError: .*unexpected keyword argument 'wide'",
    ),
    "--build gives no module": (
        {"model.py": MODEL},
        "inspect model.py --build 3+4",
        2,
        r"--build '3\+4' gives a int, not an nn.Module",
    ),
    "--build gives a class": (
        {"model.py": MODEL},
        "inspect model.py --build Attention",
        2,
        r"--build 'Attention' gives the class Attention, not an nn.Module; call it",
    ),
    # Its inputs.
    "--inputs is no expression": (
        {"model.py": MODEL},
        "inspect model.py --inputs (1,",
        2,
        r"--inputs '\(1,' is not a Python expr",
    ),
    "--inputs raises": (
        {"model.py": MODEL},
        "inspect model.py --inputs ids",
        2,
        r"--inputs 'ids' fails: NameError: name 'ids' is not defined",
    ),
    "--inputs do not fit": (
        {"model.py": MODEL},
        "inspect model.py --inputs torch.ones(2,4,5)",
        2,
        r"the forward of Attention fails on --inputs 'torch.ones\(2,4,5\)': model.py:11: RuntimeError: .*shape",
    ),
    "--inputs with a dict of other keys": (
        {"model.py": MODEL},
        "inspect model.py --inputs {1:2}",
        2,
        r"--inputs '\{1:2\}' gives a dict whose keys are not names of forward's parameters",
    ),
    "no inferred input fits": (
        {
            "model.py": MODEL.replace(
                "def forward(self, x):", "def forward(self, x):\n        assert x is None, 'seven'"
            )
        },
        "inspect model.py",
        2,
        r"the forward of Attention fails on every input inferred .*x=float32\[2, 4, 8\].*py:11: AssertionError: seven; "
        r'give them, for example --inputs "torch.randn\(2, 4, 8\)"',
    ),
    "nothing can be inferred": (
        {"model.py": "from torch import nn\nclass M(nn.Module):\n    def forward(self, graph): return graph\n"},
        "inspect model.py",
        2,
        r"no inputs can be inferred for forward\(graph\) of M; give them, for example --inputs",
    ),
    # Hugging Face configs.
    "no such config": ({}, "inspect config.json", 2, r"no file 'config.json'"),
    "a config that is not JSON": (
        {"config.json": "{"},
        "inspect config.json",
        2,
        r"'config.json' is not JSON: Expecting",
    ),
    "JSON that is no config": (
        {"config.json": "[1]"},
        "inspect config.json",
        2,
        r"'config.json' is not a Hugging Face config",
    ),
    "a config of diffusers": (
        {"config.json": '{"_class_name": "DiT"}'},
        "inspect config.json",
        2,
        r'it has no "model_type" \(it is that of DiT in diffusers\); give a transformers config.json, or build',
    ),
    "a model that transformers does not know": (
        {"config.json": '{"model_type": "gpt9"}'},
        "inspect config.json",
        2,
        r"'config.json' has model_type 'gpt9', which transformers [\d.]+ does not know; build the model in a",
    ),
    "a model whose code is elsewhere": (
        {"config.json": '{"model_type": "gpt9", "auto_map": {"AutoModel": "x.Y"}}'},
        "inspect config.json",
        2,
        r"does not know \(its own code, named in auto_map, is not run\)",
    ),
    "a config that contradicts itself": (
        {"config.json": '{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}'},
        "inspect config.json",
        2,
        r"'config.json' is refused by transformers: .*hidden size \(10\) is not a multiple",
    ),
    # What is written.
    "an output that exists": (
        {"model.py": MODEL, "out.py": "mine"},
        "convert model.py -o out.py",
        2,
        r"output 'out.py' exists; add --force to overwrite it",
    ),
    "a page that exists": (
        {"model.py": MODEL, "out.html": "mine"},
        "inspect model.py --html out.html",
        2,
        r"output 'out.html' exists; add --force to overwrite it",
    ),
    "an output that is a folder": (
        {"model.py": MODEL, "d/x": ""},
        "convert model.py -o d",
        2,
        r"output 'd' is a folder; give the name",
    ),
    "an output in no folder": (
        {"model.py": MODEL},
        "convert model.py -o no/out.py",
        2,
        r"output 'no/out.py': there is no folder",
    ),
    "an output below a file": (
        {"model.py": MODEL},
        "convert model.py -o model.py/out.py",
        2,
        r"there is no folder '.*model.py'",
    ),
    "an output that the file system refuses": (
        {"model.py": MODEL, "l.json": layout_json(PLAIN)},
        "convert model.py --layout l.json -o /proc/out.py",
        2,
        r"output '/proc/out.py' cannot be written: (No such file|Permission denied)",
    ),
    "an optimizer that is not known": (
        {"model.py": MODEL},
        "convert model.py --optimizer adagrad",
        2,
        r"'--optimizer': .*'adagrad' is not one of 'adamw', 'adam', 'sgd', 'muon', 'lion'",
    ),
    "a negative tau": ({"model.py": MODEL}, "convert model.py --tau -1", 2, r"'--tau': -1 is not a positive number"),
    "a tau of zero": ({"model.py": MODEL}, "convert model.py --tau 0", 2, r"'--tau': 0 is not a positive number"),
    "a tau that is no number": (
        {"model.py": MODEL},
        "convert model.py --tau nan",
        2,
        r"'--tau': nan is not a positive number",
    ),
    # A layout from a file.
    "no such layout": (
        {"model.py": MODEL},
        "convert model.py --layout no.json",
        2,
        r"the layout 'no.json' cannot be read: No such",
    ),
    "a layout that is not JSON": (
        {"model.py": MODEL, "l.json": "x"},
        "convert model.py --layout l.json",
        2,
        r"'l.json' is not JSON \(.*\); make it with inspect --json",
    ),
    "a layout of another schema": (
        {"model.py": MODEL, "l.json": '{"schema": 9}'},
        "convert model.py --layout l.json",
        2,
        r"'l.json' is not a layout: layout has schema 9; this version reads schema 1",
    ),
    "a layout of another model": (
        {"model.py": MODEL, "l.json": layout_json(PLAIN).replace("q.weight", "wq.weight")},
        "convert model.py --layout l.json",
        2,
        r"site '' of the layout names 'wq.weight', which is no parameter of this model \(closest: 'q.weight'\)",
    ),
    "a layout of a larger model": (
        {"model.py": MODEL, "l.json": layout_json(TOO_MANY_ROWS)},
        "convert model.py --layout l.json",
        2,
        r"rows \[0, 16\] along axis 0 of 'k.weight', whose shape is \(8, 8\)",
    ),
    "a layout that is wrong": (
        {"model.py": MODEL, "l.json": layout_json(WRONG)},
        "verify model.py --layout l.json",
        1,
        r"site '': its key side comes out of 'k.weight', which no block claims",
    ),
    "a way that bench does not know": (
        {"model.py": MODEL},
        "bench model.py --ways a,quick",
        2,
        r"--ways: there is no way 'quick'; choose from a,b,c,d,e,f,plain,quack",
    ),
    "an empty layout": (
        {"model.py": MODEL, "l.json": json.dumps(QKLayout().to_dict())},
        "convert model.py --layout l.json",
        1,
        r"no attention found in Attention\(\) of model.py: nothing to convert",
    ),
}


def run(line: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command line in which no word has a space."""
    status = main(line.split())
    out, err = capfd.readouterr()
    return status, out, err


@pytest.mark.parametrize("case", CASES)
def test_bad_input_on_the_command_line(case: str, own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files, line, status, message = CASES[case]
    for name, text in files.items():
        (own_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (own_folder / name).write_text(text)
    before = {path: path.read_bytes() for path in own_folder.rglob("*") if path.is_file()}
    found, out, err = run(line, capfd)
    assert (found, out) == (status, "")
    assert err.count("\n") == 1 and err.startswith("quack-fx: ") and "Traceback" not in err
    assert re.search(message, err), err
    assert {path: path.read_bytes() for path in own_folder.rglob("*") if path.is_file()} == before


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 25


def test_debug_shows_the_traceback_too(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (own_folder / "model.py").write_text("1 / 0\n")
    status, _, err = run("inspect model.py --debug", capfd)
    assert status == 2 and "ZeroDivisionError: division by zero" in err and "Traceback" in err
    assert err.splitlines()[-1].startswith("quack-fx: model.py does not run: model.py:1")


# ---- the Python API --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)


def flattened() -> nn.Module:
    """A module as FSDP1 leaves it: its weights in one flat parameter."""
    model = nn.Module()
    model.register_parameter("_flat_param", nn.Parameter(torch.zeros(128)))
    return model


def zero(model: Attention) -> Attention:
    nn.init.zeros_(model.q.weight)
    nn.init.zeros_(model.k.weight)
    return model


def attach(model: nn.Module, parameters: Any = None, **kwargs: Any) -> None:
    from quack_fx import QuacK

    QuacK(torch.optim.AdamW(parameters or model.parameters()), model, QKLayout((PLAIN,)), **kwargs)


API: dict[str, tuple[Callable[[], object], type[QuackError], str]] = {
    "parameters flattened by FSDP1": (lambda: attach(flattened()), LayoutError, r"\(FSDP1\).*fully_shard \(FSDP2\)"),
    "a block of norm zero": (
        lambda: attach(zero(Attention())),
        FactorError,
        r"a head in q.weight, k.weight has norm zero, or one that is not finite; initialise it",
    ),
    "an optimizer without the query/key weights": (
        lambda: attach(Attention(), [nn.Parameter(torch.ones(2))]),
        OptimizerError,
        r"'?[qk].weight'?",
    ),
    "a negative tau": (lambda: attach(Attention(), tau=-1.0), QuackError, r"tau.*-1"),
    "an unknown norm": (
        lambda: attach(Attention(), norm="nuclear"),
        QuackError,
        r"norm is 'nuclear'; use 'frobenius' or 'spectral'",
    ),
    "a layout of another model": (
        lambda: attach(nn.Linear(8, 8)),
        LayoutError,
        r"'q.weight', which is no parameter of this",
    ),
    "a layout that is a list": (lambda: QKLayout.from_dict([]), LayoutError, r"a layout is a JSON object, not list"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", API)
def test_bad_input_to_the_api(case: str) -> None:
    call, error, message = API[case]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
