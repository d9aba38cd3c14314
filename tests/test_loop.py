"""The loop: events without tensors, the same bits for the same position, controls that differ in one thing alone."""

import copy
import dataclasses
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from support import CPU, plan, small_net, training
from timm.utils import ModelEmaV3
from torch import nn

from repan_cli import config
from repan_cli.blocks import Geometry, make_block, rep_blocks
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.data.types import ArrayImages
from repan_cli.errors import DivergedError, StoppedError
from repan_cli.system.device import Runtime
from repan_cli.training import loop, optim
from repan_cli.training.evaluation import evaluate
from repan_cli.training.events import CycleEnd, CycleStart, Epoch, LossLog, StepEnd
from repan_cli.training.loop import fit
from repan_cli.training.plan import Phase
from repan_cli.training.tasks import Classification

pytestmark = pytest.mark.usefixtures("few_blocks")


def weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_events_come_in_order_and_hold_plain_values_only(digits):
    events = list(fit(training(digits, plan(), log_every=2)))
    names = [type(event).__name__ for event in events]
    phase = ["CycleStart", *["StepEnd", "LossLog", "StepEnd", "LossLog", "StepEnd", "Epoch"] * 2, "CycleEnd"]
    assert names == phase * 2
    for event in events:
        values = dataclasses.asdict(event).values()
        assert all(value is None or type(value) in (int, float, bool) for value in values), event
    epochs = [event for event in events if isinstance(event, Epoch)]
    assert [(event.cycle, event.epoch) for event in epochs] == [(0, 1), (0, 2), (1, 1), (1, 2)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits(digits, precision):
    runs = [training(digits, plan(), runtime=Runtime(CPU, precision), seed=seed) for seed in (3, 3, 4)]
    losses = [[event.loss for event in fit(run) if isinstance(event, Epoch)] for run in runs]
    assert same(weights(runs[0]), weights(runs[1]))
    assert losses[0] == losses[1] != losses[2]


def test_cycles_from_a_baseline_file_are_the_cycles_behind_that_baseline(digits):
    """With zeroed momentum nothing leaks from the baseline into the cycles but its weights."""
    whole = training(digits, plan(cycle__momentum="zero"))
    later = training(digits, plan(cycle__momentum="zero", baseline=False))
    for event in fit(whole):
        if isinstance(event, CycleEnd) and event.cycle == 0:
            later.model.load_state_dict(weights(whole))
    list(fit(later))
    assert same(weights(whole), weights(later))


def test_the_control_is_training_on_with_zeroed_momentum(digits):
    control = training(digits, plan(cycle__restart="none", cycle__momentum="zero", baseline__optim__lr="0.05"))
    list(fit(control))
    by_hand = training(digits, ())
    for phase in plan():
        optim.zero_momentum(by_hand.optimizer)
        for epoch in (1, 2):
            by_hand.model.train()
            batches = by_hand.train.training_batches(64, 0, phase.cycle, epoch)
            for step, (images, labels, *_) in enumerate(batches):
                for group in by_hand.optimizer.param_groups:
                    group["lr"] = phase.learning_rate(epoch - 1 + step / 3)
                by_hand.optimizer.zero_grad()
                F.cross_entropy(by_hand.model(images), labels).backward()
                torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 10.0)
                by_hand.optimizer.step()
    assert same(weights(control), weights(by_hand))


def test_the_rescaled_control_changes_the_course_and_no_function(digits):
    """Training goes another way than without rescaling; the logits stay, and no block is merged."""
    none, rescaled = (training(digits, plan(cycle__restart=how)) for how in ("none", "rescale"))
    starts = [event for event in fit(rescaled) if isinstance(event, CycleStart) and event.cycle]
    list(fit(none))
    assert [(start.restarted, start.blocks) for start in starts] == [(False, 5)] * len(starts)
    assert starts
    assert max(start.logit_error for start in starts) < 1e-4
    assert not same(weights(none), weights(rescaled))


def test_a_restart_keeps_accuracy_and_logits(digits):
    start = next(event for event in fit(training(digits, plan(baseline=False))))
    assert start.restarted
    assert start.blocks == 5
    assert start.top1_before == start.top1_after_restart
    assert start.logit_error < 1e-5


