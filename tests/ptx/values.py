# SPDX-License-Identifier: Apache-2.0
"""Numbers as PTX has them: bit patterns in unsigned arrays, seen as integers or floats; roundings NumPy lacks.

NaN payloads are not modelled: a NaN stays a NaN, with any pattern.
"""

import numpy as np

# The element type a PTX type is seen as. bf16 has none in NumPy and stays a pattern; packed pairs are seen as 32 bits.
DTYPES = {
    **{
        f"{sign}{bits}": np.dtype(f"{code}{bits // 8}") for sign, code in ("bu", "uu", "si") for bits in (8, 16, 32, 64)
    },
    **{"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "bf16": np.dtype("u2")},
    **{"f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "tf32": np.dtype("u4"), "pred": np.dtype(bool)},
}
PATTERN = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")
TINY = np.float32(2.0**-126)


def odd_float32(x: np.ndarray) -> np.ndarray:
    """Rounds float64 to float32 with an odd last bit if inexact, so that a later narrower rounding is right."""
    near = x.astype(np.float32)
    bits = near.view(np.uint32)
    fix = (near.astype(np.float64) != x) & (bits & 1 == 0) & np.isfinite(near) & ~np.isnan(x)
    if not fix.any():
        return near
    step = np.where(np.abs(near) < np.abs(x), 1, -1).astype(np.int32).view(np.uint32)
    return np.where(fix, bits + step, bits).view(np.float32)


def from_bfloat(patterns: np.ndarray) -> np.ndarray:
    """The float32 value of bf16 patterns."""
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat(x: np.ndarray) -> np.ndarray:
    """The bf16 patterns nearest to float32 or float64 values, halves to even."""
    x = odd_float32(x) if x.dtype == np.float64 else np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 values to zero of the same sign (.ftz)."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def decode(kind: str, value: np.ndarray) -> np.ndarray:
    """Numbers to compute with from registers of a float type; a packed pair gives two numbers a lane."""
    if kind == "f16x2":
        return np.ascontiguousarray(value).view(np.float16)
    if kind == "bf16x2":
        return from_bfloat(np.ascontiguousarray(value).view(np.uint16))
    return from_bfloat(value) if kind == "bf16" else value


def encode(kind: str, x: np.ndarray) -> np.ndarray:
    """The registers for numbers, rounded to nearest even."""
    if kind == "f16x2":
        return x.astype(np.float16).view(np.uint32)
    if kind in ("bf16", "bf16x2"):
        return to_bfloat(x) if kind == "bf16" else to_bfloat(x).view(np.uint32)
    return x.astype(DTYPES[kind], copy=False)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of numbers narrower than float64 as float64 that rounds once to any of their types."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    c = np.asarray(c, np.float64)
    total = np.atleast_1d(product + c)
    part = total - product
    lost = (product - (total - part)) + (c - part)
    fix = (lost != 0) & np.isfinite(total)
    if not fix.any():
        return total
    bits = total.view(np.uint64)
    fix &= bits & np.uint64(1) == 0
    step = np.where((lost > 0) == (total > 0), 1, -1).astype(np.int64).view(np.uint64)
    return np.where(fix, bits + step, bits).view(np.float64)


def directed(mode: str, x: np.ndarray) -> np.ndarray:
    """Rounds float64 to float32 towards zero ("rz"), down ("rm") or up ("rp")."""
    near = x.astype(np.float32)
    wide = near.astype(np.float64)
    wrong = {"rz": np.abs(wide) > np.abs(x), "rm": wide > x, "rp": wide < x}[mode]
    goal = {"rz": np.float32(0), "rm": np.float32(-np.inf), "rp": np.float32(np.inf)}[mode]
    return np.where(wrong, np.nextafter(near, goal), near)


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product of two integers of the same type."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}8")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.astype(np.uint64), b.astype(np.uint64)
    cross = (x >> half) * (y & low) + (((x & low) * (y & low)) >> half)
    other = (x & low) * (y >> half) + (cross & low)
    high = (x >> half) * (y >> half) + (cross >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.astype(a.dtype)


def to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Whole numbers in float64 as an integer type: out of range saturates, NaN gives 0."""
    limits = np.iinfo(dtype)
    inside = (x > limits.min) & (x < float(limits.max))
    kept = np.where(inside, x, 0.0).astype(dtype)
    ends = np.where(x <= limits.min, dtype.type(limits.min), dtype.type(limits.max))
    return np.where(inside | np.isnan(x), kept, ends)
