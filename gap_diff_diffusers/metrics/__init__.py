"""What is measured: the generated pictures, and what protection costs."""

from ..registry import Registry

METRICS = Registry(
    "metric",
    {
        "brisque": f"{__name__}.quality:Brisque",
        "identity": f"{__name__}.identity:DlibIdentity",
    },
)
"""Measurements of generated pictures: classes of `metrics.base.Metric`."""
