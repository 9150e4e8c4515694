# SPDX-License-Identifier: Apache-2.0
"""Whole kernels in the PTX interpreter, as nvcc and Triton emit them, and the mistakes it must find."""

import numpy as np
import pytest
from ptx.compilers import cuda, triton_program
from ptx.interpreter import Pointer, Program, PtxError, Struct

RANDOM = np.random.default_rng(7)


# c = a b^T for a of 16 rows and b of 64: each of two warps has four tiles of columns. MISTAKE is empty or planted.
MATMUL = """
constexpr int kDepth = 32, kRow = 48;  // Rows of 80 bytes would do; 96 keep 16-byte alignment and few conflicts.
extern "C" KERNEL(64) matmul(const uint16_t* a, const uint16_t* b, float* c, int depth) {
  SHARED(memory);
  auto fetch = [&](int step) {
    unsigned char* to = memory + (step & 1) * 80 * kRow * 2;
    for (int i = threadIdx.x; i < 80 * 4; i += 64) {
      int row = i / 4, part = i % 4;
      const uint16_t* from = row < 16 ? a + row * depth : b + (row - 16) * depth;
      copy_async(to + row * kRow * 2 + part * 16, from + step * kDepth + part * 8);
    }
    copy_commit();
  };
  float d[4][4] = {};
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, two = lane % 4 * 2;
  fetch(0);
  for (int step = 0; step < depth / kDepth; ++step) {
    if (step + 1 < depth / kDepth) { fetch(step + 1); WAIT(1); } else { WAIT(0); }
    SYNC;
    const uint16_t* s = (const uint16_t*)(memory + (step & 1) * 80 * kRow * 2);
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t f[4], g[2];
      for (int r = 0; r < 4; ++r) f[r] = *(const uint32_t*)(s + (row + 8 * (r & 1)) * kRow + k + two + 8 * (r >> 1));
      for (int t = 0; t < 4; ++t) {
        for (int r = 0; r < 2; ++r)
          g[r] = *(const uint32_t*)(s + (16 + warp * 32 + t * 8 + row) * kRow + k + two + 8 * r);
        multiply_add(d[t], f, g[0], g[1]);
      }
    }
    END;
  }
  for (int t = 0; t < 4; ++t)
    for (int i = 0; i < 4; ++i) c[(row + 8 * (i >> 1)) * 64 + warp * 32 + t * 8 + two + (i & 1) LAST] = d[t][i];
}
"""


def matmul(waits=("copy_wait<0>()", "copy_wait<1>()"), sync="sync_block()", end="sync_block()", last="", **how):
    source = MATMUL.replace("SYNC", sync).replace("LAST", last).replace("END", end)
    source = source.replace("WAIT(0)", waits[0]).replace("WAIT(1)", waits[1])
    a, b = (RANDOM.standard_normal((rows, 128)).astype(np.float16) for rows in (16, 64))
    c = np.zeros((16, 64), np.float32)
    report = cuda(source).run("matmul", 1, 64, [a, b, c, 128], shared_bytes=2 * 80 * 96, **how)
    np.testing.assert_allclose(c, a.astype(np.float64) @ b.astype(np.float64).T, rtol=1e-5, atol=1e-5)
    return report


