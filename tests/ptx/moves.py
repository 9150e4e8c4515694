# SPDX-License-Identifier: Apache-2.0
"""Opcodes that move and convert values and access memory."""

import operator

import numpy as np
from ptx.code import Code, kind_of, opcode
from ptx.machine import Machine
from ptx.memory import GLOBAL_START, WINDOWS
from ptx.parser import TYPE_BITS, Instruction, PtxError, Vector
from ptx.values import DTYPES, FLOATS, PATTERN, encode, flush, to_integer

_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("mov")
def _move(code: Code, ins: Instruction):
    kind = kind_of(ins)
    to, source = ins.operands
    if isinstance(to, Vector):
        return _unpack(code, to.items, source, kind)
    write = code.writer(to, kind)
    if isinstance(source, Vector):
        return _pack(code, write, source.items, kind)
    read = code.reader(source, kind)
    return lambda m: write(m, read(m))


def _unpack(code: Code, items: tuple, source, kind: str):
    part = f"b{TYPE_BITS[kind] // len(items)}"
    writes = [code.writer(o, part) for o in items]
    read = code.reader(source, f"b{TYPE_BITS[kind]}")

    def run(m):
        value = np.ascontiguousarray(np.broadcast_to(read(m), m.shape)).view(DTYPES[part]).reshape(-1, len(items))
        for i, write in enumerate(writes):
            write(m, np.ascontiguousarray(value[:, i]))

    return run


def _pack(code: Code, write, items: tuple, kind: str):
    reads = [code.reader(o, f"b{TYPE_BITS[kind] // len(items)}") for o in items]

    def run(m):
        parts = [np.broadcast_to(read(m), m.shape) for read in reads]
        write(m, np.stack(parts, axis=1).view(DTYPES[kind])[:, 0])

    return run


@opcode("undefined")
def _undefined(code: Code, ins: Instruction):
    return lambda m: m.undefine(ins.operands[0])


def _converter(to: str, source: str, parts: list[str]):
    """The function of cvt from decoded numbers to the values of a type."""
    rounding = next((_ROUND[p] for p in parts if p in _ROUND), None)
    sat = "sat" in parts
    if to not in FLOATS:
        dtype = DTYPES[to]
        if source in FLOATS:
            return lambda x: to_integer(rounding(np.asarray(x, np.float64)), dtype)
        limits = np.iinfo(dtype)
        return lambda x: (np.clip(x, limits.min, limits.max) if sat else x).astype(dtype)
    ftz = "ftz" in parts

    def convert(x):
        x = flush(x) if ftz and x.dtype == np.float32 else x
        x = rounding(x) if rounding else x
        if sat:
            x = np.where(np.isnan(x), 0, np.clip(x, 0, 1))
        if x.dtype.kind in "iu" and to in ("f16", "bf16"):
            x = x.astype(np.float64)
        return encode(to, x)

    return convert


@opcode("cvt")
def _convert(code: Code, ins: Instruction):
    parts = ins.parts[1:]
    to, source = parts[-2:]
    allowed = {"rn", "ftz", "sat", "relu", *_ROUND}
    if not {*parts[:-2]} <= allowed or not {to, source} <= {*TYPE_BITS} or to == "tf32":
        raise PtxError("unknown opcode")
    if source in FLOATS and to not in FLOATS and not {*parts} & {*_ROUND}:
        raise PtxError("unknown opcode")
    write = code.writer(ins.operands[0], to)
    reads = [code.floats(o, source) for o in ins.operands[1:]]
    single = to.removesuffix("x2")
    convert = _converter(single, source, parts)
    relu = "relu" in parts

    def part(m, read):
        x = read(m)
        return convert(np.where(np.isnan(x), x, np.maximum(x, 0)) if relu else x)

    if to == single:
        return lambda m: write(m, part(m, reads[0]))

    def pair(m):
        high, low = (np.broadcast_to(part(m, read), m.shape).view(np.uint16).astype(np.uint32) for read in reads)
        write(m, high << np.uint32(16) | low)

    return pair


@opcode("cvta")
def _convert_address(code: Code, ins: Instruction):
    parts = [p for p in ins.parts[1:-1] if p != "to"]
    if len(parts) != 1 or ins.parts[-1] != "u64":
        raise PtxError("unknown opcode")
    start = np.uint64(WINDOWS.get(parts[0], 0))
    function = np.subtract if "to" in ins.parts else np.add
    return code.elementwise(ins, "u64", lambda a: function(a, start))


