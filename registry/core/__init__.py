"""What every room needs: errors, paths, digests, terminal, TOML, signatures."""