def test_matmul_and_its_costs():
    report = matmul(measure=True)
    assert report.counts()["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] == 2 * 4 * 4 * 2
    copies = report.select("cp.async.cg")
    assert sum(s.requests for s in copies) == 4 * 80 * 4 // 32
    assert sum(s.lane_bytes for s in copies) == 2 * 4 * 80 * 64
    # Whole sectors are used: 32 lanes of 16 bytes are 16 sectors.
    assert report.total("sectors", "cp.async.cg") == 16 * report.total("requests", "cp.async.cg")
    # Rows are 24 banks apart: rows 0 and 4 share theirs.
    assert report.total("wavefronts", "ld.shared") == 2 * report.total("shared_requests", "ld.shared")


def test_finds_a_missing_wait():
    with pytest.raises(PtxError, match=r"shared memory that was never written; thread .*ld\.shared"):
        matmul(waits=("", ""))


def test_finds_a_wait_that_leaves_too_many_copies():
    # Only the last step reads what is not there yet: what an earlier step left.
    with pytest.raises(AssertionError):
        matmul(waits=("copy_wait<1>()", "copy_wait<1>()"))


@pytest.mark.parametrize("order", ["together", "forward", "backward"])
@pytest.mark.parametrize("eager", [False, True])
def test_matmul_in_any_order(order, eager):
    matmul(order=order, eager=eager)


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_finds_missing_barriers_of_the_matmul(order):
    with pytest.raises(PtxError, match="shared memory that was never written"):
        matmul(sync="", order=order)
    # Warps that are ahead copy over what the others have still to read.
    with pytest.raises(AssertionError):
        matmul(end="", order=order, eager=True)


def test_finds_a_missing_barrier():
    # The first warp reads what the second writes further down in the code.
    program = cuda("""extern "C" KERNEL(64) k(float* d) {
        SHARED(memory);
        volatile float* s = (float*)memory;
        if (threadIdx.x < 32) d[threadIdx.x] = s[63 - threadIdx.x];
        else s[threadIdx.x] = 1; }""")
    with pytest.raises(PtxError, match="shared memory that was never written"):
        program.run("k", 1, 64, [np.zeros(64, np.float32)], shared_bytes=256)


def test_finds_an_index_off_by_one():
    with pytest.raises(PtxError, match=r"global access out of bounds; thread \(63, 0, 0\) of block .*st\.global\.f32"):
        matmul(last="+ 1")


def test_finds_a_barrier_in_divergent_code():
    program = cuda("""extern "C" KERNEL(64) k(float* d) {
        SHARED(memory);
        float* s = (float*)memory;
        if (threadIdx.x < 40) { s[threadIdx.x] = 1; sync_block(); d[threadIdx.x] = s[39 - threadIdx.x]; }
        else { s[threadIdx.x] = 2; sync_block(); d[threadIdx.x] = s[100 - threadIdx.x] * 3; } }""")
    with pytest.raises(PtxError, match=r"barrier in divergent code.*bar\.sync"):
        program.run("k", 1, 64, [np.zeros(64, np.float32)], shared_bytes=512)


def test_finds_inactive_lanes():
    shuffle = cuda("""extern "C" KERNEL(32) k(uint32_t* d) {
        if (threadIdx.x < 20) d[threadIdx.x] = shuffle(d[threadIdx.x], 3); }""")
    with pytest.raises(PtxError, match=r"inactive lanes in the mask.*shfl\.sync"):
        shuffle.run("k", 1, 32, [np.zeros(32, np.uint32)])
    product = cuda("""extern "C" KERNEL(32) k(float* d) {
        float c[4] = {};
        const uint32_t a[4] = {threadIdx.x, 1, 2, 3};
        if (threadIdx.x < 31) multiply_add(c, a, 4, 5);
        d[threadIdx.x] = c[0]; }""")
    with pytest.raises(PtxError, match=r"inactive lanes in a warp-wide instruction.*mma\.sync"):
        product.run("k", 1, 32, [np.zeros(32, np.float32)])


COLLATZ = """extern "C" KERNEL(96) k(const int* a, int* d, int n) {
    int i = blockIdx.x * 96 + threadIdx.x;
    if (i >= n) return;
    int v = a[i], steps = 0;
    while (v != 1) { if (v & 1) v = 3 * v + 1; else v /= 2; if (++steps == 50) break; }
    switch (steps % 5) {
      case 0: steps += 7; break;
      case 1: steps *= 3;
      case 2: steps ^= v; break;
      default: steps = -steps;
    }
    d[i] = steps; }"""


def test_divergence():
    a, got = np.arange(1, 1001, dtype=np.int32), np.zeros(1000, np.int32)
    cuda(COLLATZ).run("k", 11, 96, [a, got, 1000])
    for v, result in zip(a.tolist(), got.tolist(), strict=True):
        steps = 0
        while v != 1 and steps < 50:
            v, steps = (3 * v + 1 if v & 1 else v // 2), steps + 1
        if steps % 5 == 0:
            steps += 7
        elif steps % 5 <= 2:
            steps = (steps * 3 if steps % 5 == 1 else steps) ^ v
        else:
            steps = -steps
        assert result == steps


def test_structs_constants_and_local_memory():
    program = cuda("""
        __constant__ short table[4] = {5, -6, 7, 8};
        __device__ float bias = 0.5f;
        struct Part { char tag; const float* x; };
        struct All { int n; Part part; double scale; uint16_t last[3]; };
        extern "C" KERNEL(32) k(All all, float* d) {
          float local[8];
          for (int i = 0; i < all.n; ++i) local[i] = all.part.x[threadIdx.x] * i;
          float sum = local[threadIdx.x % 8] * all.scale + table[threadIdx.x % 4];
          d[threadIdx.x] = sum + bias + all.last[2] + all.part.tag;
        }""")
    x, d = RANDOM.standard_normal(40).astype(np.float32), np.zeros(32, np.float32)
    part = Struct(np.int8(3), Pointer(x, 32))
    program.run("k", 1, 32, [Struct(np.int32(8), part, np.float64(2), np.arange(3, dtype=np.uint16)), d])
    lane = np.arange(32)
    want = x[8:] * (lane % 8) * 2.0 + np.array([5, -6, 7, 8])[lane % 4] + 0.5 + 2 + 3
    np.testing.assert_allclose(d, want, rtol=1e-6)


def test_atomics_and_block_indices():
    program = cuda("""extern "C" KERNEL(64) k(int* counts, float* sum) {
        atomicAdd(&counts[(blockIdx.y * gridDim.x + blockIdx.x) % 4], threadIdx.y);
        atomicAdd(sum, 0.5f); atomicMax(&counts[4], threadIdx.x); }""")
    counts, total = np.zeros(5, np.int32), np.zeros(1, np.float32)
    program.run("k", (3, 2), (16, 2), [counts, total])
    assert counts.tolist() == [32, 32, 16, 16, 15] and total[0] == 96


@pytest.mark.parametrize("stride, wavefronts", [(1, 1), (2, 2), (33, 1), (32, 32), (0, 1)])
def test_bank_conflicts(stride, wavefronts):
    program = cuda("""extern "C" KERNEL(32) k(float* d, int stride) {
        SHARED(memory);
        float* s = (float*)memory;
        for (int i = threadIdx.x; i < 1056; i += 32) s[i] = i;
        sync_block();
        d[threadIdx.x] = s[threadIdx.x * stride]; }""")
    out = np.zeros(32, np.float32)
    report = program.run("k", 1, 32, [out, stride], shared_bytes=1056 * 4, measure=True)
    assert (out == np.arange(32) * stride).all()
    assert report.total("wavefronts", "ld.shared") == wavefronts
    assert report.total("conflicts", "ld.shared") == wavefronts - 1
    assert report.total("wavefronts", "st.shared") == report.total("shared_requests", "st.shared") == 33


@pytest.mark.parametrize(
    "type, stride, sectors", [("float", 1, 4), ("float", 8, 32), ("float4", 1, 16), ("char", 1, 1)]
)
def test_sectors(type, stride, sectors):
    program = cuda(
        f"""extern "C" KERNEL(32) k(const {type}* a, {type}* d) {{ d[threadIdx.x] = a[threadIdx.x * {stride}]; }}"""
    )
    report = program.run("k", 1, 32, [np.zeros(4096, np.uint8), np.zeros(4096, np.uint8)], measure=True)
    assert report.total("sectors", "ld.global") == sectors
    assert report.total("requests", "ld.global") == 1


def test_hints_to_the_caches_change_nothing():
    program = raw("""ld.param.u64 %rd0, [x];
        ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r0, %r1, _, %r3}, [%rd0];
        ld.volatile.global.u8 %r4, [%rd0+16];
        st.global.L1::no_allocate.v2.b32 [%rd0+32], {%r3, %r4};""")
    x = np.arange(64, dtype=np.uint8)
    program.run("k", 1, 32, [x])
    assert x[32:40].tolist() == [12, 13, 14, 15, 16, 0, 0, 0]


def raw(body, registers=".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<3>;"):
    return Program(f".version 9.0\n.visible .entry k(.param .u64 x)\n{{\n{registers}\n{body}\nret;\n}}\n")


@pytest.mark.parametrize(
    "body, message",
    [
        ("tcgen05.ld %r1;", "unknown opcode; line 5: tcgen05.ld %r1"),
        ("add.sat.s32 %r1, %r2, %r3;", r"unknown opcode"),
        ("add.s32 %r1, %r2, 1;", r"register %r2 is read but was never written; thread \(0, 0, 0\)"),
        ("mov.b32 %r0, 3; setp.eq.s32 %p0, %r0, 3; @!%p0 mov.b32 %r1, 2; add.s32 %r2, %r1, 1;", "%r1 is read"),
        ("ld.param.u64 %rd0, [x]; ld.global.u32 %r1, [%rd0+2];", "unaligned global access of 4 bytes"),
        ("ld.param.u64 %rd0, [x]; ld.global.u32 %r1, [%rd0-4];", "global access out of bounds"),
        ("mov.b32 %r0, 64; ld.shared.u32 %r1, [%r0];", r"shared access out of bounds \(byte 64 of 64\)"),
        ("mov.b32 %r0, 6; ld.shared.u32 %r1, [%r0];", "unaligned shared"),
        ("$L: bra $L;", "still running"),
        ("mov.u32 %r0, %clock;", "unknown special register"),
    ],
)
def test_finds_mistakes(body, message):
    with pytest.raises(PtxError, match=message):
        raw(body).run("k", 1, 32, [np.zeros(64, np.uint8)], shared_bytes=64, limit=1000)


def test_read_only_buffers_stay():
    x = np.zeros(64, np.uint8)
    x.flags.writeable = False
    with pytest.raises(PtxError, match="read-only"):
        raw("ld.param.u64 %rd0, [x]; mov.b32 %r0, 1; st.global.b32 [%rd0], %r0;").run("k", 1, 32, [x])


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_triton(kind, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    from ptx.triton_kernels import matmul as kernel

    size = {"M": 32, "N": 64, "K": 64, "BK": 32}
    signature = {"a": f"*{kind}", "b": f"*{kind}", "c": "*fp32", **dict.fromkeys(size, "constexpr")}
    program, threads, shared = triton_program(kernel, signature, size)
    (name,) = program.kernels
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 64).to(dtype)
    c = np.zeros((32, 64), np.float32)
    pointers = [x.view(torch.int16).numpy() for x in (a, b)]
    # Behind the arguments Triton passes two pointers to scratch memory.
    report = program.run(name, 1, threads, [*pointers, c, None, None], shared_bytes=shared, measure=True)
    np.testing.assert_allclose(c, (a.double() @ b.double()).numpy(), rtol=1e-5, atol=1e-5)
    assert report.select("mma.sync") and report.select("ldmatrix")


@pytest.mark.parametrize("row, conflicts", [(16, 0), (32, 4), (128, 28), (144, 0)])
def test_wide_shared_accesses_take_a_quarter_of_a_warp(row, conflicts):
    program = cuda("""extern "C" KERNEL(32) k(float4* d, int row) {
        SHARED(memory);
        float4* own = (float4*)(memory + threadIdx.x * row);
        *own = make_float4(1, 2, 3, threadIdx.x);
        sync_warp();
        d[threadIdx.x] = *(const float4*)(memory + (31 - threadIdx.x) * row); }""")
    out = np.zeros((32, 4), np.float32)
    report = program.run("k", 1, 32, [out, row], shared_bytes=32 * row, measure=True)
    assert (out[:, 3] == 31 - np.arange(32)).all()
    for opcode in ("st.shared.v4", "ld.shared.v4"):
        assert report.total("wavefronts", opcode) == 4 + conflicts
        assert report.total("conflicts", opcode) == conflicts
        assert report.total("lane_bytes", opcode) == 512


def test_lanes_wait_for_their_warp():
    # Of each warp only some lanes come from the loop late; the others must not read before.
    program = cuda("""extern "C" KERNEL(64) k(int* d) {
        SHARED(memory);
        volatile int* s = (int*)memory;
        int i = threadIdx.x, v = i;
        if (i % 3 == 0) { while (v < 1000) v = v * 3 + 1; }
        s[i] = v;
        sync_warp();
        d[i] = s[i ^ 31]; }""")
    want = np.arange(64)
    for _ in range(8):
        want = np.where((np.arange(64) % 3 == 0) & (want < 1000), want * 3 + 1, want)
    for order in ("together", "forward", "backward"):
        out = np.zeros(64, np.int32)
        program.run("k", 1, 64, [out], shared_bytes=256, order=order)
        assert (out == want[np.arange(64) ^ 31]).all()
