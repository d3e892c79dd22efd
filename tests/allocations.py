"""The memory that a call takes of torch's CPU allocator, as the profiler sees it."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocations_of(function: Callable[[], object]) -> list[int]:
    """List the bytes that a call takes, and below zero gives back, in their order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
