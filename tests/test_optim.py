"""Parameter groups, clipping, freezing, and the learning rate as a pure function."""

import dataclasses
import itertools
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from support import small_net

from repan_cli.anneal import coordinates
from repan_cli.anneal.restart import restart
from repan_cli.blocks import rep_blocks
from repan_cli.config import names
from repan_cli.config.settings import OptimConfig
from repan_cli.errors import InputError
from repan_cli.training import optim, snapshot
from repan_cli.training.schedules import SCHEDULES, learning_rate


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_start_at_the_peak_and_never_rise(name):
    factors = [SCHEDULES[name](step / 100) for step in range(101)]
    assert factors[0] == 1
    assert all(0 <= later <= earlier for earlier, later in itertools.pairwise(factors))


def test_cosine_with_warmup():
    settings = OptimConfig(lr=0.2, min_lr=0.02, warmup_epochs=4)
    rates = [learning_rate(settings, epoch, 24) for epoch in (0, 1, 4, 14, 24, 30)]
    assert rates == pytest.approx([0, 0.05, 0.2, 0.11, 0.02, 0.02])


def test_an_unknown_schedule_is_named():
    with pytest.raises(InputError, match="unknown schedule 'cosin'; did you mean cosine"):
        learning_rate(OptimConfig(schedule="cosin"), 0, 1)


def test_groups_hold_every_parameter_once_by_role():
    model = small_net()
    groups = optim.parameter_groups(model)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["trunk"] == (".trunk." in name)
            role = "classifier" if name.startswith("head") else "weight" if ".conv." in name else "norm"
            assert group["role"] == role


@pytest.mark.parametrize(("decay", "decaying"), [("weights", {"weight"}), ("all", {"weight", "norm", "classifier"})])
def test_which_parameters_decay(decay, decaying):
    optimizer = optim.build_optimizer(small_net(), OptimConfig(weight_decay=0.5, decay=decay))
    assert {g["role"] for g in optimizer.param_groups if g["weight_decay"] == 0.5} == decaying
    assert {g["weight_decay"] for g in optimizer.param_groups} <= {0.0, 0.5}


def test_a_phase_changes_settings_but_not_the_groups():
    optimizer = optim.build_optimizer(small_net(), OptimConfig())
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    optim.apply_settings(optimizer, OptimConfig(momentum=0.0, weight_decay=0.1))
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    assert all(group["momentum"] == 0 and not group["nesterov"] for group in optimizer.param_groups)


def with_gradients(model: torch.nn.Module, size: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, size)


def norm_of(parameters: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


def test_clipping_bounds_the_whole_norm_or_that_of_the_convs():
    model = small_net()
    head = list(model.get_classifier().parameters())
    convs = [p for p in model.parameters() if p.ndim == 4]
    for which, clipped in (("all", list(model.parameters())), ("convs", convs)):
        optimizer = optim.build_optimizer(model, OptimConfig())
        with_gradients(model, 1.0)
        untouched = norm_of(head)
        optim.clip_gradients(optimizer, OptimConfig(clip=2.0, clip_params=which))
        assert norm_of(clipped) == pytest.approx(2.0, rel=1e-4)
        assert (norm_of(head) == untouched) == (which == "convs")
    with_gradients(model, 1.0)
    before = norm_of(list(model.parameters()))
    optim.clip_gradients(optimizer, dataclasses.replace(OptimConfig(), clip=None))
    assert norm_of(list(model.parameters())) == before


def test_a_frozen_trunk_does_not_move_while_the_rest_does():
    model = small_net()
    optimizer = optim.build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.1, decay="all"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with_gradients(model, 1.0)
        optim.drop_trunk_gradients(optimizer)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".trunk." in name)


def test_adams_memory_is_carried_over_with_its_squares():
    """By hand: a weight's gradient times 3 or -2, a gamma's as a sum of others', fresh branches at 0."""
    model = small_net("rep")
    optimizer = optim.build_optimizer(model, OptimConfig(name="adamw", lr=0.1))
    with_gradients(model, 1.0)
    optimizer.step()
    block = next(block for _, block in rep_blocks(model))
    weight, gamma, side = block.trunk.conv.weight, block.trunk.norm.weight, block.branches[0].norm.weight
    for parameter, mean, square in ((weight, 5.0, 4.0), (gamma, 1.0, 4.0), (side, 2.0, 9.0)):
        optimizer.state[parameter]["exp_avg"].fill_(mean)
        optimizer.state[parameter]["exp_avg_sq"].fill_(square)
    ratio = torch.full((len(weight),), 3.0).index_fill(0, torch.tensor([1]), -2.0)
    shares = {gamma: torch.full_like(gamma, 0.5), side: torch.full_like(side, -2.0)}
    head = optimizer.state[model.head.weight]["exp_avg"].clone()
    optim.carry_momentum(optimizer, [coordinates.CoordinateChange(block, ratio, shares)])
    of = optimizer.state
    assert of[weight]["exp_avg"][:2, 0, 0, 0].tolist() == [15, -10]
    assert of[weight]["exp_avg_sq"][:2, 0, 0, 0].tolist() == [36, 16]
    assert (of[gamma]["exp_avg"] == 0.5 * 1 - 2 * 2).all()
    assert (of[gamma]["exp_avg_sq"] == (0.5 * 2 + 2 * 3) ** 2).all()
    assert of[weight]["step"] == 1
    for parameter in block.branches.parameters():
        assert not any(value.any() for value in of[parameter].values())
    assert torch.equal(of[model.head.weight]["exp_avg"], head)


