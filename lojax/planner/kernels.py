"""What a compiled GPU program moves through memory: the bytes at the borders of its kernels, and a roofline time.

A kernel reads its operands and writes its results; what is between stays on the chip. So the bytes at the borders of
all kernels are the least that a program moves (a cache may spare some of them, a tile that is read twice adds some).

A kernel that takes a slice of an operand reads the slice; one that updates a slice of an operand in place writes the
slice. So a scan over stacked layers counts one layer an iteration, not the whole stack.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import jax

from lojax.planner.collectives import nbytes
from lojax.planner.gpus import GPUS, Gpu
from lojax.planner.hlo import Instruction, Program, called, parse

_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
    | {"replica-id", "domain", "add-dependency", "get-dimension-size"}
)
_CALLS = frozenset({"call", "conditional", "while", "async-start"})
_VIEWS = frozenset({"bitcast", "reshape"})
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_ARITHMETIC = frozenset(
    {"add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "exponential", "exponential-minus-one"}
    | {"log", "log-plus-one", "tanh", "logistic", "rsqrt", "sqrt", "cbrt", "negate", "abs", "sine", "cosine", "erf"}
    | {"reduce", "remainder", "atan2", "floor", "ceil"}
)
_PARTS = {  # how the rate of a product compares with bfloat16's, by bits of the wider operand
    4: 2.0,
    8: 2.0,
    16: 1.0,
    32: 0.5,  # TF32, which JAX takes by default
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a program.

    Attributes:
        name: The instruction's.
        scope: Where it comes from, by the names of functions and of `jax.named_scope`: ``jit(step)/attention/mul``.
        runs: How often a step runs it.
        read: Bytes of operands, each run.
        written: Bytes of results, each run.
        workspace: Bytes of scratch memory that a library call may use, each run. Most calls leave most of it alone.
        products: Operations of its matrix products and convolutions, as bfloat16 operations of the same time.
        flops: Operations of its matrix products and convolutions.
        arithmetic: Operations for each element: additions, functions, the additions of a sum.
    """

    name: str
    scope: str
    runs: int
    read: int
    written: int
    workspace: int = 0
    products: float = 0.0
    flops: int = 0
    arithmetic: int = 0

    @property
    def bytes(self) -> int:
        """Bytes at its borders, each run, workspace included: it is one of the results in the program."""
        return self.read + self.written + self.workspace

    def seconds(self, gpu: Gpu) -> float:
        """The least time of a run: of its products, its arithmetic and its bytes, whichever takes longest.

        The workspace does not count here, since how much of it is used cannot be known.
        """
        memory = (self.read + self.written) / gpu.bandwidth
        return max(self.products / gpu.flops, self.arithmetic / gpu.vector_flops, memory)


@dataclasses.dataclass(frozen=True)
class GpuCost:
    """What a step of a compiled program costs one GPU.

    Attributes:
        bytes: Bytes at the borders of kernels, the workspaces of library calls included.
        workspace: The workspaces among them.
        kernels: How many kernels a step launches.
        temporaries: Bytes of temporary memory.
        peak: The most bytes in use at once, arguments included.
        flops: Operations of matrix products and convolutions.
        seconds: The roofline time: the sum over the kernels of the least time of each. Transfers between GPUs take no
            time here.
    """

    bytes: int
    workspace: int
    kernels: int
    temporaries: int
    peak: int
    flops: int
    seconds: float