_SPACES = {"global": "global", "const": "global", "shared": "shared", "local": "local", "param": "param"}
_ORDERS = {"volatile", "relaxed", "acquire", "release", "weak", "gpu", "cta", "sys"}
_ORDERS |= {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt"}


def _space(parts: list[str]) -> str:
    """The memory named by the parts of an opcode, "" for a generic address."""
    for part in parts:
        if part not in _ORDERS and part not in _SPACES:
            raise PtxError(f"unknown opcode (.{part})")
    return next((_SPACES[p] for p in parts if p in _SPACES), "")


def _elements(operand, parts: list[str]) -> tuple[tuple, list[str]]:
    """The registers of a load or store, and its opcode's parts without the vector's."""
    if not isinstance(operand, Vector):
        return (operand,), parts
    if len(operand.items) == 1:
        return operand.items, parts
    if f"v{len(operand.items)}" not in parts:
        raise PtxError("the vector's size is not the opcode's")
    return operand.items, [p for p in parts if p != f"v{len(operand.items)}"]


@opcode("ld", "ldu")
def _load(code: Code, ins: Instruction):
    items, parts = _elements(ins.operands[0], ins.parts)
    kind, space = parts[-1], _space(parts[1:-1])
    size, dtype = TYPE_BITS[kind] // 8, DTYPES[kind]
    address = code.address(ins.operands[1])
    writes = [code.writer(o, kind) for o in items]

    def run(m):
        for write, value in zip(writes, m.load(space, address(m), size, len(writes)), strict=True):
            write(m, value.view(dtype))

    return run


@opcode("st")
def _store(code: Code, ins: Instruction):
    items, parts = _elements(ins.operands[1], ins.parts)
    kind, space = parts[-1], _space(parts[1:-1])
    bits = TYPE_BITS[kind]
    address = code.address(ins.operands[0])
    reads = [code.reader(o, kind) for o in items]

    def run(m):
        m.store(space, address(m), [np.asarray(read(m)).view(PATTERN[bits]) for read in reads], bits // 8)

    return run


_ATOMIC = {
    **{"add": operator.add, "min": min, "max": max, "and": operator.and_, "or": operator.or_, "xor": operator.xor},
    **{"exch": lambda old, new: new, "cas": lambda old, expected, new: new if old == expected else old},
}


@opcode("atom", "red")
def _atomic(code: Code, ins: Instruction):
    parts = [p for p in ins.parts[1:] if p != "noftz"]
    function, kind = _ATOMIC[parts[-2]], parts[-1]
    space = _space([p for p in parts[:-2] if p not in ("acq_rel",)])
    if kind in ("bf16", "bf16x2", "f16x2"):
        raise PtxError("unknown opcode")
    size, dtype = TYPE_BITS[kind] // 8, DTYPES[kind]
    returns = ins.parts[0] == "atom"
    target, *values = ins.operands[1:] if returns else ins.operands
    address, reads = code.address(target), [code.reader(v, kind) for v in values]
    write = code.writer(ins.operands[0] if returns else None, kind)

    def run(m):
        everywhere = address(m)
        operands = [np.broadcast_to(read(m), m.shape) for read in reads]
        lanes, before = m.lanes, np.zeros(m.shape, dtype)
        report, m.launch.report = m.launch.report, None
        for lane in lanes:
            m.lanes = np.array([lane])
            before[lane] = m.load(space, everywhere, size)[0].view(dtype)[lane]
            new = dtype.type(function(before[lane], *(o[lane] for o in operands)))
            m.store(space, everywhere, [new.view(PATTERN[8 * size])], size)
        m.lanes, m.launch.report = lanes, report
        write(m, before)

    return run


@opcode("cp")
def _copy(code: Code, ins: Instruction):
    parts = ins.parts[2:]
    if ins.parts[1] != "async":
        raise PtxError("unknown opcode")
    if parts == ["commit_group"]:
        return _commit
    if parts in (["wait_group"], ["wait_all"]):
        pending = ins.operands[0].value if ins.operands else -1
        return lambda m: _wait(m, pending)
    if parts not in (["ca", "shared", "global"], ["cg", "shared", "global"]):
        raise PtxError("unknown opcode")
    operands = ins.operands[:-1] if "cache_hint" in ins.opcode else ins.operands
    to, source, size = code.address(operands[0]), code.address(operands[1]), operands[2].value
    read_size = code.reader(operands[3], "u32") if len(operands) > 3 else None
    if size not in ((16,) if parts[0] == "cg" else (4, 8, 16)):
        raise PtxError("cp.async copies 4, 8 or 16 bytes, .cg only 16")
    return lambda m: _start_copy(m, to(m), source(m), size, read_size and read_size(m))


def _start_copy(m: Machine, to: np.ndarray, source: np.ndarray, size: int, read) -> None:
    """Checks a copy now, but leaves the bytes where they are until it is waited for."""
    lanes = m.lanes
    read = np.full(lanes.size, size) if read is None else np.broadcast_to(read, m.shape)[lanes].astype(np.int64)
    if (read > size).any():
        m.fail("cp.async reads more than it writes", lanes[np.argmax(read > size)])
    offsets = source[lanes] - GLOBAL_START
    if (offsets & (size - 1)).any():
        m.fail("unaligned source of cp.async", lanes[np.argmax(offsets & (size - 1) != 0)])
    for part in np.unique(read[read > 0]):
        some = read == part
        if m.launch.report:
            m.launch.report.access(m.at, "global", offsets[some], lanes[some], size)
        if problem := m.launch.buffers.check(offsets[some], part, False):
            m.fail(problem[0], lanes[some][problem[1]])
    m.copies.append((lanes, m.check("shared", to[lanes], lanes, size, True), offsets, read, size, m.committed[lanes]))
    if m.launch.eager:
        _wait(m, -1)


def _commit(m: Machine) -> None:
    m.committed[m.lanes] += 1


def _wait(m: Machine, pending: int) -> None:
    """Does the copies of the active lanes that a wait ends; -1: also those that are in no group yet."""
    rest, shared, buffers = [], m.scratch["shared"], m.launch.buffers
    for lanes, to, source, read, size, group in m.copies:
        due = m.mask[lanes] & (group < m.committed[lanes] - pending)
        for i in range(size if due.any() else 0):
            inside = i < read[due]
            shared.views[1][to[due] + i] = np.where(inside, buffers.views[1][np.where(inside, source[due] + i, 0)], 0)
            shared.written[1][to[due] + i] = 1
        if not due.all():
            rest.append(tuple(x if isinstance(x, int) else x[~due] for x in (lanes, to, source, read, size, group)))
    m.copies = rest


@opcode("ldmatrix")
def _load_matrix(code: Code, ins: Instruction):
    parts = ins.parts[1:]
    count = {"x1": 1, "x2": 2, "x4": 4}.get(next((p for p in parts if p in ("x1", "x2", "x4")), ""))
    transposed = "trans" in parts
    if not {"sync", "aligned", "m8n8", "shared", "b16"} <= {*parts} or count is None:
        raise PtxError("unknown opcode")
    items = ins.operands[0].items if isinstance(ins.operands[0], Vector) else (ins.operands[0],)
    writes, address = [code.writer(o, "b32") for o in items], code.address(ins.operands[1])

    def run(m):
        m.require_warps()
        lanes = m.lanes[m.lanes % 32 < 8 * count]
        rows = np.stack(m.load("shared", address(m), 2, 8, lanes), axis=1).reshape(-1, 4, 8, 8)
        for i, write in enumerate(writes):
            matrix = rows[:, i].swapaxes(1, 2) if transposed else rows[:, i]
            write(m, np.ascontiguousarray(matrix).view(np.uint32).reshape(m.shape))

    return run


@opcode("membar", "fence", "prefetch", "prefetchu", "discard")
def _nothing(code: Code, ins: Instruction):
    return lambda m: None


@opcode("createpolicy")
def _policy(code: Code, ins: Instruction):
    write = code.writer(ins.operands[0], "b64")
    return lambda m: write(m, np.uint64(0))


@opcode("isspacep")
def _is_in_space(code: Code, ins: Instruction):
    space = ins.parts[1]
    write, read = code.writer(ins.operands[0], "pred"), code.reader(ins.operands[1], "u64")

    def run(m):
        windows = {name: (read(m) >> np.uint64(40)) == start >> 40 for name, start in WINDOWS.items()}
        outside = ~np.logical_or.reduce(list(windows.values()))
        write(m, {**windows, "global": outside}[space])

    return run
