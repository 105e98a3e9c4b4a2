"""Helpers that every room uses: safe files, the Hub, optional packages, run manifests."""
