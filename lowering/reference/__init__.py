"""The ops in plain PyTorch: what every kernel is compared with."""

from .append import append
from .attend import attend
from .calibrate import begin_calibration, calibrate
from .retain import retain

__all__ = ["append", "attend", "begin_calibration", "calibrate", "retain"]
