"""Task sequences: which samples, classes and input transform each task has."""

from clnp_search.tasks.data import RawData
from clnp_search.tasks.scenarios import SCENARIOS, Scenario, Split, Task, TaskData

__all__ = ["SCENARIOS", "RawData", "Scenario", "Split", "Task", "TaskData"]
