"""The schedule of a TPU's program, from text as its compiler writes it; tests/test_clock.py has programs of our own."""

import pytest

from mixgrpo_jax.runtime import chips, hlo, schedule

CHIP = chips.CHIPS["v5p"]._replace(clock=1e6, flops=1e6, link_bandwidth=1e6, network_bandwidth=1e5)

MODULE = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/mixgrpo_jax/train.py"
2 "/elsewhere/site-packages/flax/nnx/module.py"
3 "/somewhere/mixgrpo_jax/mixgrpo_jax/models/model.py"
4 "/somewhere/mixgrpo_jax/mixgrpo_jax/models/nn/layers.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=3 function_name_id=1 line=90 end_line=90 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
3 {file_name_id=4 function_name_id=1 line=30 end_line=31 column=1 end_column=2}
4 {file_name_id=4 function_name_id=1 line=38 end_line=38 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=4}


%inner (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0:T(8,128)} parameter(0)
  %copy = f32[8,8]{1,0} copy(%p), backend_config={"window_config":{"estimated_cycles":"70000"}}
  ROOT %d = f32[8,8]{1,0} dot(%copy, %copy), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %product = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%inner, metadata={op_name="jit(step)/dot_general" \
stack_frame_id=4}, backend_config={"window_config":{"estimated_cycles":"1000"}}
BODY
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %result = (s32[]{:T(128)}, f32[8,8]{1,0}) tuple(%i, %product)
}
%condition (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  ROOT %less = pred[]{:T(512)} constant(true)
}
CALLED
ENTRY %main (x: f32[8,8]) -> (s32[], f32[8,8]) {
  %x = f32[8,8]{1,0} parameter(0)
  %norm = f32[8,8]{1,0} copy(%x), backend_config={"window_config":{"estimated_cycles":"500"}}
  %attend = f32[8,8]{1,0} custom-call(%norm), custom_call_target="tpu_custom_call"
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, f32[8,8]{1,0}) tuple(%zero, %attend)
  ROOT %loop = (s32[]{:T(128)}, f32[8,8]{1,0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def read(body="", called=""):
    text = MODULE.replace("BODY\n", body).replace("CALLED\n", called)
    return schedule.read(text, kernel=lambda name, operands: 600.0 if name == "attend" else 0.0)


def test_cycles_are_counted_once_and_as_often_as_they_run():
    program = read()
    assert program.cycles == {"products": 3 * 1000, "the rest": 500}
    assert program.flops == 3 * 2 * 8**3
    seconds = program.seconds(CHIP, rate=0.5)
    assert seconds == pytest.approx(
        {"products": 3e-3, "the rest": 5e-4, "kernels": 1.2e-3, "waiting": 0, "waiting across": 0, "total": 4.7e-3}
    )
    assert (program * 2).seconds(CHIP)["total"] == 2 * program.seconds(CHIP)["total"]


def test_the_costliest_operations_say_where_they_come_from():
    first, *_, last = read().costliest(CHIP, rate=0.5)
    assert (first["name"], first["times"], first["cycles"]) == ("product", 3, 1000)
    assert first["share"] == pytest.approx(3 / 4.7)
    assert first["place"] == "mixgrpo_jax/models/nn/layers.py:38 < mixgrpo_jax/models/model.py:90"
    assert first["scope"] == "jit(step)/dot_general"
    assert (last["name"], last["place"]) == ("norm", "")


GROUPS = "replica_groups={{0,1,2,3}}, dimensions={0}"  # an all-gather of [8, 8] fp32 receives 3 * 256 bytes
BUSY = """  %busy = f32[8,8]{1,0} copy(%x), backend_config={"window_config":{"estimated_cycles":"CYCLES"}}
"""
PAIR = f"""  %start = (f32[8,8]{{1,0}}, f32[32,8]{{1,0}}) all-gather-start(%x), {GROUPS}
{BUSY}  %done = f32[32,8]{{1,0}} all-gather-done(%start)
"""
WRAPPED = f"""  %start = ((f32[8,8]{{1,0}}), f32[32,8]{{1,0}}, u32[]{{:S(2)}}) async-start(%x), calls=%wrapped
{BUSY}  %update = ((f32[8,8]{{1,0}}), f32[32,8]{{1,0}}, u32[]{{:S(2)}}) async-update(%start)
  %done = f32[32,8]{{1,0}} async-done(%update)
"""
GATHER = f"  %w = f32[8,8]{{1,0}} parameter(0)\n  ROOT %g = f32[32,8]{{1,0}} all-gather(%w), channel_id=1, {GROUPS}"
# an asynchronous collective fusion: one that starts it, products that carry it, one that ends it; each repeats the gather
CHAIN = """  %start = (f32[8,8]{1,0}, f32[32,8]{1,0}) fusion(%x), kind=kCustom, calls=%starts
  %w = f32[8,8]{1,0} get-tuple-element(%start), index=0
  %carried = (f32[8,8]{1,0}, f32[8,8]{1,0}) fusion(%w, %x), kind=kOutput, calls=%carries, \
backend_config={"window_config":{"estimated_cycles":"CYCLES"}}
  %done = f32[32,8]{1,0} fusion(%w), kind=kCustom, calls=%ends
"""


def _flag(flag):
    return f', backend_config={{"async_collective_fusion_config":{{"flag_start":"{flag}","flag_end":"{flag}"}}}}'


CALLED = "".join(
    f"%{name} (w: f32[8,8]) -> f32[32,8] {{\n{GATHER}{flag}\n}}\n"
    for name, flag in (("wrapped", ""), ("starts", _flag(-1)), ("carries", _flag(2)), ("ends", _flag(2)))
)


@pytest.mark.parametrize("body", [PAIR, WRAPPED, CHAIN])
@pytest.mark.parametrize("cycles", [0, 300, 1000])
def test_a_transfer_waits_for_what_no_computation_hides(body, cycles):
    program = read(body.replace("CYCLES", str(cycles)), CALLED)
    assert program.seconds(CHIP)["waiting"] == pytest.approx(3 * max(0, 768 - cycles) / 1e6)
    assert program.hidden(CHIP) == pytest.approx(3 * min(768, cycles) / 1e6)
    assert program.cycles["products"] + program.cycles["the rest"] == 3 * (1000 + cycles) + 500
    text = MODULE.replace("BODY\n", body).replace("CALLED\n", CALLED)
    assert hlo.cost(text).collectives == {"all-gather": (3, 3 * 768)}


def test_a_synchronous_transfer_is_hidden_by_nothing():
    program = read(f"  %g = f32[32,8]{{1,0}} all-gather(%x), {GROUPS}\n{BUSY.replace('CYCLES', '9000')}")
    assert program.seconds(CHIP)["waiting"] == pytest.approx(3 * 768 / 1e6)
    assert program.hidden(CHIP) == 0


NETWORK = """  %token = token[] after-all()
  %send = (f32[8,8]{1,0}, u32[], token[]) send(%x, %token), channel_id=1, is_host_transfer=true, ABOUT
  %recv = (f32[8,8]{1,0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, ABOUT
  %sent = token[] send-done(%send), channel_id=1, is_host_transfer=true
  %received = (f32[8,8]{1,0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
"""


@pytest.mark.parametrize(("slices", "times"), [("1,2", 1.0), ("1,2,3,4", 1.5), ("1:8", 1.75)])
def test_what_crosses_slices_is_counted_apart(slices, times):
    about = 'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    about += f'_xla_megascale_target="{{{slices}}}x{{0:3}}",_xla_megascale_transfer_type="ALL_REDUCE"}}'
    body = NETWORK.replace("ABOUT", about)
    cost = hlo.cost(MODULE.replace("BODY\n", body).replace("CALLED\n", ""))
    assert cost.collectives == {hlo.ACROSS: (3, 3 * 256 * times)}
    assert (cost.moved, cost.across) == (0, 3 * 256 * times)
    seconds = read(body).seconds(CHIP)
    assert (seconds["waiting"], seconds["waiting across"]) == (0, pytest.approx(3 * 256 * times / 1e5))


def test_slices_by_name():
    assert chips.parse("2xv5p:4x4x4") == (2, "v5p", "4x4x4")
    assert (chips.size("v5e:4x8"), chips.size("3xv5e:4x8")) == (32, 96)
    assert chips.chip("2xv5p:2x2x1") is chips.CHIPS["v5p"]
    for wrong in ("v5p", "v3:2x2", "0xv5p:2x2x1", "2x4x4", "v5p:2x"):
        with pytest.raises(ValueError, match="give .*KIND:AxB"):
            chips.parse(wrong)


@pytest.mark.parametrize("kind", chips.CHIPS)
def test_clocks_make_the_peak_by_whole_units(kind):
    """Peak FLOP/s over the clock is what 128 x 128 or 256 x 256 units of multiply-adds do in a cycle."""
    per_cycle = chips.CHIPS[kind].flops / chips.CHIPS[kind].clock
    assert per_cycle == pytest.approx({"v4": 8, "v5e": 4, "v5p": 8, "v6e": 16, "tpu7x": 16}[kind] * 2 * 128**2, rel=2e-3)
