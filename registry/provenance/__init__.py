"""Provenance: licences, SBOMs, attestations."""
