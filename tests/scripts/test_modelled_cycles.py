# SPDX-License-Identifier: Apache-2.0
"""Which instructions the model of CPUs is given; neither a compiler nor llvm-mca is needed."""

from release.modelled_cycles import longest_loop

TEXT = """
row:
.L2:
	vpaddd	%zmm0, %zmm1, %zmm2
.L3:
	vpmulld	%zmm0, %zmm1, %zmm2
	jle	.L5
	vpaddd	%zmm0, %zmm1, %zmm2
	jne	.L3
	jmp	.L2
.L4:
	addq	$1, %rax
	jne	.L4
weights_of_one:
	.long	256
"""


def test_the_longest_loop_has_no_other_inside():
    loop, weights = longest_loop(TEXT)
    assert weights == 256
    assert [line.split()[0] for line in loop.splitlines()] == ["vpmulld", "jle", "vpaddd", "jne"]
