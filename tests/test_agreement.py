"""Ranks agree on code, settings and data before they train; each has a GPU of its own, and one fetches the data."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from support import small_net
from torch import distributed

from repan_cli import config
from repan_cli.data import streaming
from repan_cli.errors import InputError, LostRankError, lost_rank
from repan_cli.session import agreement
from repan_cli.system import ranks
from repan_cli.training import step


def met_by_all(store, count):
    """Let so many ranks meet at once; returns the key that each sees the first rank's word under."""
    found = {}

    def come(rank):
        part = ranks._met(store, rank, count)
        if rank == 0:
            part.set("word", "here")
        part.wait(["word"])
        found[rank] = part.get("word").decode()

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(count)]
    for thread in reversed(threads):
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_ranks_meet_again_and_again_in_a_store_that_keeps_what_lost_ones_left():
    store = distributed.HashStore()
    for count in (3, 3, 2, 3):
        assert met_by_all(store, count) == dict.fromkeys(range(count), "here")
        store.set("repan/came/1", "left by one that was killed")


def test_a_rank_that_does_not_come_is_one_line(monkeypatch):
    monkeypatch.setattr(ranks, "START_LIMIT", ranks.timedelta(seconds=0.2))
    with pytest.raises(LostRankError, match="not all 2 ranks came within"):
        ranks._met(distributed.HashStore(), 0, 2)


def test_a_difference_is_refused_with_its_rank_and_its_name(monkeypatch):
    monkeypatch.setattr(ranks, "joined", lambda: True)
    monkeypatch.setattr(ranks, "gathered", lambda text: [text, text, text.replace("2,000", "1,999")])
    ranks.agree({"classes": "ten"}, "mend it")
    with pytest.raises(InputError, match="ranks differ in images: 1,999 on rank 2, 2,000 on rank 0; mend it"):
        ranks.agree({"classes": "ten", "images": "2,000"}, "mend it")


def facts_of(monkeypatch, compare, *arguments):
    """Return all that a rank would compare."""
    found = {}
    monkeypatch.setattr(agreement, "joined", lambda: True)
    monkeypatch.setattr(agreement, "agree", lambda facts, mend: found.update(facts))
    compare(*arguments)
    return found


def differing(monkeypatch, compare, one, other):
    first, second = (facts_of(monkeypatch, compare, *given) for given in (one, other))
    return [name for name in {**first, **second} if first.get(name) != second.get(name)]


def test_other_images_labels_and_classes_are_seen(monkeypatch, digits):
    def seen(other):
        return differing(monkeypatch, agreement.agree_on_images, (digits,), (other,))

    train = digits.train
    labels, images = train.labels.copy(), train.images.copy()
    labels[3] = (labels[3] + 1) % 10
    images[7, 0, 0] ^= 1
    fewer = train.take(np.arange(len(train.labels)) > 0)
    assert seen(digits) == []
    assert seen(dataclasses.replace(digits, train=train._replace(labels=labels))) == ["the training labels"]
    assert seen(dataclasses.replace(digits, train=train._replace(images=images))) == ["the training pixels"]
    assert "the training images" in seen(dataclasses.replace(digits, train=fewer))
    assert seen(dataclasses.replace(digits, classes=digits.classes[::-1])) == ["the classes"]


def test_other_weights_are_seen(monkeypatch):
    one, other = small_net(), small_net()
    assert differing(monkeypatch, agreement.agree_on_network, (one, "net"), (other, "net")) == []
    with torch.no_grad():
        next(other.parameters()).flatten()[0] += 1e-6
    assert len(differing(monkeypatch, agreement.agree_on_network, (one, "net"), (other, "net"))) == 1


