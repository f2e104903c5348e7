"""Networks saved by `torch.export.save`, opened without running code that the file may contain.

`torch.export.load` falls back to full unpickling, evaluates size expressions as Python and writes names into Python
source. It therefore gets a sanitized copy of the file: the tensors, and the program with every string validated.
Example inputs, metadata and unknown members are left out.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convscope.errors import ConvscopeError
from convscope.sources.files import first_line
from convscope.sources.spec import ModelSpec

# Members of an archive of torch 2.8 and later (below a folder named like the archive) ...
PROGRAM = "models/model.json"
CONFIG = re.compile(r"data/(weights|constants)/model_\1_config\.json")
TENSORS = re.compile(
    r"data/(weights|constants)/(weight|tensor)_\d+|archive_(format|version)|byteorder|(\.data/)?version"
)
# ... and of earlier versions.
OLD_PROGRAM = "serialized_exported_program.json"
OLD_TENSORS = ("serialized_state_dict.pt", "serialized_constants.pt")
EXAMPLES = ("data/sample_inputs/model.pt", "serialized_example_inputs.pt")

NAME = re.compile(r"\w*")
CONSTANT = re.compile(r"[\w.]*")
IDENTIFIER = re.compile(r"[\w.:/@+ -]*")
MODULES = re.compile(r"[\w.,;:<>@$()\[\]' -]*")
OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!(from_file|save)\.)\w+\.\w+"
    r"|torch\.ops\.(prims|torchvision|quantized_decomposed)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_autocast|wrap_with_set_grad_enabled)"
    r"|_operator\.(getitem|eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|truediv|mod|pow|and_|or_|lshift|rshift)"
    r"|math\.\w+|torch\.sym_\w+"
)
NESTING = re.compile(r'[\w\s\[\],"\\./:-]*')
ARITHMETIC = (
    ast.Expression,
    ast.Call,
    ast.Constant,
    ast.Name,
    ast.keyword,
    ast.UnaryOp,
    ast.BinOp,
    ast.BoolOp,
    ast.Compare,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
    ast.expr_context,
)
FUNCTION = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Mod|Max|Min|Abs|Piecewise|ExprCondPair|Tuple|And|Or|Not"
    "|Equality|Unequality|StrictLessThan|StrictGreaterThan|LessThan|GreaterThan|Eq|Ne|Lt|Le|Gt|Ge"
    "|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilDiv|LShift|RShift|PowByNatural|FloatPow|FloatTrueDiv"
    "|IntTrueDiv|IsNonOverlappingAndDenseIndicator|(Ceil|Floor|Trunc|Round)ToInt|TruncToFloat|RoundDecimal|ToFloat|Identity"
)


def from_file(path: Path, weights: str | None) -> ModelSpec:
    """Open a network saved by `torch.export.save`; layers get their original names back."""
    if weights not in (None, "default"):
        raise ConvscopeError("a .pt2 file holds its own weights; weights= is for models made by name")
    copy = _sanitized_copy(path)
    try:
        program = torch.export.load(copy)
        module = torch.export.unflatten(program)
    except Exception as error:  # damaged archives raise many types
        raise ConvscopeError(f"{path} cannot be read as an exported program: {first_line(error)}") from error
    return _describe(program, module, path.name)


def from_program(program: torch.export.ExportedProgram, name: str) -> ModelSpec:
    """Describe an exported program that the user passes in."""
    return _describe(program, torch.export.unflatten(program), name)


def _describe(program: torch.export.ExportedProgram, module: nn.Module, path: str) -> ModelSpec:
    inputs = [
        getattr(node.meta.get("val"), "shape", ())
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    if len(inputs) != 1 or len(inputs[0]) != 4:
        shapes = ", ".join(str(tuple(shape)) for shape in inputs)
        raise ConvscopeError(f"{path} takes {shapes or 'nothing'}; expected one batch of images (N, C, H, W)")
    batch, channels, height, width = [n if isinstance(n, int) else None for n in inputs[0]]
    if batch not in (None, 1):
        raise ConvscopeError(
            f"{path} takes batches of exactly {batch}; export it with a free or single batch: "
            "dynamic_shapes=({0: torch.export.Dim('batch')},)"
        )
    side = height or width
    size = None if side is None else (height or side, width or side)
    # Its memory format is not changed: the graph has guards on strides.
    return ModelSpec(module, path, size=size, channels=channels, fixed_batch_size=batch, loaded_by_convscope=False)


def _sanitized_copy(path: Path) -> io.BytesIO:
    """Copy the archive, with nothing but members that are known to be data."""
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as clean:
            members = dict.fromkeys(archive.namelist())
            if any("aotinductor/" in name for name in members):
                raise _UnsafeContentError(
                    "machine code; save the program with torch.export.save instead of compiling it"
                )
            root = next((name.removesuffix(PROGRAM) for name in members if name.endswith("/" + PROGRAM)), "")
            if root + PROGRAM not in members and OLD_PROGRAM not in members:
                raise ValueError("there is no program in the archive")
            for name in members:
                content = _member_content(archive.read(name), name.removeprefix(root))
                if content is not None:
                    clean.writestr(name, content)
    except _UnsafeContentError as error:
        raise ConvscopeError(f"{path} is not opened: it holds {error}") from error
    except Exception as error:  # damaged archives raise many types
        raise ConvscopeError(f"{path} is not an exported program (.pt2), or is damaged: {first_line(error)}") from error
    copy.seek(0)
    return copy


class _UnsafeContentError(ValueError):
    """The archive holds something that could be code."""


def _member_content(raw: bytes, name: str) -> bytes | None:
    """Return the sanitized content of a member; None leaves it out."""
    if name in EXAMPLES:
        return b""
    if name in (PROGRAM, OLD_PROGRAM) or CONFIG.fullmatch(name):
        return json.dumps(_validated(json.loads(raw))).encode()
    if name in OLD_TENSORS:
        try:
            torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise _UnsafeContentError(f"pickled code or objects ({name})") from error
        return raw
    return raw if TENSORS.fullmatch(name) else None


def _validated(value: Any, key: str = "") -> Any:
    """Return a program or weight config without metadata; raise for a string that could be code."""
    if isinstance(value, dict):
        if value.get("use_pickle"):
            raise _UnsafeContentError(f"pickled objects ({value.get('path_name')})")
        members = {k: v for k, v in value.items() if k not in ("metadata", "guards_code")}
        if modules := value.get("metadata", {}).get("nn_module_stack"):
            members["metadata"] = {"nn_module_stack": modules}
        elif "metadata" in value:
            members["metadata"] = {}
        return {_validated(k): _validated(v, k) for k, v in members.items()}
    if isinstance(value, list):
        return [_validated(v, key) for v in value]
    if isinstance(value, str) and not RULES.get(key, IDENTIFIER.fullmatch)(value):
        raise _UnsafeContentError(f"{value[:60]!r} where {key or 'a name'} is expected")
    return value


def _is_arithmetic(text: str) -> bool:
    """Return whether a size expression is plain arithmetic; sympy would evaluate anything."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except SyntaxError:
        return False
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    values = [str(node.value) for node in nodes if isinstance(node, ast.Constant)]
    return (
        all(isinstance(node, ARITHMETIC) for node in nodes)
        and all(isinstance(name, ast.Name) and FUNCTION.fullmatch(name.id) for name in called)
        and all(map(CONSTANT.fullmatch, values))
    )


def _is_tree(text: str) -> bool:
    """Return whether a pytree spec is plain nesting; a context that is a mapping could import a module."""

    def plain(tree: Any) -> bool:
        return bool(NESTING.fullmatch(json.dumps(tree["context"]))) and all(map(plain, tree["children_spec"]))

    return not text or plain(json.loads(text)[1])


RULES: dict[str, Callable[[str], object]] = {
    "target": OPERATOR.fullmatch,
    "as_operator": OPERATOR.fullmatch,
    "name": NAME.fullmatch,
    "as_name": NAME.fullmatch,
    "nn_module_stack": MODULES.fullmatch,
    "expr_str": _is_arithmetic,
    "in_spec": _is_tree,
    "out_spec": _is_tree,
    "as_string": lambda _: True,  # an operator's argument, never part of the source
    "as_strings": lambda _: True,
}
