# SPDX-License-Identifier: Apache-2.0
"""Opcodes that compute: integers, floats, comparisons."""

import operator

import numpy as np
from ptx.code import Code, apply, kind_of, opcode
from ptx.parser import TYPE_BITS, Instruction, Pair, PtxError
from ptx.values import DTYPES, FLOATS, directed, encode, flush, fused, high_product


def _quotient(a, b):
    """Division that truncates, as C has it; by zero the result is left open."""
    b = np.where(b == 0, a.dtype.type(1), b)
    return (a - np.fmod(a, b)) // b


def _approximate(function):
    """A float32 function computed in float64: better than the hardware, which promises a few bits less."""
    return lambda *a: function(*(x.astype(np.float64) for x in a)).astype(np.float32)


_INTEGER = {
    **{"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "div": _quotient},
    **{"rem": lambda a, b: np.fmod(a, np.where(b == 0, a.dtype.type(1), b)), "neg": np.negative, "abs": np.abs},
}
_FLOAT = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.fmin, "max": np.fmax},
    **{"neg": np.negative, "abs": np.abs, "fma": fused, "mad": fused},
    **{"sqrt": np.sqrt, "rcp": np.reciprocal, "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2, "lg2": np.log2},
    **{"sin": np.sin, "cos": np.cos, "tanh": np.tanh, "copysign": lambda a, b: np.copysign(b, a)},
}
# With one rounding to follow, of any kind.
_EXACT = {
    **{"add": lambda a, b: fused(a, 1, b), "sub": lambda a, b: fused(a, 1, -b), "mul": lambda a, b: fused(a, b, 0)},
    **{"fma": fused, "mad": fused},
}
_ROUNDED_TWICE = ("sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh", "div")


def _float(code: Code, ins: Instruction, kind: str):
    name, parts = ins.parts[0], ins.parts
    function = _FLOAT[name]
    if "NaN" in parts:
        function = {"min": np.minimum, "max": np.maximum}[name]
    if name in _ROUNDED_TWICE and kind == "f32":
        function = _approximate(function)
    mode = next((p for p in parts if p in ("rz", "rm", "rp")), "")
    if mode:
        if kind != "f32" or name not in _EXACT:
            raise PtxError(f"unknown opcode (.{mode})")
        function = _EXACT[name]
    if kind == "f64" and name in ("fma", "mad"):
        function = _fused_double
    ftz, sat = "ftz" in parts and kind == "f32", "sat" in parts

    def compute(*sources):
        if ftz:
            sources = [flush(x) for x in sources]
        value = function(*sources)
        if sat:
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1))
        value = directed(mode, value) if mode else encode(kind, value)
        return flush(value) if ftz else value

    write = code.writer(ins.operands[0], kind)
    return apply(write, [code.floats(o, kind) for o in ins.operands[1:]], compute)


def _fused_double(a, b, c):
    # The 64 bits of a long double, not the 106 that would be exact.
    return (a.astype(np.longdouble) * b + c).astype(np.float64)


@opcode(
    "add", "sub", "min", "max", "div", "rem", "neg", "abs", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"
)
def _simple(code: Code, ins: Instruction):
    kind = kind_of(ins, "rn rz rm rp ftz sat approx full NaN")
    if kind in FLOATS:
        return _float(code, ins, kind)
    if len(ins.parts) > 2 or ins.parts[0] not in _INTEGER:
        raise PtxError("unknown opcode")
    return code.elementwise(ins, kind, _INTEGER[ins.parts[0]])


@opcode("copysign", "fma")
def _float_only(code: Code, ins: Instruction):
    return _float(code, ins, kind_of(ins, "rn rz rm rp ftz sat"))


