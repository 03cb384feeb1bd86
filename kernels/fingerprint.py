"""What decides how a kernel compiles, as one short text: where it is equal, compiling again would say nothing new."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
import types
from collections.abc import Callable, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend


def fingerprint(source: ASTSource, target: GPUTarget, options: dict[str, Any], measure: Sequence[Callable]) -> str:
    """A digest of all that a compiled kernel and what is read from it depend on.

    That is the kernel's code and that of all it calls, as :func:`code_of` says; argument types, constants and what is
    known of addresses; the architecture and every option, given or default; the versions of triton and ptxas; and the
    functions that ``measure`` the result.

    Args:
        source: a kernel with its types and constants, as ``triton.compile`` takes it; target, options: likewise.
        measure: the functions whose answers are recorded beside the digest.
    """
    backend = _backend(target)
    parts = [
        code_of(source.fn),
        *(str(sorted(table.items(), key=str)) for table in (source.signature, source.constants, source.attrs)),
        _options(target, tuple(sorted(options.items()))),
        backend.hash(),
        triton.__version__,
        *(_code(function) for function in measure),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def code_of(kernel: triton.JITFunction) -> str:
    """The code of a kernel, of every ``triton.jit`` function it reaches, and the values of the globals they read.

    Comments, docstrings, formatting and the place in the file do not count. Triton's own functions stand for their
    version, which the fingerprint holds.

    Raises:
        TypeError: a kernel that reads anything but numbers, text, ``triton.jit`` functions and triton's modules.
    """
    found: dict[str, str] = {}
    todo = [kernel]
    while todo:
        function = todo.pop()
        name = f"{function.fn.__module__}.{function.fn.__qualname__}"
        if name in found:
            continue
        code = _plain(function.src)
        read = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)} & set(
            function.fn.__globals__
        )
        values = {}
        for used in sorted(read):
            value = function.fn.__globals__[used]
            if isinstance(value, triton.JITFunction):
                todo.append(value)
            elif isinstance(value, (int, float, str, tl.constexpr, tl.dtype)):
                values[used] = repr(value)
            elif not (isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] == "triton"):
                raise TypeError(f"{name} reads {used} = {value!r}: what of it counts for the compiler cannot be told")
        found[name] = f"{code}\n{values}"
    return "\n".join(f"{name}: {found[name]}" for name in sorted(found))


@functools.cache
def _code(function: Callable) -> str:
    """The code of a Python function."""
    return _plain(textwrap.dedent(inspect.getsource(function)))


def _plain(code: str) -> str:
    """The code of a function without comments, docstring and formatting."""
    tree = ast.parse(code)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.cache
def _backend(target: GPUTarget) -> Any:
    return make_backend(target)


@functools.cache
def _options(target: GPUTarget, options: tuple[tuple[str, Any], ...]) -> str:
    return _backend(target).parse_options(dict(options)).hash()