OTHERS = ("adamw", "nadam", "rmsproptf", "laprop", "lamb", "adan", "adabelief", "madgrad", "adagrad", "muon")
"""Optimizers whose state begins with zeros, with other numbers, with a copy of the weights, or counts by group."""


@pytest.mark.parametrize("name", ["sgd", *OTHERS])
def test_zeroing_momentum_forgets_the_past(name):
    """A step after it equals the first step of a new optimizer."""
    models, settings = [small_net(), small_net()], OptimConfig(name=name, lr=0.1)
    old = optim.build_optimizer(models[0], settings)
    for _ in range(3):
        with_gradients(models[0], 3.0)
        old.step()
    optim.zero_momentum(old)
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, (old, optim.build_optimizer(models[1], settings)), strict=True):
        with_gradients(model, 1.0)
        optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["madgrad", "novograd"])
def test_carrying_momentum_removes_what_a_restart_makes_wrong(name):
    """MADGRAD keeps a copy of the first weights: after a restart it would undo the trunk's new coordinates. NovoGrad
    averages one square for all weights of a layer.
    """
    model = small_net("rep")
    optimizer = optim.build_optimizer(model, OptimConfig(name=name, lr=0.01))
    with_gradients(model, 1.0)
    optimizer.step()
    changes = restart(model, rule="reset", attach="zero-gamma").changes
    optim.carry_momentum(optimizer, changes)
    blocks = {id(p) for _, block in rep_blocks(model) for p in block.parameters()}
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()} - blocks
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with_gradients(model, 1e-6)
    optimizer.step()
    assert all((p - before[name]).abs().max() < 0.1 for name, p in model.named_parameters() if id(p) in blocks)


@pytest.mark.parametrize("name", ["sgd", *OTHERS])
def test_a_restored_optimizer_takes_the_same_steps(name):
    settings = OptimConfig(name=name, lr=0.01)
    runs = []
    for _ in range(2):
        model = small_net()
        runs.append(SimpleNamespace(model=model, optimizer=optim.build_optimizer(model, settings)))
    first, second = runs
    for step in range(5):
        if step == 3:
            second.model.load_state_dict(first.model.state_dict())
            tensors, plain = snapshot._optimizer_state(first)
            kept = {name: value.clone() for name, value in tensors.items()}
            snapshot._restore_optimizer(second, kept, json.loads(json.dumps(plain)))
        for run in runs if step >= 3 else runs[:1]:
            with_gradients(run.model, float(step))
            run.optimizer.step()
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


class KeepsAList(torch.optim.SGD):
    """An optimizer whose state is more than tensors and plain values, like that of Kron."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["Q"] = [torch.eye(2)]


def test_an_optimizer_that_cannot_be_used_or_resumed_is_refused_before_the_first_step(monkeypatch):
    with pytest.raises(InputError, match="optim.name=adahessian cannot be used here: .*grad"):
        optim.build_optimizer(small_net(), OptimConfig(name="adahessian"))
    tried = []
    monkeypatch.setattr(
        "timm.optim.create_optimizer_v2", lambda params, **_: tried.append(params) or KeepsAList(params)
    )
    with pytest.raises(InputError, match="optim.name=adamw has a state that a checkpoint cannot hold"):
        optim.build_optimizer(small_net().to("meta"), OptimConfig(name="adamw"))
    assert tried[0][0].device.type == "meta", "that of the network: some optimizers work only on GPUs"


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_the_optimizers_that_are_listed_can_be_used_and_the_others_cannot():
    """All but those that need a GPU, or a package that is not installed."""

    def refusal(name):
        try:
            optim.build_optimizer(small_net(), OptimConfig(name=name))
        except InputError as error:
            return str(error)

    assert all(map(refusal, names.UNUSABLE))
    refused = filter(None, map(refusal, names.optimizers()))
    assert [line for line in refused if not re.search("CUDA required|install", line)] == []


@pytest.mark.parametrize("live", [0.0, 1.0])
def test_gradients_of_frozen_trunks_are_zero_even_if_they_overflow(live):
    model = small_net().train()
    optimizer = optim.build_optimizer(model, OptimConfig())
    trunks = optim._trunk_parameters(optimizer)
    for parameter in trunks:
        parameter.grad = torch.full_like(parameter, float("inf"))
    optim.mask_trunk_gradients(optimizer, torch.tensor(live))
    assert trunks
    assert all(bool((p.grad == (0 if live == 0 else float("inf"))).all()) for p in trunks)