@pytest.fixture(scope="module")
def settled(digits):
    """A deep network whose statistics have settled."""
    run = training(digits, plan(baseline=False), model=small_net(name="repvgg_b0_cifar", in_chans=1))
    with torch.no_grad():
        for epoch in range(40):
            for images, *_ in run.train.training_batches(192, 7, 7, epoch):
                run.model.train()(images)
    return run.model


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "jumps"), [("calibrate", False), ("running", True), ("reset", True)])
def test_the_loss_across_a_restart_tells_the_rules_apart(digits, settled, rule, jumps):
    """`calibrate` keeps the training loss, the others do not."""
    run = training(digits, plan(baseline=False, cycle__rule=rule), model=copy.deepcopy(settled))
    start = next(fit(run))
    assert (abs(start.loss_after_restart - start.loss_before) > 0.1) == jumps


def test_the_frozen_trunk_stays_while_its_statistics_move(digits):
    run = training(digits, plan(baseline=False, cycle__freeze_trunk="yes", cycle__attach_epochs="2"))
    events = fit(run)
    next(events)
    after_restart = weights(run)
    assert isinstance(list(events)[-1], CycleEnd)
    for name, value in run.model.state_dict().items():
        if ".trunk." in name:
            assert torch.equal(value, after_restart[name]) == ("running" not in name and "tracked" not in name), name
    assert not torch.equal(run.model.head.weight, after_restart["head.weight"])


def test_the_attach_rate_follows_the_ramp(digits):
    events = list(fit(training(digits, plan(baseline=False, cycle__attach_epochs="1.5"), log_every=1)))
    rates = [event.attach_rate for event in events if isinstance(event, LossLog)]
    assert rates == pytest.approx([0, 2 / 9, 4 / 9, 6 / 9, 8 / 9, 1])


def test_a_cycle_can_end_with_its_best_weights(digits):
    run = training(digits, plan(baseline=False, epochs="3", cycle__start_from="best"), lr=0.5)
    seen, states = [], []
    for event in fit(run):
        if isinstance(event, Epoch):
            seen.append(event.val_top1)
            states.append(weights(run))
    assert same(weights(run), states[seen.index(max(seen))])


def test_without_a_validation_part_nothing_is_best(digits):
    events = list(fit(training(digits, plan(), val=False)))
    assert not any(event.best for event in events if isinstance(event, Epoch))
    assert events[-1].top1 is None
    assert events[-1].test_top1 is not None


def test_the_test_set_chooses_nothing(digits):
    """Turning the test labels round changes the figures reported on them, and nothing else."""
    runs = [training(digits, plan(cycle__start_from="best")) for _ in range(2)]
    runs[1].test.labels = runs[1].test.labels.flip(0)
    events = [[e for e in fit(run) if isinstance(e, Epoch)] for run in runs]
    assert same(weights(runs[0]), weights(runs[1]))
    assert [e.best for e in events[0]] == [e.best for e in events[1]]


def test_the_baseline_has_its_own_label_smoothing(digits):
    """The first loss of an untrained step: cross-entropy with the smoothing of its phase."""
    first = {}
    for smoothing in ("0", "0.5"):
        run = training(digits, plan(baseline__optim__label_smoothing=smoothing), log_every=1)
        first[smoothing] = next(event.loss for event in fit(run) if isinstance(event, LossLog))
    model = small_net(in_chans=1).to(memory_format=torch.channels_last).train()
    images, labels, *_ = next(run.train.training_batches(64, 0, 0, 1))
    for smoothing, loss in first.items():
        expected = F.cross_entropy(copy.deepcopy(model)(images), labels, label_smoothing=float(smoothing))
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_divergence_stops_the_run(digits):
    run = training(digits, plan())
    with torch.no_grad():
        run.model.head.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="no longer finite"):
        list(fit(run))


def test_evaluation_counts_every_image_once_and_leaves_the_mode(digits):
    model = small_net(in_chans=1).train()
    images = InMemoryLoader(digits.test, mean=digits.mean, std=digits.std, device=CPU)
    score = evaluate(model, images)
    assert model.training
    with torch.no_grad():
        batch, labels, *_ = next(images.batches(10_000))
        logits = copy.deepcopy(model).eval()(batch)
    ranks = logits.argsort(1, descending=True)
    assert score.images == len(labels) == 359
    assert score.top1 == pytest.approx(100 * (ranks[:, 0] == labels).float().mean().item(), abs=1e-4)
    assert score.top5 == pytest.approx(100 * (ranks[:, :5] == labels[:, None]).any(1).float().mean().item(), abs=1e-4)
    assert score.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_there_is_no_top5_with_five_classes_or_fewer(digits):
    torch.manual_seed(0)
    model = small_net(in_chans=1)
    model.reset_classifier(3)
    labels = digits.test.labels % 3
    images = InMemoryLoader(ArrayImages(digits.test.images, labels), mean=digits.mean, std=digits.std, device=CPU)
    score = evaluate(model, images)
    assert score.top5 is None
    assert score.figures().keys() == {"top1", "loss", "images"}


