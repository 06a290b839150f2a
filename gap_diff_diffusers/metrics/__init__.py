"""What is measured: the generated pictures, and what protection costs."""

from ..registry import Registry

METRICS = Registry(
    "metric",
    {
        "brisque": f"{__name__}.quality:Brisque",
        "identity": f"{__name__}.identity:DlibIdentity",
        "identity_arcface": f"{__name__}.identity:ArcFaceIdentity",
        "identity_sface": f"{__name__}.identity:OpenCVIdentity",
        "ser_fiq": f"{__name__}.quality:SerFiq",
    },
)
"""Measurements of generated pictures: classes of `metrics.base.Metric`."""

OFFLINE = ("brisque", "identity", "ser_fiq")
"""Those that need nothing but the extra `metrics`."""
