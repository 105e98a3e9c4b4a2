"""Tables of demonstrations: checked rows, content ids, leak guards, own files, and public data sets by name."""

from .check import TableReport, check_table
from .sources import SOURCES, Source, SourcePart, find_source, load_triplets
from .table import MAX_PIXELS, TripletTable, check_leaks, find_twins, load_table

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
    "load_table",
    "load_triplets",
]
