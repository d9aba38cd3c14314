"""Losses around a restart: the windows span epochs, and every run's records suffice for any position."""

import dataclasses
import json
import re

import pytest
import torch
from shared_fixtures import CPU
from support import plan, training, write_run

from repan_cli.compare import table
from repan_cli.compare.groups import compare
from repan_cli.compare.results import find_runs, read_result
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.runs import felt
from repan_cli.training import loop
from repan_cli.training.events import CycleEnd, Epoch
from repan_cli.training.loop import fit


def record(cycle, loss, *parts, steps=100):
    return {"cycle": cycle, "steps": steps, "loss": loss, **dict(zip(felt.KEYS, parts, strict=True))}


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ([(41, 41, 41)] * 2, ("50", "123")),
        ([(41, 41, 41), (41,)], ("41-50", "41-123")),
        ([(300,), (500,)], ("50", "200")),
        ([(100, 100)], ("50", "200")),
        ([(1,)], ("1", "1")),
        ([], ("50", "200")),
        ([(None,)], ("50", "200")),
    ],
)
def test_the_steps_that_a_window_covers_are_named(lengths, says):
    courses = [[record(1, 1.0, 1, 1, 1, steps=steps) for steps in course] for course in lengths]
    assert tuple(felt.covered(courses, window) for window in felt.HEADS) == says


def test_a_run_names_the_steps_of_short_cycles(small_run):
    records = [json.loads(line) for line in (small_run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = sum(each["steps"] for each in records if each["cycle"] == 1)
    assert steps < 200
    if steps > 50:
        assert re.search(
            rf" first +first +\n.* loss +50 +{steps} .*\n.* before +steps +steps +at end", small_run.stderr
        )
    else:  # both windows are the same steps
        assert re.search(rf" all +\n.* loss +{steps} .*\n.* before +steps +at end", small_run.stderr)


def test_a_window_of_one_epoch_is_its_part():
    pace = felt.Pace(images=3000, batch_size=10)
    before, after = record(0, 1.0, 4.0, 5.0, 0.5, steps=300), record(1, 2.0, 3.0, 2.5, 1.5, steps=300)
    assert felt.around([before, after], 1, pace) == {"before_200": 0.5, "first_50": 3.0, "first_200": 2.5}


def test_a_window_runs_on_over_epochs():
    """200 steps are one epoch of 150 and 50 of the next; at its end, 50 of the one before."""
    pace = felt.Pace(images=1500, batch_size=10)
    records = [record(0, 8.0, 0, 0, 4.0, steps=150), record(0, 2.0, 0, 0, 0, steps=150)]
    records += [record(1, 6.0, 7.0, 0, 0, steps=150), record(1, 5.0, 0, 2.0, 0, steps=150)]
    found = felt.around(records, 1, pace)
    assert found == {"before_200": (3 * 2 + 4) / 4, "first_50": 7.0, "first_200": (3 * 6 + 2) / 4}


def test_a_window_ends_with_its_phase_and_counts_images():
    """The last batch of an epoch is smaller: 41 steps of 32 are 1,295 images."""
    pace = felt.Pace(images=1295, batch_size=32)
    records = [record(cycle, loss, 9.0, 0, 0, steps=41) for cycle, loss in ((0, 1.0), (1, 4.0), (1, 2.0))]
    records[2] |= {"loss_head_50": 2.0}
    found = felt.around(records, 1, pace)
    assert found["before_200"] == 1.0
    assert found["first_50"] == pytest.approx((4 * 1295 + 2 * 9 * 32) / (1295 + 9 * 32))
    assert found["first_200"] == pytest.approx(3.0)


def test_a_run_without_a_baseline_has_no_loss_before():
    assert felt.around([record(1, 1.0, 1, 1, 1)], 1, felt.Pace(1000, 10))["before_200"] is None
    assert felt.around([{"cycle": 1, "loss": 1.0}], 1, felt.Pace(1000, 10))["first_50"] is None


@pytest.mark.parametrize(
    ("steps", "marks"), [(352, (50, 200, 152)), (200, (50, 200, 0)), (100, (50, 0, 100)), (36, (14, 20, 16))]
)
def test_marks(steps, marks):
    assert felt.marks(steps) == marks


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (7, 1), (32, 1), (32, 3), (4, 3), (256, 1)])
def test_losses_are_those_of_the_steps(digits, monkeypatch, batch_size, accumulate):
    """Against the plain mean over every image, where each step's loss is known."""
    seen = []

    def update(run, phase, task, group, elapsed):
        for batch in group:
            loss = 1 + (7 * len(seen) % 31) / (3 + len(seen))
            seen.append((phase.cycle, loss, len(batch.images)))
            run.progress.totals.add(torch.tensor([loss * len(batch.images), 0, 0]), len(batch.images))

    monkeypatch.setattr(loop, "update", update)
    monkeypatch.setattr(loop, "_end", lambda run, phase: CycleEnd(phase.cycle, None, 0, 0, 0, 0))
    run = training(digits, plan(epochs="6", cycle__restart="none"), val=False, batch_size=batch_size)
    run.train = InMemoryLoader(digits.train, mean=digits.mean, std=digits.std, device=CPU)
    run.accumulate = accumulate
    run.plan = tuple(dataclasses.replace(phase, epochs=6) for phase in run.plan)
    records = [dataclasses.asdict(event) for event in fit(run) if isinstance(event, Epoch)]
    steps = run.train.steps(batch_size)
    updates = [min(end, steps) for end in range(0, steps + accumulate, accumulate)]
    found = felt.around(records, 1, felt.Pace(run.train.count, batch_size, accumulate))
    for key, cycle, window in (("before_200", 0, 200), ("first_50", 1, 50), ("first_200", 1, 200)):
        of_cycle = [step for step in seen if step[0] == cycle]
        whole, rest = divmod(window, steps)
        if key == "before_200":
            begun = next(end for end in updates if end >= steps - rest)  # of the epoch that the window begins in
            chosen = of_cycle[-(whole * steps + steps - begun) or len(of_cycle) :]
        else:
            chosen = of_cycle[: whole * steps + next(end for end in updates if end >= rest)]
        expected = sum(loss * images for _, loss, images in chosen) / sum(images for *_, images in chosen)
        assert found[key] == pytest.approx(expected, rel=1e-5), key


