"""A sweep file as frozen, validated objects.

Torch is imported where it is needed, so that a faulty file is refused at once and Ray starts without waiting for it.
"""

from clnp_search.config.reading import (
    FORKED_SECTIONS,
    load_sweep,
    network_state,
    overridden,
    parse_sweep,
    planned_with,
    sweep_at,
    sweep_of,
)
from clnp_search.config.sections import (
    AUTO_MARGINS,
    AugmentConfig,
    ForgettingConfig,
    ModuleConfig,
    ResourcesConfig,
    SearchConfig,
    TrackingConfig,
)
from clnp_search.config.sweep import Sweep
from clnp_search.config.values import AlphaValue, alpha_parts

__all__ = [
    "AUTO_MARGINS",
    "FORKED_SECTIONS",
    "AlphaValue",
    "AugmentConfig",
    "ForgettingConfig",
    "ModuleConfig",
    "ResourcesConfig",
    "SearchConfig",
    "Sweep",
    "TrackingConfig",
    "alpha_parts",
    "load_sweep",
    "network_state",
    "overridden",
    "parse_sweep",
    "planned_with",
    "sweep_at",
    "sweep_of",
]