@pytest.mark.parametrize(
    ("device", "gpus", "local", "says"),
    [
        ("cuda:0", 2, 0, "would put all 2 ranks on one GPU: give --device cuda"),
        ("cuda", 1, 1, "2 ranks on this machine, but PyTorch sees 1 GPU: give torchrun --nproc-per-node 1"),
        ("auto", 1, 1, "2 ranks on this machine, but PyTorch sees 1 GPU"),
    ],
)
def test_every_rank_has_a_gpu_of_its_own(monkeypatch, device, gpus, local, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in (("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2), ("LOCAL_RANK", local)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=says):
        ranks.join_ranks(device)
    assert ranks.own_gpu("cpu") is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.own_gpu("auto") == torch.device("cuda", local)


def test_the_group_knows_its_gpu(monkeypatch):
    given = {}
    monkeypatch.setattr(ranks, "own_gpu", lambda device: torch.device("cuda", 1))
    monkeypatch.setattr(ranks, "_launcher_store", lambda: None)
    monkeypatch.setattr(ranks, "_met", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **words: given.update(words, on=backend))
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.join_ranks("cuda") == (1, 2)
    assert (given["device_id"], given["on"]) == (torch.device("cuda", 1), "cpu:gloo,cuda:nccl")


def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(streaming, "usable_cores", lambda: 12)
    gpu = torch.device("cuda")
    assert streaming.default_workers(gpu) == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert streaming.default_workers(gpu) == 3


def test_the_first_rank_of_each_machine_fetches_before_the_others(monkeypatch):
    order = []
    monkeypatch.setattr(ranks, "joined", lambda: True)
    for rank in (0, 1, 2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)

        def gathered(text, limit=None, rank=rank):
            order.extend([f"{rank} waits"] if limit else [])
            return ["", "", ""] if limit else ["a", "b", "a"]

        monkeypatch.setattr(ranks, "gathered", gathered)
        ranks.first_on_each_machine(lambda rank=rank: order.append(f"{rank} reads") or "data")
    assert order == ["0 reads", "0 waits", "1 reads", "1 waits", "2 waits", "2 reads"]


def test_a_rank_that_cannot_read_its_data_ends_those_that_wait_for_it(monkeypatch):
    """They waited for a day, since other machines do not notice that it has ended."""
    store, own, found = distributed.HashStore(), threading.local(), {}
    monkeypatch.setattr(ranks, "joined", lambda: True)
    monkeypatch.setattr(ranks._Ours, "store", store)
    monkeypatch.setattr(ranks, "platform", type("Each", (), {"node": lambda: f"machine-{own.rank}"}))
    monkeypatch.setattr(distributed, "get_rank", lambda: own.rank)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks._Ours, "meetings", type("Each", (), {"__next__": lambda _: next(own.meetings)})())

    def come(rank):
        own.rank, own.meetings = rank, iter(range(9))

        def read():
            if rank == 1:
                raise InputError("no folder photos")
            return "data"

        try:
            found[rank] = ranks.first_on_each_machine(read)
        except (InputError, LostRankError) as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=come, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {1: "no folder photos", 0: "rank 1 on machine-1 has ended: no folder photos"}


def test_ranks_that_share_a_batch_unevenly_take_no_whole_batch_for_a_ragged_one():
    class Run:
        batch_size = 128

    for rank, images in enumerate(torch.arange(128).tensor_split(3)):
        run = Run()
        run.runtime = type("Machine", (), {"rank": rank, "ranks": 3})
        run.called = type("Compiled", (), {"_orig_mod": "inner"})()
        batch = type("Batch", (), {"images": images})
        assert step._called(run, batch) is run.called
        batch.images = images[1:]
        assert step._called(run, batch) == "inner"


def test_a_lost_rank_is_told_from_a_fault_of_the_program():
    assert lost_rank(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert not lost_rank(RuntimeError("shapes do not match"))


def test_files_may_have_other_places_on_each_machine(monkeypatch):
    """Their contents are compared."""
    places = dict.fromkeys(("data.root", "data.class_order", "teacher.name", "baseline.teacher.name"), "/here")
    settings = {"data.name": "folder", "model.name": "repvgg_a0_cifar", **places}
    found = facts_of(monkeypatch, agreement.agree_on_settings, config.build(settings))
    assert "setting data.name" in found
    assert "/here" not in found.values()
