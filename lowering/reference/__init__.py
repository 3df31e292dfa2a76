"""The ops in plain PyTorch: what every kernel is compared with."""

from .append import append
from .attend import attend
from .calibrate import calibrate
from .pages import decode_pages, encode_pages, page_field

__all__ = ["append", "attend", "calibrate", "decode_pages", "encode_pages", "page_field"]
