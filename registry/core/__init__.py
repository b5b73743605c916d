"""Modules that every room uses: errors, paths, digests, files of text, terminal, TOML, signatures."""
