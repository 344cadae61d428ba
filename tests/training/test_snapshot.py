"""Copies of training's state: equal, apart, with the tensors' ties among each other."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from s3rec_dist.training.snapshot import HostCopies


def make_tree() -> dict[str, Any]:
    flat = torch.arange(12, dtype=torch.float32)
    module = OrderedDict(weight=flat[2:8].view(2, 3).t(), bias=flat[8:], empty=torch.empty(0, 3))
    module._metadata = {"version": 1}  # type: ignore[attr-defined]
    adam = {0: {"step": torch.tensor(3.0), "exp_avg": torch.nn.Parameter(torch.rand(4).bfloat16())}}
    return {"module": module, "optimizer": [adam, (torch.tensor([True, False]), None)], "settings": {"a": [1]}}


def test_a_copy_is_equal_and_does_not_change_with_what_it_was_taken_from() -> None:
    tree = make_tree()
    taken = HostCopies().of(tree)
    moment = tree["optimizer"][0][0]["exp_avg"].detach().clone()
    with torch.no_grad():
        tree["optimizer"][0][0]["exp_avg"].zero_()
        tree["module"]["bias"].zero_()
    tree["settings"]["a"].append(2)
    assert torch.equal(taken["optimizer"][0][0]["exp_avg"], moment)
    assert taken["module"]["weight"].tolist() == [[2, 5], [3, 6], [4, 7]] and taken["module"]["bias"].tolist() == [
        8,
        9,
        10,
        11,
    ]
    assert taken["module"]["empty"].shape == (0, 3) and taken["module"]._metadata == {"version": 1}
    assert taken["optimizer"][1][0].tolist() == [True, False] and taken["optimizer"][1][1] is None
    assert taken["settings"] == {"a": [1]}


def test_tensors_that_share_memory_share_its_copy() -> None:
    module = HostCopies().of(make_tree())["module"]
    assert module["weight"].untyped_storage().data_ptr() == module["bias"].untyped_storage().data_ptr()


def test_memory_is_used_again_where_sizes_are_the_same() -> None:
    copies, tree = HostCopies(), make_tree()
    places = [copies.of(tree)["module"]["weight"].data_ptr() for _ in range(3)]
    assert len(set(places)) == 1
    tree["module"]["weight"] = torch.rand(7, 7)
    assert torch.equal(copies.of(tree)["module"]["weight"], tree["module"]["weight"])
    assert torch.equal(copies.of({"one": tree["module"]["weight"]})["one"], tree["module"]["weight"])
