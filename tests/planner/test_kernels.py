"""What a GPU program moves at the borders of its kernels, against counts by hand; the programs of the second half are
compiled for an H100 that is not there."""

import jax
import jax.numpy as jnp
import pytest

from lojax.planner.gpu_aot import compiler_options, gpu_sharding, has_gpu_compiler, lower_for_gpu
from lojax.planner.gpus import GPUS
from lojax.planner.kernels import gpu_cost, read_kernels

H100 = GPUS["h100"]
compiles = pytest.mark.skipif(not has_gpu_compiler(), reason="JAX's CUDA plugin is not installed")


def text(entry, *computations):
    """A program of these computations."""
    return "\n\n".join(
        ["HloModule m, is_scheduled=true", *computations, f"ENTRY %main (x: f32[]) -> f32[] {{{entry}}}"]
    )


PRODUCT = """%product (p0: bf16[8,16], p1: bf16[16,4]) -> bf16[8,4] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = bf16[16,4]{1,0} parameter(1)
  %dot = bf16[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %square = bf16[8,4]{1,0} multiply(%dot, %dot)
}"""


def test_a_fusion_reads_its_operands_and_writes_its_result():
    (kernel,) = read_kernels(
        text(
            """
  %x = bf16[128]{0} parameter(0)
  %w = bf16[16,4]{1,0} parameter(1)
  %view = bf16[8,16]{1,0} bitcast(%x)
  ROOT %y = bf16[8,4]{1,0} fusion(%view, %w), kind=kCustom, calls=%product
""",
            PRODUCT,
        )
    )
    assert (kernel.read, kernel.written, kernel.runs) == (2 * (8 * 16 + 16 * 4), 2 * 8 * 4, 1)
    assert (kernel.flops, kernel.arithmetic) == (2 * 8 * 16 * 4, 8 * 4)
    assert kernel.seconds(H100) == pytest.approx((2 * (8 * 16 + 16 * 4) + 2 * 8 * 4) / 3352.32e9)


def test_a_cublas_call_has_a_workspace_which_takes_no_time():
    (kernel,) = read_kernels(
        text(
            """
  %x = f32[4096,2048]{1,0} parameter(0)
  %w = f32[2048,2048]{1,0} parameter(1)
  %call = (f32[4096,2048]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", """
            """backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %y = f32[4096,2048]{1,0} get-tuple-element(%call), index=0
"""
        )
    )
    assert (kernel.read, kernel.written) == (4 * (4096 * 2048 + 2048 * 2048), 4 * 4096 * 2048)
    assert (kernel.workspace, kernel.bytes) == (4096, kernel.read + kernel.written + 4096)
    assert kernel.flops == 2 * 4096 * 2048 * 2048
    assert kernel.seconds(H100) == pytest.approx(kernel.flops / (989.4e12 / 2))  # TF32 has half of bfloat16's rate


LOOP = """%body (state: (s32[], f32[10,4], f32[10,4])) -> (s32[], f32[10,4], f32[10,4]) {
  %state = (s32[], f32[10,4]{1,0}, f32[10,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = f32[10,4]{1,0} get-tuple-element(%state), index=1
  %saved = f32[10,4]{1,0} get-tuple-element(%state), index=2
  %next = s32[] fusion(%i), kind=kLoop, calls=%increment
  %new = f32[10,4]{1,0} fusion(%saved, %stack, %i), kind=kLoop, calls=%layer
  ROOT %result = (s32[], f32[10,4]{1,0}, f32[10,4]{1,0}) tuple(%next, %stack, %new)
}"""
INCREMENT = """%increment (i: s32[]) -> s32[] {
  %i = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %sum = s32[] add(%i, %one)
}"""
LAYER = """%layer (saved: f32[10,4], stack: f32[10,4], i: s32[]) -> f32[10,4] {
  %saved = f32[10,4]{1,0} parameter(0)
  %stack = f32[10,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %w = f32[1,4]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,4}
  %twice = f32[1,4]{1,0} add(%w, %w)
  ROOT %new = f32[10,4]{1,0} dynamic-update-slice(%saved, %twice, %i, %zero)
}"""
CONDITION = """%condition (state: (s32[], f32[10,4], f32[10,4])) -> pred[] {
  %state = (s32[], f32[10,4]{1,0}, f32[10,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %n = s32[] constant(10)
  ROOT %less = pred[] fusion(%i, %n), kind=kLoop, calls=%compare
}"""
COMPARE = """%compare (i: s32[], n: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %n = s32[] parameter(1)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}"""
WHILE = """
  %state = (s32[], f32[10,4]{1,0}, f32[10,4]{1,0}) parameter(0)
  ROOT %out = (s32[], f32[10,4]{1,0}, f32[10,4]{1,0}) while(%state), condition=%condition, body=%body, """