@opcode("mul", "mad", "mul24", "mad24")
def _multiply(code: Code, ins: Instruction):
    kind = kind_of(ins, "lo hi wide rn rz rm rp ftz sat")
    if kind in FLOATS:
        return _float(code, ins, kind)
    name, half = ins.parts[0], ins.parts[1]
    result = f"{kind[0]}{2 * TYPE_BITS[kind]}" if half == "wide" else kind
    if name.endswith("24") or half not in ("lo", "hi", "wide"):
        raise PtxError("unknown opcode")
    wide = DTYPES[result]
    product = {
        "lo": np.multiply,
        "hi": high_product,
        "wide": lambda a, b: np.multiply(a.astype(wide), b.astype(wide)),
    }[half]
    write = code.writer(ins.operands[0], result)
    reads = [code.reader(o, kind) for o in ins.operands[1:3]]
    if name == "mul":
        return apply(write, reads, product)
    reads.append(code.reader(ins.operands[3], result))
    return apply(write, reads, lambda a, b, c: product(a, b) + c)


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}


@opcode("and", "or", "xor", "not")
def _logic(code: Code, ins: Instruction):
    return code.elementwise(ins, kind_of(ins), _LOGIC[ins.parts[0]])


@opcode("cnot")
def _is_zero(code: Code, ins: Instruction):
    return code.elementwise(ins, kind_of(ins), lambda a: (a == 0).astype(a.dtype))


_COMPARE = {
    **{
        "eq": operator.eq,
        "ne": operator.ne,
        "lt": operator.lt,
        "le": operator.le,
        "gt": operator.gt,
        "ge": operator.ge,
    },
    **{"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge},
}
_UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def _comparison(name: str, kind: str):
    if kind not in FLOATS:
        return _COMPARE[name]
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name in _UNORDERED:
        ordered = _COMPARE[_UNORDERED[name]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    return _COMPARE[name]


@opcode("setp")
def _set_predicate(code: Code, ins: Instruction):
    kind = kind_of(ins, " ".join([*_COMPARE, *_UNORDERED, "num nan and or xor ftz"]))
    compare = _comparison(ins.parts[1], kind)
    combine = next((_LOGIC[p] for p in ins.parts[2:-1] if p in _LOGIC), None)
    first, a, b, *other = ins.operands
    if "x2" in kind or (combine is None) != (not other):
        raise PtxError("unknown opcode")
    second = first.second if isinstance(first, Pair) else None
    writes = [code.writer(o, "pred") for o in (first.first if isinstance(first, Pair) else first, second)]
    read_a, read_b = code.floats(a, kind), code.floats(b, kind)
    read_c = code.reader(other[0], "pred") if other else None

    def run(m):
        result = np.asarray(compare(read_a(m), read_b(m)))
        opposite = ~result if second else None
        if read_c:
            c = read_c(m)
            result, opposite = combine(result, c), combine(opposite, c) if second else None
        writes[0](m, result)
        if second:
            writes[1](m, opposite)

    return run


@opcode("set")
def _set(code: Code, ins: Instruction):
    kind, result = ins.parts[-1], ins.parts[-2]
    if ins.parts[2:-2] not in ([], ["ftz"]) or result not in ("u32", "s32", "f32", "f16") or "x2" in kind:
        raise PtxError("unknown opcode")
    compare = _comparison(ins.parts[1], kind)
    true = DTYPES[result].type(1 if result in FLOATS else -1) if result != "u32" else np.uint32(0xFFFFFFFF)
    write, reads = code.writer(ins.operands[0], result), [code.floats(o, kind) for o in ins.operands[1:]]
    return apply(write, reads, lambda a, b: np.where(compare(a, b), true, DTYPES[result].type(0)))


@opcode("selp")
def _select(code: Code, ins: Instruction):
    kind = kind_of(ins)
    write = code.writer(ins.operands[0], kind)
    reads = [code.reader(o, kind) for o in ins.operands[1:3]] + [code.reader(ins.operands[3], "pred")]
    return apply(write, reads, lambda a, b, p: np.where(p, a, b))
