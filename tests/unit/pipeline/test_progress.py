"""Adding up the seconds of stages."""

from pipeline.progress import Event, StageClock


def test_seconds_go_to_the_stage_that_was_on() -> None:
    now = 0.0
    heard: list[Event] = []
    clock = StageClock(heard.append, clock=lambda: now)
    events = [Event(stage) for stage in ("start", "train", "train", "draw", "train", "stop")]
    for event in events:
        clock(event)
        now += 2.0
    assert clock.seconds == {"start": 2.0, "train": 6.0, "draw": 2.0, "stop": 0.0}
    assert heard == events
