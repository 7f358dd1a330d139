"""Artifacts from base weights and an adapter, in one streaming pass; `export.export` is the way in."""
