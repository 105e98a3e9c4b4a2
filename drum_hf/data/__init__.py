"""Tables of demonstrations: checked rows, content ids, leak guards, and reading the user's own files."""

from .files import load_table
from .triplets import MAX_PIXELS, TripletTable, check_leaks

__all__ = ["MAX_PIXELS", "TripletTable", "check_leaks", "load_table"]
