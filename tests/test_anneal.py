"""A restart keeps the function, in place; the plan of a run is a pure function of position."""

import copy
import dataclasses
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import randomize_norms, relative, small_net

from repan_cli import config
from repan_cli.anneal.calibration import calibrate
from repan_cli.anneal.rescaling import rescale
from repan_cli.anneal.restart import CHOICES, restart
from repan_cli.anneal.restoration import MOST_GROWTH
from repan_cli.blocks import FAMILIES, Geometry, make_block, rep_blocks, set_attach_rate
from repan_cli.errors import InputError
from repan_cli.integrations.restarts import Restarts
from repan_cli.models.expand import expand
from repan_cli.training import optim
from repan_cli.training.plan import Phase, cycle_plan, training_plan

RULES = ("calibrate", "running", "reset")


ATTACH = ("ramp", "zero-gamma", "compensated")


def crossed(families, middle):
    """Every family with each of three choices and each way to attach.

    All pairs of the three are fast tests, the rest is long.
    """
    return [
        pytest.param(family, one, attach, marks=() if (n + a + b) % 3 == 0 else pytest.mark.soak)
        for n, family in enumerate(families)
        for a, one in enumerate(middle)
        for b, attach in enumerate(ATTACH)
    ]


def images(seed: int = 0, count: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def trained(family: str) -> torch.nn.Module:
    """A network with statistics and gammas as training leaves them: random, but not so that it blows up."""
    model = small_net(family)
    with torch.no_grad():
        for batch_seed in range(3):
            model.train()(images(batch_seed))
    return model.eval()


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(("family", "rule", "attach"), crossed(FAMILIES, RULES))
@torch.no_grad()
def test_every_rule_keeps_the_function_in_eval_mode(family, rule, attach):
    model = trained(family).double()
    set_attach_rate(model, 0.7)
    x = images(count=32).double()
    expected = model(x)
    report = restart(model, rule=rule, images=[x], attach=attach)
    assert report.blocks == 5
    assert relative(model.eval()(x), expected) < 1e-9


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize(
    ("family", "trunk_scale", "attach"),
    crossed([name for name in FAMILIES if not FAMILIES[name].post_norm], ["merged", "keep", "pace"]),
)
@torch.no_grad()
def test_calibrate_keeps_the_function_in_train_mode(family, trunk_scale, attach):
    """On the calibration batch, in a network whose every BN is in a block; the bound is 1 %, the error 1e-5."""
    model = trained(family)
    x = images()
    expected = model(x)
    restart(model, images=[x[:25], x[25:]], attach=attach, trunk_scale=trunk_scale)
    assert relative(model.train()(x), expected) < 1e-3


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("family", ["repvgg", "acb", "dbb", "plain"])
@torch.no_grad()
def test_rescaling_takes_the_trunks_scale_of_a_restart_and_nothing_else(family):
    """The function stays, every side branch stays, and each channel has the norm that a restart gives it."""
    model, x = trained(family).double(), images(count=32).double()
    merged = copy.deepcopy(model)
    restart(merged, images=[x], trunk_scale="merged")
    expected, in_train = model(x), copy.deepcopy(model).train()(x)
    sides = {name: p.clone() for name, p in model.named_parameters() if ".branches." in name}
    before = [block.trunk.conv.weight.clone() for _, block in rep_blocks(model)]
    assert rescale(model).blocks == 5
    assert relative(model(x), expected) < 1e-9
    for old, (_, block), (_, restarted) in zip(before, rep_blocks(model), rep_blocks(merged), strict=True):
        old, new, goal = (weight.flatten(1) for weight in (old, block.trunk.conv.weight, restarted.trunk.conv.weight))
        merged_away = goal.norm(dim=1, keepdim=True) == 0  # such a channel keeps its weights
        scale = torch.where(merged_away, 1.0, goal.norm(dim=1, keepdim=True) / old.norm(dim=1, keepdim=True))
        torch.testing.assert_close(new, scale * old)
        assert not torch.allclose(new, old, rtol=0.05)
    assert all(torch.equal(p, sides[name]) for name, p in model.named_parameters() if name in sides)
    assert relative(model.train()(x), in_train) < 1e-3


def test_rescaling_needs_a_norm_behind_the_trunk():
    with pytest.raises(InputError, match="nothing to rescale"):
        rescale(small_net("qarep"))


DEEP = [name for name in FAMILIES if not FAMILIES[name].post_norm]


@pytest.mark.parametrize("family", [pytest.param(n, marks=() if n == "repvgg" else pytest.mark.soak) for n in DEEP])
@torch.no_grad()
def test_the_function_is_kept_through_22_blocks_as_well(family):
    """In eval mode in float64 and on the calibration batch in train mode, within the bounds of the small network."""
    model, x = trained(family), images()
    expected = model(x)
    double = copy.deepcopy(model).double()
    exact = double(x.double())
    assert restart(double, images=[x.double()]).blocks == 22
    assert relative(double.eval()(x.double()), exact) < 1e-9
    restart(model, images=[x[:25], x[25:]])
    assert relative(model.train()(x), expected) < 1e-3


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_a_norm_after_the_sum_keeps_the_function_in_both_modes_under_every_rule(rule):
    """What the family `qarep` is for: no rule applies, nothing is measured."""
    model = trained("qarep").double()
    x = images().double()
    expected = copy.deepcopy(model)(x), copy.deepcopy(model).train()(x)
    restart(model, rule=rule)
    assert relative(model(x), expected[0]) < 1e-12
    assert relative(model.train()(x), expected[1]) < 1e-12


@pytest.mark.parametrize("rule", ["running", "reset"])
@torch.no_grad()
def test_the_other_rules_break_train_mode(rule):
    """The measured reason for `calibrate`; were it not so, the test above would prove nothing."""
    model = trained("repvgg")
    x = images()
    expected = model(x)
    restart(model, rule=rule)
    assert relative(model.train()(x), expected) > 0.1


@torch.no_grad()
def test_letting_branches_in_at_once_changes_the_function():
    model = trained("repvgg")
    x = images()
    expected = model(x)
    restart(model, images=[x], attach="one")
    assert relative(model(x), expected) > 0.1
    assert all(block.attach_rate == 1 for _, block in rep_blocks(model))


def test_restart_works_in_place():
    model = small_net()
    storage = {name: value.data_ptr() for name, value in model.state_dict(keep_vars=True).items()}
    parameters = list(model.parameters())
    before = copy.deepcopy(model.state_dict())
    restart(model, images=[images()])
    assert {name: value.data_ptr() for name, value in model.state_dict(keep_vars=True).items()} == storage
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert all("stages" in name for name in changed)
    assert any("branches" in name for name in changed)


def test_fresh_branches_depend_on_the_generator_alone():
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))
        model = small_net()
        restart(model, rule="reset", generator=torch.Generator().manual_seed(seed))
        drawn.append(model.stages[1][0].branches[0].conv.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("wrong", [{"rule": "calibrat"}, {"attach": "slow"}, {"branch_init": "x"}, {"trunk_scale": 1}])
def test_unknown_choices_are_named(wrong):
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="is not a choice"):
        restart(model, images=[images()], **wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_small_branches_are_small():
    model = small_net()
    restart(model, rule="reset", branch_init="small", generator=torch.Generator().manual_seed(0))
    weight = torch.cat([block.branches[0].conv.weight.flatten() for _, block in rep_blocks(model)])
    assert weight.detach().std().item() == pytest.approx(0.01, rel=0.05)


@torch.no_grad()
def test_running_replaces_zero_gammas_and_says_so():
    block = randomize_norms(make_block("repvgg", Geometry(4, 4, (3, 3), padding=(1, 1)))).double().eval()
    x = torch.randn(8, 4, 6, 6, dtype=torch.float64)
    expected, old = block(x), copy.deepcopy(block.trunk.norm)
    assert restart(block, rule="running").zero_gammas == 1
    assert relative(block(x), expected) < 1e-12
    assert block.trunk.norm.weight[0] == 1
    assert torch.equal(block.trunk.norm.weight[1:], old.weight[1:])
    assert torch.equal(block.trunk.norm.running_mean, old.running_mean)


@torch.no_grad()
def test_running_sets_gamma_to_one_for_acb_as_released():
    block = randomize_norms(make_block("acb", Geometry(4, 4, (3, 3), padding=(1, 1))))
    restart(block, rule="running")
    assert torch.equal(block.trunk.norm.weight, torch.ones(4))


@torch.no_grad()
def test_calibrate_measures_biased_moments_over_all_batches():
    block = randomize_norms(make_block("rep", Geometry(3, 5, (3, 3), padding=(1, 1)))).double().eval()
    x = torch.randn(20, 3, 7, 7, dtype=torch.float64)
    weight, _ = block.equivalent_kernel()
    z = torch.nn.functional.conv2d(x, weight, padding=1)
    model = torch.nn.Sequential(block)
    moments = calibrate(model, iter([x[:7], (x[7:], "labels")]))["0"]
    torch.testing.assert_close(moments.mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(moments.var, z.var((0, 2, 3), correction=0))


@torch.no_grad()
def test_keep_gives_every_channel_its_old_norm():
    model = trained("repvgg")
    old = {name: block.trunk.conv.weight.flatten(1).norm(dim=1) for name, block in rep_blocks(model)}
    restart(model, images=[images()], trunk_scale="keep")
    for name, block in rep_blocks(model):
        norms = block.trunk.conv.weight.flatten(1).norm(dim=1)
        alive = norms > 0  # channel 0 has gamma 0 in every branch: its merged kernel is 0 and has no norm to give
        assert alive.sum() >= len(norms) - 1
        torch.testing.assert_close(norms[alive], old[name][alive])


@torch.no_grad()
def test_pace_gives_every_channel_its_old_gamma_over_sigma():
    """Also where gamma is negative; where it is next to 0 the norm grows by the factor that it may."""
    model = trained("repvgg")
    old = {name: _fold_of(block) for name, block in rep_blocks(model)}
    norms = {name: block.trunk.conv.weight.flatten(1).norm(dim=1) for name, block in rep_blocks(model)}
    restart(model, images=[images()], trunk_scale="pace")
    bounded = 0
    for name, block in rep_blocks(model):
        grown = block.trunk.conv.weight.flatten(1).norm(dim=1) / norms[name]
        assert (grown < 1.0001 * MOST_GROWTH).all()
        free = grown < 0.999 * MOST_GROWTH
        free[0] = False  # its gamma is 0 in every branch, and its merged kernel 0
        bounded += int((~free).sum())
        torch.testing.assert_close(_fold_of(block)[free], old[name][free], rtol=1e-4, atol=1e-6)
    assert (torch.cat(list(old.values())) < 0).sum() > 100
    assert 22 < bounded < 400


def _fold_of(block):
    norm = block.trunk.norm
    return norm.weight / torch.sqrt(norm.running_var + norm.eps)


@pytest.mark.usefixtures("few_blocks")
@pytest.mark.parametrize("attach", ATTACH)
@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_pace_keeps_the_function_in_float64(family, attach):
    model = trained(family).double()
    set_attach_rate(model, 0.7)
    x = images(count=32).double()
    expected = model(x)
    restart(model, images=[x], attach=attach, trunk_scale="pace")
    assert relative(model.eval()(x), expected) < 1e-10


def settled(block, x):
    """With the statistics of `x`, so that eval mode and train mode are the same function."""
    norms = [module for module in block.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    for _ in range(3):
        block.train()(x)
    return block


def gradients(block, x):
    """Of a loss that is not even in the output, in the mode that the block is in."""
    block.zero_grad()
    (block(x) + 0.5).square().mul(torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype)).mean().backward()
    return {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trunk_scale", ["merged", "keep", "pace"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_carried_momentum_equals_that_of_the_new_coordinates(family, trunk_scale):
    """Against autograd on the same images: weights as eval mode sees them, gamma and beta as train mode does."""
    x = torch.randn(64, 6, 12, 12, dtype=torch.float64)
    block = randomize_norms(make_block(family, Geometry(6, 6, (3, 3), padding=(1, 1)))).double()
    block.attach_rate.fill_(0.7)
    settled(block, x)
    outside = torch.nn.Linear(2, 2).double()
    model = torch.nn.ModuleList([block, outside])
    optimizer = optim.build_optimizer(model, config.OptimConfig(momentum=0.9))
    found = {}
    for train in (False, True):
        found |= {(name, train): grad for name, grad in gradients(block.train(train), x).items()}
    for name, parameter in block.named_parameters():
        optimizer.state[parameter]["momentum_buffer"].copy_(found[name, "norm" in name])
    optimizer.state[outside.weight]["momentum_buffer"].fill_(3.0)
    report = restart(torch.nn.Sequential(block), images=[x], attach="zero-gamma", trunk_scale=trunk_scale)
    optim.carry_momentum(optimizer, report.changes)
    for name, parameter in block.named_parameters():
        carried = optimizer.state[parameter]["momentum_buffer"]
        if name.startswith("branches"):
            assert not carried.any(), name
            continue
        expected = gradients(block.train("norm" in name), x)[name]
        alive = torch.arange(6) > (0 if "norm" in name or block.trunk.has_norm else -1)  # whose gamma is not 0
        if name == "trunk.conv.weight":
            alive &= report.changes[0].ratio.abs() < MOST_GROWTH
        torch.testing.assert_close(carried[alive], expected[alive], rtol=5e-3, atol=1e-5, msg=name)
    assert (optimizer.state[outside.weight]["momentum_buffer"] == 3).all()


@torch.no_grad()
def test_a_dead_channel_survives_calibration():
    block = make_block("plain", Geometry(3, 4, (3, 3), padding=(1, 1))).eval()
    block.trunk.conv.weight[1] = 0
    restart(torch.nn.Sequential(block), images=[images()])
    assert all(torch.isfinite(value).all() for value in block.state_dict().values())


def test_calibrate_without_images_is_refused():
    with pytest.raises(InputError, match="need images"):
        restart(small_net())


def test_a_network_without_blocks_is_refused():
    with pytest.raises(InputError, match="no re-parameterizable block"):
        restart(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3)), rule="reset")


# ---------------------------------------------------------------------------------------------- the plan


def plan(*, baseline: bool = True, **settings: str) -> tuple[Phase, ...]:
    given = {"baseline.epochs": "20", "baseline.optim.lr": "0.1", "optim.lr": "0.05", "epochs": "10"}
    dotted = {key.replace("__", "."): value for key, value in settings.items()}
    return cycle_plan(config.build(given, dotted), baseline=baseline)


def test_every_cycle_has_its_own_course():
    phases = plan(
        cycle__schedule="restart",
        cycle__count="3",
        cycle__lr_decay="0.5",
        optim__min_lr="0.001",
        baseline__optim__min_lr="0.001",
    )
    assert [(phase.cycle, phase.epochs) for phase in phases] == [(0, 20), (1, 10), (2, 10), (3, 10)]
    assert [phase.learning_rate(0) for phase in phases] == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    assert [phase.learning_rate(phase.epochs) for phase in phases] == pytest.approx([0.001] * 4)
    assert phases[1].learning_rate(5) == pytest.approx((0.05 + 0.001) / 2)


def test_one_course_runs_through_baseline_and_cycles():
    phases = plan(cycle__count="4", cycle__schedule="continuous")
    rates = [phase.learning_rate(epoch) for phase in phases for epoch in range(phase.epochs)]
    whole = training_plan(config.build({"epochs": "60", "optim.lr": "0.1"}))[0]
    assert rates == pytest.approx([whole.learning_rate(epoch) for epoch in range(60)])


def test_one_course_without_a_baseline_begins_at_the_rate_of_the_cycles():
    phases = plan(baseline=False, cycle__count="2", cycle__schedule="continuous")
    assert phases[0].cycle == 1
    assert phases[0].learning_rate(0) == 0.05
    assert phases[1].learning_rate(0) == pytest.approx(0.025)


@pytest.mark.parametrize("course", ["restart", "continuous"])
def test_the_control_differs_in_merging_alone(course):
    pairs = zip(plan(cycle__schedule=course), plan(cycle__schedule=course, cycle__restart="none"), strict=True)
    for with_rep, without in pairs:
        assert with_rep.restarts == (with_rep.cycle > 0)
        assert not without.restarts
        assert without.attach_rate(1.0) is None
        assert dataclasses.replace(with_rep, settings=None) == dataclasses.replace(without, settings=None)


@settings(max_examples=50, deadline=None)
@given(elapsed=st.floats(0, 10), length=st.sampled_from([0.0, 0.5, 3.0, 20.0]))
def test_the_ramp_rises_from_zero_to_one(elapsed, length):
    phase = plan(cycle__attach="ramp", cycle__attach_epochs=str(length))[1]
    expected = min(1.0, elapsed / length) if length else 1.0
    assert phase.attach_rate(elapsed) == pytest.approx(expected)


def test_the_trunk_is_frozen_during_the_ramp_only():
    frozen = plan(cycle__freeze_trunk="yes", cycle__attach_epochs="3")
    assert [frozen[1].trunk_is_frozen(epoch) for epoch in (0, 2.9, 3, 9)] == [True, True, False, False]
    assert not frozen[0].trunk_is_frozen(0)
    assert not plan()[1].trunk_is_frozen(0)


def test_the_data_order_can_repeat():
    assert [phase.data_cycle() for phase in plan(cycle__count="3")] == [0, 1, 2, 3]
    assert [phase.data_cycle() for phase in plan(cycle__count="3", cycle__reseed="same")] == [0, 1, 1, 1]


def test_the_settings_offer_what_restart_accepts():
    for name, choices in CHOICES.items():
        assert config.SCHEMA[f"cycle.{name}"].choices == choices


def test_python_functions_commands_and_callbacks_have_the_same_defaults():
    of_commands = config.CycleConfig()
    of_restart, of_expand = (inspect.signature(function).parameters for function in (restart, expand))
    of_callbacks = {field.name: field.default for field in dataclasses.fields(Restarts)}
    for name in CHOICES:
        assert of_restart[name].default == of_callbacks[name] == getattr(of_commands, name)
    assert of_expand["attach"].default == of_commands.attach


@pytest.mark.parametrize("act", [restart, rescale, lambda model, only: set_attach_rate(model, 0.5, only=only)])
def test_a_block_that_is_not_there_is_named(act):
    model = small_net()
    name = next(name for name, _ in rep_blocks(model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=f"the network has no block '{name}s'; did you mean {name}"):
        act(model, only=[name, f"{name}s"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("attach", CHOICES["attach"])
def test_a_restart_without_images_leaves_the_network_as_it_was(attach):
    model = trained("repvgg")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="need images that reach every block"):
        restart(model, attach=attach)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