def gpu_cost(
    compiled: jax.stages.Compiled, gpu: Gpu = GPUS["h100"], *, kernel_flops: Mapping[str, int] | None = None
) -> GpuCost:
    """The cost of a program that was compiled for a GPU.

    Args:
        compiled: The program.
        gpu: The GPU whose peaks the time takes.
        kernel_flops: Operations of each run of custom kernels (Pallas), which the compiled text does not tell, by a
            part of the kernel's name.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None, "only backends without a compiler return None"
    kernels = read_kernels(text, kernel_flops=kernel_flops)
    return GpuCost(
        bytes=sum(k.runs * k.bytes for k in kernels),
        workspace=sum(k.runs * k.workspace for k in kernels),
        kernels=sum(k.runs for k in kernels),
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        flops=sum(k.runs * k.flops for k in kernels),
        seconds=sum(k.runs * k.seconds(gpu) for k in kernels),
    )


def read_kernels(text: str, *, kernel_flops: Mapping[str, int] | None = None) -> list[Kernel]:
    """The kernels of a scheduled GPU program.

    Args:
        text: What ``compiled.as_text()`` returns.
        kernel_flops: As in `gpu_cost`.
    """
    program = parse(text)
    return list(_kernels(program, program.entry, 1, kernel_flops or {}))


def _kernels(program: Program, name: str, runs: int, known: Mapping[str, int]) -> Iterator[Kernel]:
    for instruction in program.computations[name].values():
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
            continue
        if instruction.opcode not in _CALLS:
            yield _kernel(program, name, instruction, runs, known)
            continue
        inner = runs * program.iterations(name, instruction) if instruction.opcode == "while" else runs
        branches = [list(_kernels(program, c, inner, known)) for c in called(instruction)]
        if instruction.opcode == "conditional":  # one branch runs; the most expensive one counts
            branches = [max(branches, key=lambda kernels: sum(k.runs * k.bytes for k in kernels))]
        for kernels in branches:
            yield from kernels


def _kernel(program: Program, computation: str, i: Instruction, runs: int, known: Mapping[str, int]) -> Kernel:
    siblings = program.computations[computation]
    operands = [siblings[name] for name in i.operands if name in siblings]
    opcode = i.opcode.removesuffix("-start")
    if opcode == "fusion":
        body = program.computations[called(i)[0]]
        read = sum(_parameter_bytes(program, body, n, o) for n, o in enumerate(operands))
        flops, products, arithmetic = _operations(program, body)
        return Kernel(i.name, _scope(i), runs, read, _written(body), 0, products, flops, arithmetic)
    read = sum(_read_by(i, position, _size(o)) for position, o in enumerate(operands))
    written = _updated(i, siblings) if opcode == i.opcode else _started(i, operands)
    workspace = _workspace(i)
    flops, products, arithmetic = _own_operations(i, operands, known)
    return Kernel(i.name, _scope(i), runs, read, written - workspace, workspace, products, flops, arithmetic)


def _scope(i: Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', i.text)
    return name.group(1) if name else ""


def _started(i: Instruction, operands: list[Instruction]) -> int:
    """The bytes of the results of an asynchronous instruction, whose start returns operands, results and a context."""
    if i.opcode == "copy-start":  # the copy, the operand, the context
        return nbytes(*i.shapes[0])
    first = sum(len(o.shapes) for o in operands)
    results = i.shapes[first:] if len(i.shapes) > first else i.shapes  # an all-reduce returns its results alone
    return sum(nbytes(*shape) for shape in results if shape != ("u32", ()))


def _size(i: Instruction) -> int:
    return sum(nbytes(*shape) for shape in i.shapes)


def _read_by(user: Instruction, position: int, size: int) -> int:
    """The bytes that an instruction reads of its operand at ``position``, which has ``size`` bytes."""
    if user.opcode in _SLICES and position == 0:
        return min(size, _size(user))
    if user.opcode in ("dynamic-update-slice", "scatter") and position == 0:
        return 0  # in place
    return size


def _updated(i: Instruction, siblings: Mapping[str, Instruction]) -> int:
    """The bytes that an instruction writes: of an update in place, the update."""
    if i.opcode == "dynamic-update-slice":
        return _size(siblings[i.operands[1]])
    if i.opcode == "scatter":  # reads what it adds to
        return 2 * _size(siblings[i.operands[-1]])
    return _size(i)


def _parameter_bytes(program: Program, body: Mapping[str, Instruction], number: int, operand: Instruction) -> int:
    """The bytes that a fusion reads of its parameter ``number``."""
    size = _size(operand)
    parameter = next(i for i in body.values() if i.opcode == "parameter" and f"parameter({number})" in i.text)
    return min(size, _bytes_of_uses(program, body, parameter, size))


def _bytes_of_uses(program: Program, body: Mapping[str, Instruction], value: Instruction, size: int) -> int:
    total = 0
    in_place = {i.name for i in _roots(body)}
    for user in body.values():
        for position in (n for n, name in enumerate(user.operands) if name == value.name):
            if user.opcode in _VIEWS:
                total += _bytes_of_uses(program, body, user, size)
            elif user.opcode == "fusion":
                inner = program.computations[called(user)[0]]
                total += _parameter_bytes(program, inner, position, value)
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.name not in in_place:
                total += size  # a copy with an update
            elif user.opcode != "tuple":
                total += _read_by(user, position, size)
            if total >= size:
                return size
    return total


def _roots(body: Mapping[str, Instruction]) -> list[Instruction]:
    """What a fusion returns, before views."""
    root = next(i for i in body.values() if i.root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return [_before_views(body, i) for i in results]


def _before_views(body: Mapping[str, Instruction], i: Instruction) -> Instruction:
    while i.opcode in _VIEWS:
        i = body[i.operands[0]]
    return i


def _written(body: Mapping[str, Instruction]) -> int:
    return sum(_updated(i, body) for i in _roots(body))


def _operations(program: Program, body: Mapping[str, Instruction]) -> tuple[int, float, int]:
    """Of a fusion: the operations of its products, the same weighed by their rate, and its arithmetic."""
    flops, products, arithmetic = 0, 0.0, 0
    for i in body.values():
        if i.opcode == "fusion":
            own = _operations(program, program.computations[called(i)[0]])
        else:
            own = _own_operations(i, [body[name] for name in i.operands], {})
        flops, products, arithmetic = flops + own[0], products + own[1], arithmetic + own[2]
    return flops, products, arithmetic


def _own_operations(i: Instruction, operands: list[Instruction], known: Mapping[str, int]) -> tuple[int, float, int]:
    if i.opcode in _ARITHMETIC:
        shape = (operands[0] if i.opcode == "reduce" else i).shapes[0][1]
        return 0, 0.0, math.prod(shape)
    flops, target = 0, i.attribute("custom_call_target") or ""
    if i.opcode == "dot":
        flops = _dot_flops(i, operands, re.findall(r"\d+", i.attribute("lhs_contracting_dims") or ""))
    elif i.opcode == "convolution" or "cudnn$conv" in target:
        flops = _convolution_flops(i, operands[1])
    elif "cublas" in target and (dims := re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.text)):
        flops = _dot_flops(i, operands, re.findall(r"\d+", dims.group(1)))
    elif i.opcode.startswith("custom-call"):
        flops = next((n for part, n in known.items() if part in i.text), 0)
        return flops, float(flops), 0
    return flops, flops and flops / _rate([o.shapes[0][0] for o in operands[:2]]), 0


def _dot_flops(i: Instruction, operands: list[Instruction], contracted: list[str]) -> int:
    lhs = operands[0].shapes[0][1]
    return 2 * math.prod(i.shapes[0][1]) * math.prod(lhs[int(d)] for d in contracted)


def _rate(dtypes: list[str]) -> float:
    bits = max(int(match.group()) if (match := re.search(r"\d+", d)) else 8 for d in dtypes)
    return _PARTS.get(bits, 1 / 16)


def _convolution_flops(i: Instruction, kernel: Instruction) -> int:
    labels = (i.attribute("dim_labels") or "").split("_")[1].split("->")[0]
    sizes = dict(zip(labels, kernel.shapes[0][1], strict=True))
    return 2 * math.prod(i.shapes[0][1]) * math.prod(n for label, n in sizes.items() if label != "o")


def _workspace(i: Instruction) -> int:
    """The scratch memory of a cuBLAS or cuDNN call: the last of its results."""
    if i.opcode != "custom-call":
        return 0
    target = i.attribute("custom_call_target") or ""
    is_library = "cublas" in target or "cudnn" in target
    return nbytes(*i.shapes[-1]) if is_library and len(i.shapes) > 1 and i.shapes[-1][0] in ("s8", "u8") else 0
