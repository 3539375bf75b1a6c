"""Placement groups that nobody uses any more: found and removed.

Ray keeps the placement group of an actor that died for as long as its job lives. Ray Train has a
cleaner for them, which learns of a group once its workers have started: a controller that dies
before that leaves room taken for good.
"""

from __future__ import annotations


def remove_orphaned_groups() -> int:
    """Remove the placement groups of this job whose makers have died; returns how many.

    The process is connected to Ray, whose public table of groups does not tell their makers.
    """
    import ray
    from ray import PlacementGroupID
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    table = state._connect_and_get_accessor().get_placement_group_table()
    groups = [PlacementGroupTableData.FromString(row) for row in table]
    orphans = [
        group
        for group in groups
        if group.creator_job_id.hex() == job
        and group.creator_actor_dead
        and not group.is_detached
        and group.state != PlacementGroupTableData.REMOVED
    ]
    for group in orphans:
        remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
    return len(orphans)