def felt_run(folder, losses, *, lr=0.05, steps=352, **given):
    folder = write_run(folder, **given)
    lines = [
        {**record(n // 2, *[loss] * 4, steps=steps), "epoch": n % 2 + 1, "val_top1": 50.0, "lr": lr}
        for n, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_compare_sets_a_restart_beside_its_control_at_the_same_steps(tmp_path):
    for seed, factor in enumerate((1.2, 1.4)):
        felt_run(tmp_path / f"repan_{seed}", [2, 1, factor, 1], seed=seed)
        felt_run(tmp_path / f"none_{seed}", [2, 1, 1, 1], seed=seed, cycle__restart="none")
    comparison = compare([read_result(path) for path in find_runs([str(tmp_path)])])
    none, repan = comparison.groups
    assert comparison.felt(repan) == {1: pytest.approx(1.3)}
    assert comparison.felt(none) == {}


@pytest.mark.parametrize(("steps", "says"), [(352, "200"), (41, "82")])
def test_compare_names_the_steps_that_were_averaged(tmp_path, steps, says):
    felt_run(tmp_path / "repan", [2, 1, 1.5, 1], steps=steps)
    felt_run(tmp_path / "none", [2, 1, 1, 1], steps=steps, cycle__restart="none")
    comparison = compare([read_result(path) for path in find_runs([str(tmp_path)])])
    assert f"training loss of the {says} steps after a restart" in table.legend(comparison)


def test_a_control_at_another_rate_says_nothing_of_a_restart(tmp_path):
    felt_run(tmp_path / "repan", [2, 1, 1.5, 1])
    felt_run(tmp_path / "none", [2, 1, 1, 1], lr=0.02, cycle__restart="none")
    comparison = compare([read_result(path) for path in find_runs([str(tmp_path)])])
    assert comparison.felt(comparison.groups[1]) == {}


def test_the_table_has_its_column_only_where_it_says_something(tmp_path):
    felt_run(tmp_path / "a", [2, 1, 1.5, 1])
    felt_run(tmp_path / "b", [2, 1, 1, 1], cycle__restart="none")
    both = compare([read_result(path) for path in find_runs([str(tmp_path)])])
    alone = compare([read_result(tmp_path / "a")])
    assert "restart loss" in table.titles(both)
    assert "1.50" in table.rows(both)[1]
    assert "same steps" in table.legend(both)
    assert "restart loss" not in table.titles(alone)
