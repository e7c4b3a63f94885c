"""TF_CONFIG: which worker a process is, and what is wrong with the variable."""

import json

import pytest

from gpt_2_simple.distributed.tf_config import (
    ClusterSpec,
    read_tf_config,
    split_address,
    tf_config,
)

TWO = {"worker": ["a:1", "b:2"]}


def read(cluster, task=None):
    config = {"cluster": cluster} if task is None else {"cluster": cluster, "task": task}
    return read_tf_config({"TF_CONFIG": json.dumps(config)})


def worker(index):
    return {"type": "worker", "index": index}


@pytest.mark.parametrize("text", ["", " ", "{}", '{"task": {"type": "worker", "index": 0}}'])
def test_without_a_cluster_there_are_no_workers(text):
    assert read_tf_config({}) is None
    assert read_tf_config({"TF_CONFIG": text}) is None


def test_cluster_of_one_process_is_none():
    assert read({"chief": ["a:1"]}, {"type": "chief", "index": 0}) is None
    assert read({"worker": ["a:1"], "ps": ["b:1"]}, worker(0)) is None


def test_workers_are_numbered_as_listed():
    assert read(TWO, worker(0)) == ClusterSpec(("a:1", "b:2"), 0)
    spec = read(TWO, {"type": "worker", "index": "1"})  # some set the index as a text
    assert spec == ClusterSpec(("a:1", "b:2"), 1)
    assert (spec.address, spec.count, spec.name(0)) == ("b:2", 2, "worker 0 (a:1)")


@pytest.mark.parametrize("chief", ["chief", "master"])
def test_chief_is_worker_0(chief):
    cluster = {"worker": {"0": "b:2", "1": "c:3"}, chief: ["a:1"]}
    assert read(cluster, {"type": chief, "index": 0}) == ClusterSpec(("a:1", "b:2", "c:3"), 0)
    assert read(cluster, worker(1)).index == 2


def test_text_for_a_worker_is_read_back():
    text = tf_config(("a:1", "b:2"), 1)
    assert read_tf_config({"TF_CONFIG": text}) == ClusterSpec(("a:1", "b:2"), 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"TF_CONFIG='\{' cannot be read .*: write it as \{\"cluster\""),
        ("[1]", "cannot be read"),
        ('{"cluster": {"worker": 3}}', "cannot be read"),
        (json.dumps({"cluster": TWO, "task": worker(2)}), "its task, worker 2, is none of"),
        (json.dumps({"cluster": TWO, "task": {"type": "evaluator"}}), "evaluator 0, is none of"),
        (json.dumps({"cluster": {**TWO, "ps": ["c:3"]}, "task": worker(0)}), "parameter servers"),
        (json.dumps({"cluster": {"worker": ["a", "b:2"]}, "task": worker(0)}), "'a' is no address"),
        (json.dumps({"cluster": {"worker": ["a:1", "a:1"]}, "task": worker(0)}), "one address"),
    ],
)
def test_wrong_variable_is_told(text, message):
    with pytest.raises(ValueError, match=message):
        read_tf_config({"TF_CONFIG": text})


def test_address_is_split_into_host_and_port():
    assert split_address("10.0.0.2:2222") == ("10.0.0.2", 2222)
    assert split_address("[::1]:80") == ("::1", 80)
