"""Distillation: the loss, a teacher with its own image size, the cache of its logits, and sources of teachers."""

import errno
import json
import os

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from support import CPU, FP32, digit_loader, one_line, relative, run, small_net, write_folders
from torch import nn

from repan_cli import config
from repan_cli.blocks import rep_blocks
from repan_cli.data.batches import Batch
from repan_cli.errors import InputError, OutOfSpaceError
from repan_cli.session.teachers import PhaseTasks, TeacherModel
from repan_cli.training.loop import fit
from repan_cli.training.plan import cycle_plan, training_plan
from repan_cli.training.run import Training
from repan_cli.training.tasks import Classification, Distillation
from repan_cli.training.teacher import LogitCache, Teacher, View, allocate

pytestmark = pytest.mark.usefixtures("few_blocks")


def batch_of(images, labels=None):
    index = torch.arange(len(images))
    return Batch(images, index % 5 if labels is None else labels, index, index * 0)


# ---------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_one_of_the_paper():
    torch.manual_seed(0)
    student, wanted, labels = nn.Identity(), torch.randn(6, 5).double(), torch.arange(6) % 5
    logits = torch.randn(6, 5)
    task = Distillation(Classification(0.1), lambda batch: wanted, alpha=0.7, temperature=3.0)
    loss, out = task(student, batch_of(logits, labels))
    p = (wanted.float() / 3).softmax(1)
    divergence = sum((p[i] * (p[i].log() - (logits[i] / 3).softmax(0).log())).sum() for i in range(6)) / 6
    expected = 0.7 * 9 * divergence + 0.3 * F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(out, logits)


def test_a_student_that_agrees_has_no_soft_loss():
    logits = torch.randn(6, 5)
    task = Distillation(Classification(), lambda batch: logits, alpha=1.0, temperature=4.0)
    assert task(nn.Identity(), batch_of(logits))[0].abs() < 1e-6


# ---------------------------------------------------------------------------------------------- the teacher


