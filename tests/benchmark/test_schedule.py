"""What is read from a TPU program's text: cycles, padding, and collectives beside work or not."""

import pytest
import tpu_schedule as schedule

from gae_jax.benchmark.collectives import Program

# Lines as libtpu 0.0.42 prints them, of two blocks of LightningDiT-XL; cut.
TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %sum = bf16[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64,128]) -> bf16[16,128] {
  %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %cut = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %i), dynamic_slice_sizes={16,128}
}

%fused_product (p: bf16[64,128], q: bf16[128,72]) -> bf16[64,72] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[128,72]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[64,72]{1,0:T(8,128)(2,1)} convolution(%p, %q), dim_labels=bf_io->bf
}

%fused_move (x: bf16[64,72]) -> bf16[64,72] {
  %x = bf16[64,72]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.9 = bf16[64,72]{0,1:T(8,128)(2,1)} copy(%x)
}

%fused_add (x.1: bf16[64,72]) -> bf16[64,72] {
  %x.1 = bf16[64,72]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %double = bf16[64,72]{1,0:T(8,128)(2,1)} add(%x.1, %x.1)
}

%async_collective_fusion.1 (p.1: bf16[4,128]) -> bf16[16,128] {
  %p.1 = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="5"}
}

%async_collective_done (p.2: bf16[4,128]) -> bf16[16,128] {
  %p.2 = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[16,128]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="5"}
}

%body (t: (bf16[64,72], u32[])) -> (bf16[64,72], u32[]) {
  %t = (bf16[64,72]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %y = bf16[64,72]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=0
  %n = u32[]{:T(128)} get-tuple-element(%t), index=1
  %loop_add = bf16[64,72]{1,0:T(8,128)(2,1)} fusion(%y), kind=kLoop, calls=%fused_add, backend_config={"estimated_cycles":"100"}
  %one = u32[]{:T(128)} constant(1)
  %next = u32[]{:T(128)} add(%n, %one)
  ROOT %out = (bf16[64,72]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%loop_add, %next)
}

%cond (t.1: (bf16[64,72], u32[])) -> pred[] {
  %t.1 = (bf16[64,72]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) parameter(0)
  %n.1 = u32[]{:T(128)} get-tuple-element(%t.1), index=1
  %end = u32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%n.1, %end), direction=LT
}

ENTRY %main (a.1: bf16[16,128], b.1: bf16[128,72]) -> bf16[64,72] {
  %a.1 = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b.1 = bf16[128,72]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%a.1), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %permute-start = (bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a.1), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %fusion.1 = bf16[64,72]{1,0:T(8,128)(2,1)} fusion(%all-gather.1, %b.1), kind=kOutput, calls=%fused_product, metadata={op_name="jit(step)/transpose(jvp())/checkpoint/rematted_computation/dot_general"}, backend_config={"estimated_cycles":"4000"}
  %permute-done = bf16[16,128]{1,0:T(8,128)(2,1)} collective-permute-done(%permute-start)
  %idle-start = (bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%permute-done), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %idle-done = bf16[16,128]{1,0:T(8,128)(2,1)} collective-permute-done(%idle-start)
  %spread.1 = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%b.1), kind=kCustom, calls=%async_collective_fusion.1
  %spread.2 = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%b.1), kind=kCustom, calls=%async_collective_done
  %scatter = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%all-gather.1), kind=kCustom, calls=%all-reduce-scatter.1
  %copy_fusion = bf16[64,72]{0,1:T(8,128)(2,1)} fusion(%fusion.1), kind=kLoop, calls=%fused_move, backend_config={"estimated_cycles":"50"}
  %attention.1 = bf16[64,72]{1,0:T(8,128)(2,1)} custom-call(%copy_fusion), custom_call_target="tpu_custom_call"
  %zero = u32[]{:T(128)} constant(0)
  %in = (bf16[64,72]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) tuple(%attention.1, %zero)
  %loop = (bf16[64,72]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}) while(%in), condition=%cond, body=%body
  ROOT %r = bf16[64,72]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=0
}
"""  # noqa: E501


def test_a_reading():
    found = schedule.read(TEXT, devices=4)
    assert found.cycles == {"products": 4000, "elementwise": 3 * 100, "moves": 50}
    assert sum(found.cycles.values()) == 4350
    assert found.recomputed == 4000
    assert found.kernels == 1
    assert found.fusions == {"output": 1, "custom": 3, "loop": 1 + 3}
    assert found.moved == 64 * 72 * 2
    piece, whole = 16 * 128 * 2, 64 * 128 * 2
    # gather and scatter wait, and so does the permute with nothing between start and end
    assert found.exposed == whole * 3 / 4 * 2 + piece
    assert found.hidden == piece + 16 * 128 * 2 * 3 / 4  # the spread gather counts once


def test_only_what_runs_one_after_the_other_is_scheduled():
    program = Program(TEXT)
    assert dict(schedule.scheduled(program)) == {"main": 1, "body": 3, "cond": 3}


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("bf16[256,72]{1,0:T(8,128)(2,1)}", (256 * 72 * 2, 256 * 128 * 2)),  # channels on lanes
        ("bf16[72,256]{1,0:T(8,128)(2,1)S(1)}", (72 * 256 * 2,) * 2),  # tokens on lanes
        ("bf16[256,72]{0,1:T(8,128)(2,1)}", (72 * 256 * 2,) * 2),  # as above
        ("f32[3,5,64]{2,0,1:T(8,128)}", (3 * 5 * 64 * 4, 5 * 8 * 128 * 4)),
        ("f32[1000]{0:T(1024)}", (4000, 4096)),
        ("(f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)})", (8192, 8192)),
        ("f32[]{:T(128)}", (0, 0)),
    ],
)
def test_padding_of_tiles(shape, sizes):
    assert schedule.sizes_of(shape) == sizes
