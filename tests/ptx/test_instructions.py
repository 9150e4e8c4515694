# SPDX-License-Identifier: Apache-2.0
"""Single instructions, as kernels/cuda/ptx.h wraps them and as nvcc chooses them, against NumPy."""

import numpy as np
import pytest
from ptx.compilers import cuda, cuda_program

RANDOM = np.random.default_rng(7)


def words(*shape):
    return RANDOM.integers(0, 2**32, shape, dtype=np.uint32)


def elementwise(expression, *arrays, out=np.uint32, scalars=""):
    """Runs out[i] = expression of a, b, c at i."""
    names = "abc"[: len(arrays)]
    types = {"uint32": "uint32_t", "uint16": "uint16_t", "float32": "float", "int32": "int32_t", "int64": "long long"}
    types |= {"float64": "double", "uint64": "unsigned long long", "int16": "int16_t", "int8": "int8_t"}
    pointers = "".join(f"const {types[x.dtype.name]}* {n}_, " for n, x in zip(names, arrays, strict=True))
    loads = "".join(f"auto {n} = {n}_[i]; " for n in names)
    program = cuda(f"""extern "C" KERNEL(128) k({pointers}{types[np.dtype(out).name]}* d, int n) {{
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) {{ {loads}d[i] = {expression}; }} }}""")
    result = np.zeros(arrays[0].shape, out)
    program.run("k", -(-result.size // 128), 128, [*arrays, result, result.size])
    return result


def test_permute_bytes():
    a, b, c = words(3, 1000)
    pair = np.stack([a, b], axis=1).view(np.uint8)
    want = np.zeros((1000, 4), np.uint8)
    for i in range(4):
        nibble = (c >> np.uint32(4 * i)) & 15
        byte = np.take_along_axis(pair, (nibble & 7)[:, None].astype(np.int64), 1)[:, 0]
        want[:, i] = np.where(nibble & 8, np.where(byte & 128, 255, 0), byte)
    assert (elementwise("permute_bytes(a, b, c & 0x7777)", a, b, c & 0x77777777) == permuted(pair, c & 0x7777)).all()
    assert (elementwise("permute_bytes(a, b, 0x6240)", a, b) == permuted(pair, np.full(1000, 0x6240))).all()
    raw = cuda("""extern "C" KERNEL(128) k(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
        int i = threadIdx.x; asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d[i]) : "r"(a[i]), "r"(b[i]), "r"(c[i])); }""")
    got = np.zeros(128, np.uint32)
    raw.run("k", 1, 128, [np.ascontiguousarray(x[:128]) for x in (a, b, c)] + [got])
    assert (got == want[:128].reshape(-1).view(np.uint32)).all()


def permuted(pair, selector):
    chosen = (selector[:, None] >> (4 * np.arange(4))) & 7
    return np.ascontiguousarray(np.take_along_axis(pair, chosen.astype(np.int64), 1)).view(np.uint32)[:, 0]


def test_funnel_left():
    high, low, shift = words(1000), words(1000), RANDOM.integers(0, 32, 1000, dtype=np.uint32)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    want = ((both << shift.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
    assert (elementwise("funnel_left(a, b, c)", high, low, shift) == want).all()


def test_lane_index():
    got = np.zeros(96, np.int32)
    cuda("""extern "C" KERNEL(96) k(int* d) { d[threadIdx.x] = lane_index(); }""").run("k", 1, 96, [got])
    assert (got == np.arange(96) % 32).all()


def test_sum_bytes():
    v, base = words(1000), words(1000)
    want = v.view(np.uint8).reshape(-1, 4).sum(1, dtype=np.uint32) + base
    assert (elementwise("sum_bytes(a, b)", v, base) == want).all()


def test_add_halves():
    a, b = words(2, 4000)
    got = elementwise("add_halves(a, b)", a, b).view(np.float16)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, a.view(np.float16) + b.view(np.float16))


EVERY_HALF = np.arange(65536, dtype=np.uint32).astype(np.uint16)


def test_conversions_of_every_half():
    np.testing.assert_array_equal(
        elementwise("from_half(a)", EVERY_HALF, out=np.float32), EVERY_HALF.view(np.float16).astype(np.float32)
    )
    wide = (EVERY_HALF.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(elementwise("from_bfloat(a)", EVERY_HALF, out=np.float32), wide)


def test_rounding_to_halves():
    import torch

    x = np.concatenate([words(20000).view(np.float32), (RANDOM.standard_normal(20000) * 2e-4).astype(np.float32)])
    # Ties: every half plus half of its last place.
    ties = EVERY_HALF.view(np.float16).astype(np.float32).view(np.uint32) + np.uint32(1 << 12)
    x = np.concatenate([x, ties.view(np.float32), (EVERY_HALF.astype(np.uint32) << 16 | 0x8000).view(np.float32)])
    tensor = torch.from_numpy(x)
    for call, kind in (("to_half", torch.float16), ("to_bfloat", torch.bfloat16)):
        got = torch.from_numpy(elementwise(f"{call}(a)", x, out=np.uint16).view(np.int16)).view(kind)
        assert torch.equal(got.nan_to_num(7), tensor.to(kind).nan_to_num(7))


def test_to_int():
    x = np.concatenate([RANDOM.uniform(-1e3, 1e3, 1000), np.arange(-8, 8) / 2, [3e9, -3e9, np.nan]]).astype(np.float32)
    want = np.where(np.isnan(x), 0, np.clip(np.rint(x.astype(np.float64)), -(2**31), 2**31 - 1)).astype(np.int32)
    assert (elementwise("to_int(a)", x, out=np.int32) == want).all()


def signed(n, low=-(2**31)):
    return RANDOM.integers(low, 2**31, n).astype(np.int32)


INTEGERS = {
    "a * b + c": lambda a, b, c: a * b + c,
    "a / (b | 1)": lambda a, b, c: np.trunc(a / (b | 1).astype(np.float64)),
    "a % (b | 1)": lambda a, b, c: np.fmod(a, b | 1),
    "__mulhi(a, b)": lambda a, b, c: (a.astype(np.int64) * b) >> 32,
    "min(a, b) - max(b, c)": lambda a, b, c: np.minimum(a, b) - np.maximum(b, c),
    "abs(a) ^ ~b & c | -c": lambda a, b, c: np.abs(a) ^ ~b & c | -c,
    "(a >> (b & 31)) + (int)((unsigned)a << (c & 31))": lambda a, b, c: (a >> (b & 31)) + (a << (c & 31)),
    "a < b ? a : (b < c && a != c) ? b : c": lambda a, b, c: np.where(a < b, a, np.where((b < c) & (a != c), b, c)),
    "__popc(a) + __clz(b) * 64 + (int)__brev(c)": lambda a, b, c: (
        np.bitwise_count(a.view(np.uint32)).astype(np.int32)
        + 64 * (32 - np.frexp(b.view(np.uint32).astype(np.float64))[1])
        + np.array([int(f"{x:032b}"[::-1], 2) for x in c.view(np.uint32).tolist()], np.uint32).view(np.int32)
    ),
    "(int)((a << 13) >> 20) + (int)((unsigned)(b << 5) >> 27)": lambda a, b, c: (
        ((a << 13) >> 20) + ((b << 5).view(np.uint32) >> 27).view(np.int32)
    ),
    "__dp4a(a, b, c)": lambda a, b, c: (
        c + (a.view(np.int8).astype(np.int32) * b.view(np.int8)).reshape(-1, 4).sum(1, dtype=np.int32)
    ),
    "(signed char)a + (unsigned short)b * (short)c": lambda a, b, c: (
        a.astype(np.int8) + b.astype(np.uint16).astype(np.int32) * c.astype(np.int16)
    ),
}


def each_in_a_kernel(statements):
    """A program with a kernel k0, k1, ... for each statement on a, b, c and d at i: they compile in one go."""
    return cuda(
        "".join(
            f"""extern "C" KERNEL(128) k{n}(const int* x, const int* y, const int* z, int* d) {{
            int i = threadIdx.x, a = x[i], b = y[i], c = z[i]; {statement}; }}"""
            for n, statement in enumerate(statements)
        )
    )


@pytest.mark.parametrize("number, expression", list(enumerate(INTEGERS)), ids=INTEGERS)
def test_integers(number, expression):
    a, b, c, got = signed(128), signed(128), signed(128), signed(128)
    each_in_a_kernel(f"d[i] = {e}" for e in INTEGERS).run(f"k{number}", 1, 128, [a, b, c, got])
    with np.errstate(all="ignore"):
        want = INTEGERS[expression](a, b, c).astype(np.int32)
    assert (got == want).all()


def test_wide_integers():
    a, b = signed(500).astype(np.int64) * 1_000_003 + 11, signed(500).astype(np.int64) * 77_777 + 5
    got = elementwise("__mul64hi(a, b) ^ (a / (b | 1)) ^ (a >> 7)", a, b, out=np.int64)
    for x, y, z in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        quotient = abs(x) // abs(y | 1) * (1 if (x < 0) == ((y | 1) < 0) else -1)
        assert z == (x * y >> 64) ^ quotient ^ (x >> 7)


@pytest.mark.parametrize("position, length", [(0, 0), (3, 7), (28, 9), (31, 1), (40, 3), (5, 32)])
def test_bit_fields(position, length):
    program = cuda("""extern "C" KERNEL(32) k(const int* a, int* d, int p, int n) {
        int i = threadIdx.x;
        asm("bfe.s32 %0, %1, %2, %3;" : "=r"(d[i]) : "r"(a[i]), "r"(p), "r"(n));
        asm("bfe.u32 %0, %1, %2, %3;" : "=r"(d[i + 32]) : "r"(a[i]), "r"(p), "r"(n));
        asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(d[i + 64]) : "r"(a[i]), "r"(a[31 - i]), "r"(p), "r"(n)); }""")
    a, out = signed(32), np.zeros((3, 32), np.int32)
    program.run("k", 1, 32, [a, out, position, length])
    for i, x in enumerate(a.tolist()):
        bits = [x >> min(j, 31) & 1 for j in range(position, position + length)]
        sign = x >> min(position + length - 1, 31) & 1 if length else 0
        plain = sum(b << j for j, b in enumerate(bits) if position + j < 32)
        filled = sum((b if position + j < 32 else sign) << j for j, b in enumerate(bits + [sign] * 32) if j < 32)
        filled = sum((bits[j] if j < length and position + j < 32 else sign) << j for j in range(32)) if length else 0
        assert out[0, i].item() & 0xFFFFFFFF == filled
        assert out[1, i].item() & 0xFFFFFFFF == plain & 0xFFFFFFFF
        mask = ((1 << length) - 1) << position & 0xFFFFFFFF
        assert out[2, i].item() & 0xFFFFFFFF == (a[31 - i].item() & ~mask | x << position & mask) & 0xFFFFFFFF


TABLES = (0x00, 0xFF, 0x96, 0xE8, 0xCA, 0x6A, 0x1B, 0x2C, 0x47)


@pytest.mark.parametrize("number, table", list(enumerate(TABLES)))
def test_logic_of_three(number, table):
    statement = 'asm("lop3.b32 %0, %1, %2, %3, {};" : "=r"(d[i]) : "r"(a), "r"(b), "r"(c))'
    a, b, c, got = (words(128) for _ in range(4))
    each_in_a_kernel(statement.format(t) for t in TABLES).run(f"k{number}", 1, 128, [a, b, c, got])
    bits = np.unpackbits(np.stack([a, b, c]).view(np.uint8).reshape(3, -1), axis=1)
    want = (table >> (4 * bits[0] + 2 * bits[1] + bits[2])) & 1
    assert (np.packbits(want.astype(np.uint8)).view(np.uint32) == got).all()


def test_fused_multiply_add_rounds_once():
    from fractions import Fraction

    a, b = RANDOM.standard_normal((2, 500)).astype(np.float32)
    c = (-(a.astype(np.float64) * b) * (1 + RANDOM.integers(-3, 4, 500) * 2.0**-24)).astype(np.float32)
    c[::2] = (a * b)[::2] * np.float32(2.0**25)
    got = elementwise("fmaf(a, b, c)", a, b, c, out=np.float32)
    for x, y, z, value in zip(*(v.astype(float).tolist() for v in (a, b, c, got)), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = np.float32(value)
        error = abs(Fraction(value) - exact)
        for other in (np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))):
            assert error <= abs(Fraction(float(other)) - exact)


def test_approximations():
    x = RANDOM.uniform(0.1, 8, 500).astype(np.float32)
    want = np.exp2(x.astype(np.float64)) + 1 / np.sqrt(x.astype(np.float64)) + x / 3.0
    got = elementwise("exp2f(a) + rsqrtf(a) + __fdividef(a, 3.f)", x, out=np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_floats_of_the_math_library():
    x = RANDOM.uniform(0.1, 8, 500).astype(np.float32)
    wide = x.astype(np.float64)
    # expf rounds down in its range reduction; floorf and rintf are conversions.
    got = elementwise("expf(a) + floorf(a) - rintf(a * 3) + sqrtf(a) + 1 / a", x, out=np.float32)
    want = np.exp(wide) + np.floor(x) - np.rint(x * np.float32(3)) + np.sqrt(wide) + 1 / wide
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    got = elementwise(
        "__fadd_rd(a, b) == __fadd_ru(a, b) ? 1 : __fadd_rz(-a, b) >= __fadd_rd(-a, b)", x, x[::-1].copy()
    )
    assert got.all()


def test_packed_halves_and_bfloats():
    program = cuda_program("""
        #include <cuda_bf16.h>
        #include <cuda_fp16.h>
        extern "C" __global__ void k(const __half2* a, const __nv_bfloat162* b, __half2* c, __nv_bfloat162* d) {
          int i = threadIdx.x;
          c[i] = __hfma2(a[i], a[i + 32], a[i + 64]);
          c[i + 32] = __hmax2(__hmul2(a[i], a[i + 32]), __hneg2(a[i + 64]));
          d[i] = __hfma2(b[i], b[i + 32], b[i + 64]);
          d[i + 32] = __floats2bfloat162_rn(__low2float(b[i]) * 3.f, __high2float(b[i]) / 3.f);
        }""")
    import torch

    a, b = torch.randn(3, 64).half(), torch.randn(3, 64).bfloat16()
    c, d = torch.zeros(2, 64).half(), torch.zeros(2, 64).bfloat16()
    program.run("k", 1, 32, [x.view(torch.int16).numpy() for x in (a, b, c, d)])
    assert torch.equal(c[0], (a[0].double() * a[1] + a[2]).half())
    assert torch.equal(c[1], torch.maximum(a[0] * a[1], -a[2]))
    assert torch.equal(d[0], (b[0].double() * b[1] + b[2]).bfloat16())
    factor = torch.tensor([3.0, 1 / 3]).repeat(32)
    assert torch.allclose(d[1].float(), b[0].float() * factor, rtol=2**-8)


# The m16n8k16 and m16n8k32 fragments as the PTX ISA numbers them: lane = 4 row + column pair or quad.
MMA = """
template <class T, class A> DEVICE void product(const A* a, const A* b, T* c, int depth) {
  int row = threadIdx.x / 4, in_four = threadIdx.x % 4, each = 4 / sizeof(A);
  uint32_t f[4], g[2];
  T d[4];
  for (int r = 0; r < 4; ++r)
    f[r] = *(const uint32_t*)(a + (row + 8 * (r & 1)) * depth + (in_four + 4 * (r >> 1)) * each);
  for (int r = 0; r < 2; ++r) g[r] = *(const uint32_t*)(b + row * depth + (in_four + 4 * r) * each);
  for (int i = 0; i < 4; ++i) d[i] = c[(row + 8 * (i >> 1)) * 8 + in_four * 2 + (i & 1)];
  SWAP;
  multiply_add(d, f, g[0], g[1]);
  for (int i = 0; i < 4; ++i) c[(row + 8 * (i >> 1)) * 8 + in_four * 2 + (i & 1)] = d[i];
}
extern "C" KERNEL(32) halves(const uint16_t* a, const uint16_t* b, float* c) { product(a, b, c, 16); }
extern "C" KERNEL(32) bytes(const uint8_t* a, const uint8_t* b, int32_t* c) { product(a, b, c, 32); }
"""


def halves_product(source):
    a, b = (RANDOM.standard_normal((n, 16)).astype(np.float16) for n in (16, 8))
    c = RANDOM.standard_normal((16, 8)).astype(np.float32)
    want = a.astype(np.float64) @ b.astype(np.float64).T + c
    cuda(source).run("halves", 1, 32, [a, b, c])
    return c, want


def test_finds_swapped_fragment_registers():
    got, want = halves_product(MMA.replace("SWAP", "uint32_t t = f[1]; f[1] = f[2]; f[2] = t"))
    assert np.abs(got - want).max() > 0.1


def test_multiply_add():
    got, want = halves_product(MMA.replace("SWAP", ""))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    a = RANDOM.integers(0, 256, (16, 32)).astype(np.uint8)
    b = RANDOM.integers(-128, 128, (8, 32)).astype(np.int8)
    c = signed((16, 8))
    want = a.astype(np.int32) @ b.astype(np.int32).T + c
    cuda(MMA.replace("SWAP", "")).run("bytes", 1, 32, [a, b, c])
    assert (c == want).all()


def test_shuffles():
    program = cuda("""extern "C" KERNEL(64) k(const uint32_t* a, const float* f, uint32_t* d, float* e) {
        int i = threadIdx.x;
        d[i] = shuffle(a[i], a[i] & 31);
        d[i + 64] = __shfl_up_sync(kAllLanes, a[i], 3, 16);
        d[i + 128] = __shfl_down_sync(kAllLanes, a[i], 5, 8);
        d[i + 192] = __ballot_sync(kAllLanes, a[i] & 1);
        float s = f[i];
        for (int m = 1; m < 32; m *= 2) s += shuffle_xor(s, m);
        e[i] = s; }""")
    a, f = words(64), np.arange(64, dtype=np.float32)
    d, e = np.zeros((4, 2, 32), np.uint32), np.zeros((2, 32), np.float32)
    program.run("k", 1, 64, [a, f, d, e])
    a, lane = a.reshape(2, 32), np.arange(32)
    assert (d[0] == np.take_along_axis(a, (a & 31).astype(np.int64), 1)).all()
    assert (d[1] == a[:, np.where(lane % 16 >= 3, lane - 3, lane)]).all()
    assert (d[2] == a[:, np.where(lane % 8 < 3, lane + 5, lane)]).all()
    assert (d[3] == ((a & 1) << lane.astype(np.uint32)).sum(1, dtype=np.uint32)[:, None]).all()
    assert (e == f.reshape(2, 32).sum(1, keepdims=True)).all()
