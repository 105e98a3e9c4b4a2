"""Tables of demonstrations: checked rows, content ids, leak guards, own files, and public data sets by name."""

from ..utils.images import MAX_PIXELS, load_image
from .check import TableReport, check_table
from .sources import SOURCES, Source, SourcePart, find_source, load_triplets
from .table import TripletTable, check_leaks, find_twins, load_table

__all__ = [
    "MAX_PIXELS",
    "SOURCES",
    "Source",
    "SourcePart",
    "TableReport",
    "TripletTable",
    "check_leaks",
    "find_twins",
    "check_table",
    "find_source",
    "load_image",
    "load_table",
    "load_triplets",
]
