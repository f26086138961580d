"""A Ray cluster of two nodes on this machine: both run trials, and a node that dies costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from test_launch import Watch, go, grid_of

from harness.errors import InputError
from harness.launch.cluster import RayLauncher
from harness.launch.local import LocalLauncher
from harness.record import Record
from harness.results.store import Store
from harness.runner.execution import Policy
from harness.spec.trial import TrialSpec

Small = Callable[..., TrialSpec]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # A dead node is known after a second and a half, not after twenty.
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 2, "include_dashboard": False, "_system_config": quick}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=2)
    made.wait_for_nodes()
    yield made
    made.shutdown()


def losses(store: Store) -> dict[tuple[str, int], float]:
    labels = {row["trial_id"]: row["label"] for row in store.read("trials").to_pylist()}
    return {(labels[step["trial_id"]], step["step"]): step["loss"] for step in store.read("steps").to_pylist()}


class Axe(Watch):
    """Fells a node after so many trials."""

    def __init__(self, after: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.after, self.act = after, act

    def finished(self, record: Record) -> None:
        self.after -= 1
        if self.after == 0:
            self.act()

    def child_display(self) -> Axe:
        return self


@pytest.mark.long
def test_what_a_cluster_lacks_is_named(cluster: Any) -> None:
    for options, message in (
        ({"device": "cuda"}, "no node of the cluster has a card"),
        ({"device": "cpu", "processes": (1, 3)}, "num_processes 3: a trial has 2 cores here; give --cpus 3 or more"),
        ({"device": "cpu", "accelerator": "H100"}, "no node of the cluster has an H100; --accelerator takes Ray's"),
        ({"device": "cpu", "cpus": 1000}, "no node of the cluster has 1000 cores; give fewer with --cpus"),
    ):
        with pytest.raises(InputError, match=message), RayLauncher(cluster.address, **options):
            pass
    for address, message in (("127.0.0.1:1", "refused"), ("nowhere", "it is none; give host:port, or auto")):
        with pytest.raises(InputError, match=f"--address {address}: .*{message}.*ray start --head"):
            RayLauncher(address).__enter__()


@pytest.mark.parametrize(
    ("node", "options", "workers", "message"),
    [
        ({"CPU": 8, "GPU": 2}, {"processes": (1, 2)}, 2, None),
        ({"CPU": 8, "GPU": 2}, {"processes": (2,)}, 1, None),
        (
            {"CPU": 8, "GPU": 2},
            {"processes": (1, 3)},
            0,
            "num_processes 3: no node of the cluster has 12 cores and 3 ca",
        ),
        ({"CPU": 8, "GPU": 2}, {"processes": (2,), "cpus": 8}, 0, "has 16 cores and 2 cards; give fewer with --cpus"),
        (
            {"CPU": 4, "GPU": 8},
            {"processes": (8,)},
            0,
            "num_processes 8: no node of the cluster has 8 cores and 8 cards",
        ),
    ],
)
def test_cards_and_cores_of_a_trial_over_several_processes(
    monkeypatch: pytest.MonkeyPatch, node: dict[str, float], options: dict[str, Any], workers: int, message: str | None
) -> None:
    """On nodes with cards, which are made up; nothing is started."""
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "NodeID": "a", "Resources": node}])
    monkeypatch.setattr(RayLauncher, "_ask_environments", lambda self, nodes: ())
    launcher = RayLauncher(device="cuda", **options)
    if message is not None:
        with pytest.raises(InputError, match=message), launcher:
            pass
        return
    with launcher:
        assert launcher.workers == workers
        taken = launcher._resources(2)
        assert (taken["num_cpus"], taken["num_gpus"]) == (8, 2), "a card and its share of the cores for each"


@pytest.mark.long
@pytest.mark.timeout(900)  # Ray's processes start four times slower beside another worker on two cores
def test_a_node_dies_and_nothing_is_lost(small: Small, tmp_path: Path, cluster: Any) -> None:
    """Three trials on two nodes, of which one is killed amid them: all rows, once, with the losses of local."""
    same = {"train_samples": 12, "device": "cpu"}
    grid = grid_of(
        pair=small(num_processes=2, sharding="full_shard", **same),
        **{f"t{seed}": small(seed=seed, **same) for seed in range(2)},
    )
    store, local = Store(tmp_path / "ray"), Store(tmp_path / "local")
    second = next(iter(cluster.worker_nodes))
    with RayLauncher(cluster.address, device="cpu", processes=(1, 2)) as launcher:
        assert (launcher.workers, len(launcher.environments("cpu"))) == (2, 1), "two nodes of one kind"
        axe = Axe(1, lambda: cluster.remove_node(second, allow_graceful=False))
        summary = go(grid, store, launcher, axe, policy=Policy(retries=3))
        assert go(grid, store, launcher).records == ()
    assert len(summary.records) == 3
    assert {record.status for record in summary.records} == {"ok"}
    assert all(record.node for record in summary.records)
    assert len(store.start_times()) == 3
    with LocalLauncher() as started:
        go(grid, local, started)
    assert losses(store) == losses(local)
