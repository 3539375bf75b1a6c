"""Room that a dead actor has taken is given back; a living one keeps its own."""

from __future__ import annotations

from typing import Any

from pipeline.orphans import remove_orphaned_groups


def test_the_group_of_a_dead_maker_is_removed_and_no_other(ray_cluster: None) -> None:
    import ray
    from ray.util import placement_group_table

    @ray.remote(num_cpus=0)
    class Maker:
        def make(self) -> Any:
            from ray.util.placement_group import placement_group

            group = placement_group([{"CPU": 1}])
            ray.get(group.ready())
            return group.id.hex()

    makers = [Maker.remote() for _ in range(2)]  # type: ignore[attr-defined]
    living, orphan = ray.get([maker.make.remote() for maker in makers])
    assert remove_orphaned_groups() == 0
    ray.kill(makers[1])
    while remove_orphaned_groups() == 0:
        pass  # Ray has not noticed yet
    table = placement_group_table()
    assert (table[living]["state"], table[orphan]["state"]) == ("CREATED", "REMOVED")
    assert remove_orphaned_groups() == 0
    ray.kill(makers[0])
    while remove_orphaned_groups() == 0:
        pass
