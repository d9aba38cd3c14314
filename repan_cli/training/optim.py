"""Build the optimizer and its parameter groups, and carry its state over a restart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from repan_cli.anneal.coordinates import CoordinateChange
from repan_cli.blocks import rep_blocks
from repan_cli.config.names import unknown_optimizer
from repan_cli.config.settings import OptimConfig
from repan_cli.errors import InputError
from repan_cli.models.inspect import classifier_layers
from repan_cli.system.text import first_line

SGD = "sgd"
"""The default optimizer; others are timm's."""

Group = dict[str, Any]
"""A group of parameters with the settings that the optimizer uses for them."""


def parameter_groups(model: nn.Module) -> list[Group]:
    """Group the parameters by `role`, weight, norm (BN and biases) or classifier, and by whether they are in a `trunk`.

    The groups never change during a run, only their settings, so one optimizer serves all phases.
    """
    trunk = {id(p) for _, block in rep_blocks(model) for p in block.trunk.parameters()}
    layers = dict(model.named_modules())
    classifier = {id(p) for name in classifier_layers(model) for p in layers[name].parameters()}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        role = "classifier" if id(parameter) in classifier else "weight" if parameter.ndim > 1 else "norm"
        groups.setdefault((role, id(parameter) in trunk), []).append(parameter)
    return [{"params": params, "role": role, "trunk": is_trunk} for (role, is_trunk), params in groups.items()]


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer `optim.name` over `parameter_groups`. Raises InputError for an unknown name."""
    groups = parameter_groups(model)
    optimizer: torch.optim.Optimizer
    if optim.name == SGD:
        optimizer = torch.optim.SGD(groups, lr=optim.lr, fused=True)
    else:
        import timm.optim  # timm imports the compiler for one of its optimizers

        known = [str(name) for name in timm.optim.list_optimizers()]
        if optim.name not in known:
            raise unknown_optimizer(optim.name, known)
        _refuse_unusable(optim, next(model.parameters()).device)
        optimizer = timm.optim.create_optimizer_v2(groups, opt=optim.name, lr=optim.lr, momentum=optim.momentum)
    apply_settings(optimizer, optim)
    return optimizer


PLAIN = (int, float, bool, str, type(None))
"""The types of a state's values, besides tensors, that checkpoints hold."""


def _refuse_unusable(optim: OptimConfig, device: torch.device) -> None:
    """Raise InputError for an optimizer that needs more than gradients, or whose state a checkpoint cannot hold.

    It makes two steps on a small parameter of its own, on the device of the network: some work only on GPUs.
    """
    import timm.optim

    trial = nn.Parameter(torch.ones(2, 2, device=device))
    try:
        with torch.random.fork_rng(devices=[]):
            optimizer = timm.optim.create_optimizer_v2([trial], opt=optim.name, lr=optim.lr, momentum=optim.momentum)
            for _ in range(2):
                trial.grad = torch.ones_like(trial)
                optimizer.step()
    except Exception as error:  # a package that is missing, a second derivative, anything in an optimizer
        raise InputError(f"optim.name={optim.name} cannot be used here: {first_line(error)}") from None
    kept = [value for state in optimizer.state.values() for value in state.values()]
    if not all(isinstance(value, (Tensor, *PLAIN)) for value in kept):
        raise InputError(
            f"optim.name={optim.name} has a state that a checkpoint cannot hold, so no run could be resumed: give "
            "another, see 'repan list optimizers'"
        )


def apply_settings(optimizer: torch.optim.Optimizer, optim: OptimConfig) -> None:
    """Set momentum and weight decay of every group for a new phase."""
    for group in optimizer.param_groups:
        if optim.name == SGD:
            group["momentum"] = optim.momentum
            group["nesterov"] = optim.nesterov and optim.momentum > 0
            _add_momentum(optimizer, group)
        group["weight_decay"] = optim.weight_decay if optim.decay == "all" or group["role"] == "weight" else 0.0


