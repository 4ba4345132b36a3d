"""What a run asks of its cluster."""

import contextlib

import pytest
from ray.data.checkpoint import CheckpointConfig

from pipelines import cluster
from schemas import RaySettings, StageSettings, UsageError


@pytest.fixture
def asked(monkeypatch):
    """Demands that were made, and taken back; no Ray is started."""
    found = []
    monkeypatch.setattr(cluster, "placement_group", lambda bundles: found.append(bundles) or "group")
    monkeypatch.setattr(cluster, "remove_placement_group", found.append)
    for name in ("init", "shutdown"):
        monkeypatch.setattr(cluster.ray, name, lambda **_: None)
    there = {"CPU": 64.0, "GPU": 3.0, "memory": 8.0 * 2**30}
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: there)
    nodes = [{"Alive": True, "Resources": {"CPU": 32.0, "GPU": 2.0, "memory": 8.0 * 2**30}}]
    nodes += [{"Alive": True, "Resources": {"CPU": 32.0, "GPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    return found


POOLS = (StageSettings(gpus=1, actors=2), StageSettings(actors=1, gpus=0.5))


def test_an_autoscaler_sees_what_the_pools_take_until_it_is_there(asked):
    with cluster.connected(RaySettings(address="head:6379"), POOLS):
        bundles, taken_back = asked
        assert bundles.count({"CPU": 1.0, "GPU": 1.0}) == 2
        assert bundles.count({"CPU": 1.0, "GPU": 0.5}) == 1
        assert bundles.count({"CPU": 1.0}) == cluster.ENGINE_CPUS
        assert taken_back == "group"  # else it would hold what the pools are to have


def test_memory_is_asked_for_and_an_actor_that_takes_nothing_is_not(asked):
    with cluster.connected(RaySettings(address="head:6379"), (StageSettings(cpus=0), StageSettings(memory_gib=2))):
        assert {} not in asked[0]
        assert {"CPU": 1.0, "memory": 2 * 2**30} in asked[0]


def test_pools_that_work_one_after_the_other_need_no_more_than_the_larger(asked):
    """Preparing and training on the same three GPUs."""
    turns = (StageSettings(gpus=1, actors=2),), (StageSettings(gpus=1, actors=3),)
    with cluster.connected(RaySettings(address="head:6379", wait_s=0), *turns):
        assert [bundles.count({"CPU": 1.0, "GPU": 1.0}) for bundles in asked[::2]] == [2, 3]
    with (
        pytest.raises(cluster.RunFailed),
        cluster.connected(RaySettings(address="head:6379", wait_s=0), sum(turns, ())),
    ):
        pass


@pytest.mark.parametrize(
    ("stage", "most", "sizes"),
    [
        ({"actors": 3}, None, (3, 3)),
        ({"actors": 3}, 2, (2, 2)),
        ({"actors": 2, "max_actors": 5}, None, (2, 5)),
        ({"actors": 2, "max_actors": 5}, 4, (2, 4)),
        ({"actors": 2, "max_actors": 5}, 1, (1, 1)),
    ],
)
def test_a_pool_is_as_large_as_its_stage_says_and_no_larger_than_its_work(stage, most, sizes):
    asked = cluster.pool(StageSettings(gpus=0.5, memory_gib=2, **stage), most)
    assert (asked["compute"].min_size, asked["compute"].max_size) == sizes
    assert (asked["num_cpus"], asked["num_gpus"], asked["memory"]) == (1, 0.5, 2 * 2**30)


def test_what_is_still_lacking_after_the_wait_is_said_and_asked_for_no_more(asked):
    with (
        pytest.raises(cluster.RunFailed, match=r"lacks 5 GPUs \(needs 8, has 3\)"),
        cluster.connected(RaySettings(address="head:6379", wait_s=0.2), (StageSettings(gpus=1, actors=8),)),
    ):
        raise AssertionError("it began")
    assert asked[-1] == "group"


@pytest.mark.parametrize(
    ("stage", "lacking"),
    [
        ({"cpus": 48}, "a node with 48 CPUs for an actor"),
        ({"gpus": 2, "cpus": 40}, "a node with 40 CPUs, 2 GPUs for an actor"),
        ({"gpus": 2, "memory_gib": 8}, None),
    ],
)
def test_an_actor_that_fits_no_node_is_said(asked, stage, lacking):
    told = pytest.raises(cluster.RunFailed, match=f"lacks {lacking}") if lacking else contextlib.nullcontext()
    with told, cluster.connected(RaySettings(address="head:6379", wait_s=0), (StageSettings(**stage),)):
        pass


def test_a_ray_of_its_own_needs_no_autoscaler(asked, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with cluster.connected(RaySettings(), POOLS):
        assert asked == []


@pytest.mark.parametrize(
    ("address", "there"), [(None, 2), ("head:6379", 64)], ids=["own: told of more than there is", "cluster"]
)
def test_cpus_are_those_that_are_really_there(asked, monkeypatch, address, there):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 2)
    assert cluster.cpus(RaySettings(address=address)) == there


def test_a_step_does_not_take_over_the_checkpoint_of_the_one_before(tmp_path):
    context = cluster.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(id_column="sample_id", checkpoint_path=str(tmp_path))
    assert cluster.quiet_data().checkpoint_config is None


CLUSTER = RaySettings(address="head:6379")


@pytest.mark.parametrize(
    ("settings", "device", "gpus"),
    [(RaySettings(), "cuda", 0.5), (CLUSTER, "cuda", 0.5), (CLUSTER, "auto", 0), (CLUSTER, "cpu", 0)],
)
def test_actors_that_have_gpus_of_their_own_or_want_none_are_fine(settings, device, gpus):
    assert cluster.unreserved(settings, device, {"measure": StageSettings(gpus=gpus)}) is None


def test_actors_on_gpus_that_nobody_reserves_are_told_of_and_refused_on_a_cluster():
    pools = {"encode": StageSettings(), "transfer": StageSettings(gpus=1), "finish": StageSettings()}
    words = "--device cuda, but encode.gpus=0 and finish.gpus=0: Ray reserves no GPU"
    assert cluster.unreserved(RaySettings(), "cuda", pools).startswith(f"note: {words}")
    with pytest.raises(UsageError, match=words):
        cluster.unreserved(CLUSTER, "cuda", pools)
