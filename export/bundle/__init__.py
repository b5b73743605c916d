"""Bundles: a verified artifact with everything that serves it.

`layout` lists what a bundle holds and checks one, `write` makes one, `vendor` finds the modules and packages it needs,
and `host/` holds the templates of the files that start and monitor the server.
"""