def _add_momentum(optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Allocate every parameter's momentum buffer now.

    If a loss scaler skips the first step, fused SGD would leave the buffers as uninitialized memory.
    """
    for parameter in group["params"] if group["momentum"] else ():
        optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, *, frozen: bool = False) -> None:
    """Set the rate of all groups, in place if it is a tensor on the device; the rate of `frozen` trunks is 0."""
    on_device: dict[Tensor, float] = {}
    for group in optimizer.param_groups:
        value = 0.0 if frozen and group["trunk"] else rate
        if isinstance(group["lr"], Tensor):
            on_device[group["lr"]] = value
        else:
            group["lr"] = value
    for place, value in on_device.items():
        place.fill_(value)


def can_be_recorded(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer's step can be part of a CUDA graph: it must neither count nor decide on the host."""
    return isinstance(optimizer, torch.optim.SGD) and bool(optimizer.defaults["fused"])


def rates_to_device(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move the learning rates to tensors that a recorded step reads: one for all trunks, one for everything else."""
    rates = {trunk: torch.zeros((), device=device) for trunk in (False, True)}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["trunk"]]


ZERO_AT_FIRST = {"step", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "sum"}
"""The state that a new optimizer begins with zeros. It is zeroed in place, since recorded steps hold on to it."""


def zero_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer that of a first step, because a restart changes the coordinates of its parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _forget(optimizer, parameter, group)
        if isinstance(group.get("step"), Tensor):  # some optimizers count by group
            group["step"].zero_()
        elif "step" in group:
            group["step"] = 0


def zero_trunk_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Reset the state of all trunks, which are about to be frozen: it would be that of weights long past at the end."""
    for parameter in _trunk_parameters(optimizer):
        _forget(optimizer, parameter)


def _forget(optimizer: torch.optim.Optimizer, parameter: Tensor, group: Group | None = None) -> None:
    """Reset the state of a parameter to that before its first step.

    State that does not begin with zeros, such as a copy of the weights, is removed: the optimizer then makes it anew.
    """
    state = optimizer.state.get(parameter, {})
    if any(key not in ZERO_AT_FIRST or not isinstance(value, Tensor) for key, value in state.items()):
        del optimizer.state[parameter]
        return
    for key, value in state.items():
        value.fill_((group or {}).get("initial_accumulator_value", 0) if key == "sum" else 0)


MEANS, SQUARES = ("momentum_buffer", "exp_avg"), ("exp_avg_sq",)
"""The state that is carried over: averages of gradients, and of their squares. A trunk with other state is reset."""


def carry_momentum(optimizer: torch.optim.Optimizer, changes: Iterable[CoordinateChange]) -> None:
    """Convert the optimizer's state, in place, to the coordinates after a restart.

    Trunks keep their momentum, fresh branches start with none, and everything outside of blocks keeps its state.
    """
    for change in changes:
        trunk, state = change.block.trunk, optimizer.state
        for parameter in trunk.parameters():
            if not _can_be_carried(state.get(parameter, {}), parameter):
                del state[parameter]
        if (norm := trunk.batch_norm) is not None:
            for key, value in dict(_carried_gamma(state, norm.weight, change)).items():
                state[norm.weight][key].copy_(value)
        for key, value in state.get(trunk.conv.weight, {}).items():
            if key in (*MEANS, *SQUARES):
                factor = change.ratio if key in MEANS else change.ratio.square()
                value.mul_(factor.to(value).view(-1, 1, 1, 1))
        for parameter in change.block.branches.parameters():
            _forget(optimizer, parameter)


def _can_be_carried(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Return whether a state holds nothing but counts, and averages with a number for each weight."""
    averages = {key: value for key, value in state.items() if key != "step"}
    return averages.keys() <= {*MEANS, *SQUARES} and all(
        isinstance(value, Tensor) and value.shape == parameter.shape for value in averages.values()
    )


def _carried_gamma(
    state: Mapping[Tensor, Any], gamma: Tensor, change: CoordinateChange
) -> Iterator[tuple[str, Tensor]]:
    """Yield the state for the trunk's new gamma: the sum over the old gammas, and for squares an upper bound."""
    for key in state.get(gamma, {}):
        shares = [(each, share) for each, share in change.shares.items() if key in state.get(each, {})]
        terms = [(share.to(gamma), state[each][key]) for each, share in shares]
        if key in MEANS:
            yield key, sum((share * value for share, value in terms), torch.zeros_like(gamma))
        elif key in SQUARES:
            yield key, sum((share.abs() * value.sqrt() for share, value in terms), torch.zeros_like(gamma)).square()


def drop_trunk_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Exclude the trunks from the next step, its weight decay and momentum, and from the gradient's norm."""
    for group in optimizer.param_groups:
        if group["trunk"]:
            for parameter in group["params"]:
                parameter.grad = None


def mask_trunk_gradients(optimizer: torch.optim.Optimizer, live: Tensor) -> None:
    """Zero the gradients of trunks if `live`, 0 or 1 on the device, is 0; also those that overflowed.

    This is for a recorded step with frozen trunks, whose learning rate is 0 already. `mask_trunk_momentum` has to
    follow: otherwise weight decay would let momentum grow, and the weights would jump when trunks train again.
    """
    frozen = live == 0
    for parameter in _trunk_parameters(optimizer):
        if parameter.grad is not None:
            parameter.grad.masked_fill_(frozen, 0)  # a product with 0 would keep infinity as NaN, and skip the step


def mask_trunk_momentum(optimizer: torch.optim.Optimizer, live: Tensor) -> None:
    """Zero the trunks' momentum if `live`, 0 or 1 on the device, is 0."""
    memory = [optimizer.state[p].get("momentum_buffer") for p in _trunk_parameters(optimizer)]
    if there := [buffer for buffer in memory if buffer is not None]:  # None if momentum is 0
        torch._foreach_mul_(there, live)


def _trunk_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups if group["trunk"] for p in group["params"]]


def clip_gradients(optimizer: torch.optim.Optimizer, optim: OptimConfig) -> Tensor:
    """Scale gradients down to a total 2-norm of `optim.clip`, without a host-device sync; None leaves them.

    Returns the sum of their norms, which is finite if and only if all gradients are.
    """
    clipped: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        chosen = clipped if optim.clip_params == "all" or group["role"] == "weight" else others
        chosen += [p for p in group["params"] if p.grad is not None]
    norms = [
        torch.nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])  # foreach if the device has it
        for some in (clipped, others)
        if some
    ]
    if optim.clip is not None and clipped:
        torch.nn.utils.clip_grads_with_norm_(clipped, optim.clip, norms[0])
    return torch.stack(norms).sum()


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> Tensor:
    """Make a step unless `norm` is not finite; return whether it was skipped, 0 or 1, on the device.

    Fused SGD decides on the device. For other optimizers the host decides on CPUs, and on GPUs gradients become zeros.
    """
    skipped = (~norm.isfinite()).float()
    if optimizer.defaults.get("fused"):
        vars(optimizer).update(grad_scale=None, found_inf=skipped)  # fused optimizers read these
    elif norm.device.type == "cpu":
        if skipped.item():
            return skipped
    else:
        gradients = (p.grad for group in optimizer.param_groups for p in group["params"])
        for gradient in gradients:
            if gradient is not None:
                gradient.masked_fill_(skipped.bool(), 0)
    optimizer.step()
    return skipped