def test_the_optimizer_never_loses_its_parameters(digits):
    run = training(digits, plan())
    list(fit(run))
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}
    assert len(list(rep_blocks(run.model))) == 5


# ---------------------------------------------------------------------------------------------- more ways to train


def test_accumulated_batches_make_the_update_of_one_large_batch(digits):
    """In eval mode, where BN makes no difference between one batch and its parts."""
    runs = []
    for batch_size, accumulate in ((64, 1), (16, 4)):
        run = training(digits, plan(), seed=1, batch_size=batch_size, accumulate=accumulate)
        run.model.train = lambda mode=True: None
        run.model.eval()
        next(event for event in fit(run) if isinstance(event, StepEnd))
        runs.append(run)
    assert runs[1].progress.step == 4
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(runs[1].model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert runs[0].progress.totals.loss.item() == pytest.approx(runs[1].progress.totals.loss.item(), rel=1e-5)


def fresh():
    torch.manual_seed(0)
    return timm.create_model("repvgg_a0_cifar", num_classes=10, in_chans=1)


def test_a_ragged_last_group_is_an_update(digits):
    run = training(digits, plan(), batch_size=64, accumulate=2)
    events = list(fit(run))
    assert [event.step for event in events if isinstance(event, StepEnd)][:2] == [2, 3]


def test_the_weight_average_is_scored_and_reset_by_a_restart(digits):
    model = small_net(in_chans=1)
    average = ModelEmaV3(model, decay=0.9)
    run = training(digits, plan(cycle__attach="ramp"), model=model, ema=average)
    for event in fit(run):
        if isinstance(event, CycleStart) and event.cycle == 1:
            assert same(average.module.state_dict(), model.state_dict())
        if isinstance(event, StepEnd):
            rates = [{name: b.attach_rate.item() for name, b in rep_blocks(m)} for m in (model, average.module)]
            assert rates[0] == rates[1]
        if isinstance(event, Epoch):
            assert event.val_top1 == evaluate(average.module, run.val).top1
    assert run.scored is average.module
    assert not same(average.module.state_dict(), model.state_dict())


def test_the_average_is_the_exponential_one(digits):
    model = small_net(in_chans=1)
    run = training(digits, plan(), model=model, ema=ModelEmaV3(model, decay=0.75))
    name = next(name for name, value in model.named_parameters() if value.ndim == 4)
    expected = dict(model.named_parameters())[name].detach().clone()
    for count, event in enumerate(event for event in fit(run) if isinstance(event, StepEnd)):
        decay = 0.75 if count else 0.0  # the first weights are forgotten
        expected = decay * expected + (1 - decay) * dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(dict(run.ema.module.named_parameters())[name].detach(), expected)
        if count == 3:
            return
        assert event.cycle == 0


def test_binary_cross_entropy_is_that_of_each_class():
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    target = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
    p = logits.sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1).mean()
    assert Classification(0.1, binary=True).loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    shares = torch.softmax(torch.randn(6, 5), 1)
    for binary in (False, True):
        assert Classification(binary=binary).loss(logits, shares).isfinite()


def test_half_precision_trains_with_a_scaled_loss(digits):
    found = {}
    for precision in ("fp16", "fp32"):
        runtime = Runtime(CPU, precision)
        phases = (Phase(0, 6, config.OptimConfig(lr=0.05), None, 0, 6),)
        run = training(digits, phases, model=fresh(), runtime=runtime, scaler=runtime.scaler())
        found[precision] = [event.loss for event in fit(run) if isinstance(event, Epoch)]
        assert all(value.isfinite().all() for value in weights(run).values())
        assert run.scaler.is_enabled() == (precision == "fp16")
    assert found["fp16"][-1] < found["fp16"][0] - 0.1
    assert found["fp16"][-1] == pytest.approx(found["fp32"][-1], abs=0.3)


