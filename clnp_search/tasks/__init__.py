"""Task sequences: which samples, classes and input transform each task has."""

from clnp_search.tasks.data import RawData
from clnp_search.tasks.own import OwnTask
from clnp_search.tasks.scenarios import SCENARIOS, Kind, Scenario, Split, Task, TaskData, Wanted, kind_of

__all__ = ["SCENARIOS", "Kind", "OwnTask", "RawData", "Scenario", "Split", "Task", "TaskData", "Wanted", "kind_of"]
