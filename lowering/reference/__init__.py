"""The ops in plain PyTorch: what every kernel is compared with."""

from .append import append
from .attend import attend, attend_first
from .calibrate import begin_calibration, calibrate
from .retain import retain

__all__ = ["append", "attend", "attend_first", "begin_calibration", "calibrate", "retain"]