def test_a_skipped_first_step_leaves_momentum_at_zero():
    model = fresh()
    optimizer = optim.build_optimizer(model, config.OptimConfig())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.full((4, 1, 8, 8), torch.inf)).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert not any(state["momentum_buffer"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("name", ["adamw", "lamb", "nadamw", "rmsprop"])
def test_optimizers_of_timm_train_and_are_zeroed(digits, name):
    settings = {"optim.name": name, "optim.lr": "0.001", "baseline.optim.lr": "0.001", "baseline.epochs": "4"}
    phases = plan(**settings, cycle__momentum="zero")
    run = training(digits, phases, model=fresh(), settings=phases[0].optim)
    losses = []
    for event in fit(run):
        if isinstance(event, CycleStart) and event.cycle == 1:
            held = [v for state in run.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
            assert held or name == "rmsprop"  # whose state is removed instead
            assert not any(value.any() for value in held)
        if isinstance(event, Epoch) and event.cycle == 0:
            losses.append(event.loss)
    assert losses[-1] < losses[0]


def test_best_test_leaves_the_weights_that_the_test_set_chose(digits):
    run = training(digits, plan(cycle__start_from="best-test", epochs="3"))
    scores = []
    for event in fit(run):
        if isinstance(event, Epoch):
            scores.append(evaluate(run.model, run.test).top1)
        if isinstance(event, CycleEnd):
            assert event.test_top1 == max(scores)
            scores = []


def test_a_stop_while_the_test_set_is_scored_changes_nothing(digits, monkeypatch):
    """The epoch is scored again after it: as if for the first time."""

    def run():
        return training(digits, plan(cycle__start_from="best-test", epochs="1", baseline__epochs="1"))

    whole, stopped, stops = run(), run(), iter([True])
    expected = [event for event in fit(whole) if isinstance(event, Epoch)]

    def interrupted(model, images, *options):
        if images is stopped.test and next(stops, False):
            raise StoppedError
        return evaluate(model, images, *options)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    with pytest.raises(StoppedError):
        list(fit(stopped))
    assert (stopped.progress.step, stopped.progress.since_best) == (3, 0)
    found = [event for event in fit(stopped) if isinstance(event, Epoch)]
    assert [(event.best, event.val_top1) for event in found] == [(event.best, event.val_top1) for event in expected]
    assert stopped.progress.since_best == whole.progress.since_best


def test_a_restart_draws_nothing_from_what_ran_before(digits):
    """Dropout in the looks at a restart, and a user's own branches, may draw from the global generators."""
    found = []
    for seed in (1, 2):
        run = training(digits, plan(baseline__epochs="1", epochs="1"), model=fresh())
        run.model.head = nn.Sequential(nn.Dropout(0.5), run.model.head)
        for event in fit(run):
            if isinstance(event, CycleEnd) and event.cycle == 0:
                torch.manual_seed(seed)
            if isinstance(event, CycleStart) and event.cycle == 1:
                found.append((event.loss_before, event.loss_after_restart, torch.rand(1).item()))
    assert found[0] == found[1]


def test_the_speed_is_that_of_this_process_whatever_the_sums_hold(digits):
    """Rank 0 collects the images of all ranks when the run is saved within an epoch."""
    run = training(digits, plan(baseline__epochs="1"))
    for event in fit(run):
        if isinstance(event, StepEnd) and event.step == 1:
            run.progress.totals.images += 10**12
        if isinstance(event, Epoch):
            assert event.images_per_second < 10**9
            return


def test_trunks_that_are_frozen_begin_again_without_momentum(digits):
    """Under a carried momentum too, whether steps are recorded or not: it would be that of weights long past."""
    run = training(digits, plan(cycle__freeze_trunk="true", cycle__momentum="carry", epochs="1"))
    for event in fit(run):
        if isinstance(event, CycleStart) and event.cycle:
            held = {id(p): state["momentum_buffer"] for p, state in run.optimizer.state.items()}
            trunks = {id(p) for _, block in rep_blocks(run.model) for p in block.trunk.parameters()}
            others = {id(run.model.head.weight)}
            assert not any(held[each].any() for each in trunks)
            assert all(held[each].any() for each in others)
            return


def test_a_look_at_a_restart_takes_no_more_memory_than_an_evaluation(digits, monkeypatch):
    monkeypatch.setattr(loop, "eval_batch", lambda images: 70)
    run = training(digits, plan())
    seen, batches = [], run.train.training_batches
    monkeypatch.setattr(run.train, "training_batches", lambda size, *place: seen.append(size) or batches(size, *place))
    loop._look(run, run.plan[1], run.task_of(run.plan[1]))
    assert seen == [70]


@pytest.mark.soak
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_training_pass_gives_the_same_losses(digits):
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        block = make_block("repvgg", Geometry(1, 10, (3, 3), padding=(1, 1)))
        model = nn.Sequential(block, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        wrapped = torch.compile(model) if compiled else None
        run = training(digits, plan(), model=model, wrapped=wrapped, log_every=1)
        found.append([event.loss for event in fit(run) if isinstance(event, LossLog)])
    assert len(found[0]) == 12
    assert found[0] == pytest.approx(found[1], rel=1e-5)
