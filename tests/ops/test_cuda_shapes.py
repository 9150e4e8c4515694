# SPDX-License-Identifier: Apache-2.0
"""The thread blocks that are chosen for a layer on GPUs of several kinds."""

import pytest
from random_layers import EVERY_RATE

from quip_vllm.ops import LinearSpec, cuda_layout, cuda_shapes

GPUS = {
    "A100": cuda_shapes.Gpu(108, 163 * 1024, 164 * 1024),
    "RTX 4090": cuda_shapes.Gpu(128, 99 * 1024, 100 * 1024),
    "H200": cuda_shapes.Gpu(132, 227 * 1024, 228 * 1024, wgmma=True),
}


@pytest.mark.parametrize("gpu", ["A100", "RTX 4090"])
@pytest.mark.parametrize(("code", "bits"), EVERY_RATE)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 8192), (16, 64), (28672, 8192), (5120, 13824)])
def test_thread_blocks_fit_the_gpu_and_cover_the_layer(cuda, gpu, code, bits, n, k):
    from quip_vllm.ops.cuda import _kernels, _problem

    spec = LinearSpec(code, bits, k, (n,))
    name = _kernels(spec, GPUS[gpu])
    if bits == 2:
        assert name.endswith("_large") == (gpu == "A100" and (code in ("hyb", "e8p")))
    problem = _problem(spec, name)
    split, *blocks = cuda_shapes.choose(problem, GPUS[gpu])
    assert split % cuda_layout.SPARE_CHUNKS == 0
    for m, warps, depth in zip(cuda_shapes.ROWS, blocks[::2], [*blocks[1::2], 1], strict=True):
        assert problem.shared(m, warps, depth, 0) <= GPUS[gpu].shared_block
    if n * k >= 1 << 24:  # enough work for every multiprocessor
        count = -(-n // (32 * blocks[0])) * -(-k // (64 * split))
        assert count >= 0.7 * GPUS[gpu].multiprocessors


@pytest.mark.parametrize("gpu", ["A100", "RTX 4090"])
def test_the_model_weighs_a_launch_against_parts_of_k(cuda, gpu):
    """Many outputs occupy a GPU without parts of k, few do not; an output rotation of full width has no choice.

    Blocks of 32 are within any thread block; wider ones restrict it, which an A100 minds.
    """
    from quip_vllm.ops.cuda import _problem

    for n, block, together in ((28672, 32, True), (4096, 128, False), (28672, None, False), (128, None, False)):
        problem = _problem(LinearSpec("hyb", 2, 4096, (n,), block), "hyb")
        split, warps, depth, *_ = cuda_shapes.choose(problem, GPUS[gpu])
        assert cuda_shapes.fuses(cuda_shapes.Candidate(warps, depth, split), problem) is together
    assert problem.width == 128  # one projection of a power of two: its full width is a block


@pytest.mark.parametrize("gpu", ["A100", "RTX 4090"])
def test_the_model_weighs_three_launches_against_rotating_in_each_thread_block(cuda, gpu):
    """Few rows take one launch, if both sides are rotated in blocks of 128; the setting takes it away."""
    from quip_vllm.ops.cuda import _shape

    found = {}
    for block, most in ((128, 16), (128, 1), (128, 0), (64, 16), (None, 16)):
        shape, found[block, most] = _shape(LinearSpec("hyb", 2, 4096, (4096,), block), "hyb", GPUS[gpu], most)
        if found[block, most]:
            assert shape[1] % 4 == 0 and shape[2] == 2  # blocks of 128 outputs, of a depth that is compiled
    assert found[128, 16] >= found[128, 1] == 1 and not (found[128, 0] or found[64, 16] or found[None, 16])


def test_many_rows_take_what_shared_memory_holds(cuda):
    """And parts of k where the outputs are few; a code without such a kernel has no choice."""
    from quip_vllm.ops.cuda import _problem

    def choice(code, bits, n, gpu="A100"):
        return cuda_shapes.choose_wide(_problem(LinearSpec(code, bits, 4096, (n,), 256), code), GPUS[gpu])

    assert choice("1mad", 2, 27648) == choice("hyb", 2, 27648) == [256, 64, 0]  # two waves
    assert choice("1mad", 2, 16896, "H200") == choice("hyb", 2, 16896, "H200") == [256, 64, 1]
    assert choice("e8p", 3, 4096, "H200")[::2] == [128, 1] and choice("3inst", 3, 4096, "H200")[::2] == [256, 0]
    assert choice("1mad", 4, 4096, "RTX 4090")[0] == 256 and choice("hyb", 4, 4096, "RTX 4090")[0] == 128
    assert choice("e8p", 3, 4096, "RTX 4090")[0] == 128
    assert choice("hyb", 2, 1024)[1] < 16
    assert choice("lut", 2, 4096) == choice("1mad", 5, 4096) == []
    problem = _problem(LinearSpec("hyb", 2, 4096, (4096,)), "hyb")
    assert "a block has 101376" in cuda_shapes.wide_refusal(problem, GPUS["RTX 4090"], 256, False)
    assert "9.0" in cuda_shapes.wide_refusal(problem, GPUS["RTX 4090"], 64, True)


def test_a_candidate_is_refused_with_a_reason():
    def shared(rows, warps, depth, chunks):
        return 0 if rows > 16 and depth > 1 else 1000 * rows * warps * depth

    problem = cuda_shapes.Problem(4096, 4096, 2, 4.0, 0, shared)
    gpu = GPUS["A100"]
    deep = cuda_shapes.Candidate(4, 4, 8)
    assert "no kernel for 64 rows has" in cuda_shapes.refusal(deep, problem, gpu, 64)
    assert "shared memory" in cuda_shapes.refusal(deep, problem, gpu, 16)
    assert cuda_shapes.refusal(deep, problem, gpu, 8) is None
    with pytest.raises(ValueError, match="shared memory"):
        cuda_shapes.choose(problem, cuda_shapes.Gpu(108, 100, 100))
