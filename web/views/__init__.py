"""The data of the pages, for their templates."""