def test_a_teacher_sees_images_its_own_way():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(5))
    raw = torch.rand(4, 3, 12, 12)
    own, student = View(12, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), View(12, (0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    normalised = {
        view: (raw - torch.tensor(view.mean).view(1, 3, 1, 1)) / torch.tensor(view.std).view(1, 3, 1, 1)
        for view in (own, student)
    }
    expected = model.eval()(normalised[own])
    teacher = Teacher(model.train(), own=own, student=student, runtime=FP32)
    assert relative(teacher.logits(normalised[student]), expected) < 1e-5
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_may_want_another_size():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    teacher = Teacher(model, own=View(8, (0, 0, 0), (1, 1, 1)), student=View(4, (0, 0, 0), (1, 1, 1)), runtime=FP32)
    assert teacher.logits(torch.randn(2, 3, 4, 4)).shape == (2, 5)


@pytest.mark.parametrize("storage", ["memory", "file"])
def test_the_cache_agrees_with_the_live_teacher_on_every_view(digits, tmp_path, monkeypatch, storage):
    if storage == "file":
        monkeypatch.setattr("repan_cli.training.teacher.SHARE_OF_HOST", 0.0)
    mapped = []
    monkeypatch.setattr(np, "memmap", lambda *args, make=np.memmap, **kw: mapped.append(make(*args, **kw)) or mapped[0])
    data, live = digit_loader(digits), small_net(in_chans=1)
    view = View(8, digits.mean, digits.std)
    teacher = Teacher(live, own=view, student=view, runtime=FP32)
    cache = LogitCache(teacher, lambda: allocate((data.count, data.view_count, 10), CPU, tmp_path))
    for again in range(2):
        for number in range(data.view_count):
            batch = data.batch(torch.arange(3, 40), torch.full((37,), number))
            found, expected = cache(batch), teacher(batch)
            assert relative(found, expected) < 1e-3, "float16 rounding"
            assert torch.equal(found.argmax(1), expected.argmax(1))
        assert cache.computed == 37 * data.view_count
        assert cache.asked == 37 * data.view_count * (again + 1)
    assert bool(mapped) == (storage == "file")
    assert not list(tmp_path.iterdir()), "the file goes with the process"


def test_a_teacher_that_is_no_function_of_the_view_is_found_out(digits):
    data = digit_loader(digits)

    def moody(batch):
        return torch.randn(len(batch.index), 10)

    cache = LogitCache(moody, lambda: allocate((data.count, data.view_count, 10), CPU, None))
    batch = data.batch(torch.arange(4), torch.zeros(4, dtype=torch.long))
    cache(batch)
    with pytest.raises(InputError, match="the same views differ by .*; set teacher.cache=none"):
        cache(batch)


@pytest.mark.parametrize(
    "setting", ["data.cutout=2", "data.erase=0.1", "data.mixup=0.2", "data.cutmix=1", "data.augment=randaugment"]
)
def test_a_cache_is_refused_with_the_reason_where_views_cannot_be_numbered(capsys, small_run, setting):
    words = ["distill", "--model", "repvgg_a0", "--dataset", "digits", "--teacher", small_run.folder / "best.pt"]
    refused = one_line(capsys, *words, "--dry-run", setting, "teacher.cache=views")
    assert f"teacher.cache=views has no use: with {setting} no view repeats" in refused


def test_only_views_that_are_missing_are_computed(digits):
    data, asked = digit_loader(digits), []

    def teacher(batch):
        asked.append(len(batch.index))
        return torch.zeros(len(batch.index), 10) + batch.index[:, None]

    cache = LogitCache(teacher, lambda: allocate((data.count, data.view_count, 10), CPU, None))
    cache(data.batch(torch.tensor([1, 2]), torch.tensor([0, 0])))
    found = cache(data.batch(torch.tensor([2, 5, 1]), torch.tensor([0, 0, 3])))
    assert asked == [2, 2]
    assert cache.computed == 4
    assert found[:, 0].tolist() == [2, 5, 1]


# ---------------------------------------------------------------------------------------------- in a run


def settings_of(**given):
    keys = {"epochs": "1", "baseline.epochs": "1", "cycle.count": "2", "cycle.attach_epochs": "0"}
    return config.build(keys, {key.replace("__", "."): str(value) for key, value in given.items()})


def test_the_baseline_has_no_teacher_unless_it_names_its_own():
    plan = cycle_plan(settings_of(teacher__name="a.pt", teacher__alpha=0.9), baseline=True)
    assert [phase.teacher.name for phase in plan] == [None, "a.pt", "a.pt"]
    named = settings_of(teacher__name="a.pt", baseline__teacher__name="b.pt", baseline__teacher__alpha=0.1)
    plan = cycle_plan(named, baseline=True)
    assert [(phase.teacher.name, phase.teacher.alpha) for phase in plan] == [
        ("b.pt", 0.1),
        ("a.pt", 0.5),
        ("a.pt", 0.5),
    ]
    assert training_plan(settings_of(teacher__name="a.pt"))[0].teacher.name == "a.pt"


def test_a_teacher_of_two_phases_is_found_once(digits, monkeypatch):
    found = []
    view = View(8, digits.mean, digits.std)
    monkeypatch.setattr(
        "repan_cli.session.teachers.find_teacher",
        lambda settings, dataset: found.append(settings.name) or TeacherModel(small_net(in_chans=1), view, "digest"),
    )
    task_of = PhaseTasks(small_net(in_chans=1), digits, digit_loader(digits), FP32)
    plan = cycle_plan(
        settings_of(teacher__name="a.pt", baseline__teacher__name="a.pt", baseline__teacher__alpha=0.1), baseline=True
    )
    task_of.prepare(plan)
    tasks = [task_of(phase) for phase in plan]
    assert found == ["a.pt"]
    assert tasks[0].teacher is tasks[1].teacher
    assert (tasks[0].alpha, tasks[1].alpha) == (0.1, 0.5)


def test_previous_is_the_merged_network_as_the_cycle_finds_it(digits):
    model = small_net(in_chans=1)
    data = digit_loader(digits)
    task_of = PhaseTasks(model, digits, data, FP32)
    first, second = cycle_plan(settings_of(teacher__name="previous"), baseline=False)
    batch = data.batch(torch.arange(16), torch.zeros(16, dtype=torch.long))
    expected = model(batch.images)
    teacher = task_of(first).teacher
    assert not any(rep_blocks(teacher.teacher.model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert relative(teacher(batch), expected) < 1e-2, "not the network as it has become"
    assert relative(task_of(second).teacher(batch), model(batch.images)) < 1e-2, "the cache begins anew"


def test_a_teacher_is_part_of_nothing_that_is_trained_or_saved(digits):
    """The teacher's weights neither move nor reach the optimizer; the same seed gives the same student."""
    model = small_net(in_chans=1)
    data = digit_loader(digits)
    teacher = small_net(in_chans=1, seed=3)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    view = View(8, digits.mean, digits.std)
    task = Distillation(Classification(), Teacher(teacher, own=view, student=view, runtime=FP32), 0.5, 4.0)
    from repan_cli.training.optim import build_optimizer

    training = Training(
        model=model,
        task_of=lambda phase: task,
        optimizer=build_optimizer(model, config.OptimConfig()),
        plan=training_plan(settings_of()),
        train=data,
        val=None,
        test=data,
        runtime=FP32,
        batch_size=256,
    )
    list(fit(training))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    inside = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert not inside & {id(p) for p in teacher.parameters()}


QUICK = [
    "--dataset",
    "digits",
    "--epochs",
    1,
    "data.per_class=40",
    "data.batch_size=64",
    "run.precision=fp32",
    "--json",
]


@pytest.mark.slow
def test_distill_and_cycle_with_a_teacher(capsys, small_run, tmp_path):
    teacher = small_run.folder / "best.pt"
    words = ["--model", "repvgg_a0_cifar", "--teacher", teacher, *QUICK]
    code, out, err = run(capsys, "distill", *words, "--out", tmp_path / "a", "teacher.alpha=0.9")
    assert code == 0, err
    assert "alpha 0.9, temperature 4" in " ".join(err.split())
    assert json.loads(out)["command"] == "distill"
    code, out, _ = run(capsys, "info", tmp_path / "a" / "last.pt", "--json")
    facts = json.loads(out)
    digest = json.loads(run(capsys, "info", teacher, "--json")[1])["digest"]
    assert facts["teachers"] == {str(teacher): digest}
    cycles = ["--baseline-epochs", 1, "--cycles", 2, "--out", tmp_path / "b"]
    code, out, err = run(capsys, "cycle", *words, *cycles)
    assert code == 0, err
    assert len(json.loads(out)["cycles"]) == 2
    code, _, err = run(
        capsys, "cycle", *words[:2], *QUICK, *cycles[:4], "--teacher", "previous", "--out", tmp_path / "c"
    )
    assert code == 0, err


def test_a_teacher_from_a_file_of_others(capsys, tmp_path):
    weights = timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    words = ["--model", "repvgg_a0_cifar", *QUICK, "--teacher", tmp_path / "theirs.pth"]
    assert "give teacher.model=NAME" in one_line(capsys, "distill", *words)
    code, _, err = run(capsys, "distill", *words, "teacher.model=timm:test_resnet", "--out", tmp_path / "a")
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("distill",), "no teacher: give --teacher"),
        (("distill", "--teacher", "previous"), "'previous' is for 'repan cycle'"),
        (("distill", "--teacher", "gone.pt"), "no file gone.pt for the teacher"),
        (("distill", "--teacher", "timm:resnet18"), "does not know the 10 classes of digits"),
        (("distill", "--teacher", "timm:resnet19"), "unknown model 'timm:resnet19'"),
        (("train", "teacher.name=a.pt"), "teacher.name has no effect in 'repan train'"),
        (("cycle", "teacher.model=resnet18"), "teacher.model needs teacher.name"),
        (("cycle", "--teacher", "a.pt", "teacher.alpha=2"), "teacher.alpha: must be at most 1, got 2"),
    ],
)
def test_teachers_that_cannot_be_used(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    command, *rest = words
    assert says in one_line(capsys, command, "--model", "repvgg_a0_cifar", "--dataset", "digits", *rest)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_other_classes_is_refused(capsys, small_run, tmp_path):
    photos = write_folders(tmp_path / "photos")
    words = ["--model", "repvgg_a0_cifar", "--dataset", "folder", "--data-root", photos]
    line = one_line(capsys, "distill", *words, "--teacher", small_run.folder / "best.pt")
    assert "knows 10 classes, folder has 2" in line


def test_the_ranks_of_a_machine_share_its_memory_for_their_caches(tmp_path, monkeypatch):
    """Each has a table of its own; together they took four times the free memory of a machine of eight ranks."""
    reserved = []
    monkeypatch.setattr("repan_cli.training.teacher.memory_bytes", lambda free: 100)
    monkeypatch.setattr("repan_cli.training.teacher._reserve", lambda *_: reserved.append(True))
    for ranks, in_file in (("1", 0), ("2", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert allocate((4, 3, 2), CPU, tmp_path).shape == (4, 3, 2)  # 48 bytes
        assert len(reserved) == in_file


def test_a_disk_without_room_for_the_cache_is_an_error_at_once(tmp_path, monkeypatch):
    """A mapped file with holes would end the process by a signal, in the middle of a run."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("repan_cli.training.teacher.SHARE_OF_HOST", 0.0)
    table = allocate((4, 3, 2), CPU, tmp_path)
    assert table.shape == (4, 3, 2)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutOfSpaceError, match="no space left in .* for the teacher's logits of all views, 48 bytes"):
        allocate((4, 3, 2), CPU, tmp_path)
