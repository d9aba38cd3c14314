"""Every speed that repan promises, measured in one process: cases take turns, and ratios of medians are what counts.

    python tests/benchmark/suite.py                    all that this machine can do, within ten minutes
    python tests/benchmark/suite.py --only step,fuse   some of it
    python tests/benchmark/suite.py --quick            a dry run of everything on tiny inputs; its figures mean nothing

Runs from a checkout, without installation. Prints JSON with the device, the versions and two measured ceilings (a large
matrix product, a large copy); a table goes to stderr.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from repan_cli import (
    config,
    export,
    models,
    runs,
)
from repan_cli.data.batches import Augmentation
from repan_cli.data.in_memory import InMemoryLoader
from repan_cli.data.types import ArrayImages
from repan_cli.display.console import Display
from repan_cli.session.build import prepare
from repan_cli.session.recorder import Record
from repan_cli.system.device import (
    Runtime,
    describe_machine,
    find_device,
    find_precision,
    peak_memory,
)
from repan_cli.system.host import processor
from repan_cli.system.timing import Timing, interleaved, wait
from repan_cli.training import optim
from repan_cli.training.cuda_graphs import WARM_UPS, CudaRecorder, Graphs
from repan_cli.training.events import Epoch, StepEnd
from repan_cli.training.loop import fit
from repan_cli.training.plan import Phase
from repan_cli.training.progress import Totals
from repan_cli.training.run import Training
from repan_cli.training.step import update
from repan_cli.training.tasks import Classification, Distillation, Task
from repan_cli.training.teacher import LogitCache, Teacher, View

STUDENT, TEACHER, CLASSES, SIDE = "repvgg_a1_cifar", "resnet101_cifar", 100, 32
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
VIEW = View(SIDE, MEAN, STD)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What the measurements share. `seconds` are for each case; `quick` shrinks everything."""

    device: torch.device
    seconds: float
    quick: bool

    @property
    def batch(self) -> int:
        return 16 if self.quick else 128

    @property
    def calls(self) -> int:
        """Of a case each time it has its turn: the first finds what another one has left in the processor's caches."""
        return 1 if self.quick else 4

    @property
    def images(self) -> int:
        """Of a training set: as many as CIFAR has, and fewer where nothing depends on their number."""
        return 200 if self.quick else 50_000 if self.device.type == "cuda" else 5_000

    @property
    def best(self) -> str:
        """The precision that `run.precision=auto` means here."""
        return find_precision("auto", self.device)

    def machine(self, precision: str, *, channels_last: bool = True) -> Runtime:
        return Runtime(self.device, precision, channels_last)

    def time(self, cases: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        return interleaved(cases, seconds=self.seconds, least=5, device=self.device)

    def rates(self, cases: dict[str, Callable[[], object]], images: int) -> dict[str, dict[str, float]]:
        """Images a second of each case, whose call takes so many, and how many times those of the first it makes."""
        turns = {name: (lambda case=case: [case() for _ in range(self.calls)]) for name, case in cases.items()}
        timings = self.time(turns)
        speeds = {name: images * self.calls / timing.median for name, timing in timings.items()}
        first = next(iter(speeds.values()))
        return {
            name: {
                "images_per_second": round(speeds[name], 1),
                "quartiles": [round(images * self.calls / each, 1) for each in (timing.high, timing.low)],
                "ratio": round(speeds[name] / first, 3),
                "windows": timing.windows,
            }
            for name, timing in timings.items()
        }


# ---------------------------------------------------------------------------------------------- what is trained


def student() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(STUDENT, num_classes=CLASSES)


def source(bench: Bench, machine: Runtime) -> InMemoryLoader:
    """Random images with CIFAR's views: crops with padding 4 and flips."""
    draw = np.random.default_rng(0)
    part = ArrayImages(
        draw.integers(0, 256, (bench.images, SIDE, SIDE, 3), dtype=np.uint8), draw.integers(0, CLASSES, bench.images)
    )
    place = {"device": machine.device, "memory_format": machine.memory_format}
    return InMemoryLoader(part, mean=MEAN, std=STD, augmentation=Augmentation(padding=4, flip=True), **place)


def training(
    bench: Bench, machine: Runtime, task: Task, *, graph: bool = False, compiled: bool = False, epochs: int = 1
) -> Training:
    """A run with the settings of recipes/cifar, but for the learning rate: noise is to be learned by nobody."""
    model = student().to(machine.device, memory_format=machine.memory_format)
    settings = config.OptimConfig(lr=1e-3)
    data = source(bench, machine)
    return Training(
        model=model,
        task_of=lambda phase: task,
        optimizer=optim.build_optimizer(model, settings),
        plan=(Phase(0, epochs, settings, None, 0, epochs),),
        train=data,
        val=None,
        test=data,
        runtime=machine,
        batch_size=bench.batch,
        log_every=10**9,
        wrapped=torch.compile(model, dynamic=False) if compiled else None,
        graphs=Graphs(CudaRecorder(machine.device)) if graph else None,
    )


def stepper(run: Training) -> Callable[[], object]:
    """One update after the other on whole batches, epoch after epoch."""
    run.model.train()
    run.progress.totals = Totals.zeros(run.runtime.device)
    task = run.task_of(run.plan[0])

    def batches() -> Iterator[Any]:
        for epoch in range(1, 10**9):
            for batch in task.prepared(run.train.training_batches(run.batch_size, 0, 0, epoch)):
                if len(batch.images) == run.batch_size:
                    yield batch

    coming = batches()
    return lambda: update(run, run.plan[0], task, [next(coming)], 0.0)


def plain_loop(bench: Bench) -> Callable[[], object]:
    """What one would write without repan: float32, NCHW, eager, on the same images and views."""
    data = source(bench, bench.machine("fp32", channels_last=False))
    model = student().to(bench.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def batches() -> Iterator[Any]:
        for epoch in range(1, 10**9):
            yield from data.training_batches(bench.batch, 0, 0, epoch)

    coming = batches()

    def step() -> None:
        images, labels, *_ = next(coming)
        while len(images) < bench.batch:
            images, labels, *_ = next(coming)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()

    return step


def tiers(bench: Bench) -> dict[str, dict[str, Any]]:
    """The ways of a step, from the plain loop's arithmetic to all that the device can do."""
    found = {"float32, channels last": {"precision": "fp32"}, bench.best: {"precision": bench.best}}
    if bench.device.type == "cuda":
        found |= {f"{bench.best}, graph": {"precision": bench.best, "graph": True}}
        found |= {f"{bench.best}, graph, compiled": {"precision": bench.best, "graph": True, "compiled": True}}
    return found


def network(name: str) -> nn.Module:
    """A merged teacher with fresh weights."""
    model = timm.create_model(name, num_classes=CLASSES)
    return export.fuse(model, torch.randn(2, 3, SIDE, SIDE))[0]


def full_cache(bench: Bench, data: InMemoryLoader) -> LogitCache:
    """A cache that knows every view: steps take as long whatever its logits are."""
    table = torch.randn((data.count, data.view_count, CLASSES), dtype=torch.float16, device=bench.device)
    cache = LogitCache(lambda batch: None, lambda: table)
    cache.filled[:] = True
    cache.compared = True
    return cache


# ---------------------------------------------------------------------------------------------- the measurements


def ceilings(bench: Bench) -> dict[str, Any]:
    """A large matrix product in float32 and the best precision, in TFLOP/s, and a large copy, in GB/s."""
    side, count = (256, 2**16) if bench.quick else (8192, 2**28) if bench.device.type == "cuda" else (2048, 2**26)
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    pairs = {name: torch.randn(side, side, device=bench.device).to(kind) for name, kind in kinds.items()}
    given, taken = (torch.ones(count, device=bench.device) for _ in range(2))
    cases = {name: lambda matrix=matrix: matrix @ matrix for name, matrix in pairs.items()}
    timings = bench.time({**cases, "copy": lambda: taken.copy_(given)})
    found = {f"matmul {name} TFLOP/s": round(2 * side**3 / timings[name].median / 1e12, 3) for name in pairs}
    return {**found, "copy GB/s": round(8 * count / timings["copy"].median / 1e9, 1)}


def step(bench: Bench) -> dict[str, Any]:
    """A step of the student: the plain loop against repan's tiers."""
    cases = {"plain loop (float32, NCHW, eager)": plain_loop(bench)}
    for name, kind in tiers(bench).items():
        kind = dict(kind)
        run = training(bench, bench.machine(kind.pop("precision")), Classification(), **kind)
        cases[name] = stepper(run)
    return bench.rates(cases, bench.batch)


def counts(bench: Bench) -> dict[str, Any]:
    """Of a step of the student: what it launches, and the time that it takes the host.

    On a GPU the kernels of a replayed recording, and why there is none (`refused`); else the operators that are
    dispatched.
    """
    graph = bench.device.type == "cuda"
    run = training(bench, bench.machine(bench.best), Classification(), graph=graph)
    one = stepper(run)
    for _ in range(WARM_UPS + 2):
        one()
    wait(bench.device)
    if graph:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            one()
            wait(bench.device)
        launched = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    else:
        with Operators() as operators:
            one()
        launched = operators.count
    host = []
    for _ in range(3 if bench.quick else 50):
        began = time.perf_counter()
        one()
        host.append(time.perf_counter() - began)
        wait(bench.device)
    refused = run.graphs.refused if run.graphs else None
    return {"launched": launched, "host_microseconds": round(1e6 * sorted(host)[len(host) // 2]), "refused": refused}


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched meanwhile, views and memory included."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def distill(bench: Bench) -> dict[str, Any]:
    """A step of distillation: a live ResNet-101 in float32 and as repan runs it, and the cache of its logits."""
    found, teacher = {}, network(TEACHER)
    kinds = {"live, float32": "fp32", f"live, {bench.best}": bench.best, "cached": bench.best}
    for name, precision in kinds.items():
        machine = bench.machine(precision)
        placed = copy.deepcopy(teacher).to(machine.device, memory_format=machine.memory_format)
        live = Teacher(placed, own=VIEW, student=VIEW, runtime=machine)
        knows = full_cache(bench, source(bench, machine)) if name == "cached" else live
        task = Distillation(Classification(), knows, alpha=0.5, temperature=4.0)
        graph = bench.device.type == "cuda" and precision == bench.best
        found[name] = stepper(training(bench, machine, task, graph=graph))
    return bench.rates(found, bench.batch)


def teacher(bench: Bench) -> dict[str, Any]:
    """Logits a second of a ResNet-101 with its BN folded."""
    count = 8 if bench.quick else 1000 if bench.device.type == "cuda" else 100
    merged, cases = network(TEACHER), {}
    for precision in dict.fromkeys(("fp32", bench.best)):
        machine = bench.machine(precision)
        placed = copy.deepcopy(merged).to(machine.device, memory_format=machine.memory_format)
        asked = Teacher(placed, own=VIEW, student=VIEW, runtime=machine)
        images = torch.randn(count, 3, SIDE, SIDE, device=bench.device).contiguous(memory_format=machine.memory_format)
        cases[precision] = lambda asked=asked, images=images: asked.logits(images)
    return bench.rates(cases, count)


def loader(bench: Bench) -> dict[str, Any]:
    """Batches of CIFAR's views, normalised; on a CPU with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = source(bench, bench.machine("fp32"))
    position = iter(range(1, 10**9))
    found = bench.rates({"views": lambda: list(data.training_batches(bench.batch, 0, 0, next(position)))}, data.count)
    torch.set_num_threads(threads)
    return found


@torch.no_grad()
def inference(bench: Bench) -> dict[str, Any]:
    """The fused student against the multi-branch one, in float32."""
    multi = student().eval()
    fused, _ = export.fuse(multi, torch.randn(2, 3, SIDE, SIDE))
    forms = {"multi-branch": multi, "fused": fused}
    placed = {name: form.to(bench.device, memory_format=torch.channels_last) for name, form in forms.items()}
    found = {}
    for count in (1, 4) if bench.quick else (1, 128):
        images = torch.randn(count, 3, SIDE, SIDE, device=bench.device).contiguous(memory_format=torch.channels_last)
        cases = {name: lambda form=form, images=images: form(images) for name, form in placed.items()}
        found |= {f"{name}, batch {count}": row for name, row in bench.rates(cases, count).items()}
    return found


def fuse(bench: Bench) -> dict[str, Any]:
    """Merging ResNet-18 with Diverse Branch Blocks, with its proof."""
    model = models.create("resnet18" if not bench.quick else "resnet18_cifar", num_classes=1000, in_chans=3)
    side = 32 if bench.quick else 224
    images = torch.randn(8, 3, side, side)
    models.expand(model, "dbb", images=images[:2], attach="one")
    seconds = []
    for _ in range(1 if bench.quick else 5):
        began = time.perf_counter()
        _, report = export.fuse(model, images)
        seconds.append(time.perf_counter() - began)
    return {"seconds": round(sorted(seconds)[len(seconds) // 2], 3), "rel_error_fp64": report.rel_error_fp64}


def start(bench: Bench) -> dict[str, Any]:
    """`repan --help`, the whole process."""
    seconds = []
    for _ in range(1 if bench.quick else 7):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "repan_cli", "--help"], cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    return {"seconds": round(sorted(seconds)[len(seconds) // 2], 3)}


def epoch(bench: Bench) -> dict[str, Any]:
    """Whole epochs of the loop, with the ragged last batch: plain and with a cached teacher."""
    found, graph, epochs = {}, bench.device.type == "cuda", 2 if bench.device.type == "cpu" else 8
    for name in ("alone", "with a cached teacher"):
        machine = bench.machine(bench.best)
        task: Task = Classification()
        if name != "alone":
            task = Distillation(task, full_cache(bench, source(bench, machine)), alpha=0.5, temperature=4.0)
        run = training(bench, machine, task, graph=graph, epochs=epochs)
        seconds, began, memory = [], time.perf_counter(), []
        for event in fit(run):
            if isinstance(event, Epoch):
                wait(bench.device)
                seconds.append(time.perf_counter() - began)
                memory.append(peak_memory(bench.device))
                began = time.perf_counter()
        settled = sorted(seconds[epochs // 2 :])
        found[name] = {
            "seconds_an_epoch": round(settled[len(settled) // 2], 4),
            "images": run.train.count,
            "first_epoch_seconds": round(seconds[0], 3),
            "peak_MiB": round(memory[-1] / 2**20),
            "peak_MiB_growth_after_half": round((memory[-1] - memory[epochs // 2 - 1]) / 2**20, 1),
            "recordings": run.graphs.recorded if run.graphs else None,
        }
    return found


def overhead(bench: Bench) -> dict[str, Any]:
    """Of the time of a real run, what its record (metrics, checkpoints) and its display take, in per cent."""
    with tempfile.TemporaryDirectory() as place:
        given = {"data.name": "synthetic", "model.name": STUDENT, "epochs": "3", "run.out": f"{place}/run"}
        given |= {"run.device": str(bench.device), "optim.lr": "0.001"}
        given |= {"model.name": "repvgg_a0_cifar", "epochs": "1", "data.batch_size": "1000"} if bench.quick else {}
        session = prepare("train", config.resolve("train", None, given))
        spent = {"record": 0.0, "display": 0.0}
        with runs.RunDirectory(Path(place) / "run") as folder:
            folder.write_text("config.yaml", config.dump(session.config, cycles=False))
            epochs = {phase.cycle: phase.epochs for phase in session.training.plan}
            display = Display(epochs=epochs, steps=session.training.train.steps(session.config.data.batch_size))
            record, began, steps = Record(session, folder), time.perf_counter(), 0
            record.open()
            with display:
                for event in fit(session.training):
                    for name, take in (("record", record.take), ("display", display.show)):
                        at = time.perf_counter()
                        take(event)
                        spent[name] += time.perf_counter() - at
                    steps += isinstance(event, StepEnd)
            whole = time.perf_counter() - began
            record.close()
            display.close()
    shares = {f"{name} %": round(100 * seconds / whole, 3) for name, seconds in spent.items()}
    return {**shares, "seconds": round(whole, 2), "steps": steps}


def losses(bench: Bench) -> dict[str, Any]:
    """The relative difference of a tier's loss from the plain float32 one's, on the first batch, and the largest over
    eight steps, in which rounding grows; and why a recording was refused, if one was.
    """
    found: dict[str, list[float]] = {}
    refused: dict[str, str | None] = {}
    for name, kind in {"plain": {"precision": "fp32", "channels_last": False}, **tiers(bench)}.items():
        kind = dict(kind)
        machine = bench.machine(kind.pop("precision"), channels_last=kind.pop("channels_last", True))
        run = training(bench, machine, Classification(), **kind)
        one, seen = stepper(run), []
        for _ in range(8):
            before = run.progress.totals.loss.item()
            one()
            seen.append((run.progress.totals.loss.item() - before) / bench.batch)
        found[name] = seen
        refused[name] = run.graphs.refused if run.graphs else None
    plain = found.pop("plain")
    return {
        name: {
            "first step": abs(seen[0] - plain[0]) / plain[0],
            "eight steps": max(abs(a - b) / b for a, b in zip(seen, plain, strict=True)),
            "refused": refused[name],
        }
        for name, seen in found.items()
    }


MEASUREMENTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    each.__name__: each
    for each in (ceilings, losses, step, counts, distill, teacher, loader, inference, fuse, start, epoch, overhead)
}


# ---------------------------------------------------------------------------------------------- against the targets


def targets(found: dict[str, Any], bench: Bench) -> list[tuple[str, float, str, float]]:
    """What is promised, what was measured, at least or at most, how much."""
    cuda, best, rows = bench.device.type == "cuda", bench.best, []
    small, large = (1, 4) if bench.quick else (1, 128)
    if "step" in found and not cuda:
        rows += [("student step against the plain loop", found["step"][best]["ratio"], ">=", 2.0)]
    if "counts" in found and cuda:
        rows += [("kernels of a recorded step", found["counts"]["launched"], "<=", 500)]
        rows += [("host time of a step, microseconds", found["counts"]["host_microseconds"], "<=", 150)]
    if "distill" in found and not cuda:
        rows += [("distillation with the cache against a live teacher", found["distill"]["cached"]["ratio"], ">=", 15)]
    if "teacher" in found and cuda:
        rows += [("teacher's logits a second", found["teacher"][best]["images_per_second"], ">=", 62_000)]
    if "loader" in found and not cuda:
        rows += [("loader, images a second on one core", found["loader"]["views"]["images_per_second"], ">=", 30_000)]
    if "inference" in found and not cuda:
        rows += [("fused against multi-branch, batch 1", found["inference"][f"fused, batch {small}"]["ratio"], ">=", 2)]
        rows += [("the same, batch 128", found["inference"][f"fused, batch {large}"]["ratio"], ">=", 1.7)]
    if "fuse" in found:
        rows += [("fuse of ResNet-18 + DBB, seconds", found["fuse"]["seconds"], "<=", 2.0)]
    if "start" in found:
        rows += [("repan --help, seconds", found["start"]["seconds"], "<=", 0.3)]
    if "epoch" in found and cuda:
        rows += [
            (f"epoch {name}, seconds", row["seconds_an_epoch"], "<=", 0.32) for name, row in found["epoch"].items()
        ]
    if "overhead" in found:
        share = found["overhead"]["record %"] + found["overhead"]["display %"]
        rows += [("record and display, % of a run", round(share, 3), "<=", 2.0)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case (4)")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), help=f"some of {','.join(MEASUREMENTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny inputs: shows that everything runs")
    words = parser.parse_args()
    if unknown := set(words.only.split(",")) - set(MEASUREMENTS):
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(MEASUREMENTS)}")
    bench = Bench(find_device(words.device), 0.0 if words.quick else words.seconds, words.quick)
    machine = describe_machine(bench.machine(bench.best))
    result: dict[str, Any] = {**machine, "processor": processor(), **runs.software(), "quick": words.quick}
    began = time.perf_counter()
    for name in words.only.split(","):
        at = time.perf_counter()
        result[name] = MEASUREMENTS[name](bench)
        print(f"{name}: {time.perf_counter() - at:.0f} s", json.dumps(result[name]), file=sys.stderr, flush=True)
    rows = targets(result, bench)
    result["targets"] = [
        {
            "work": work,
            "measured": value,
            "target": f"{sign} {limit}",
            "met": value >= limit if sign == ">=" else value <= limit,
        }
        for work, value, sign, limit in rows
    ]
    result["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(result))
    for row in result["targets"]:
        met = "met" if row["met"] else "NOT met"
        print(f"{row['work']:52} {row['measured']:>10g}  {row['target']:>10}  {met}", file=sys.stderr)


if __name__ == "__main__":
    main()