def test_a_loop_reads_one_layer_of_a_stack_and_writes_one_slice_in_place():
    entry = WHILE + 'backend_config={"known_trip_count":{"n":"10"}}\n'
    kernels = {k.name: k for k in read_kernels(text(entry, LOOP, CONDITION, INCREMENT, LAYER, COMPARE))}
    assert (kernels["new"].read, kernels["new"].written, kernels["new"].runs) == (4 * 4 + 4, 4 * 4, 10)
    assert (kernels["next"].read, kernels["next"].written, kernels["next"].runs) == (4, 4, 10)
    assert kernels["less"].read == 8


def test_an_update_that_is_not_in_place_copies_everything():
    copying = LAYER.replace("ROOT %new", "%new").replace("\n}", "\n  ROOT %n = f32[10,4]{1,0} negate(%new)\n}")
    entry = WHILE + 'backend_config={"known_trip_count":{"n":"10"}}\n'
    kernels = {k.name: k for k in read_kernels(text(entry, LOOP, CONDITION, INCREMENT, copying, COMPARE))}
    assert (kernels["new"].read, kernels["new"].written) == (4 * (40 + 4) + 4, 4 * 40)


def test_of_a_conditional_the_most_expensive_branch_counts():
    branch = """%{name} (x: f32[{n}]) -> f32[] {{
  %x = f32[{n}]{{0}} parameter(0)
  ROOT %copy = f32[{n}]{{0}} copy(%x)
}}"""
    entry = """
  %which = s32[] parameter(0)
  %a = f32[3]{0} parameter(1)
  %b = f32[5]{0} parameter(2)
  ROOT %y = f32[] conditional(%which, %a, %b), branch_computations={%small, %large}
"""
    program = text(entry, branch.format(name="small", n=3), branch.format(name="large", n=5))
    assert [k.bytes for k in read_kernels(program)] == [2 * 5 * 4]


def test_a_slice_read_twice_counts_twice_but_never_more_than_the_whole():
    fusion = """%pick (x: f32[6]) -> f32[4] {{
  %x = f32[6]{{0}} parameter(0)
  %a = f32[{n}]{{0}} slice(%x), slice={{[0:{n}]}}
  %b = f32[{n}]{{0}} slice(%x), slice={{[1:{n}]}}
  ROOT %y = f32[{n}]{{0}} add(%a, %b)
}}"""
    entry = "\n  %x = f32[6]{0} parameter(0)\n  ROOT %y = f32[4]{0} fusion(%x), kind=kLoop, calls=%pick\n"
    assert read_kernels(text(entry, fusion.format(n=2)))[0].read == 16
    assert read_kernels(text(entry, fusion.format(n=4)))[0].read == 24


# Compiled.


def shapes(*sizes, dtype=jnp.bfloat16):
    """Shapes on the GPU."""
    return [jax.ShapeDtypeStruct(size, dtype, sharding=gpu_sharding(H100)) for size in sizes]


def cost(f, *args, triton=True):
    """The cost of a function of these shapes."""
    return gpu_cost(lower_for_gpu(jax.jit(f), *args).compile(compiler_options(triton=triton)), H100)


@compiles
@pytest.mark.parametrize("triton", (True, False))
def test_a_product(triton):
    x, w = shapes((8192, 512), (512, 1024))
    c = cost(lambda x, w: x @ w, x, w, triton=triton)
    assert c.bytes - c.workspace == 2 * (8192 * 512 + 512 * 1024 + 8192 * 1024)
    assert (c.flops, c.kernels) == (2 * 8192 * 512 * 1024, 1)
    assert (c.workspace > 0) == (not triton)
    assert c.peak >= 2 * (8192 * 512 + 512 * 1024 + 8192 * 1024)


@compiles
def test_a_scan_over_stacked_layers_reads_each_layer_once_and_saves_each_state_once():
    layers, tokens, width = 6, 8192, 512
    x, w = shapes((tokens, width), (layers, width, width))

    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, w)

    c = cost(f, x, w)
    state, layer = 2 * tokens * width, 2 * width * width
    # An iteration multiplies a state with a layer and saves a state; it may copy the layer, and a state twice. To count
    # whole stacks would add 6 layers and 12 states to each iteration.
    assert layers * (layer + 3 * state) <= c.bytes <= layers * (3 * layer + 7 * state) + 8 * state
    assert c.flops == layers * 2 * tokens * width * width


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("triton", (True, False))
def test_the_frozen_layer_and_full_fine_tuning(triton):
    """T=8192, 4096 x 4096, bfloat16: every operand of every product is 64 MiB but W0, which is 32."""
    x, w, g = shapes((8192, 4096), (4096, 4096), (8192, 4096))

    def step(wrt):
        def run(x, w, g):
            y, back = jax.vjp(lambda *wrt: wrt[0] @ (wrt[1] if len(wrt) > 1 else w), *(x, w)[:wrt])
            return y, back(g)

        return cost(run, x, w, g, triton=triton)

    frozen, full = step(1), step(2)
    assert [round((c.bytes - c.workspace) / 2**20) for c in (frozen, full)] == [320, 480]
    assert [c.kernels for c in (frozen, full)] == [2, 3]
    assert [c.workspace > 0 for c in (frozen, full)] == [not triton] * 2
    assert frozen.seconds == pytest.approx(4 * 8192 * 4096**2 / 989.4e12)  # bound by operations
