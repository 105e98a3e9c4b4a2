"""Retrieval and pipelines behind a web page or a server."""
